"""No data but what a test provides, and the real ones where they are at hand."""

import os
from pathlib import Path

import pytest

REAL = os.environ.get("BILEVEL_DATA")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """No data but what a test provides: an empty cache, no $BILEVEL_DATA."""
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def real_data():
    if not REAL:
        pytest.skip("set BILEVEL_DATA to a folder with MNIST/raw and omniglot-py")
    return Path(REAL)
