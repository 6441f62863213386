"""Every test starts from the same generators."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20240229)
