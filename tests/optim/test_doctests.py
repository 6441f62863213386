"""The examples in the docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import optim

MODULES = ["optim", *(f"optim.{m.name}" for m in pkgutil.iter_modules(optim.__path__))]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_optimizer_has_an_example():
    classes = [c for c in vars(optim).values() if hasattr(c, "state_dict")]
    assert len(classes) == 15
    for c in classes:
        assert ">>> " in c.__doc__ and "Reference" in c.__doc__, c
