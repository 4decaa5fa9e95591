"""Shared fixtures. One thread first of all: forking after several OpenMP threads ran can hang the child."""

import torch

torch.set_num_threads(1)

import pytest

from tgmm_nn.covariance import COVARIANCES


@pytest.fixture(params=COVARIANCES)
def family(request):
    """Each of the six covariance types by name."""
    return request.param


@pytest.fixture
def generator():
    """Own source of randomness of a test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
