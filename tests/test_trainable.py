"""The mixture as unconstrained parameters: equal to the layer it comes from, and what gradients may do to it."""

import copy
import io
from functools import partial

import pytest
import torch
from oracles import assert_near, distribution, joint, random_layer, unchanged
from test_distributed import FORK_IS_WANTED, on_two_ranks
from torch.nn.parallel import DistributedDataParallel

from tgmm_nn import GaussianMixture, TrainableGaussianMixture

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-6)]
PRIORS = {
    "weight_concentration_prior": 2.0,
    "mean_prior": [1.0, -1.0],
    "mean_precision_prior": 0.5,
    "covariance_prior": 1.5,
    "degrees_of_freedom_prior": 4.0,
}
DEAD = [0.25, 0.0, 0.75]


@pytest.fixture
def layer(family, generator):
    """Make layers of one family, set to random mixtures of 3 components in 2 features."""
    return partial(random_layer, family, generator)


@pytest.fixture
def x(generator):
    """60 rows of two groups."""
    centres = torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64)
    return centres[torch.arange(60) % 2] + torch.randn(60, 2, generator=generator, dtype=torch.float64)


def with_a_dead_component(gmm):
    return gmm.set_parameters(DEAD, gmm.means_, gmm.covariances_)


def steps(gmm, x, n=50, optimizer=torch.optim.Adam, **options):
    """Climb the likelihood by gradient; return the loss of each step."""
    optimizer, losses = optimizer(gmm.parameters(), **options), []
    for _ in range(n):
        optimizer.zero_grad()
        loss = -gmm(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same_mixture(one, other, tolerance):
    for p, q in zip(one.mixture(), other.mixture(), strict=True):
        assert_near(p, q, tolerance)


# ------------------------------------------------------------------------------------------------------ conversion


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_conversion_is_exact_both_ways(layer, dtype, tolerance, dead, x):
    gmm = layer(dtype=dtype)
    gmm = with_a_dead_component(gmm) if dead else gmm
    with unchanged(gmm):
        trainable = gmm.to_parameters()
        again = trainable.to_mixture()
    assert isinstance(trainable, TrainableGaussianMixture)
    assert {p.dtype for p in (*trainable.parameters(), *trainable.mixture())} == {dtype}
    assert_same_mixture(trainable, gmm, tolerance)
    assert_same_mixture(again, gmm, tolerance)
    assert type(again) is GaussianMixture
    assert again.fitted_
    assert again.means_.dtype == dtype
    assert_near(trainable(x.to(dtype)), gmm(x.to(dtype)), 100 * tolerance)
    assert bool((again.weights_ == 0).any()) == dead


def test_the_free_numbers_have_the_shape_of_what_they_stand_for(layer):
    gmm = layer()
    assert {name: p.shape for name, p in gmm.to_parameters().named_parameters()} == {
        "logits": gmm.weights_.shape,
        "means": gmm.means_.shape,
        "free_factor": gmm.factor_.shape,
    }
    assert gmm.to_parameters().n_parameters == gmm.n_parameters


def test_narrow_components_far_from_zero_survive_conversion(family, generator):
    mixture = random_layer(family, generator, offset=1e3)
    gmm = mixture.set_parameters(mixture.weights_, mixture.means_, 1e-8 * mixture.covariances_)
    assert_same_mixture(gmm.to_parameters().to_mixture(), gmm, 1e-12)


def test_options_and_priors_return_with_the_mixture(layer):
    gmm = layer(**PRIORS, init_means=[[0.0, 1.0]] * 3, tol=0.5, random_state=3, chunk_size=7, cem=True)
    again = gmm.to_parameters().to_mixture()
    assert repr(again) == repr(gmm)
    for name, value in gmm.options().items():
        assert torch.equal(again.options()[name], value) if isinstance(value, torch.Tensor) else True
    assert gmm.to_parameters().chunk_size == 7


def test_the_trainable_mixture_shares_no_memory_with_its_source(layer, x):
    gmm = layer()
    trainable = gmm.to_parameters()
    with unchanged(gmm):
        steps(trainable, x, n=2, lr=0.1)
    means = trainable.means.clone()
    gmm.em_step(x)
    assert torch.equal(trainable.means, means)


def test_only_a_mixture_becomes_trainable():
    with pytest.raises(TypeError, match="Expected `mixture` to be a GaussianMixture, but got Linear"):
        TrainableGaussianMixture(torch.nn.Linear(2, 2))


def test_numbers_that_are_no_mixture_do_not_become_one(layer):
    trainable = layer().to_parameters()
    trainable.means.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="Expected `means` to be finite"):
        trainable.to_mixture()


