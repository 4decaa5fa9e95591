"""Shared fixtures. One thread first of all: forking after several OpenMP threads ran can hang the child."""

import torch

torch.set_num_threads(1)

import pytest

from tgmm_nn import few
from tgmm_nn.covariance import COVARIANCES


@pytest.fixture(params=COVARIANCES)
def family(request):
    """Each of the six covariance types by name."""
    return request.param


@pytest.fixture(params=["few", "many"])
def either_form(request, monkeypatch):
    """Run a test twice: as it is, and by the general forms, which few rows on a CPU take for what is not ordinary."""
    if request.param == "many":
        for limit in ("SCORED", "SUMMED", "ESTIMATED"):
            monkeypatch.setattr(few, limit, 0)


@pytest.fixture
def generator():
    """Own source of randomness of a test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
