"""Samples: the laws that they are drawn from, by Kolmogorov-Smirnov tests, and where randomness comes from."""

import copy

import numpy as np
import pytest
import torch
from oracles import assert_near, copy_of_buffers, dense, random_layer, unchanged
from scipy import special, stats

from tgmm_nn import GaussianMixture, sampling

INF = float("inf")


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def distances(gmm, samples, ids):
    """Return each row's Mahalanobis distance from the component that it was drawn from, by a solver."""
    matrices = dense(gmm.covariance.internal(gmm.covariances_).double(), gmm.n_features)
    matrices = matrices.expand(gmm.n_components, -1, -1)[ids]
    away = samples.double() - gmm.means_.double()[ids]
    return (away * torch.linalg.solve(matrices, away.unsqueeze(-1)).squeeze(-1)).sum(-1).sqrt()


# ------------------------------------------------------------------------------------------------------ the radii

CASES = [
    (d, bounds)
    for d in (1, 2, 10, 100)
    for bounds in [(0.0, INF), (1.0, 2.0), (0.0, 0.1), (3.0, INF), (8.0, 9.0), (20.0, INF), (30.0, INF), (29.0, 30.0)]
    if not (d == 100 and bounds == (0.0, 0.1))
] + [(100, (0.0, 1.0)), (100, (0.1, 0.2)), (100, (9.0, 11.0)), (2, (37.0, INF))]


@pytest.mark.parametrize(("n_features", "bounds"), CASES)
def test_radii_follow_the_truncated_chi_law(n_features, bounds, generator):
    """The oracle is the law of the probability that a radius leaves behind it, in the tail that has the digits."""
    r = sampling.radii(4000, n_features, bounds, generator).numpy()
    assert ((bounds[0] <= r) & (r <= bounds[1])).all()
    assert len(np.unique(r)) > 3900
    tail = special.gammainc if bounds[1] ** 2 < n_features else special.gammaincc
    low, high = (tail(0.5 * n_features, 0.5 * bound**2) for bound in bounds)
    share = (tail(0.5 * n_features, 0.5 * r**2) - low) / (high - low)
    assert stats.kstest(share, "uniform").pvalue > 1e-3


def test_radii_far_out_are_those_of_the_exponential_tail(generator):
    """In two dimensions r² / 2 beyond a² / 2 is exponential, whatever a: an oracle without special functions."""
    r = sampling.radii(4000, 2, (30.0, INF), generator)
    assert stats.kstest((0.5 * (r.square() - 900.0)).numpy(), "expon").pvalue > 1e-3


@pytest.mark.parametrize(
    ("n_features", "bounds"), [(1, (38.0, INF)), (2, (50.0, 60.0)), (100, (0.0, 5e-3)), (10, (1e200, INF))]
)
def test_a_shell_that_float64_cannot_represent_is_an_error(n_features, bounds):
    message = "`std_range` .* a probability that float64 can represent, but between .* lies less than 2e-308 in .* feat"
    gmm = GaussianMixture(2, n_features, "spherical")
    with unchanged(gmm), pytest.raises(ValueError, match=message):
        gmm.sample(3, std_range=bounds)


# ---------------------------------------------------------------------------------------------------- the mixture


