"""E-steps of several mixtures at once: each as if alone, about any reference point, and one pass over rows for all."""

import math
from collections import Counter

import pytest
import torch
from oracles import assert_near, random_layer, random_mixture

from tgmm_nn import GaussianMixture, fitting
from tgmm_nn.assignment import HARD, SOFT, Assignment
from tgmm_nn.expectation import expectation, expectations
from tgmm_nn.monomials import Monomials

# The form follows from these: products for all mixtures, rows whitened by each, and blocks of features for each.
FORMS = {
    "moments in float64": {"dtype": torch.float32, "d": 2},
    "moments in the rows' dtype": {"dtype": torch.float64, "d": 2, "moments": True},
    "whitened": {"dtype": torch.float64, "d": 2},
    "blocks": {"dtype": torch.float64, "d": 130},
    "blocks of moments": {"dtype": torch.float64, "d": 130, "moments": True},
}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture
def problem(family, form, generator):
    """Return four mixtures, their structure, rows that are not all finite, and options of that form."""
    options = dict(FORMS[form])
    dtype, d = options.pop("dtype"), options.pop("d")
    mixtures = [random_mixture(family, generator, 3, d, dtype=dtype) for _ in range(4)]
    x = 2 * torch.randn(60, d, generator=generator, dtype=dtype)
    x[7, 0], x[8, 1] = torch.nan, torch.inf
    return [mixture.parameters for mixture in mixtures], mixtures[0].covariance, x, options


def tolerance(x):
    return 1e-5 if x.dtype == torch.float32 else 1e-11


@pytest.mark.parametrize("chunk_size", [None, 17])
@pytest.mark.parametrize(
    "assignment", [SOFT, HARD, Assignment(temperature=2.0, offset=torch.tensor([0.0, 1.0, -1.0]))], ids=repr
)
def test_each_of_several_mixtures_has_the_sums_that_it_has_alone(problem, assignment, chunk_size, generator):
    mixtures, covariance, x, options = problem
    weight = torch.rand(60, generator=generator, dtype=x.dtype)
    log_prior = torch.randn(60, 3, generator=generator, dtype=x.dtype)
    log_prior[3:9, 1], log_prior[20] = -torch.inf, -torch.inf
    options |= {"assignment": assignment, "chunk_size": chunk_size}
    origin = torch.full((x.shape[1],), 0.25, dtype=x.dtype)
    together = expectations(x, mixtures, covariance, weight, log_prior, origin=origin, **options)
    for sums, parameters in zip(together, mixtures, strict=True):
        alone = expectation(x, parameters, covariance, weight, log_prior, **options)
        assert sums.skipped == alone.skipped == 3
        assert_near(sums.about(alone.origin).sums(), alone.sums(), tolerance(x))


def test_sums_about_another_reference_point_are_the_same_sums(problem):
    """The point is that of the moments; a float32 number, from which float32 rows have exact differences."""
    mixtures, covariance, x, options = problem
    origin = torch.full((x.shape[1],), -1.5, dtype=x.dtype)
    for parameters in mixtures:
        [given] = expectations(x, [parameters], covariance, origin=origin, **options)
        own = expectation(x, parameters, covariance, **options)
        assert_near(given.about(own.origin).sums(), own.sums(), tolerance(x))
        if given.origin.ndim == 1:  # not each component's own mean
            assert_near(given.origin, origin.to(given.origin))


def test_a_fit_sums_moments_about_the_mean_of_its_rows(family, generator):
    x = torch.randn(90, 2, generator=generator) + 30 * torch.eye(3, 2).repeat(30, 1)
    prior = {"mean_prior": -100.0, "mean_precision_prior": 50.0}  # the mixture's own mean is far off
    gmm = GaussianMixture(3, 2, family, random_state=0, max_iter=500, **prior).fit(x)
    running = gmm.running_statistics()
    assert_near(running.origin.float(), x.double().mean(0).float().expand(3, 2), 1e-5)
    assert_near(running.first.sum(0), torch.zeros(2).double(), 1e-6)  # of one row's weight, about that mean


def test_mixtures_of_one_pass_go_each_by_their_own_form(family, generator):
    """By moments where their rounding allows it, which is then told, and precisely where it does not."""
    x = torch.randn(500, 2, generator=generator)
    gmm = random_layer(family, generator, dtype=torch.float32)
    data, found = gmm._survey(x, None, sync=False)
    mixtures, roundings = [random_mixture(family, generator).parameters for _ in range(4)], [1e-6, math.inf, 1e-5, 1.0]
    together = fitting.expect(mixtures, roundings, data, found, gmm._em_options())
    assert [one.rounding for one in together] == [1e-6, 0.0, 1e-5, 0.0]
    for one, parameters, rounding in zip(together, mixtures, roundings, strict=True):
        [alone] = fitting.expect([parameters], [rounding], data, found, gmm._em_options())
        assert one.sums.origin.shape == alone.sums.origin.shape
        assert one.objective == pytest.approx(alone.objective, rel=1e-6)
        assert_near(one.sums.sums(), alone.sums.sums(), 1e-4 if one.rounding else 1e-9)


def passes(monkeypatch, **options):
    """Return how many chunks of rows a fit of 300 rows forms moments of, and its numbers of mixtures by E-step."""
    formed, sizes = Counter(), Counter()
    call, each = Monomials.__call__, fitting.expectations

    def counted(self, rows):
        formed[len(rows)] += 1
        return call(self, rows)

    def noted(rows, mixtures, *args, **how):
        sizes[len(mixtures)] += 1
        return each(rows, mixtures, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Monomials, "__call__", counted)
        patch.setattr(fitting, "expectations", noted)
        x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        gmm = GaussianMixture(4, 2, tol=1e-9, max_iter=10, init_means="random", random_state=0, **options)
        with pytest.warns(UserWarning, match="EM did not converge"):
            gmm.fit(x)
    return formed, sizes


def test_starts_share_what_is_formed_of_the_rows(monkeypatch):
    """Eight starts make eleven E-steps together, which is all that they may; the one that is left makes its own."""
    formed, sizes = passes(monkeypatch, n_init=8)
    assert formed == {300: 11 + 11}
    assert sizes == {8: 11, 1: 11}
