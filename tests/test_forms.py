"""The rule by which an E-step takes a form, and the rounding that it goes by, against sums in float64."""

import itertools
from functools import partial

import pytest
import torch
from oracles import assert_near, dense, random_mixture

from tgmm_nn import GaussianMixture, functional
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.expectation import blockwise_statistics, expectation, moment_statistics, whitened_statistics
from tgmm_nn.forms import conditioning, moment_rounding, rows_of_blocks, rows_of_moments, rows_per_chunk
from tgmm_nn.functional import Parameters
from tgmm_nn.maximization import maximize
from tgmm_nn.statistics import hard_statistics

EPS = torch.finfo(torch.float32).eps


def test_conditioning_is_the_squared_range_in_standard_deviations_of_the_component(family, generator):
    """Its oracle whitens rows of independent features, every combination of signs: their mean squares."""
    mixture = random_mixture(family, generator, n_features=3)
    scale = torch.tensor([[1.0, 2.0, 0.5], [3.0, 1.0, 1.0], [0.1, 0.2, 9.0]]).double()
    factor = torch.linalg.inv(torch.linalg.cholesky(dense(mixture.covariances, 3)))  # the precision's, transposed
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3))).double()
    squares = (factor[:, None] @ (signs * scale[:, None])[..., None]).square().squeeze(-1).mean(1)
    expected = (squares.amax(-1) * squares.sum(-1)).sqrt().max()
    assert_near(conditioning(scale.square(), mixture.parameters.factor, mixture.covariance), expected)


def test_conditioning_takes_factors_that_do_not_fit_into_a_cache_one_by_one(family, generator, monkeypatch):
    mixture, squares = random_mixture(family, generator), torch.rand(3, 2, generator=generator).double()
    expected = conditioning(squares, mixture.parameters.factor, mixture.covariance)
    monkeypatch.setattr("tgmm_nn.triangular.CACHED", 1)
    assert_near(conditioning(squares, mixture.parameters.factor, mixture.covariance), expected)


def test_rounding_grows_with_the_root_of_the_rows_that_are_added_up_in_float32(family, generator):
    mixture, squares = random_mixture(family, generator), torch.rand(3, 2, generator=generator).double()
    b = conditioning(squares, mixture.parameters.factor, mixture.covariance)
    size = rows_of_moments(mixture.parameters.means, mixture.covariance, torch.float32)
    for n_rows, chunk_size, rows in ((9, None, 9), (900, None, 900), (900, 100, 100), (10**9, None, size)):
        got = moment_rounding(squares, mixture.parameters, mixture.covariance, torch.float32, n_rows, chunk_size)
        assert_near(got, EPS * b * rows**0.5 / 3)


def test_chunks_are_whole_lines_of_a_cache_and_sums_by_blocks_of_few_rows(family):
    covariance = COVARIANCES[family]
    for n_components, n_features in ((1, 1), (3, 17), (50, 64), (7, 90), (1000, 500)):
        means = torch.zeros(n_components, n_features)
        rows = rows_of_moments(means, covariance, torch.float32)
        assert rows % 16 == 0
        assert rows >= 256
        assert rows_per_chunk(means.numel(), 8) % 16 == 0
        assert rows_of_blocks(means, torch.float32, moments=True) <= max(1024, 2 * n_features)
        assert rows_of_blocks(means, torch.float32, moments=False) >= 2 * n_features


KINDS = ("far apart", "far along one feature", "of unlike scales", "of correlated features", "of high condition")


def narrow_rows(kind, n_features, n_rows, rare, generator):
    """Draw two clusters which are a challenge to moments; of the second every tenth row, or every hundredth."""
    x = torch.randn(n_rows, n_features, generator=generator, dtype=torch.float64)
    far, labels = torch.zeros(2, n_features, dtype=torch.float64), (torch.arange(n_rows) % rare == 0).long()
    if kind == "far apart":
        far[1] = 100.0 / n_features**0.5
    elif kind == "far along one feature":
        far[1, 0] = 30.0
    elif kind == "of unlike scales":
        x = x * torch.logspace(-3, 3, n_features).double()
    elif kind == "of correlated features":
        x = 0.05 * x + torch.randn(n_rows, 1, generator=generator, dtype=torch.float64)
    elif kind == "of high condition":
        axes = torch.linalg.qr(torch.randn(n_features, n_features, generator=generator, dtype=torch.float64))[0]
        x = (x * torch.logspace(0, -1.5, n_features).double()) @ axes.mT
    return (x + far[labels]).float(), labels