def test_samples_have_the_moments_of_their_components(family, generator):
    gmm = random_layer(family, generator, n_features=3)
    samples, ids = gmm.sample(60_000, generator=generator)
    assert samples.dtype == torch.float64
    assert ids.dtype == torch.int64
    counts = torch.bincount(ids, minlength=3)
    assert stats.chisquare(counts.numpy(), (60_000 * gmm.weights_).numpy()).pvalue > 1e-3
    for k, matrix in enumerate(dense(gmm.covariance.internal(gmm.covariances_), 3).expand(3, -1, -1)):
        rows = samples[ids == k]
        assert_near(rows.mean(0), gmm.means_[k], 0.06)
        assert_near(rows.mT.cov(), matrix, 0.1 * float(matrix.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_score_as_the_entropy_says(family, dtype, generator):
    """The mean log-density of one Gaussian's samples is minus its entropy."""
    gmm = random_layer(family, generator, n_components=1, n_features=3, dtype=dtype)
    samples, _ = gmm.sample(40_000, generator=generator)
    assert samples.dtype == dtype
    matrix = dense(gmm.covariance.internal(gmm.covariances_).double(), 3)[0]
    entropy = torch.distributions.MultivariateNormal(torch.zeros(3).double(), matrix).entropy()
    assert gmm.score(samples) == pytest.approx(-entropy.item(), abs=4 * (1.5 / 40_000) ** 0.5)


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"confidence": 0.95}, 0.0, (-2 * np.log(0.05)) ** 0.5),
        ({"confidence": 1}, 0.0, INF),
        ({"std_range": (1.0, 2.0)}, 1.0, 2.0),
        ({"std_range": [3, INF]}, 3.0, INF),
        ({"std_range": (0.0, 1e-3)}, 0.0, 1e-3),
    ],
)
def test_restricted_samples_keep_to_their_shell_in_every_direction(family, options, low, high, generator):
    gmm = random_layer(family, generator)
    samples, ids = gmm.sample(3000, generator=generator, **options)
    r = distances(gmm, samples, ids)
    assert ((r > low * (1 - 1e-9)) & (r < high * (1 + 1e-9))).all()
    survival = np.exp(-0.5 * r.numpy() ** 2)
    ends = np.exp(-0.5 * low**2), np.exp(-0.5 * high**2)
    assert stats.kstest((ends[0] - survival) / (ends[0] - ends[1]), "uniform").pvalue > 1e-3
    assert stats.chisquare(torch.bincount(ids, minlength=3).numpy(), (3000 * gmm.weights_).numpy()).pvalue > 1e-3
    root = torch.linalg.cholesky(dense(gmm.covariance.internal(gmm.covariances_), 2)).expand(3, 2, 2)[ids]
    u = torch.linalg.solve_triangular(root, (samples - gmm.means_[ids])[..., None], upper=False).squeeze(-1)
    angle = torch.atan2(u[:, 1], u[:, 0]) / (2 * torch.pi) + 0.5
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 1e-3


def test_one_component_can_be_drawn(family, generator):
    gmm = random_layer(family, generator)
    samples, ids = gmm.sample(2000, component=1, generator=generator)
    assert (ids == 1).all()
    assert_near(samples.mean(0), gmm.means_[1], 0.15)


def test_a_component_of_weight_zero_is_never_drawn(generator):
    gmm = GaussianMixture(4, 1).set_parameters([0.0, 0.5, 0.5, 0.0], [[0.0], [1.0], [2.0], [3.0]], [[[1.0]]] * 4)
    assert set(gmm.sample(5000, generator=generator)[1].tolist()) == {1, 2}


def test_no_sample_is_an_empty_tensor(family):
    samples, ids = GaussianMixture(3, 2, family).sample(0, confidence=0.5)
    assert (samples.shape, ids.shape) == ((0, 2), (0,))


def test_many_features_fit_into_memory():
    """One root for each row of 300 x 300 numbers would take 3.6 GB."""
    samples, _ = GaussianMixture(2, 300).sample(5000)
    assert_near(samples.var(0), torch.ones(300), 0.15)


# ------------------------------------------------------------------------------------------------------ randomness


def test_a_generator_decides_the_draw(family, generator):
    gmm = random_layer(family, generator)
    one, same, other = (gmm.sample(20, generator=generator_of(seed)) for seed in (1, 1, 2))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], other[0])


def test_random_state_decides_the_sequence_of_draws_and_each_differs(generator):
    gmm = random_layer("full", generator, random_state=3)
    twin = copy.deepcopy(gmm)
    draws = [gmm.sample(5)[0] for _ in range(3)]
    assert not torch.equal(draws[0], draws[1])
    for draw in draws:
        assert torch.equal(twin.sample(5)[0], draw)


def test_a_seed_holds_for_the_same_mixture_up_to_rounding(family, generator):
    """As it does on another machine, where a fit differs in its last digits."""
    gmm = random_layer(family, generator, random_state=0)
    near = copy.deepcopy(gmm).set_parameters(gmm.weights_, gmm.means_ + 1e-9, gmm.covariances_ * (1 + 1e-9))
    assert_near(near.sample(50)[0], gmm.sample(50)[0], 1e-7)


