"""How rows are shared: responsibilities by hand, and balanced ones against Sinkhorn's iteration on a dense matrix."""

import math

import pytest
import torch
from oracles import assert_near, joint, random_layer, random_mixture

from tgmm_nn import GaussianMixture
from tgmm_nn.assignment import HARD, LEAST_SHARE, SOFT, Assignment, responsibilities
from tgmm_nn.expectation import expectation
from tgmm_nn.functional import log_density, log_density_and_entropy
from tgmm_nn.transport import sinkhorn


@pytest.fixture
def mixture(family, generator):
    return random_mixture(family, generator)


@pytest.fixture
def x(generator):
    return 3 * torch.randn(40, 2, generator=generator, dtype=torch.float64)


def log_joint_of(mixture, x):
    return joint(x, mixture.parameters.weights, mixture.parameters.means, mixture.covariances)


def balanced(scores, weight, marginals, n_iterations=600):
    """Sinkhorn's iteration as it is written down: scale columns, then rows, of exp(scores)."""
    plan = (scores - scores.amax(-1, keepdim=True)).exp()
    for _ in range(n_iterations):
        plan = plan * (marginals / plan.sum(0))
        plan = plan * (weight / plan.sum(1))[:, None]
    return plan


def assert_sums_are(statistics, r, x):
    assert_near(statistics.count, r.sum(0), 1e-7)
    assert_near(statistics.about(torch.zeros_like(statistics.origin)).first, r.mT @ x, 1e-6)


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_a_temperature_divides_the_joint(mixture, x, temperature, moments):
    r = (log_joint_of(mixture, x) / temperature).softmax(-1)
    how = {"assignment": Assignment(temperature=temperature), "moments": moments}
    sums = expectation(x, mixture.parameters, mixture.covariance, **how)
    assert_sums_are(sums, r, x)
    assert_near(sums.log_likelihood, log_density(x, mixture.parameters, mixture.covariance).sum(), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shares_too_small_for_any_sum_are_none(dtype):
    """Subnormal ones slow a product many times on some processors."""
    away = torch.tensor([0.0, 30.0, 60.0, 80.0, 81.0, 90.0, 100.0, 1000.0], dtype=dtype)
    joint = torch.stack([torch.full_like(away, -50.0), -50.0 - away])
    oracle = joint.double().softmax(0)
    shares = responsibilities(joint.clone(), None, None, SOFT)
    kept = oracle >= LEAST_SHARE
    assert kept[1].tolist() == [True] * 4 + [False] * 4
    torch.testing.assert_close(shares.r.double(), torch.where(kept, oracle, 0.0), rtol=1e-4, atol=0)
    assert_near(shares.log_likelihood.double(), joint.double().logsumexp(0).sum(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("assignment", [SOFT, HARD, Assignment(temperature=0.5), Assignment(temperature=4.0)])
def test_a_density_that_is_no_number_is_that_of_a_component_far_away(dtype, value, assignment):
    joint = torch.tensor([[value, value, -1.0], [-2.0, value, -2.0]], dtype=dtype)
    shares = responsibilities(joint.clone(), None, None, assignment)
    assert shares.r[:, :2].tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert_near(shares.r[:, 2].sum(), torch.ones((), dtype=dtype), 1e-6)
    assert shares.usable.tolist() == [True, False, True]
    assert_near(shares.log_likelihood, -2.0 + joint[:, 2].logsumexp(0), 1e-6)
    assert_near(shares.classification, torch.tensor(-3.0, dtype=dtype), 1e-6)


@pytest.mark.parametrize("log_prior", [None, torch.zeros(3, 2)])
def test_a_component_that_is_forbidden_gets_nothing_at_any_temperature(log_prior):
    joint = torch.tensor([[-1.0, -2.0, -math.inf], [math.nan, -math.inf, -math.inf]])
    for temperature in (0.5, 1.0, 4.0):
        for hard in (False, True):
            offset = torch.tensor([-math.inf, 0.0])
            assignment = Assignment(hard, temperature, offset)
            shares = responsibilities(joint.clone(), None, log_prior, assignment)
            assert shares.usable.tolist() == [False] * 3  # offsets forbid the one, the densities the other
            assert not shares.r.any()
            shares = responsibilities(joint.clone(), None, log_prior, assignment._replace(offset=None))
            assert shares.r.tolist() == [[1.0, 1.0, 0.0], [0.0] * 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_whose_log_prior_is_no_number_does_not_enter(value):
    prior = torch.tensor([[value, 0.0], [0.0, -math.inf]])
    for assignment in (SOFT, HARD, Assignment(temperature=4.0)):
        shares = responsibilities(torch.zeros(2, 2), None, prior, assignment)
        assert shares.r.tolist() == [[0.0, 1.0], [0.0, 0.0]]


def test_offsets_are_added_and_may_be_followed_wholly(mixture, x):
    offset = torch.tensor([3.0, -2.0, 0.0], dtype=torch.float64)
    scores = log_joint_of(mixture, x) / 2 + offset
    for hard, r in ((False, scores.softmax(-1)), (True, torch.eye(3, dtype=torch.float64)[scores.argmax(-1)])):
        sums = expectation(x, mixture.parameters, mixture.covariance, assignment=Assignment(hard, 2.0, offset))
        assert_sums_are(sums, r, x)


def test_a_layer_is_told_how_to_assign_and_else_goes_by_its_option(generator, x):
    gmm = random_layer("full", generator)
    torch.testing.assert_close(
        gmm.statistics(x, assignment=HARD).count, torch.bincount(gmm.predict(x), minlength=3).double()
    )
    assert not torch.equal(gmm.statistics(x).count, gmm.statistics(x, assignment=HARD).count)
    twin = random_layer("full", torch.Generator().manual_seed(0), cem=True)
    twin.load_state_dict(gmm.state_dict())
    gmm.em_step(x, assignment=HARD)
    twin.em_step(x)
    assert_near(gmm.means_, twin.means_)


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_sinkhorn_gives_each_component_its_share(mixture, x, epsilon, chunk_size, generator):
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    marginals = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    assignment = sinkhorn(
        x, mixture.parameters, mixture.covariance, marginals, weight, epsilon=epsilon, n_iterations=40,
        chunk_size=chunk_size,
    )  # fmt: skip
    sums = expectation(x, mixture.parameters, mixture.covariance, weight, assignment=assignment)
    assert_near(sums.count, weight.sum() * marginals, 1e-6)
    density = log_joint_of(mixture, x) - mixture.parameters.weights.log()
    assert_sums_are(sums, balanced(density / epsilon, weight, weight.sum() * marginals), x)


def test_sinkhorn_balances_each_class_within(mixture, x):
    """Component 0 belongs to class 0, the others to class 1; a row of a class may only take the class's components."""
    labels = torch.arange(40) % 4 == 0
    allowed = torch.tensor([[True, False, False], [False, True, True]])[(~labels).long()]
    log_prior = torch.where(allowed, 0.0, -math.inf).double()
    gmm_like = (mixture.parameters, mixture.covariance)
    assignment = sinkhorn(x, *gmm_like, torch.full((3,), 1 / 3), None, log_prior, n_iterations=40)
    sums = expectation(x, *gmm_like, None, log_prior, assignment=assignment)
    assert_near(sums.count, torch.tensor([10.0, 15.0, 15.0], dtype=torch.float64), 1e-6)


def test_sinkhorn_brings_back_a_component_of_weight_zero_and_leaves_out_what_is_not_finite(generator, x):
    gmm = random_layer("full", generator)
    gmm.set_parameters([0.5, 0.5, 0.0], gmm.means_, gmm.covariances_)
    x[3], x[4] = torch.nan, torch.inf
    counts = gmm.statistics(x, assignment=gmm.sinkhorn(x, n_iterations=40)).count
    assert_near(counts, torch.full((3,), 38 / 3, dtype=torch.float64), 1e-5)
    counts = gmm.statistics(x, assignment=gmm.sinkhorn(x, marginals="weights", n_iterations=40)).count
    assert_near(counts, torch.tensor([19.0, 19.0, 0.0], dtype=torch.float64), 1e-5)


@pytest.mark.parametrize("epsilon", [1.0, 0.05])
@pytest.mark.parametrize("n_features", [2, 64, 256])
def test_separate_clusters_of_unequal_size_are_balanced_by_default(n_features, epsilon, generator):
    """Their log-densities differ by hundreds of nats: Sinkhorn's own iteration would take thousands of steps."""
    centres = 4 * torch.randn(10, n_features, generator=generator)
    y = torch.multinomial(torch.linspace(1, 4, 10), 1000, replacement=True, generator=generator)
    x = centres[y] + torch.randn(1000, n_features, generator=generator)
    gmm = GaussianMixture(10, n_features, "diag", random_state=0).initialize(x)
    shares = gmm.statistics(x, assignment=gmm.sinkhorn(x, epsilon=epsilon)).count / 1000
    torch.testing.assert_close(shares, torch.full((10,), 0.1, dtype=torch.float64), rtol=0, atol=0.005)


def test_rows_all_nearest_to_one_component_are_shared_and_none_is_lost(generator):
    gmm = GaussianMixture(3, 2, "spherical")
    gmm.set_parameters([0.8, 0.1, 0.1], [[0.0, 0.0], [40.0, 0.0], [80.0, 0.0]], [1.0, 1.0, 1.0])
    x = torch.linspace(-1, 20, 30)[:, None] * torch.tensor([[1.0, 0.0]])
    sums = gmm.statistics(x, assignment=gmm.sinkhorn(x))
    torch.testing.assert_close(sums.count, torch.full((3,), 10.0, dtype=torch.float64), rtol=0, atol=0.5)
    assert float(sums.weight()) == pytest.approx(30.0)
    assert gmm.sinkhorn(x[:0]).offset.isfinite().all()  # no rows: nothing to balance
    one = GaussianMixture(1, 2)
    assert float(one.statistics(x, assignment=one.sinkhorn(x)).count) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"marginals": "equal"}, ValueError, "`marginals` to be one of 'uniform', 'weights', but got 'equal'"),
        ({"epsilon": 0.0}, ValueError, "`epsilon` to be above 0"),
        ({"n_iterations": 0}, ValueError, "`n_iterations` to be at least 1"),
        ({"n_iterations": 1.5}, TypeError, "`n_iterations` to be an integer"),
    ],
)
def test_bad_options_of_sinkhorn_name_themselves(generator, x, options, error, match):
    with pytest.raises(error, match=match):
        random_layer("full", generator).sinkhorn(x, **options)


def test_density_and_entropy_are_those_of_the_distribution(mixture, x):
    log_joint = log_joint_of(mixture, x)
    entropy = torch.distributions.Categorical(logits=log_joint).entropy()
    expected = torch.stack([log_joint.logsumexp(-1), entropy], -1)
    assert_near(log_density_and_entropy(x, mixture.parameters, mixture.covariance), expected, 1e-9)
    gmm = random_layer("full", torch.Generator().manual_seed(0))
    density, entropy = gmm.log_density_and_entropy(x.reshape(4, 10, 2))
    assert_near(density, gmm(x).reshape(4, 10))
    assert_near(entropy, torch.special.entr(gmm.predict_proba(x)).sum(-1).reshape(4, 10), 1e-9)
