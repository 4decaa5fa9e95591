"""Parts of an update: sums that are there already, what may move, and components that start anew."""

import copy

import pytest
import torch
from oracles import (
    assert_near,
    assert_same_buffers,
    copy_of_buffers,
    dense,
    joint,
    random_covariances,
    random_layer,
    unchanged,
)

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.maximization import EVERYTHING, PARTS, Learned, maximize

PRIORS = {"mean_prior": 1.0, "mean_precision_prior": 3.0, "covariance_prior": 2.0, "degrees_of_freedom_prior": 4.0}


@pytest.fixture
def x(generator):
    return 2 * torch.randn(60, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("step_size", [None, 0.3, torch.tensor(0.3)], ids=str)
def test_an_update_from_sums_is_the_step_on_their_rows(family, generator, x, step_size):
    gmm = random_layer(family, generator)
    twin = copy.deepcopy(gmm)
    sums = gmm.statistics(x[:20]).merge(gmm.statistics(x[20:]))
    value = gmm.update(sums, step_size)
    assert_near(value, twin.em_step(x, step_size=step_size), 1e-12)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(getattr(gmm, name), buffer, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_an_update_from_foreign_sums_raises_and_changes_nothing(generator, x):
    gmm, other = random_layer("full", generator), random_layer("diag", generator)
    with unchanged(gmm):
        with pytest.raises(ValueError, match="Expected `statistics` of Full"):
            gmm.update(other.statistics(x))
        with pytest.raises(TypeError, match="Expected `statistics` to be Statistics, but got Tensor"):
            gmm.update(x)
        with pytest.raises(ValueError, match="`step_size`"):
            gmm.update(gmm.statistics(x), 1.5)


# ------------------------------------------------------------------------------------------------ what may move

CHOICES = [
    {"update": ["weights"]},
    {"update": ["means"]},
    {"update": ["covariances"]},
    {"update": ["weights", "covariances"]},
    {"frozen_components": [1]},
    {"update": ["means", "covariances"], "frozen_components": [0, 2]},
]


@pytest.mark.parametrize(
    "options", [{}, {"weight_concentration_prior": 2.0, **PRIORS}], ids=["likelihood", "posterior"]
)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_an_m_step_is_stationary_in_what_it_may_move_and_leaves_the_rest(family, generator, x, options, choice):
    """Oracle: the gradient of the expected complete-data log-posterior, written with `torch.distributions`."""
    gmm = random_layer(family, generator, reg_covar=0.0, **options)
    before = {name: value.clone() for name, value in zip(PARTS, gmm.mixture(), strict=True)}
    r = joint(x, gmm.weights_, gmm.means_, gmm.covariance.internal(gmm.covariances_)).softmax(-1)
    learned = Learned.from_options(3, **choice)
    gmm.maximize(gmm.statistics(x), learned)

    weights, means = gmm.weights_.clone().requires_grad_(), gmm.means_.clone().requires_grad_()
    root = gmm.covariance.root(gmm.factor_).clone().requires_grad_()
    elements = gmm.covariance.square(root)
    factor, _ = gmm.covariance.factor(elements)
    value = (r * joint(x, weights, means, elements)).sum() + gmm.priors.log_density(
        weights, means, factor, gmm.covariance
    )
    gradients = torch.autograd.grad(value, (weights, means, root))
    frozen = choice.get("frozen_components", [])
    free = torch.tensor([k not in frozen for k in range(3)])
    for part, now, gradient in zip(PARTS, gmm.mixture(), gradients, strict=True):
        moves = free if part in choice.get("update", PARTS) else torch.zeros(3, dtype=torch.bool)
        if len(now) == 1:
            moves = moves.any()[None]
        torch.testing.assert_close(now[~moves], before[part][~moves], rtol=1e-12, atol=1e-12)
        slope = gradient[moves]
        if part == "weights" and len(slope):  # on the simplex it is the same for all that move
            slope = slope - slope.mean()
        assert_near(slope, torch.zeros_like(slope), 1e-8)
    assert_near(gmm.weights_.sum(), torch.tensor(1.0).double(), 1e-12)


def test_learning_everything_is_the_plain_step(family, generator, x):
    gmm, twin = (random_layer(family, torch.Generator().manual_seed(0)) for _ in range(2))
    every = Learned(*(torch.ones(3, dtype=torch.bool),) * 3)
    gmm.em_step(x, learned=every)
    twin.em_step(x)
    for one, other in zip(gmm.mixture(), twin.mixture(), strict=True):
        assert_near(one, other, 1e-10)
    assert Learned.from_options(3) is EVERYTHING


def test_a_component_that_does_not_exist_cannot_be_frozen():
    with pytest.raises(ValueError, match="`frozen_components` to be at most 2, but got 3"):
        Learned.from_options(3, frozen_components=[3])
    with pytest.raises(TypeError, match="`frozen_components` to be an integer"):
        Learned.from_options(3, frozen_components=["a"])


def test_weights_stay_where_those_that_may_move_have_no_rows(generator, x):
    gmm = random_layer("full", generator)
    before = gmm.weights_.clone()
    log_prior = torch.tensor([0.0, 0.0, -torch.inf]).expand(60, 3)
    gmm.em_step(x, log_prior=log_prior, learned=Learned.from_options(3, frozen_components=[0, 1]))
    assert_near(gmm.weights_, before)


# ----------------------------------------------------------------------------------- components that start anew


def test_a_component_that_starts_anew_has_the_given_mean_the_pooled_covariance_and_an_equal_share(family, generator, x):
    gmm = random_layer(family, generator, reg_covar=0.0)
    gmm.em_step(x)
    weights, means = gmm.weights_.clone(), gmm.means_.clone()
    matrices = dense(gmm.covariance.internal(gmm.covariances_), 2).expand(3, 2, 2)
    gmm.reseed([1], [[5.0, -5.0]])
    others = weights[[0, 2]] / weights[[0, 2]].sum() * 2 / 3
    assert_near(gmm.weights_[[0, 2]], others, 1e-10)
    assert_near(gmm.weights_[1], torch.tensor(1 / 3).double(), 1e-7)
    assert_near(gmm.means_[1], torch.tensor([5.0, -5.0]).double())
    assert_near(gmm.means_[[0, 2]], means[[0, 2]])
    pooled = (weights[:, None, None] * matrices).sum(0)
    now = dense(gmm.covariance.internal(gmm.covariances_), 2).expand(3, 2, 2)
    assert_near(now[1], pooled, 1e-9)
    assert_near(now[[0, 2]], matrices[[0, 2]], 1e-9)


def test_running_statistics_do_not_pull_a_new_component_back(family, generator, x):
    """espnet#6284: a revived component was overwritten by its own stale sums. And a batch keeps its share."""
    gmm = random_layer(family, generator, reg_covar=0.0)
    for _ in range(5):
        gmm.em_step(x, step_size=0.1)
    total, step_size = gmm.running_count.sum(), gmm.running_step_size.clone()
    gmm.reseed([2], [[50.0, 50.0]])
    assert_near(gmm.running_count.sum(), total, 1e-10)
    assert torch.equal(gmm.running_step_size, step_size)
    near = 50 + 0.1 * torch.randn(60, 2, generator=generator, dtype=torch.float64)
    gmm.em_step(torch.cat([x, near]), step_size=0.01)
    assert float((gmm.means_[2] - 50).abs().max()) < 1
    # the sums give the parameters: maximising at them again changes nothing
    again = copy_of_buffers(gmm)
    gmm.maximize(gmm.running_statistics())
    for name in ("weights_", "means_", "factor_"):
        assert_near(getattr(gmm, name), again[name], 1e-9)


def test_all_but_one_may_start_anew_and_also_from_a_dead_mixture(family, generator):
    gmm = random_layer(family, generator)
    gmm.em_step(torch.zeros(1, 2, dtype=torch.float64).expand(5, 2), step_size=None)
    gmm.reseed([0, 1], [[1.0, 1.0], [2.0, 2.0]])
    assert all(bool(torch.isfinite(buffer).all()) for name, buffer in gmm.named_buffers() if name.endswith("_"))
    assert_near(gmm.weights_.sum(), torch.tensor(1.0).double(), 1e-9)


@pytest.mark.parametrize(
    ("components", "means", "match"),
    [
        ([3], [[0.0, 0.0]], r"`components` to be different integers from 0 to 2, but got \[3\]"),
        ([1, 1], [[0.0, 0.0]] * 2, "`components` to be different"),
        (1, [[0.0, 0.0]], "`components` to be different"),
        ([1], [0.0, 0.0], r"`means` of shape \(1, 2\)"),
        ([1], [[0.0, float("nan")]], "`means` to be finite"),
    ],
)
def test_a_wrong_reseeding_raises_and_changes_nothing(generator, components, means, match):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(ValueError, match=match):
        gmm.reseed(components, means)


# -------------------------------------------------------------------------------------- order and shape of components


def test_components_in_another_order_are_the_same_mixture(family, generator, x):
    gmm = random_layer(family, generator)
    gmm.em_step(x)
    density, weights = gmm(x), gmm.weights_.clone()
    twin = GaussianMixture(3, 2, family, dtype=torch.float64)
    twin.load_state_dict(gmm.state_dict())
    twin.permute_components([2, 0, 1])
    assert torch.equal(twin.weights_, weights[[2, 0, 1]])
    assert_near(twin(x), density)
    for step in (gmm, twin):
        step.em_step(x[:30], step_size=0.2)
    assert_near(twin(x), gmm(x), 1e-10)
    twin.permute_components(torch.tensor([1, 2, 0]))
    for name, buffer in gmm.named_buffers():
        torch.testing.assert_close(getattr(twin, name), buffer, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [1, 2, 3]])
def test_what_is_no_permutation_raises_and_changes_nothing(generator, order):
    gmm = random_layer("full", generator)
    before = copy_of_buffers(gmm)
    with pytest.raises(ValueError, match="`order` to be a permutation of 0 to 2"):
        gmm.permute_components(order)
    assert_same_buffers(gmm, before)


def test_condition_numbers_are_those_of_the_matrices(family, generator):
    gmm = random_layer(family, generator)
    elements = random_covariances(family, 3, 2, generator)
    gmm.set_parameters([0.2, 0.3, 0.5], gmm.means_, COVARIANCES[family].public(elements))
    assert_near(gmm.condition_numbers(), torch.linalg.cond(dense(elements, 2)), 1e-9)


def test_maximize_without_rows_keeps_what_is_frozen_and_what_is_not(generator):
    gmm = random_layer("full", generator)
    empty = gmm.statistics(torch.zeros(0, 2, dtype=torch.float64))
    kept = maximize(empty, gmm.mixture(), gmm.covariance, learned=Learned.from_options(3, ["means"]))
    for one, other in zip(kept, gmm.mixture(), strict=True):
        assert torch.equal(one, other)
