"""Mixtures from scikit-learn and for it: the same log-density both ways, and criteria to choose among mixtures."""

import math

import numpy as np
import pytest
import torch
from oracles import assert_near, joint, random_layer, unchanged
from sklearn.mixture import BayesianGaussianMixture
from sklearn.mixture import GaussianMixture as SklearnGaussianMixture

from tgmm_nn import GaussianMixture

NAMES = {"full": "full", "diag": "diag", "spherical": "spherical", "tied_full": "tied"}


@pytest.fixture
def x(generator):
    z = torch.randn(120, 2, generator=generator, dtype=torch.float64)
    z[:40] += torch.tensor([4.0, 0.0])
    return z


def fitted(name, x, **options):
    return SklearnGaussianMixture(3, covariance_type=name, random_state=0, tol=1e-2, **options).fit(x.numpy())


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_a_mixture_of_scikit_learn_becomes_an_equal_layer(ours, theirs, x):
    model = fitted(theirs, x, init_params="k-means++", n_init=2, reg_covar=1e-3)
    gmm = GaussianMixture.from_sklearn(model)
    assert (gmm.covariance_type, gmm.means_.dtype, gmm.fitted_) == (ours, torch.float64, True)
    assert_near(gmm(x), torch.from_numpy(model.score_samples(x.numpy())), 1e-12)
    assert_near(gmm.predict_proba(x), torch.from_numpy(model.predict_proba(x.numpy())), 1e-12)
    assert gmm.bic(x) == pytest.approx(model.bic(x.numpy()), rel=1e-12)
    assert gmm.aic(x) == pytest.approx(model.aic(x.numpy()), rel=1e-12)
    assert (gmm.init_means, gmm.n_init, gmm.reg_covar, gmm.tol, gmm.random_state) == ("kpp", 2, 1e-3, 1e-2, 0)
    assert (gmm.converged_, gmm.n_iter_, gmm.lower_bound_) == (model.converged_, model.n_iter_, model.lower_bound_)
    narrow = GaussianMixture.from_sklearn(model, dtype=torch.float32)
    assert_near(narrow(x.float()), gmm(x).float(), 1e-5)


def test_a_layer_becomes_an_equal_mixture_of_scikit_learn(family, x, generator):
    gmm = random_layer(family, generator, tol=1e-2, max_iter=300).fit(x)
    model = gmm.to_sklearn()
    assert_near(torch.from_numpy(model.score_samples(x.numpy())), gmm(x), 1e-12)
    assert_near(torch.from_numpy(model.predict_proba(x.numpy())), gmm.predict_proba(x), 1e-12)
    assert np.array_equal(model.predict(x.numpy()), gmm.predict(x).numpy())
    assert (model.converged_, model.n_iter_, model.lower_bound_) == (True, gmm.n_iter_, gmm.lower_bound_)
    assert model.sample(5)[0].shape == (5, 2)
    if family in NAMES:
        assert model.covariance_type == NAMES[family]
        assert model.bic(x.numpy()) == pytest.approx(gmm.bic(x), rel=1e-12)
        again = GaussianMixture.from_sklearn(model)
        assert_near(tuple(again.mixture()), tuple(gmm.mixture()), 1e-12)
    model.set_params(warm_start=True).fit(x.numpy())  # goes on from there
    assert model.lower_bound_ == pytest.approx(gmm.score(x), abs=0.05)


def test_starting_values_go_both_ways(x):
    means, weights = x[:3].numpy(), np.array([0.2, 0.3, 0.5])
    gmm = GaussianMixture.from_sklearn(fitted("full", x, means_init=means, weights_init=weights))
    assert np.array_equal(gmm.init_means.numpy(), means)
    model = gmm.to_sklearn()
    assert np.array_equal(model.means_init, means)
    assert np.allclose(model.weights_init, weights)
    names = {"kmeans": "kmeans", "kpp": "k-means++", "random": "random_from_data"}
    for ours, theirs in names.items():
        assert GaussianMixture(2, 2, init_means=ours).to_sklearn().init_params == theirs
    assert GaussianMixture(2, 2, random_state=2**40 + 3).to_sklearn().random_state == 3


def test_what_is_no_fitted_mixture_of_scikit_learn_raises(x):
    with pytest.raises(ValueError, match="`fitted` to be fitted, but it has no parameters; call its fit first"):
        GaussianMixture.from_sklearn(SklearnGaussianMixture(2))
    for other in (BayesianGaussianMixture(n_components=2).fit(x.numpy()), GaussianMixture(2, 2), None):
        with pytest.raises(TypeError, match=r"`fitted` to be a sklearn\.mixture\.GaussianMixture, but got"):
            GaussianMixture.from_sklearn(other)


# -------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("weighted", [False, True])
def test_criteria_are_their_formulas(family, weighted, x, generator):
    gmm = random_layer(family, generator)
    weight = torch.rand(120, generator=generator).double() if weighted else torch.ones(120).double()
    log_joint = joint(x, gmm.weights_, gmm.means_, gmm.covariance.internal(gmm.covariances_))
    log_likelihood = (weight * log_joint.logsumexp(-1)).sum().item()
    entropy = -(weight * log_joint.log_softmax(-1).amax(-1)).sum().item()
    n, p = weight.sum().item(), gmm.n_parameters
    arguments = {"sample_weight": weight} if weighted else {}
    assert gmm.score(x, **arguments) == pytest.approx(log_likelihood / n, rel=1e-12)
    assert gmm.bic(x, **arguments) == pytest.approx(-2 * log_likelihood + p * math.log(n), rel=1e-12)
    assert gmm.aic(x, **arguments) == pytest.approx(-2 * log_likelihood + 2 * p, rel=1e-12)
    assert gmm.icl(x, **arguments) == pytest.approx(gmm.bic(x, **arguments) + 2 * entropy, rel=1e-12)


def test_bic_finds_the_number_of_components(generator):
    centres = torch.tensor([[-6.0, 0.0], [0.0, 0.0], [6.0, 0.0]])
    x = centres[torch.arange(300) % 3] + torch.randn(300, 2, generator=generator)
    fits = [GaussianMixture(k, 2, "tied_spherical", random_state=0, max_iter=500).fit(x) for k in (1, 2, 3, 4, 5)]
    for criterion in ("bic", "icl"):
        assert np.argmin([getattr(gmm, criterion)(x) for gmm in fits]) == 2


@pytest.mark.parametrize("method", ["score", "bic", "aic", "icl"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 2), "`x` with at least one row of positive weight, but got none"),
        (torch.tensor([[0.0, torch.nan], [0.0, 1.0]]), "`x` to be finite, but 1 of 2 rows hold nan or infinity"),
        (torch.tensor([[0.0, torch.inf], [0.0, 1.0]]), "`x` to be finite, but 1 of 2 rows hold nan or infinity"),
    ],
)
def test_no_criterion_is_ever_nan(method, x, message):
    gmm = GaussianMixture(2, 2)
    with unchanged(gmm), pytest.raises(ValueError, match=message):
        getattr(gmm, method)(x)
