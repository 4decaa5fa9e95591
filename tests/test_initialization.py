"""Starts of EM: chosen or given means, weights and covariances, from a sample of the rows where there are many."""

from itertools import pairwise

import pytest
import torch
from oracles import assert_near, random_covariances, restrict
from sklearn.cluster import KMeans

from tgmm_nn import GaussianMixture, initialization
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.initialization import Start
from tgmm_nn.statistics import statistics_of
from tgmm_nn.survey import Candidates


@pytest.fixture
def x(generator):
    """Three separate clusters."""
    z = torch.randn(90, 2, generator=generator, dtype=torch.float64)
    z[:20] += 8
    z[20:50] -= 8
    return z


METHODS = pytest.mark.parametrize("method", initialization.MEANS)


def candidates(x, weights=None):
    weights = torch.ones(len(x)).double() if weights is None else weights.double()
    return Candidates(x, weights).smallest(10_000).sorted()


def start(x, family, method="kmeans", *, seed=0, n_init=1, weights=None, **options):
    covariance, generator = COVARIANCES[family], torch.Generator().manual_seed(seed)
    chosen = Start.from_options(covariance, 3, 2, method, **options)
    return statistics_of(*chosen.mixture(candidates(x, weights), covariance, n_init, generator, 3), covariance)


# ------------------------------------------------------------------------------------------------------ the means


@METHODS
def test_a_start_does_not_depend_on_the_order_of_rows(family, method, x):
    one, other = start(x, family, method), start(x.flip(0), family, method)
    assert torch.equal(one.origin, other.origin)
    assert_near(one.sums(), other.sums())


@METHODS
def test_an_integer_weight_is_as_many_equal_rows(family, method, x, generator):
    times = torch.randint(0, 4, (90,), generator=generator)
    weighted = start(x[times > 0], family, method, weights=times[times > 0], init_weights="kmeans")
    repeated = start(x.repeat_interleave(times, 0), family, method, init_weights="kmeans")
    assert torch.equal(weighted.origin, repeated.origin)
    assert_near(weighted.sums(), repeated.sums())


def test_kmeans_means_are_at_the_optimum_of_scikit_learn(x):
    means = start(x, "full", n_init=5).origin
    oracle = KMeans(3, n_init=20, random_state=1).fit(x.numpy())
    inertia = torch.cdist(x, means).amin(-1).square().sum()
    assert inertia.item() == pytest.approx(oracle.inertia_, rel=1e-12)


@pytest.mark.parametrize("method", ["kpp", "random"])
def test_drawn_means_are_different_rows_of_the_data(method, x):
    for seed in range(5):
        means = start(x, "full", method, seed=seed).origin
        assert len(means.unique(dim=0)) == 3
        assert all((x == mean).all(-1).any() for mean in means)


def test_kpp_spreads_its_means_over_separate_clusters(x):
    """The chance of k-means++ to miss one of these is far below that of uniform draws, which is two in three."""
    hits = {}
    for method in ("kpp", "random"):
        labels = [start(x, "full", method, seed=seed).origin[:, 0].div(5).round().sign() for seed in range(30)]
        hits[method] = sum(len(sign.unique()) == 3 for sign in labels)
    assert hits["kpp"] == 30
    assert hits["random"] < 20


@pytest.mark.parametrize("method", ["kpp", "random"])
def test_of_several_draws_the_tightest_is_taken(method, x):
    def inertia(n_init):
        return torch.cdist(x, start(x, "full", method, n_init=n_init).origin).amin(-1).square().sum()

    values = [inertia(n) for n in range(1, 12)]
    assert all(later <= earlier for earlier, later in pairwise(values))
    assert values[-1] < values[0]


@pytest.mark.parametrize("method", ["kpp", "random"])
def test_a_row_is_drawn_in_proportion_to_its_weight(method, x):
    weights = torch.ones(90)
    weights[7] = 1e6
    for seed in range(5):
        assert (start(x, "full", method, seed=seed, weights=weights).origin == x[7]).all(-1).any()


