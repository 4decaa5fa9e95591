"""Maximum a posteriori: oracles are autograd, `torch.distributions` and `scipy.stats`, on dense matrices."""

import copy
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from oracles import (
    assert_compiled_steps_are_eager_ones,
    assert_near,
    dense,
    joint,
    random_covariances,
    random_layer,
    random_mixture,
    restrict,
)
from scipy import stats
from torch.distributions import Dirichlet, MultivariateNormal

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.priors import Priors

K, D = 3, 2
COMBINATIONS = [tuple(c) for c in product([False, True], repeat=3) if any(c)]
COMBINED = pytest.mark.parametrize(
    "combination",
    COMBINATIONS,
    ids=lambda c: "+".join(n for n, given in zip(("weights", "means", "covariances"), c, strict=True) if given),
)


@pytest.fixture
def x(generator):
    z = torch.randn(150, D, generator=generator, dtype=torch.float64)
    z[:50] = z[:50] * torch.tensor([2.0, 0.5]) + torch.tensor([3.0, 0.0])
    z[50:80] += torch.tensor([0.0, 4.0])
    return z


def options_of(family, combination, generator):
    """Return priors as a user gives them, different for each component."""
    weights, means, covariances = combination
    options = {}
    if weights:
        options["weight_concentration_prior"] = 1.0 + 5 * torch.rand(K, generator=generator).double()
    if means:
        options["mean_prior"] = torch.randn(K, D, generator=generator).double()
        options["mean_precision_prior"] = 0.5 + 3 * torch.rand(K, generator=generator).double()
    if covariances:
        covariance = COVARIANCES[family]
        options["covariance_prior"] = covariance.public(random_covariances(family, K, D, generator))
        options["degrees_of_freedom_prior"] = D + 3 * torch.rand(covariance.leading(K), generator=generator).double()
    return options


def log_prior(options, family, weights, means, elements):
    """Return what the options say, up to what the family's restriction leaves constant; differentiable."""
    value = torch.zeros((), dtype=torch.float64)
    matrices = dense(elements, D)
    if "weight_concentration_prior" in options:
        value = value + Dirichlet(options["weight_concentration_prior"], validate_args=False).log_prob(weights)
    if "mean_prior" in options:
        spread = matrices.expand(K, D, D) / options["mean_precision_prior"][:, None, None]
        spread = (spread + spread.mT) / 2
        value = value + MultivariateNormal(options["mean_prior"], spread, validate_args=False).log_prob(means).sum()
    if "covariance_prior" in options:
        scale = dense(COVARIANCES[family].internal(options["covariance_prior"]), D)
        nu = options["degrees_of_freedom_prior"]
        trace = (scale @ torch.linalg.inv(matrices)).diagonal(dim1=-2, dim2=-1).sum(-1)
        value = value - 0.5 * ((nu + D + 1) * torch.logdet(matrices) + trace).sum()
    return value


# ------------------------------------------------------------------------------------------------- the M-step


@COMBINED
def test_the_gradient_of_the_expected_log_posterior_is_zero_at_the_m_step(family, combination, x, generator):
    """All seven combinations of priors, in all families; weights by softmax, covariances as symmetric elements."""
    options = options_of(family, combination, generator)
    gmm = random_layer(family, generator, reg_covar=0.0, **options)
    elements = gmm.covariance.internal(gmm.covariances_)
    r = joint(x, gmm.weights_, gmm.means_, elements).softmax(-1)
    gmm.em_step(x)
    new = gmm.weights_.log(), gmm.means_.clone(), gmm.covariance.internal(gmm.covariances_)
    free = [p.clone().requires_grad_() for p in new]

    def expected_log_posterior(logits, means, covariances):
        weights = logits.softmax(-1)
        expected = (r * joint(x, weights, means, covariances)).sum()
        return expected + log_prior(options, family, weights, means, covariances)

    value = expected_log_posterior(*free)
    for gradient in torch.autograd.grad(value, free):
        assert gradient.abs().max() < 1e-8
    for scale in (-1e-2, 1e-2):  # a maximum, not only a stationary point
        assert expected_log_posterior(*(p * (1 + scale) for p in free)) < value


