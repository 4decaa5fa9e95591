"""Shared fixtures. One thread first of all: forking after several OpenMP threads ran can hang the child."""

import sys
from collections import Counter

import torch

torch.set_num_threads(1)

import pytest

from tgmm_nn import few
from tgmm_nn.covariance import COVARIANCES

COUNTS = pytest.StashKey()


def pytest_collection_modifyitems(items):
    """Let one in eight cases of a test count for coverage: most take the same lines, and tracing them is slow."""
    cases = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        # With this mark pytest-cov stops, and begins to trace anew.
        item.stash[COUNTS] = cases[test] % 8 == 0 or item.get_closest_marker("no_cover") is not None
        cases[test] += 1


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Trace nothing in a case that does not count, except for a debugger."""
    tracer = sys.gettrace()
    if item.stash[COUNTS] or not type(tracer).__module__.startswith("coverage"):
        return (yield)
    sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


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
