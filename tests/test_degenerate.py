"""Data with nothing to estimate from: parameters stay finite and weights valid, or one error says why not."""

import warnings

import pytest
import torch
from oracles import unchanged

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.maximization import maximize_watched
from tgmm_nn.statistics import Parameters, statistics_of

DATA = {
    "identical points": lambda g: (torch.full((20, 2), 0.3), 3),
    "as many rows as components": lambda g: (torch.randn(3, 2, generator=g), 3),
    "a constant feature": lambda g: (torch.cat([torch.randn(40, 1, generator=g), torch.ones(40, 1)], 1), 3),
    "constant features": lambda g: (torch.cat([torch.randn(40, 1, generator=g), torch.zeros(40, 3)], 1), 3),
    "collinear features": lambda g: (torch.randn(40, 1, generator=g) * torch.tensor([1.0, -2.0, 0.5]), 3),
    "duplicated rows": lambda g: (torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 1.0]]).repeat(10, 1), 3),
    "fewer distinct rows than components": lambda g: (torch.tensor([[0.0, 0.0], [1.0, 2.0]]).repeat(10, 1), 4),
    "one feature": lambda g: (torch.randn(40, 1, generator=g), 3),
    "one component": lambda g: (torch.randn(40, 2, generator=g), 1),
    "one row": lambda g: (torch.randn(1, 2, generator=g), 1),
    "more features than rows": lambda g: (torch.randn(6, 20, generator=g), 2),
    "an outlier at 1e6": lambda g: (torch.cat([torch.randn(40, 2, generator=g), torch.full((1, 2), 1e6)]), 3),
    "tiny numbers": lambda g: (1e-12 * torch.randn(40, 2, generator=g), 3),
    "large numbers": lambda g: (1e12 * torch.randn(40, 2, generator=g), 3),
    "far from zero": lambda g: (torch.randn(40, 2, generator=g) + 1e6, 3),
    "binary": lambda g: (torch.randint(2, (40, 5), generator=g).float(), 3),
    "more components than clusters": lambda g: (torch.randn(30, 2, generator=g), 12),
}


def assert_valid(gmm, x):
    for name, buffer in gmm.named_buffers():
        if name not in ("lower_bound", "objective"):
            assert torch.isfinite(buffer).all(), name
    assert (gmm.weights_ >= 0).all()
    assert gmm.weights_.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(gmm.covariances_).all()
    assert torch.isfinite(gmm(x)).all()
    assert torch.isfinite(gmm.predict_proba(x)).all()


@pytest.fixture(params=DATA)
def data(request, generator):
    return DATA[request.param](generator)


@pytest.mark.parametrize("options", [{}, {"reg_covar": 0.0}, {"reg_covar": 1e-3, "reg_covar_relative": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fit_leaves_the_layer_valid(family, dtype, options, data):
    x, n_components = data
    gmm = GaussianMixture(n_components, x.shape[1], family, dtype=dtype, random_state=0, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "EM did not converge|The means of .* are rounded|The rows of .* lie in a plane|EM left out"
        )
        gmm.fit(x.to(dtype))
    assert_valid(gmm, x.to(dtype))
    assert gmm.lower_bound_ == gmm.lower_bound_  # not nan
    gmm.em_step(x.to(dtype), step_size=0.5)
    assert_valid(gmm, x.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"cem": True},
        {"init_means": "kpp", "init_weights": "kmeans", "init_covariances": "global"},
        {"init_means": "random", "init_covariances": "eye", "n_init": 2},
        {"weight_concentration_prior": 0.5},
        {"covariance_prior": 0.1, "degrees_of_freedom_prior": 30.0, "mean_prior": 0.0, "mean_precision_prior": 0.1},
        {"mean_prior": 0.0, "mean_precision_prior": 0.1, "reg_covar": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_so_do_other_ways_of_fitting(family, options, data):
    x, n_components = data
    gmm = GaussianMixture(n_components, x.shape[1], family, random_state=0, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "EM did not converge|The means of .* are rounded|The rows of .* lie in a plane|EM left out"
        )
        gmm.fit(x)
    assert_valid(gmm, x)
    for _ in range(3):
        gmm.em_step(x)
    assert_valid(gmm, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_variance_that_vanishes_in_the_dtype_of_the_rows_is_lifted(family, dtype):
    """Rounding leaves one of 1e-47 of a constant feature, or none, as the processor has it."""
    covariance, variances = COVARIANCES[family], torch.tensor([1.0, 1e-47], dtype=torch.float64)
    element = {(): variances[1], (2,): variances, (2, 2): torch.diag(variances)}[covariance.shape(2)]
    elements = element.expand(covariance.leading(3), *element.shape)
    assert covariance.is_positive(elements, dtype).tolist() == [dtype == torch.float64] * len(elements)
    weights, means = torch.full((3,), 1 / 3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    current = Parameters(weights, means, covariance.identity(3, 2, means))
    new, singular = maximize_watched(statistics_of(weights, means, elements, covariance), current, covariance, dtype)
    assert singular == (dtype == torch.float32)
    if singular and element.ndim:
        assert covariance.variances(covariance.square(covariance.root(new.factor))).amin() > 1e-7
    else:
        torch.testing.assert_close(
            covariance.square(new.factor), covariance.square(covariance.root(elements.sqrt())), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_component_stays_and_the_others_live_on(family, dtype, generator):
    x = torch.randn(50, 2, generator=generator, dtype=dtype)
    gmm = GaussianMixture(3, 2, family, dtype=dtype)
    shape = gmm.covariances_
    gmm.set_parameters([0.5, 0.0, 0.5], [[-1.0, 0.0], [1e6, 1e6], [1.0, 0.0]], shape)
    for _ in range(10):
        gmm.em_step(x)
        assert_valid(gmm, x)
    assert gmm.weights_[1] == 0
    assert gmm.means_[1].tolist() == [1e6, 1e6]


def test_an_outlier_does_not_spoil_the_rest(family, generator):
    """It takes a component of its own; in a family with one covariance each the others are those of the clean rows."""
    x = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    dirty = torch.cat([x, torch.full((1, 2), 1e6).double()])
    gmm = GaussianMixture(2, 2, family, dtype=torch.float64, random_state=0).fit(dirty)
    bulk = gmm.means_[:, 0].argmin()
    assert gmm.weights_[bulk].item() == pytest.approx(200 / 201, rel=1e-6)
    torch.testing.assert_close(gmm.means_[bulk], x.mean(0), rtol=0, atol=1e-6)


def test_rows_of_which_none_has_weight_are_one_error(family):
    gmm = GaussianMixture(2, 2, family)
    with (
        unchanged(gmm),
        pytest.raises(ValueError, match="with at least n_components=2 rows of positive weight, but got 0"),
    ):
        gmm.fit(torch.randn(5, 2), sample_weight=torch.zeros(5))


def test_an_objective_that_is_no_number_is_one_error(monkeypatch, generator):
    """A fit that ends outside of what can be represented must not be written."""
    from tgmm_nn import learning

    fit_from = learning.fit_from
    monkeypatch.setattr(
        learning, "fit_from", lambda *args: (fit := fit_from(*args))._replace(history=[*fit.history, float("nan")])
    )
    gmm = GaussianMixture(2, 2)
    with (
        unchanged(gmm),
        pytest.raises(ValueError, match="`x` to lead EM to a finite mixture, but the objective ended as nan"),
    ):
        gmm.fit(torch.randn(20, 2, generator=generator))
