"""Classification EM: rows belong wholly to one component, and the likelihood of that classification is climbed."""

import numpy as np
import pytest
import torch
from oracles import assert_compiled_steps_are_eager_ones, assert_near, joint, random_layer

from tgmm_nn import GaussianMixture


@pytest.fixture
def x(generator):
    z = torch.randn(150, 2, generator=generator, dtype=torch.float64)
    z[:50] = z[:50] * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, 0.0])
    z[50:80] += torch.tensor([0.0, 4.0])
    return z


def classification_likelihood(gmm, x):
    """Return the mean over rows of the log of weight times density of the best component, by `torch.distributions`."""
    return joint(x, gmm.weights_, gmm.means_, gmm.covariance.internal(gmm.covariances_)).amax(-1).mean().item()


@pytest.mark.parametrize("init_means", ["kmeans", "random"])
def test_the_classification_likelihood_never_falls_and_is_what_is_reported(family, init_means, x):
    options = {"reg_covar": 0.0, "tol": 1e-9, "max_iter": 200, "init_means": init_means, "random_state": 1}
    gmm = GaussianMixture(3, 2, family, cem=True, dtype=torch.float64, **options).fit(x)
    assert (np.diff(gmm.history_) > -1e-12).all()
    assert gmm.converged_
    assert gmm.objective_ == pytest.approx(classification_likelihood(gmm, x), rel=1e-12)
    assert gmm.lower_bound_ == pytest.approx(gmm.score(x), rel=1e-12)
    assert gmm.lower_bound_ > gmm.objective_


def test_a_step_is_maximum_likelihood_within_each_class(family, x, generator):
    gmm = random_layer(family, generator, cem=True, reg_covar=0.0)
    labels = gmm.predict(x)
    expected = gmm.score(x)
    assert_near(gmm.em_step(x), torch.tensor(expected, dtype=torch.float64))
    counts = torch.bincount(labels, minlength=3)
    assert (counts > 2).all()
    assert_near(gmm.weights_, counts.double() / 150)
    groups = [x[labels == k] for k in range(3)]
    assert_near(gmm.means_, torch.stack([group.mean(0) for group in groups]))
    if family == "full":
        assert_near(gmm.covariances_, torch.stack([group.mT.cov(correction=0) for group in groups]))
    if family == "tied_diag":
        within = torch.cat([group - group.mean(0) for group in groups])
        assert_near(gmm.covariances_, within.square().mean(0))


def test_responsibilities_of_the_e_step_are_hard_and_those_of_users_stay_soft(family, x, generator):
    gmm = random_layer(family, generator, cem=True)
    sums = gmm.statistics(x)
    assert torch.equal(sums.count, torch.bincount(gmm.predict(x), minlength=3).double())
    assert ((gmm.predict_proba(x) > 0.01).sum(-1) > 1).any()


def test_a_log_prior_decides_the_class(family, x, generator):
    gmm = random_layer(family, generator, cem=True)
    labels = torch.randint(3, (150,), generator=generator)
    forced = torch.full((150, 3), -torch.inf).scatter(1, labels[:, None], 0.0)
    assert torch.equal(gmm.statistics(x, log_prior=forced).count, torch.bincount(labels).double())


@pytest.mark.parametrize("prior", [{}, {"covariance_prior": 2.0, "degrees_of_freedom_prior": 4.0, "mean_prior": 0.0}])
def test_with_priors_the_classification_posterior_never_falls(family, prior, x):
    options = {"reg_covar": 0.0, "tol": 1e-9, "max_iter": 200, "weight_concentration_prior": 3.0, **prior}
    if prior:
        options["mean_precision_prior"] = 4.0
    gmm = GaussianMixture(3, 2, family, cem=True, dtype=torch.float64, **options).fit(x)
    assert (np.diff(gmm.history_) > -1e-12).all()
    prior = gmm.priors.log_density(*gmm.mixture(), gmm.covariance).item() / 150
    assert gmm.objective_ == pytest.approx(classification_likelihood(gmm, x) + prior, rel=1e-12)


def test_spherical_classification_em_with_equal_fixed_weights_is_k_means(generator):
    """Celeux and Govaert: with equal weights and one variance the classification likelihood is the inertia."""
    x = torch.cat([torch.randn(40, 2, generator=generator).double() + c for c in (-5.0, 0.0, 5.0)])
    gmm = GaussianMixture(3, 2, "tied_spherical", cem=True, init_means="kpp", random_state=0, dtype=torch.float64).fit(
        x
    )
    labels = torch.cdist(x, gmm.means_).argmin(-1)
    assert_near(gmm.means_, torch.stack([x[labels == k].mean(0) for k in range(3)]), 1e-12)


@pytest.mark.no_cover
@pytest.mark.parametrize("step_size", [None, 0.5])
def test_compiled_hard_updates_are_the_eager_ones(family, step_size, x, generator):
    gmm = random_layer(family, generator, dtype=torch.float32, cem=True)
    assert_compiled_steps_are_eager_ones(gmm, x.float().split(50), step_size)