@COMBINED
def test_the_objective_never_falls_along_em(family, combination, x, generator):
    options = options_of(family, combination, generator)
    gmm = GaussianMixture(K, D, family, reg_covar=0.0, tol=1e-8, max_iter=2000, dtype=torch.float64, **options).fit(x)
    assert (np.diff(gmm.history_) > -1e-12).all()
    assert gmm.history_[-1] > gmm.history_[0] + 1e-4
    assert gmm.converged_
    elements = gmm.covariance.internal(gmm.covariances_)
    constant = gmm.priors.log_density(*gmm.mixture(), gmm.covariance) - log_prior(
        options, family, gmm.weights_, gmm.means_, elements
    )
    posterior = gmm(x).sum() + log_prior(options, family, gmm.weights_, gmm.means_, elements) + constant
    assert gmm.objective_ == pytest.approx(posterior.item() / 150, rel=1e-12)
    assert gmm.lower_bound_ == pytest.approx(gmm.score(x), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_normal_inverse_wishart_mode_is_that_of_murphy(dtype, generator):
    """One full Gaussian has a closed form: Murphy 2012, 4.6.3.2 with the mode of equation 4.214."""
    x = torch.randn(40, D, generator=generator).to(dtype) + 1
    m, kappa, psi, nu = torch.tensor([2.0, -1.0]), 4.0, torch.tensor([[2.0, 0.5], [0.5, 1.0]]), 5.0
    priors = {"mean_prior": m, "mean_precision_prior": kappa, "covariance_prior": psi, "degrees_of_freedom_prior": nu}
    gmm = GaussianMixture(1, D, reg_covar=0.0, dtype=dtype, **priors).fit(x)
    mean, n = x.mean(0), len(x)
    assert_near(gmm.means_[0], (kappa * m + n * mean) / (kappa + n), 1e-6)
    scatter = (x - mean).mT @ (x - mean)
    scale = psi + scatter + kappa * n / (kappa + n) * torch.outer(mean - m, mean - m)
    assert_near(gmm.covariances_[0], (scale / (nu + n + D + 2)).to(dtype), 1e-6)


def test_a_concentration_below_one_empties_weak_components(family, x, generator):
    gmm = random_layer(family, generator, weight_concentration_prior=[1e-3, 1.0, 1.0])
    x = torch.cat([x, gmm.means_])
    gmm.set_parameters([1e-9, 0.5, 0.5], gmm.means_, gmm.covariances_)
    gmm.em_step(x[:150])
    assert gmm.weights_[0] == 0
    assert_near(gmm.weights_.sum(), torch.ones(()).double())
    prior = gmm.priors.log_density(*gmm.mixture(), gmm.covariance)
    assert torch.isfinite(prior)
    gmm.fit(x)
    assert np.isfinite(gmm.objective_)


def test_where_all_weights_would_vanish_the_old_ones_stay(family, generator):
    gmm = random_layer(family, generator, weight_concentration_prior=1e-6)
    old = gmm.weights_.clone()
    gmm.em_step(gmm.means_[:1].clone())
    assert torch.equal(gmm.weights_, old)


@COMBINED
def test_a_component_without_rows_takes_the_mode_of_its_prior_and_keeps_the_rest(family, combination, generator):
    options = options_of(family, combination, generator)
    gmm = random_layer(family, generator, reg_covar=0.0, **options)
    far = gmm.means_.clone()
    far[1] = 1e6
    gmm.set_parameters(gmm.weights_, far, gmm.covariances_)
    old = gmm.covariances_.clone()
    gmm.em_step(torch.randn(50, D, generator=generator, dtype=torch.float64))
    weights, means, covariances = combination
    alpha = options["weight_concentration_prior"] if weights else torch.ones(K)
    assert_near(gmm.weights_[1], (alpha[1] - 1).double() / (50 + (alpha - 1).sum()))
    assert_near(gmm.means_[1], options["mean_prior"][1] if means else far[1])
    if not gmm.covariance.tied:
        mode = old[1]
        if covariances:
            mode = options["covariance_prior"][1] / (options["degrees_of_freedom_prior"][1] + D + 1 + means)
        assert_near(gmm.covariances_[1], mode)
    assert all(torch.isfinite(p).all() for p in gmm.mixture())


# ------------------------------------------------------------------------------------------------ the density


@COMBINED
@pytest.mark.parametrize("family", ["full", "tied_full"])
def test_the_log_prior_is_that_of_torch_and_scipy(family, combination, generator):
    options = options_of(family, combination, generator)
    mixture = random_mixture(family, generator)
    weights, means, _ = mixture.parameters
    expected = 0.0
    if combination[0]:
        expected += Dirichlet(options["weight_concentration_prior"]).log_prob(weights)
    if combination[1]:
        spread = mixture.covariances.expand(K, D, D) / options["mean_precision_prior"][:, None, None]
        expected += MultivariateNormal(options["mean_prior"], spread).log_prob(means).sum()
    if combination[2]:
        scales = COVARIANCES[family].internal(options["covariance_prior"])
        for scale, nu, c in zip(scales, options["degrees_of_freedom_prior"], mixture.covariances, strict=True):
            expected += stats.invwishart(nu.item(), scale.numpy()).logpdf(c.numpy())
    priors = Priors.from_options(mixture.covariance, K, D, **options)
    assert_near(priors.log_density(*mixture.parameters, mixture.covariance), torch.as_tensor(expected).double(), 1e-12)


@pytest.mark.parametrize("family", ["diag", "spherical", "tied_diag", "tied_spherical"])
def test_the_prior_of_a_restricted_family_is_the_full_one_at_its_matrices(family, generator):
    covariances = random_covariances(family, K, D, generator)
    covariance = COVARIANCES[family]
    factor, _ = covariance.factor(covariances)
    scale = random_covariances(family, K, D, generator)
    priors = Priors.from_options(
        covariance, K, D, covariance_prior=covariance.public(scale), degrees_of_freedom_prior=4.5
    )
    got = priors.log_density(torch.ones(K).double() / K, torch.zeros(K, D).double(), factor, covariance)
    matrices = zip(dense(scale, D), dense(covariances, D), strict=True)
    expected = sum(stats.invwishart(4.5, a.numpy()).logpdf(b.numpy()) for a, b in matrices)
    assert_near(got, torch.as_tensor(expected), 1e-12)


# ---------------------------------------------------------------------------------------- forms of what is given


def test_priors_may_be_given_in_any_shape_that_broadcasts(family, x):
    covariance = COVARIANCES[family]
    element = covariance.identity(1, D)[0] * 2.0
    shape = covariance.public_shape(K, D)
    layer = partial(GaussianMixture, K, D, family, random_state=0, max_iter=500, dtype=torch.float64)
    forms = [
        (2.0, 0.5, 1, 2.0, 4),
        ([2.0] * K, [0.5] * D, [1.0] * K, element.tolist(), np.float64(4.0)),
        (torch.full((K,), 2.0), torch.full((K, D), 0.5), np.array(1), element.expand(shape), torch.tensor(4.0)),
    ]
    fits = []
    for alpha, m, kappa, psi, nu in forms:
        priors = {"weight_concentration_prior": alpha, "mean_prior": m, "mean_precision_prior": kappa}
        fits.append(layer(**priors, covariance_prior=psi, degrees_of_freedom_prior=nu).fit(x))
    for other in fits[1:]:
        assert_near(tuple(other.mixture()), tuple(fits[0].mixture()), 1e-12)
    assert not torch.equal(fits[0].means_, layer().fit(x).means_)


# -------------------------------------------------------------------------------------------------- minibatches


def test_decreasing_steps_over_equal_batches_are_one_exact_step_with_priors(family, generator):
    """Priors weigh the same in minibatch EM: they meet the sums of all rows."""
    options = {"weight_concentration_prior": 2.0, "mean_prior": [1.0, -2.0], "mean_precision_prior": 3.0}
    options |= {"covariance_prior": 1.5, "degrees_of_freedom_prior": 4.0}
    gmm = random_layer(family, generator, n_components=1, reg_covar=0.0, **options)
    twin = copy.deepcopy(gmm)
    batches = [shift + torch.randn(20, D, generator=generator).double() for shift in (-5.0, 0.0, 5.0)]
    for t, batch in enumerate(batches, start=1):
        gmm.em_step(batch, step_size=1 / t)
    twin.em_step(torch.cat(batches))
    assert_near(tuple(gmm.mixture()), tuple(twin.mixture()), 1e-12)


@COMBINED
def test_a_constant_step_size_gives_priors_the_weight_of_the_effective_size(family, combination, generator):
    """Rows of known components, so that the fixed point is one exact step on each row 1 / ρ times."""
    options = options_of(family, combination, generator)
    gmm = random_layer(family, generator, reg_covar=0.0, **options)
    twin = copy.deepcopy(gmm)
    x = torch.randn(30, D, generator=generator).double()
    labels = torch.full((30, K), -torch.inf).scatter(1, torch.arange(30)[:, None] % K, 0.0)
    for _ in range(400):
        gmm.em_step(x, step_size=0.1, log_prior=labels)
    twin.em_step(x, torch.full((30,), 10.0), log_prior=labels)
    assert_near(tuple(gmm.mixture()), tuple(twin.mixture()), 1e-10)


def test_the_prior_outweighs_a_minibatch_as_it_would_its_effective_size(generator):
    """With a constant step size ρ over batches of n rows the sums count as n / ρ rows."""
    gmm = GaussianMixture(1, 1, "diag", mean_prior=10.0, mean_precision_prior=50.0, dtype=torch.float64)
    x = torch.randn(25, 1, generator=generator).double()
    gmm.set_parameters([1.0], [[0.0]], [[1.0]])
    for _ in range(400):
        gmm.em_step(x, step_size=0.1)
    assert_near(gmm.means_[0], (250 * x.mean(0) + 50 * 10.0) / 300, 1e-12)


def test_a_fit_is_the_fixed_point_of_exact_and_of_minibatch_steps(family, x, generator):
    options = options_of(family, (True, True, True), generator)
    gmm = GaussianMixture(K, D, family, tol=1e-13, max_iter=5000, dtype=torch.float64, **options).fit(x)
    found = tuple(p.clone() for p in gmm.mixture())
    gmm.em_step(x)
    assert_near(tuple(gmm.mixture()), found, 1e-5)
    for _ in range(5):
        gmm.em_step(x, step_size=0.999)
    assert_near(tuple(gmm.mixture()), found, 1e-2)


def test_priors_follow_the_layer_through_casts_copies_and_empty_memory(family, x, generator):
    options = options_of(family, (True, True, True), generator)
    gmm = GaussianMixture(K, D, family, device="meta", **options).to_empty(device="cpu")
    gmm.reset_parameters()
    twin = copy.deepcopy(gmm.half().double())
    fresh = GaussianMixture(K, D, family, dtype=torch.float64, **options)
    for layer in (twin, fresh):
        layer.max_iter, layer.random_state = 500, 0
    assert_near(tuple(twin.fit(x).mixture()), tuple(fresh.fit(x).mixture()), 1e-12)


@pytest.mark.parametrize("distance", [1e6, 1e9])
def test_a_prior_far_from_the_data_costs_no_digits(family, distance, generator):
    """Sums about either of the two points would lose the variance of the other."""
    x = torch.randn(50, D, generator=generator).double() + distance
    options = {"mean_prior": 0.0, "mean_precision_prior": 1e-30, "reg_covar": 0.0, "dtype": torch.float64}
    unit = COVARIANCES[family].public(COVARIANCES[family].identity(1, D))
    gmm = GaussianMixture(1, D, family, **options).set_parameters([1.0], [[distance] * D], unit)
    gmm.em_step(x)
    centred = x - x.mean(0)
    within = centred.mT @ centred + 1e-30 * 50 / (1e-30 + 50) * torch.outer(x.mean(0), x.mean(0))
    got = dense(gmm.covariance.internal(gmm.covariances_), D)[0]
    assert_near(got, dense(restrict(within[None] / 51, family), D)[0], 1e-9 * distance / 1e6)


@pytest.mark.no_cover
@pytest.mark.parametrize("step_size", [None, 0.5])
def test_compiled_updates_with_priors_are_the_eager_ones(family, step_size, x, generator):
    gmm = random_layer(family, generator, dtype=torch.float32, **options_of(family, (True, True, True), generator))
    assert_compiled_steps_are_eager_ones(gmm, x.float().split(50), step_size)