def fitted(x, labels, covariance):
    """Return an M-step at the clusters themselves."""
    n_features = x.shape[-1]
    fresh = Parameters(torch.full((2,), 0.5).double(), torch.zeros(2, n_features).double(), torch.empty(0))
    fresh = fresh._replace(factor=covariance.identity(2, n_features).double())
    return maximize(hard_statistics(x, labels, fresh.means, covariance), fresh, covariance)


def change(got, oracle, covariance, n_features):
    """Return the largest relative change of a variance in any direction."""
    whitened = dense(covariance.root(got.factor), n_features).mT @ dense(oracle.factor, n_features)
    moved = whitened.mT @ whitened - torch.eye(n_features).double()
    return float(torch.linalg.matrix_norm(moved, 2).max())


@pytest.mark.parametrize(("n_features", "rare"), [(1, 2), (2, 100), (16, 100), (70, 20), (150, 2)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_moments_move_a_covariance_by_about_what_their_rounding_says(kind, rare, n_features, family, generator):
    covariance = COVARIANCES[family]
    x, labels = narrow_rows(kind, n_features, max(4_000, 2 * rare * n_features), rare, generator)
    wide = x.double()
    parameters = fitted(wide, labels, covariance)
    oracle = maximize(whitened_statistics(wide, parameters, covariance), parameters, covariance)
    origin = functional.mixture_mean(parameters)
    squares = torch.stack([(wide[labels == k] - origin).square().mean(0) for k in (0, 1)])
    squares = torch.maximum(squares, (wide - origin).square().mean(0))
    off = float(moment_rounding(squares, oracle, covariance, torch.float32, len(x)))
    by_blocks = [partial(blockwise_statistics, moments=True)] * (family == "full")
    for form in [moment_statistics] * (n_features < 150) + by_blocks:
        got = maximize(form(x, parameters, covariance), parameters, covariance)
        assert change(got, oracle, covariance, n_features) < 2 * off + 1e-6


@pytest.mark.filterwarnings("ignore:EM did not converge")
@pytest.mark.parametrize("n_features", [4, 64])
@pytest.mark.parametrize("distance", [3.0, 200.0])
@torch.no_grad()
def test_fit_takes_no_moments_where_one_component_of_few_rows_is_far_away(n_features, distance, family, generator):
    """The range of all rows is small: its own rows are what moments would round away."""
    far, rare = torch.zeros(2, n_features), (torch.arange(20_000) % 200 == 0).long()
    far[1] = distance / n_features**0.5
    x = torch.randn(20_000, n_features, generator=generator) + far[rare]
    start = {"init_means": far, "init_weights": [0.995, 0.005], "init_covariances": 1.0}
    one, other = (
        GaussianMixture(2, n_features, family, **start, max_iter=3, tol=1e-30, reg_covar=1e-3, dtype=dtype).fit(rows)
        for dtype, rows in ((torch.float32, x), (torch.float64, x.double()))
    )
    parameters = [gmm.mixture().to(torch.float64) for gmm in (one, other)]
    assert change(*parameters, COVARIANCES[family], n_features) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("n_components", [3, 40])
def test_an_e_step_adds_many_rows_up_in_pieces(n_components, family, monkeypatch):
    """Of equal rows, whose sums MKL would round to the same side each time."""
    monkeypatch.setattr("tgmm_nn.products.prefers_onednn", lambda: False)
    covariance = COVARIANCES[family]
    x = torch.full((20_000, 2), 0.7)
    weights = torch.full((n_components,), 1.0 / n_components)
    means = torch.zeros(n_components, 2)
    means[:, 0] = torch.linspace(-1, 1, n_components)
    parameters = Parameters(weights, means, covariance.identity(n_components, 2))
    sums, oracle = (expectation(rows, parameters, covariance, moments=True) for rows in (x, x.double()))
    for value, expected in zip(sums.sums()[:3], oracle.about(sums.origin).sums()[:3], strict=True):
        torch.testing.assert_close(value, expected, rtol=3e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_formed_in_the_dtype_that_is_asked_for(family, dtype, generator):
    mixture = random_mixture(family, generator)
    x = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    got = moment_statistics(x, mixture.parameters, mixture.covariance, dtype=dtype)
    assert_near(got.sums(), moment_statistics(x, mixture.parameters, mixture.covariance).about(got.origin).sums(), 1e-5)