def test_kmeans_means_are_weighted_means_of_their_rows(x, generator):
    weights = torch.rand(90, generator=generator).double() ** 3
    means = start(x, "full", weights=weights).origin
    labels = torch.cdist(x, means).argmin(-1)
    expected = [(weights[labels == k, None] * x[labels == k]).sum(0) / weights[labels == k].sum() for k in range(3)]
    assert_near(means, torch.stack(expected), 1e-9)


@METHODS
@pytest.mark.parametrize("n_rows", [3, 2, 1])
def test_as_many_distinct_rows_as_components_or_fewer_are_the_means(family, method, n_rows, x):
    means = start(x[:n_rows].repeat(5, 1), family, method).origin
    assert torch.equal(means.unique(dim=0), x[:n_rows].unique(dim=0))


def test_given_means_are_taken_as_they_are(family, x):
    given = [[0, 0], [5, 5], [0.1, 5]]
    expected = torch.tensor(given, dtype=torch.float64)
    for means in (given, expected, expected.numpy()):
        gmm = GaussianMixture(3, 2, family, init_means=means, dtype=torch.float64).initialize(x)
        assert torch.equal(gmm.means_, expected)


# ----------------------------------------------------------------------------------------- weights and covariances


def test_uniform_weights_are_equal_and_sums_have_total_weight_one(family, x):
    sums = start(x, family)
    assert torch.equal(sums.count, torch.full((3,), 1 / 3).double().fill_(1 / 3))
    assert sums.weight() == pytest.approx(1.0, abs=1e-15)
    assert (sums.first == 0).all()


@METHODS
def test_kmeans_weights_are_the_shares_of_the_nearest_rows(family, method, x):
    gmm = GaussianMixture(3, 2, family, init_means=method, init_weights="kmeans", dtype=torch.float64).initialize(x)
    nearest = torch.cdist(x, gmm.means_).argmin(-1)
    assert_near(gmm.weights_, torch.bincount(nearest, minlength=3).double() / 90)


def test_given_weights_are_taken_as_they_are(family, x):
    gmm = GaussianMixture(3, 2, family, init_weights=[0.2, 0.3, 0.5], dtype=torch.float64).initialize(x)
    assert_near(gmm.weights_, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), 1e-15)


def test_empirical_covariances_are_those_of_the_nearest_rows(family, x):
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, dtype=torch.float64).initialize(x)
    labels = torch.cdist(x, gmm.means_).argmin(-1)
    groups = [x[labels == k] for k in range(3)]
    if gmm.covariance.tied:
        centred = torch.cat([group - group.mean(0) for group in groups])
        expected = restrict((centred.mT @ centred / 90)[None], family)
    else:
        expected = restrict(torch.stack([group.mT.cov(correction=0) for group in groups]), family)
    assert_near(gmm.covariance.internal(gmm.covariances_), expected)
    assert_near(gmm.weights_, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_global_covariance_is_that_of_all_rows(family, x):
    gmm = GaussianMixture(3, 2, family, init_covariances="global", reg_covar=0.5, dtype=torch.float64).initialize(x)
    matrices = (x.mT.cov(correction=0) + 0.5 * torch.eye(2)).expand(3, 2, 2)
    share = 3 if gmm.covariance.tied else 1
    assert_near(gmm.covariance.internal(gmm.covariances_), restrict(matrices, family) / share)


@pytest.mark.parametrize("given", ["eye", "number", "tensor", "one for all"])
def test_given_covariances_are_taken_as_they_are_without_ridge(family, given, x, generator):
    elements = random_covariances(family, 3, 2, generator)
    covariance = COVARIANCES[family]
    if given in ("eye", "number"):
        value, expected = ("eye", 1.0) if given == "eye" else (2.5, 2.5)
        expected = covariance.public(covariance.identity(3, 2).double() * expected)
    elif given == "tensor":
        value = expected = covariance.public(elements)
    else:
        value, expected = elements[0], covariance.public(elements[:1].expand_as(elements))
    options = {"init_covariances": value, "reg_covar": 0.5, "dtype": torch.float64}
    assert_near(GaussianMixture(3, 2, family, **options).initialize(x).covariances_, expected)


@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_a_cluster_without_two_distinct_rows_takes_the_pooled_covariance(family, generator):
    z = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([z - 50, z + 50, torch.tensor([[500.0, 0.0]]).expand(4, 2)])
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, dtype=torch.float64).initialize(x)
    alone = gmm.means_[:, 0].argmax()
    pooled = restrict((2 * 40 / 84 * z.mT.cov(correction=0))[None], family)[0]
    assert_near(gmm.covariances_[alone], pooled)