def test_the_representation_shows_the_shape():
    assert repr(GaussianMixture(3, 2, "diag").to_parameters()) == "TrainableGaussianMixture(3, 2, 'diag')"


# --------------------------------------------------------------------------------------------------------- density


def test_it_says_of_rows_what_the_mixture_says(layer, x):
    gmm = layer()
    trainable = gmm.to_parameters()
    for method in ("__call__", "score_samples", "predict_proba", "log_responsibilities", "score", "bic", "aic", "icl"):
        got, expected = getattr(trainable, method)(x), getattr(gmm, method)(x)
        assert_near(torch.as_tensor(got), torch.as_tensor(expected), 1e-11)
    assert torch.equal(trainable.predict(x), gmm.predict(x))


def test_the_density_is_differentiable_in_rows_and_parameters(layer, x):
    trainable = layer().to_parameters()
    names = [name for name, _ in trainable.named_parameters()]

    def density(x, *values):
        return torch.func.functional_call(trainable, dict(zip(names, values, strict=True)), (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (x[:3], *trainable.parameters())]
    assert torch.autograd.gradcheck(density, inputs)
    assert torch.autograd.gradgradcheck(density, inputs)


def test_gradients_are_those_through_torch_distributions(layer, x):
    """The oracle has its own algebra: dense covariances, each factorised."""
    trainable = layer().to_parameters()
    weights, means, factor = trainable.mixture()
    covariances = trainable.covariance.square(trainable.covariance.root(factor))
    for value in (distribution(weights, means, covariances), trainable.to_distribution()):
        expected = torch.autograd.grad(value.log_prob(x).sum(), list(trainable.parameters()), retain_graph=True)
        got = torch.autograd.grad(trainable(x).sum(), list(trainable.parameters()))
        for one, other in zip(got, expected, strict=True):
            assert_near(one, other, 1e-11)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_computes_in_float32(layer, narrow, x):
    trainable = layer(dtype=torch.float32).to_parameters().to(narrow)
    assert trainable(x.to(narrow)).dtype == torch.float32
    assert_near(trainable(x), trainable.float()(x), 1e-12)
    assert trainable.to_mixture().means_.dtype == torch.float32
    assert trainable.double()(x.float()).dtype == torch.float64


# --------------------------------------------------------------------------------------- components of weight zero


def test_a_component_of_weight_zero_has_no_gradient_and_makes_none_nan(layer, x):
    """Also far away, where it alone is near: its weight is 0 and not merely small."""
    gmm = with_a_dead_component(layer(**PRIORS))
    trainable = gmm.to_parameters()
    rows = torch.cat([x, gmm.means_[1:2] + 40]).requires_grad_()
    assert_near(trainable(rows), gmm(rows), 1e-12)
    (gradient,) = torch.autograd.grad(trainable(rows).sum(), rows, create_graph=True)
    (gradient.square().sum() + trainable.log_prior()).backward()
    assert rows.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in trainable.parameters())
    assert trainable.logits.grad[1] == 0


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_a_component_of_weight_zero_stays_there_and_stays_finite_under_weight_decay(layer, optimizer, x):
    trainable = with_a_dead_component(layer()).to_parameters()
    steps(trainable, x, optimizer=optimizer, lr=1e-2, weight_decay=1e-3)
    assert trainable.mixture().weights[1] == 0
    assert all(p.isfinite().all() for p in trainable.parameters())


# -------------------------------------------------------------------------------------------------------- learning


def test_steps_of_adam_raise_the_likelihood(layer, x):
    trainable = layer().to_parameters()
    losses = steps(trainable, x, n=100, lr=0.05)
    assert losses[-1] < losses[0] - 0.1
    assert torch.tensor(losses).isfinite().all()


