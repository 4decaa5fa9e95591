"""Starts of EM: chosen rows, k-means, and the covariances of the nearest rows."""

import pytest
import torch
from oracles import assert_near, restrict
from sklearn.cluster import KMeans

from tgmm_nn import GaussianMixture, initialization
from tgmm_nn.covariance import COVARIANCES


@pytest.fixture
def x(generator):
    """Three separate clusters."""
    z = torch.randn(90, 2, generator=generator, dtype=torch.float64)
    z[:20] += 8
    z[20:50] -= 8
    return z


def start(x, family, method, seed=0, n_init=1):
    return initialization.starting_statistics(
        x, 3, COVARIANCES[family], method, n_init, torch.Generator().manual_seed(seed)
    )


def test_canonical_order_is_that_of_sorted_tuples_for_any_order_of_rows(generator):
    x = torch.randint(0, 3, (50, 3), generator=generator)
    expected = sorted(map(tuple, x.tolist()))
    for rows in (x, x.flip(0)):
        assert list(map(tuple, initialization.canonical_order(rows).tolist())) == expected


@pytest.mark.parametrize("method", initialization.MEANS)
def test_a_start_does_not_depend_on_the_order_of_rows(family, method, x):
    one, other = start(x, family, method), start(x.flip(0), family, method)
    assert torch.equal(one.origin, other.origin)
    assert_near(one.sums(), other.sums())


@pytest.mark.parametrize("method", initialization.MEANS)
def test_a_start_has_equal_weights_and_total_weight_one(family, method, x):
    sums = start(x, family, method)
    assert torch.equal(sums.count, torch.full((3,), 1 / 3).double().fill_(1 / 3))
    assert sums.weight() == pytest.approx(1.0, abs=1e-15)
    assert (sums.first == 0).all()


def test_kmeans_means_are_at_the_optimum_of_scikit_learn(x):
    means = start(x, "full", "kmeans", n_init=5).origin
    oracle = KMeans(3, n_init=20, random_state=1).fit(x.numpy())
    inertia = torch.cdist(x, means).amin(-1).square().sum()
    assert inertia.item() == pytest.approx(oracle.inertia_, rel=1e-12)


def test_random_means_are_different_rows_of_the_data(x):
    for seed in range(5):
        means = start(x, "full", "random", seed).origin
        assert len(means.unique(dim=0)) == 3
        assert all((x == mean).all(-1).any() for mean in means)


def test_covariances_are_those_of_the_nearest_rows(family, x):
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


@pytest.mark.parametrize("family", ["full", "diag", "spherical"])
def test_a_cluster_of_one_row_takes_the_pooled_covariance(family, generator):
    z = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([z - 50, z + 50, torch.tensor([[500.0, 0.0]])])
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, dtype=torch.float64).initialize(x)
    alone = gmm.means_[:, 0].argmax()
    pooled = restrict((2 * 40 / 81 * z.mT.cov(correction=0))[None], family)[0]
    assert_near(gmm.covariances_[alone], pooled)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_nearest_is_the_nearest_by_brute_force_also_far_from_zero_in_float32(offset, generator):
    x = (torch.randn(500, 3, generator=generator) + offset).float()
    means = x[:7]
    brute_force = (x.double()[:, None] - means.double()).square().sum(-1).argmin(-1)
    assert torch.equal(initialization.nearest(x, means), brute_force)


def test_initialize_returns_the_layer_ready_for_em(family, x):
    gmm = GaussianMixture(3, 2, family)
    assert gmm.initialize(x) is gmm
    assert gmm.fitted_
    before = gmm.score(x.float())
    gmm.em_step(x)
    assert gmm.score(x.float()) > before
    gmm.initialize(x)
    assert gmm.n_updates.item() == 0


def test_fewer_distinct_rows_than_components_do_not_warn():
    gmm = GaussianMixture(3, 1).initialize(torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    assert torch.isfinite(gmm.means_).all()
