"""Mixtures of some of the features: densities divide and integrate as they must, and single components are scipy's."""

import numpy as np
import pytest
import torch
from oracles import assert_near, dense, random_layer, unchanged
from scipy import integrate, stats

from tgmm_nn import GaussianMixture

D = 4


@pytest.fixture
def gmm(family, generator):
    return random_layer(family, generator, n_features=D)


@pytest.fixture
def x(generator):
    return 2 * torch.randn(20, D, generator=generator, dtype=torch.float64)


def matrices_of(gmm):
    return dense(gmm.covariance.internal(gmm.covariances_), gmm.n_features).expand(gmm.n_components, -1, -1).numpy()


@pytest.mark.parametrize(
    "dims", [[0], [2, 0], [-1, 1, 0], [0, 1, 2, 3], 3, (1, 2), np.array([3, 1]), torch.tensor([2])]
)
def test_a_marginal_is_the_sum_of_scipy_marginals(gmm, x, dims):
    marginal = gmm.marginal(dims)
    places = np.atleast_1d(np.asarray(dims)) % D
    rows = x[:, places.tolist()]
    expected = sum(
        w * stats.multivariate_normal(m[places], c[np.ix_(places, places)]).pdf(rows.numpy())
        for w, m, c in zip(gmm.weights_.numpy(), gmm.means_.numpy(), matrices_of(gmm), strict=True)
    )
    assert marginal.n_features == len(places)
    assert_near(marginal(rows), torch.from_numpy(np.atleast_1d(expected)).log(), 1e-12)


def test_a_marginal_integrates_the_other_feature_away(family, generator):
    gmm = random_layer(family, generator, n_features=2)
    at = 0.7

    def density(y):
        return gmm(torch.tensor([at, y]).double()).exp().item()

    whole, _ = integrate.quad(density, -30, 30, points=gmm.means_[:, 1].tolist(), limit=200)
    assert gmm.marginal(0)(torch.tensor([at]).double()).exp().item() == pytest.approx(whole, rel=1e-8)


@pytest.mark.parametrize("dims", [[0], [2, 0], [-1, 1, 0], 3])
def test_a_conditional_is_the_joint_density_over_the_marginal(gmm, x, dims):
    places = [d % D for d in np.atleast_1d(dims).tolist()]
    rest = [d for d in range(D) if d not in places]
    values = x[0, places]
    conditional = gmm.condition(dims, values)
    rows = x.clone()
    rows[:, places] = values
    assert_near(conditional(rows[:, rest]), gmm(rows) - gmm.marginal(dims)(values), 1e-11)
    assert_near(conditional.weights_, gmm.marginal(dims).predict_proba(values), 1e-12)


def test_a_conditional_of_one_component_is_the_textbook_formula(generator):
    gmm = random_layer("full", generator, n_components=1, n_features=D)
    conditional = gmm.condition([1, 3], [0.5, -2.0])
    c, m = matrices_of(gmm)[0], gmm.means_[0].numpy()
    a, b = np.ix_([0, 2], [1, 3]), np.ix_([1, 3], [1, 3])
    regression = c[a] @ np.linalg.inv(c[b])
    assert_near(conditional.means_[0], torch.from_numpy(m[[0, 2]] + regression @ ([0.5, -2.0] - m[[1, 3]])), 1e-12)
    assert_near(conditional.covariances_[0], torch.from_numpy(c[np.ix_([0, 2], [0, 2])] - regression @ c[a].T), 1e-12)


def test_to_condition_twice_is_to_condition_on_both(gmm, x):
    both = gmm.condition([0, 2], x[0, [0, 2]])
    one_by_one = gmm.condition(0, x[0, 0]).condition(1, x[0, 2])
    assert_near(tuple(one_by_one.mixture()), tuple(both.mixture()), 1e-11)


def test_the_new_layer_keeps_family_dtype_and_options_that_fit(gmm, family):
    options = {"reg_covar": 0.1, "n_init": 3, "init_means": "kpp", "cem": True, "random_state": 4, "chunk_size": 9}
    priors = {"mean_prior": [1.0] * D, "mean_precision_prior": 1.0, "init_covariances": 2.0}
    other = GaussianMixture(3, D, family, **options, **priors)
    other.set_parameters(gmm.weights_, gmm.means_, gmm.covariances_)
    for new in (other.marginal([0, 1]), other.condition([2, 3], [0.0, 0.0])):
        assert new.covariance_type == family
        assert new.means_.dtype == torch.float32
        assert new.fitted_
        assert {name: getattr(new, name) for name in options} == options
        assert (new.mean_prior, new.init_covariances) == (None, "empirical")
        new.em_step(torch.randn(30, 2))


def test_a_weight_of_zero_stays_zero(generator):
    gmm = random_layer("full", generator)
    gmm.set_parameters([0.0, 0.5, 0.5], gmm.means_, gmm.covariances_)
    assert gmm.marginal(0).weights_[0] == gmm.condition(0, 0.0).weights_[0] == 0


def test_far_away_the_nearest_component_takes_all_weight(gmm):
    conditional = gmm.condition(0, 1e6)
    assert_near(conditional.weights_.sum(), torch.ones(()).double())
    assert torch.isfinite(conditional.means_).all()


@pytest.mark.parametrize(
    ("dims", "error", "message"),
    [
        ([], ValueError, r"`dims` to name at least one feature, and each once, but got \[\]"),
        ([1, 1], ValueError, r"`dims` to name at least one feature, and each once, but got \[1, 1\]"),
        ([1, -3], ValueError, r"`dims` to name at least one feature, and each once, but got \[1, -3\]"),
        ([4], ValueError, "`dims` to be at most 3, but got 4"),
        ([-5], ValueError, "`dims` to be at least -4, but got -5"),
        ([0.5], TypeError, "`dims` to be an integer, but got 0.5"),
        ([True, False], TypeError, "`dims` to be an integer, but got True"),
        (None, TypeError, "`dims` to be an integer or several, but got None"),
        ("01", TypeError, "`dims` to be an integer or several, but got '01'"),
    ],
)
@pytest.mark.parametrize("method", ["marginal", "condition"])
def test_bad_dims_raise(method, dims, error, message, generator):
    gmm = random_layer("full", generator, n_features=D)
    with unchanged(gmm), pytest.raises(error, match=message):
        getattr(gmm, method)(dims, *([0.0] if method == "condition" else []))


@pytest.mark.parametrize(
    ("dims", "values", "error", "message"),
    [
        ([0, 1, 2, 3], [0.0] * 4, ValueError, "`dims` to leave a feature, but got all 4"),
        ([0, 1], [0.0], ValueError, r"`values` of shape \(2,\), but got \(1,\)"),
        ([0], [[0.0]], ValueError, r"`values` of shape \(1,\) or a number, but got \(1, 1\)"),
        ([0], [float("nan")], ValueError, "`values` to be finite, but it holds nan or infinity"),
        ([0], "a", TypeError, "`values` to be a tensor, array, list or number"),
        ([0], 1e200, ValueError, "`values` at which the mixture has a density, but they are too far from every mean"),
    ],
)
def test_bad_values_raise(dims, values, error, message, generator):
    gmm = random_layer("full", generator, n_features=D)
    with unchanged(gmm), pytest.raises(error, match=message):
        gmm.condition(dims, values)