def test_tuning_by_gradient_after_em_does_not_fall_below_em(family, x):
    gmm = GaussianMixture(3, 2, family, tol=1e-3, random_state=0, dtype=torch.float64).fit(x)
    trainable = gmm.to_parameters()
    steps(trainable, x, n=200, lr=1e-3)
    assert trainable.score(x) >= gmm.score(x)
    assert trainable.to_mixture().score(x) == pytest.approx(trainable.score(x), abs=1e-12)


def test_em_goes_on_where_gradients_stopped(layer, x):
    trainable = layer().to_parameters()
    steps(trainable, x, n=20, lr=0.05)
    gmm = trainable.to_mixture()
    before = gmm.score(x)
    gmm.em_step(x)
    assert gmm.score(x) >= before == pytest.approx(trainable.score(x), abs=1e-12)


def test_large_steps_never_leave_the_family(layer, x):
    trainable = layer().to_parameters()
    losses = steps(trainable, x, n=100, lr=1.0)
    assert torch.tensor(losses).isfinite().all()
    assert trainable.covariance.is_factor(trainable.mixture().factor).all()
    trainable.to_mixture()


# ---------------------------------------------------------------------------------------------------------- priors


def test_without_priors_the_log_prior_is_zero(layer):
    assert layer().to_parameters().log_prior() == 0


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_the_log_prior_is_that_of_the_mixture(layer, dtype, tolerance):
    gmm = layer(dtype=dtype, **PRIORS)
    value = gmm.to_parameters().log_prior()
    expected = gmm.priors.log_density(*gmm.mixture().to(torch.float64), gmm.covariance)
    assert (value.dtype, value.shape) == (dtype, ())
    assert_near(value, expected.to(dtype), 10 * tolerance)


def test_the_penalised_likelihood_is_stationary_where_em_with_priors_ends(family, x):
    """One objective for both: gradients of the MAP loss vanish at EM's fixed point, and not without the penalty."""
    priors = {**PRIORS, "weight_concentration_prior": [2.0, 5.0]}
    options = {"reg_covar": 0.0, "tol": 1e-14, "max_iter": 2000, "random_state": 0, "dtype": torch.float64}
    gmm = GaussianMixture(2, 2, family, **priors, **options).fit(x)
    trainable = gmm.to_parameters()
    parameters = list(trainable.parameters())
    likelihood = trainable(x).sum()
    gradients = torch.autograd.grad(likelihood + trainable.log_prior(), parameters, retain_graph=True)
    alone = torch.autograd.grad(likelihood, parameters)
    assert max(g.abs().max() for g in gradients) < 1e-4
    assert min(g.abs().max() for g in alone) > 1e-2
    assert gmm.objective_ == pytest.approx((likelihood + trainable.log_prior()).item() / len(x), abs=1e-12)