def test_a_draw_that_fails_does_not_advance_the_stream(generator):
    gmm = random_layer("full", generator, random_state=0)
    twin = copy.deepcopy(gmm)
    with pytest.raises(ValueError, match="a probability that float64 can represent"):
        gmm.sample(2, std_range=(100.0, 101.0))
    assert torch.equal(gmm.sample(5)[0], twin.sample(5)[0])


def test_without_a_seed_two_mixtures_do_not_share_their_noise():
    layers = (
        GaussianMixture(1, 1).set_parameters([1.0], [[m]], [[[c]]]) for m, c in ((0.0, 1.0), (1.0, 1.0), (0.0, 4.0))
    )
    draws = np.stack([gmm.sample(2000)[0].flatten().numpy() for gmm in layers])
    assert (abs(np.corrcoef(draws)) - np.eye(3) < 0.1).all()


def test_the_stream_goes_on_after_a_copy_a_file_and_a_state(generator, tmp_path):
    gmm = random_layer("full", generator, random_state=0)
    first = gmm.sample(5)[0]
    gmm.save(tmp_path / "m.pth")
    other = GaussianMixture(3, 2, random_state=0, dtype=torch.float64)
    other.load_state_dict(gmm.state_dict())
    twins = [copy.deepcopy(gmm), GaussianMixture.load(tmp_path / "m.pth"), other]
    second = gmm.sample(5)[0]
    assert not torch.equal(first, second)
    for twin in twins:
        assert torch.equal(twin.sample(5)[0], second)


def test_sampling_advances_no_global_generator_and_changes_no_buffer(generator):
    gmm = random_layer("full", generator)
    before, state = copy_of_buffers(gmm), torch.get_rng_state()
    gmm.sample(5, std_range=(1.0, 2.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) or torch.isnan(b).all() for name, b in gmm.named_buffers())


def test_without_random_state_the_seed_of_torch_decides(generator):
    gmm = random_layer("full", generator)
    twin = copy.deepcopy(gmm)
    torch.manual_seed(5)
    one = gmm.sample(4)[0]
    torch.rand(7)  # the seed counts, not how far the generator has gone
    assert torch.equal(twin.sample(4)[0], one)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": -1}, ValueError, "`n` to be at least 0, but got -1"),
        ({"n": 2.0}, TypeError, "`n` to be an integer, but got 2.0"),
        ({"component": 3}, ValueError, "`component` to be at most 2, but got 3"),
        ({"component": -1}, ValueError, "`component` to be at least 0, but got -1"),
        ({"component": 1.0}, TypeError, "`component` to be an integer, but got 1.0"),
        ({"confidence": 0.0}, ValueError, "`confidence` to be above 0 and at most 1, but got 0.0"),
        ({"confidence": 95}, ValueError, "`confidence` to be above 0 and at most 1, but got 95"),
        ({"confidence": "0.95"}, TypeError, "`confidence` to be a number, but got '0.95'"),
        ({"confidence": 0.5, "std_range": (0.0, 1.0)}, ValueError, "`confidence` or `std_range`, but got both"),
        (
            {"std_range": (2.0, 1.0)},
            ValueError,
            r"`std_range` as \(low, high\) with 0 <= low < high, but got \(2.0, 1.0",
        ),
        ({"std_range": (-1.0, 1.0)}, ValueError, r"`std_range` as \(low, high\) with 0 <= low < high, but got \(-1.0"),
        ({"std_range": (1.0, 1.0)}, ValueError, r"`std_range` as \(low, high\) with 0 <= low < high, but got \(1.0"),
        ({"std_range": (float("nan"), 1.0)}, ValueError, r"`std_range` as \(low, high\) with 0 <= low < high"),
        ({"std_range": 2.0}, TypeError, "`std_range` to be a pair of numbers, but got 2.0"),
        ({"std_range": (1.0, None)}, TypeError, r"`std_range` to be a pair of numbers, but got \(1.0, None\)"),
        ({"generator": 0}, TypeError, "`generator` to be a torch.Generator or None, but got int"),
    ],
)
def test_bad_arguments_raise(options, error, message):
    gmm = GaussianMixture(3, 2)
    with unchanged(gmm), pytest.raises(error, match=message):
        gmm.sample(**{"n": 5, **options})