def test_where_no_cluster_has_two_rows_all_take_the_covariance_of_all_rows(family, x):
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, dtype=torch.float64).initialize(x[[0, 30, 70]])
    matrices = x[[0, 30, 70]].mT.cov(correction=0).expand(3, 2, 2)
    share = 3 if gmm.covariance.tied else 1
    assert_near(gmm.covariance.internal(gmm.covariances_), restrict(matrices, family) / share)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_nearest_is_the_nearest_by_brute_force_also_far_from_zero_in_float32(offset, generator):
    x = (torch.randn(500, 3, generator=generator) + offset).float()
    means = x[:7]
    brute_force = (x.double()[:, None] - means.double()).square().sum(-1).argmin(-1)
    assert torch.equal(initialization.nearest(x, means), brute_force)


# ------------------------------------------------------------------------------------------------------ the layer


def test_initialize_returns_the_layer_ready_for_em(family, x):
    gmm = GaussianMixture(3, 2, family)
    assert gmm.initialize(x) is gmm
    assert gmm.fitted_
    before = gmm.score(x.float())
    gmm.em_step(x)
    assert gmm.score(x.float()) > before
    gmm.initialize(x)
    assert gmm.n_updates.item() == 0


def test_priors_do_not_pull_a_start(family, x):
    """A start's sums weigh as much as one row, which any prior would outweigh."""
    options = {"init_means": x[:3], "dtype": torch.float64}
    priors = {"mean_prior": 99.0, "mean_precision_prior": 5.0, "covariance_prior": 9.0, "degrees_of_freedom_prior": 9.0}
    plain = GaussianMixture(3, 2, family, **options).initialize(x)
    pulled = GaussianMixture(3, 2, family, **options, **priors).initialize(x)
    for name in ("weights_", "means_", "factor_"):
        assert torch.equal(getattr(pulled, name), getattr(plain, name))


def test_fewer_distinct_rows_than_components_do_not_warn():
    gmm = GaussianMixture(3, 1).initialize(torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    assert torch.isfinite(gmm.means_).all()


def test_starting_options_can_be_changed_and_are_checked(x):
    gmm = GaussianMixture(3, 2, n_init=4)
    with pytest.raises(ValueError, match="`init_means` to be one of 'kmeans', 'kpp', 'random', but got 'kmean'"):
        gmm.init_means = "kmean"
    gmm.init_means, gmm.init_weights = x[:3].numpy(), [0.2, 0.3, 0.5]
    assert isinstance(gmm.init_means, torch.Tensor)
    assert "init_means=(3, 2)" in repr(gmm)
    assert_near(gmm.initialize(x).weights_, torch.tensor([0.2, 0.3, 0.5]), 1e-7)
    assert gmm.marginal(0).init_means == "kmeans"


def test_a_start_of_weight_zero_keeps_its_mean_and_covariance(family, x):
    covariance = COVARIANCES[family]
    elements = covariance.public(covariance.identity(3, 2) * 2.5)
    given = {"init_means": [[1.0, 0.0], [5.0, 1.0], [7.0, 2.0]], "init_covariances": elements, "dtype": torch.float64}
    gmm = GaussianMixture(3, 2, family, init_weights=[1.0, 0.0, 0.0], **given).initialize(x)
    assert gmm.means_.tolist() == given["init_means"]
    assert_near(gmm.covariances_, elements.double())


def test_each_distinct_row_is_a_mean_also_where_some_components_weigh_nothing():
    x = torch.tensor([[5.0], [5.0], [6.0], [7.0]])
    gmm = GaussianMixture(4, 1, init_weights="kmeans").initialize(x)
    assert set(gmm.means_.flatten().tolist()) == {5.0, 6.0, 7.0}