# --------------------------------------------------------------------------------------------------------- samples


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("component", [None, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_samples_are_those_of_the_mixture(layer, dtype, tolerance, component):
    gmm = layer(dtype=dtype)
    rows, ids = gmm.to_parameters().rsample(100, component, generator_of(1))
    expected, expected_ids = gmm.sample(100, component, generator=generator_of(1))
    assert rows.dtype == dtype
    assert_near(rows, expected, 10 * tolerance)
    assert torch.equal(ids, expected_ids)


def test_samples_follow_the_parameters_so_that_their_noise_does_not(layer):
    """The law of reparameterisation: whitened by its own component, a row is noise, with no gradient to anything."""
    trainable = layer().to_parameters()
    rows, ids = trainable.rsample(50, generator=generator_of(1))
    _, means, factor = trainable.mixture()
    y = trainable.covariance.whiten(rows, means, factor)[ids, torch.arange(50)]
    weights = torch.randn(y.shape, generator=generator_of(2), dtype=torch.float64)
    for parameter in (trainable.means, trainable.free_factor):
        (gradient,) = torch.autograd.grad((weights * y).sum(), parameter, retain_graph=True)
        assert gradient.abs().max() < 1e-12
    (shift,) = torch.autograd.grad(rows.sum(), trainable.means, retain_graph=True)
    assert_near(shift, torch.bincount(ids, minlength=3).double()[:, None].expand(3, 2))
    (spread,) = torch.autograd.grad(rows.square().sum(), trainable.free_factor, retain_graph=True)
    assert spread.any()
    assert torch.autograd.grad(rows.sum(), trainable.logits, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    ("n", "shape"), [(5, (5,)), (0, (0,)), ((4, 5), (4, 5)), ((), ()), (torch.Size([2, 0]), (2, 0))]
)
def test_samples_have_the_shape_asked_for(n, shape):
    rows, ids = GaussianMixture(3, 2).to_parameters().rsample(n)
    assert (rows.shape, ids.shape, ids.dtype) == ((*shape, 2), shape, torch.int64)


def test_without_a_generator_samples_are_those_of_torchs_seed(layer):
    trainable = layer().to_parameters()
    draws = [torch.manual_seed(seed) and trainable.rsample(5)[0] for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[2], trainable.rsample(5)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": -1}, ValueError, "`n` to be at least 0, but got -1"),
        ({"n": 2.0}, TypeError, "`n` to be an integer, but got 2.0"),
        ({"n": (2, -1)}, ValueError, "`n` to be at least 0, but got -1"),
        ({"component": 3}, ValueError, "`component` to be at most 2, but got 3"),
        ({"component": "0"}, TypeError, "`component` to be an integer, but got '0'"),
        ({"generator": 0}, TypeError, "`generator` to be a torch.Generator or None, but got int"),
    ],
)
def test_bad_arguments_of_rsample_are_named(options, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(3, 2).to_parameters().rsample(**{"n": 2, **options})


# -------------------------------------------------------------------------------------------------- distributions


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_to_distribution_is_the_same_density(layer, dtype, tolerance, dead, trainable, x):
    gmm = layer(dtype=dtype)
    gmm = with_a_dead_component(gmm) if dead else gmm
    mixture = gmm.to_parameters() if trainable else gmm
    got = mixture.to_distribution()
    assert (got.batch_shape, got.event_shape) == ((), (2,))
    assert_near(got.log_prob(x.to(dtype)), mixture(x.to(dtype)), 100 * tolerance)
    parts = got.mixture_distribution.logits + got.component_distribution.log_prob(x.to(dtype)[:, None])
    assert_near(parts, joint(x, *(p.double() for p in elements_of(gmm))).to(dtype), 100 * tolerance)
    if dead:
        assert not (got.mixture_distribution.sample((1000,)) == 1).any()


def elements_of(gmm):
    weights, means, factor = gmm.mixture().to(torch.float64)
    return weights, means, gmm.covariance.square(gmm.covariance.root(factor))


def test_a_distribution_does_not_follow_the_mixture(layer, x):
    gmm = layer()
    fixed = gmm.to_distribution()
    before = fixed.log_prob(x)
    gmm.em_step(x)
    assert torch.equal(fixed.log_prob(x), before)


# ----------------------------------------------------------------------------------------- copies, states and ranks


def test_copies_and_states_hold_the_same_mixture(layer, x):
    trainable = layer(**PRIORS).to_parameters()
    steps(trainable, x, n=3, lr=0.1)
    file = io.BytesIO()
    torch.save(trainable, file)
    file.seek(0)
    loaded = layer(**PRIORS).to_parameters()
    loaded.load_state_dict(trainable.state_dict())
    for twin in (copy.deepcopy(trainable), torch.load(file, weights_only=False), loaded):
        assert torch.equal(twin(x), trainable(x))
        assert torch.equal(twin.log_prior(), trainable.log_prior())
        assert torch.equal(twin.to_mixture().covariances_, trainable.to_mixture().covariances_)


@pytest.mark.parametrize("other", [(2, 2, "full"), (3, 1, "full"), (3, 2, "diag"), (3, 2, "tied_full")])
def test_the_state_of_another_mixture_does_not_fit(other):
    with pytest.raises(RuntimeError, match="size mismatch"):
        GaussianMixture(3, 2).to_parameters().load_state_dict(GaussianMixture(*other).to_parameters().state_dict())


@FORK_IS_WANTED
def test_gradients_of_two_ranks_average_to_those_of_all_rows(layer, x, tmp_path):
    trainable = layer().to_parameters()

    def rank_step(rank):
        wrapped = DistributedDataParallel(copy.deepcopy(trainable))
        wrapped(x[rank::2]).mean().backward()
        return [p.grad for p in wrapped.parameters()]

    expected = torch.autograd.grad(trainable(x).mean(), list(trainable.parameters()))
    for gradients in on_two_ranks(rank_step, tmp_path):
        for got, value in zip(gradients, expected, strict=True):
            assert_near(got, value)
