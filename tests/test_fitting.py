"""`fit`: EM to convergence, against scikit-learn and against the layer's own density."""

import copy
import pickle
import random
import re
import subprocess
import sys
import warnings
from functools import partial
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from oracles import assert_near, assert_same_buffers, copy_of_buffers, random_layer, unchanged
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as SklearnGaussianMixture
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture, fitting, learning, racing
from tgmm_nn.maximization import Learned

SKLEARN = {"full": "full", "diag": "diag", "spherical": "spherical", "tied_full": "tied"}
TO_THE_END = pytest.mark.filterwarnings(
    "ignore:EM did not converge|The means of .* are rounded|The rows of .* lie in a plane|EM left out:UserWarning"
)


@pytest.fixture
def clusters(generator):
    """Three overlapping clusters of 100 rows each, of different shape."""
    z = torch.randn(3, 100, 2, generator=generator, dtype=torch.float64)
    z[1] = z[1] * torch.tensor([2.0, 0.5]) + torch.tensor([4.0, 0.0])
    z[2] = z[2] @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double() + torch.tensor([2.0, 3.0])
    return z.reshape(-1, 2)


def parameters_of(gmm):
    return gmm.weights_, gmm.means_, gmm.covariances_


def sklearn_from(gmm, x, n_iter):
    """Return what scikit-learn has after ``n_iter`` steps from the layer's parameters."""
    precisions = (
        torch.linalg.inv(gmm.covariances_)
        if gmm.covariances_.ndim > 1 and gmm.covariance_type != "diag"
        else 1 / gmm.covariances_
    )
    model = SklearnGaussianMixture(
        gmm.n_components,
        covariance_type=SKLEARN[gmm.covariance_type],
        weights_init=gmm.weights_.numpy(),
        means_init=gmm.means_.numpy(),
        precisions_init=precisions.numpy(),
        max_iter=n_iter,
        tol=0.0,
        reg_covar=gmm.reg_covar,
    )
    with pytest.warns(ConvergenceWarning):
        model.fit(x.numpy())
    return model


# -------------------------------------------------------------------------------------------------- scikit-learn


@pytest.mark.parametrize("reg_covar", [0.0, 1e-2])
@pytest.mark.parametrize("family", SKLEARN)
def test_25_steps_are_those_of_scikit_learn(family, reg_covar, clusters, generator):
    gmm = random_layer(family, generator, reg_covar=reg_covar)
    oracle = sklearn_from(gmm, clusters, 25)
    for _ in range(25):
        gmm.em_step(clusters)
    expected = (oracle.weights_, oracle.means_, oracle.covariances_)
    assert_near(parameters_of(gmm), tuple(map(torch.from_numpy, expected)), 1e-12)
    assert_near(gmm(clusters), torch.from_numpy(oracle.score_samples(clusters.numpy())), 1e-12)
    assert_near(gmm.predict_proba(clusters), torch.from_numpy(oracle.predict_proba(clusters.numpy())), 1e-12)


@TO_THE_END
@pytest.mark.parametrize("family", SKLEARN)
def test_fit_of_25_iterations_is_that_of_scikit_learn(family, clusters):
    options = {"random_state": 0, "dtype": torch.float64}
    start = GaussianMixture(3, 2, family, **options).initialize(clusters)
    oracle = sklearn_from(start, clusters, 25)
    gmm = GaussianMixture(3, 2, family, max_iter=25, tol=0.0, **options).fit(clusters)
    expected = (oracle.weights_, oracle.means_, oracle.covariances_)
    assert_near(parameters_of(gmm), tuple(map(torch.from_numpy, expected)), 1e-12)
    assert gmm.n_iter_ == 25
    assert gmm.n_parameters == oracle._n_parameters()


# -------------------------------------------------------------------------------------------------- convergence


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_history_never_falls_without_regularisation(family, dtype, clusters):
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, tol=1e-6, max_iter=500, dtype=dtype).fit(clusters.to(dtype))
    change = torch.tensor(gmm.history_).double().diff()
    assert (change > -(1e-13 if dtype == torch.float64 else 1e-6)).all()
    assert gmm.history_[-1] > gmm.history_[0] + 1e-4


def test_what_fit_reports_is_true_of_the_final_parameters(family, clusters):
    gmm = GaussianMixture(3, 2, family, tol=1e-5, max_iter=500, dtype=torch.float64).fit(clusters)
    assert gmm.lower_bound_ == gmm.objective_ == gmm.history_[-1]
    assert gmm.lower_bound_ == pytest.approx(gmm.score(clusters), abs=1e-13)
    assert gmm.n_iter_ == len(gmm.history_) - 1
    assert gmm.converged_
    assert gmm.fitted_
    *_, before, last = gmm.history_
    assert abs(last - before) < 1e-5
    assert (abs(np.diff(gmm.history_[:-1])) >= 1e-5).all()


@TO_THE_END
def test_a_fit_that_was_cut_short_is_fewer_steps_of_the_same_path(family, clusters):
    gmm = partial(GaussianMixture, 3, 2, family, tol=0.0, random_state=0, dtype=torch.float64)
    long, short = gmm(max_iter=9).fit(clusters), gmm(max_iter=4).fit(clusters)
    assert short.history_ == long.history_[:5]
    assert (short.n_iter_, long.n_iter_) == (4, 9)
    stepped = gmm(max_iter=4).initialize(clusters)
    for _ in range(4):
        stepped.em_step(clusters)
    assert_near(parameters_of(short), parameters_of(stepped), 1e-12)


def test_a_fit_that_does_not_converge_warns_and_says_so(clusters):
    gmm = GaussianMixture(3, 2, max_iter=2, tol=1e-9)
    message = (
        r"EM did not converge in max_iter=2 iterations \(last change of the objective: .* nats per row, tol=1e-09\); "
    )
    with pytest.warns(UserWarning, match=message):
        gmm.fit(clusters)
    assert not gmm.converged_
    assert gmm.n_iter_ == 2
    gmm.tol = 1e9
    assert gmm.fit(clusters).converged_
    assert gmm.n_iter_ == 1


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_other_units_take_as_many_iterations_to_the_same_partition(family, scale, clusters):
    gmm = partial(GaussianMixture, 3, 2, family, reg_covar_relative=True, random_state=0, dtype=torch.float64)
    one, other = gmm().fit(clusters), gmm().fit(clusters * scale)
    assert one.n_iter_ == other.n_iter_
    assert_near(one.predict_proba(clusters), other.predict_proba(clusters * scale), 1e-12)


# ----------------------------------------------------------------------------------------- starts and randomness


@pytest.fixture
def kept(monkeypatch):
    """Runs that each decision of a race leaves, best first."""
    rounds, race = [], learning.race

    def noted(*args, **how):
        *rest, report = args
        return race(*rest, lambda runs: rounds.append(runs) or report(runs), **how)

    monkeypatch.setattr(learning, "race", noted)
    return rounds


HARD = {"init_means": "random", "random_state": 5, "dtype": torch.float64, "max_iter": 500}


@pytest.mark.parametrize("cem", [False, True])
def test_a_race_drops_the_poorer_half_by_objective_after_every_round(family, cem, clusters):
    gmm = GaussianMixture(3, 2, family, cem=cem, mean_prior=50.0, mean_precision_prior=3.0, tol=1e-6, **HARD)
    data, found = gmm._survey(clusters, None, sync=True)
    starts = dict(enumerate(start for start, _ in gmm._starts(found, 7, 1)))
    rounds, options = [], gmm._em_options()
    runs = racing.race(starts, data, found, options, rounds.append)
    assert len(rounds[0]) > 2
    assert len(runs) == 1
    for before, after in pairwise(rounds):
        assert len(after) <= (len(before) + 1) // 2
        assert [run.objective for run in after] == sorted((run.objective for run in after), reverse=True)
        of_before = {run.number: run for run in before}
        for run in after:
            assert run.history[: len(of_before[run.number].history)] == of_before[run.number].history
            made = len(run.history) - len(of_before[run.number].history)
            assert made == racing.ROUND or run.is_over(options)
        dropped = [of_before[number].objective for number in set(of_before) - {run.number for run in after}]
        assert dropped or len(before) == 1
    assert 1 <= len(racing.race(starts, data, found, options, rounds.append, left=3)) <= 3


def test_the_kept_start_is_a_run_from_that_start_alone(family, clusters, kept):
    gmm = GaussianMixture(3, 2, family, n_init=4, **HARD).fit(clusters)
    before, after = kept[0], kept[-1]
    [number] = [run.number for run in after]
    alone = GaussianMixture(3, 2, family, **HARD)
    starts = [start for start, _ in alone._starts(alone._survey(clusters, None, sync=True)[1], 4, 1)]
    assert number in [run.number for run in before]
    alone._write(starts[number - 1])
    n_steps = gmm.n_iter_ + sum(len(run.history) - 1 for run in _last_of_each_race(kept))
    for _ in range(n_steps):
        alone.em_step(clusters)
    assert_near(parameters_of(gmm), parameters_of(alone), 1e-9)


def _last_of_each_race(rounds):
    """Return the winner's run in each of the races, whose histories begin anew."""
    [winner] = rounds[-1]
    ends = [i for i, (now, then) in enumerate(pairwise(rounds)) if len(then[0].history) == 1] + [len(rounds) - 1]
    return [next(run for run in rounds[i] if run.number == winner.number) for i in ends]


@TO_THE_END
def test_the_kept_start_goes_on_to_a_hundredth_of_the_tolerance(generator):
    """So that it is no less converged than the best of many whole runs, which stop by chance late."""
    x = torch.randn(600, 2, generator=generator, dtype=torch.float64)
    options = {"init_means": "random", "random_state": 0, "dtype": torch.float64, "tol": 1e-4, "max_iter": 500}
    gmm, one = (GaussianMixture(3, 2, n_init=n, **options).fit(x) for n in (4, 1))
    for goal, fitted in ((1e-6, gmm), (1e-4, one)):
        changes = np.abs(np.diff(fitted.history_))
        assert fitted.converged_
        assert changes[-1] < goal <= changes[:-1].min()


def test_a_run_that_stops_between_its_goal_and_the_tolerance_has_converged(generator):
    x = torch.randn(600, 2, generator=generator, dtype=torch.float64)
    gmm = GaussianMixture(3, 2, init_means="random", random_state=0, dtype=torch.float64, tol=1e-4, max_iter=500)
    data, found = gmm._survey(x, None, sync=True)
    start, options = next(gmm._starts(found, 1, 1))[0], gmm._em_options()
    n_iter = len(fitting.fit_from(start, data, found, options, Mock(), options.tol).history) - 1
    for more, converged in ((3, True), (-1, False)):
        short, told = options._replace(max_iter=n_iter + more), Mock()
        run = fitting.fit_from(start, data, found, short, told, 1e-9)
        assert len(run.history) - 1 == n_iter + more
        assert run.converged == converged
        ends = [call.args[-1] for call in told.call_args_list]
        assert ends == [""] * (n_iter + more) + ["converged" if converged else "stopped"]


def test_starts_that_are_one_are_run_once(kept, generator):
    """K-means of clusters far apart finds the same partition each time."""
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64) + 30 * torch.eye(3, 2).repeat(100, 1).double()
    one, other = (GaussianMixture(3, 2, n_init=n, random_state=0, dtype=torch.float64).fit(x) for n in (1, 6))
    assert [run.number for run in kept[0] if run.number <= 6] == [1]  # those by k-means++ follow
    assert one.objective_ == pytest.approx(other.objective_, abs=1e-9)


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_a_start_whose_objective_is_no_number_loses(bad, clusters, kept, monkeypatch):
    starts_of = GaussianMixture._starts

    def starts(self, *args):
        for number, (start, sums) in enumerate(starts_of(self, *args), start=1):
            yield (start._replace(means=start.means * torch.nan) if number == bad else start), sums

    monkeypatch.setattr(GaussianMixture, "_starts", starts)
    gmm = GaussianMixture(3, 2, n_init=3, init_means="random", random_state=0, max_iter=500).fit(clusters)
    assert np.isfinite(gmm.objective_)
    assert kept[-1][0].number != bad


@pytest.mark.parametrize("init_means", ["kmeans", "kpp", "random"])
def test_a_race_costs_no_pass_over_a_stream_and_its_order_does_not_matter(init_means, clusters, generator):
    """More rows than the sample has: the same rows race wherever they come from."""
    passes = []

    class Stream:
        def __iter__(self):
            passes.append(1)
            return iter(x[torch.randperm(3000, generator=generator)].split(170))

    x = torch.cat([clusters + 1e-3 * torch.randn(300, 2, generator=generator) for _ in range(10)])
    options = {"n_init": 4, "init_means": init_means, "random_state": 1, "max_iter": 500, "dtype": torch.float64}
    fits = [GaussianMixture(3, 2, **options).fit(rows) for rows in (x, x.flip(0), Stream())]
    assert len(passes) == 1 + len(fits[-1].history_)
    for other in fits[1:]:
        assert other.n_iter_ == fits[0].n_iter_
        assert_near(parameters_of(other), parameters_of(fits[0]), 1e-11)


def test_a_race_of_rows_with_a_log_prior_heeds_it(clusters, kept):
    """On all rows, where labels make all starts but those that agree with them poor."""
    log_prior = torch.full((300, 3), -torch.inf, dtype=torch.float64)
    log_prior[torch.arange(300), torch.arange(3).repeat_interleave(100)] = 0.0
    gmm = GaussianMixture(3, 2, n_init=3, init_means="random", random_state=0, dtype=torch.float64)
    gmm.fit(clusters, log_prior=log_prior)
    expected = torch.stack([rows.mean(0) for rows in clusters.split(100)])
    assert_near(gmm.means_, expected, 1e-12)


def test_better_than_one_start(generator):
    """Eight clusters, of which one random start misses some and a race of twenty does not."""
    centres = 4.0 * torch.tensor([[i, j] for i in range(3) for j in range(3) if (i, j) != (1, 1)], dtype=torch.float64)
    x = (centres[:, None] + torch.randn(8, 400, 2, generator=generator).double()).reshape(-1, 2)
    options = {"init_means": "random", "random_state": 3, "dtype": torch.float64, "max_iter": 500}
    one, raced = (GaussianMixture(8, 2, n_init=n, **options).fit(x) for n in (1, 20))
    oracle = SklearnGaussianMixture(8, means_init=centres.numpy(), tol=1e-6).fit(x.numpy())
    assert raced.lower_bound_ == pytest.approx(oracle.score(x.numpy()), abs=1e-3)
    assert one.lower_bound_ < raced.lower_bound_ + 1e-9


@pytest.mark.parametrize("init_means", ["kmeans", "kpp", "random"])
def test_a_seed_decides_the_fit(family, init_means, clusters):
    options = {"init_means": init_means, "n_init": 2, "max_iter": 500}
    one, same = (GaussianMixture(3, 2, family, random_state=3, **options).fit(clusters) for _ in range(2))
    assert_same_buffers(one, copy_of_buffers(same))
    assert one.history_ == same.history_


def test_without_random_state_the_seed_of_torch_decides(clusters):
    def means(seed, random_state=None):
        torch.manual_seed(seed)
        torch.rand(seed + 1)  # the seed counts, not how far the generator has gone
        return GaussianMixture(3, 2, init_means="random", random_state=random_state).initialize(clusters).means_

    assert torch.equal(means(0), means(0))
    assert not torch.equal(means(0), means(1))
    assert torch.equal(means(0), means(1, random_state=0))


@pytest.mark.parametrize("init_means", ["kmeans", "kpp", "random"])
@pytest.mark.parametrize("method", ["fit", "initialize"])
def test_global_generators_are_neither_seeded_nor_advanced(method, init_means, clusters):
    states = [torch.get_rng_state(), pickle.dumps(np.random.get_state()), random.getstate()]  # noqa: NPY002
    getattr(GaussianMixture(3, 2, init_means=init_means), method)(clusters)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [pickle.dumps(np.random.get_state()), random.getstate()] == states[1:]  # noqa: NPY002


def test_the_first_import_of_scikit_learn_does_not_move_python_own_generator():
    """It does by itself, which a process that has imported it cannot show."""
    code = (
        "import random, torch, tgmm_nn; state = random.getstate(); x = torch.arange(10.0)[:, None]; "
        "tgmm_nn.GaussianMixture(2, 1).initialize(x); print(random.getstate() == state)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == ["True"]


@pytest.mark.parametrize("init_means", ["kmeans", "kpp", "random"])
def test_the_order_of_rows_does_not_matter(family, init_means, clusters, generator):
    gmm = partial(GaussianMixture, 3, 2, family, init_means=init_means, tol=1e-6, max_iter=500, dtype=torch.float64)
    shuffled = clusters[torch.randperm(len(clusters), generator=generator)]
    one, other = gmm().fit(clusters), gmm().fit(shuffled)
    assert one.n_iter_ == other.n_iter_
    assert_near(parameters_of(one), parameters_of(other), 1e-12)


# -------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_narrow_data_are_fitted_in_float32(family, dtype, clusters):
    x = (4 * clusters).to(dtype)
    one, other = (GaussianMixture(3, 2, family, max_iter=500).fit(rows) for rows in (x, x.float()))
    assert one.means_.dtype == torch.float32
    assert_same_buffers(one, copy_of_buffers(other))


@TO_THE_END
@pytest.mark.parametrize(("offset", "tolerance"), [(0.0, 5e-6), (1e3, 5e-5), (1e5, 1e-3)])
def test_a_float32_fit_agrees_with_float64_to_the_rounding_of_the_data(family, offset, tolerance, clusters):
    """Also far from zero, where sums about zero would have lost the variances altogether."""
    x = (clusters + offset).float()
    options = {"random_state": 0, "reg_covar": 0.0, "max_iter": 20, "tol": 0.0}
    one, other = (GaussianMixture(3, 2, family, dtype=t, **options).fit(x) for t in (torch.float32, torch.float64))
    scale = max(1.0, float(other.covariances_.abs().max()))
    torch.testing.assert_close(one.covariances_.double(), other.covariances_, rtol=0, atol=tolerance * scale)
    # Means are stored in float32, whose spacing at the offset is 1.2e-7 of it.
    torch.testing.assert_close(one.means_.double(), other.means_, rtol=0, atol=tolerance + 6e-8 * offset)
    assert one.lower_bound_ == pytest.approx(other.lower_bound_, abs=tolerance)


@TO_THE_END
def test_a_float32_fit_of_narrow_clusters_far_apart_is_accurate(family, generator):
    """Sums about one common point, which `fit` uses where it may, would keep three digits of these variances."""
    x = torch.eye(3, 2).repeat(100, 1) + 0.003 * torch.randn(300, 2, generator=generator)
    options = {"random_state": 0, "reg_covar": 0.0, "max_iter": 5, "tol": 0.0}
    one, other = (GaussianMixture(3, 2, family, dtype=t, **options).fit(x) for t in (torch.float32, torch.float64))
    scale = float(other.covariances_.abs().max())
    assert_near(one.covariances_.double() / scale, other.covariances_ / scale, 3e-5)


def test_fit_needs_no_graph_and_leaves_none(family, clusters):
    x = clusters.clone().requires_grad_()
    gmm = GaussianMixture(3, 2, family, max_iter=500).fit(x * 1)
    assert not any(buffer.requires_grad for buffer in gmm.buffers())
    assert x.grad is None
    assert_same_buffers(copy.deepcopy(gmm), copy_of_buffers(pickle.loads(pickle.dumps(gmm))))


def test_fit_predict_is_predict_after_fit(clusters):
    gmm = GaussianMixture(3, 2)
    assert torch.equal(gmm.fit_predict(clusters), gmm.predict(clusters))


def test_fit_does_not_depend_on_the_chunk_size(family, clusters):
    gmm = partial(GaussianMixture, 3, 2, family, max_iter=500, dtype=torch.float64)
    assert_near(parameters_of(gmm(chunk_size=7).fit(clusters)), parameters_of(gmm().fit(clusters)), 1e-12)


@TO_THE_END
@pytest.mark.parametrize("reg_covar", [0.0, 1e-6])
@pytest.mark.parametrize("data", ["one point", "duplicates", "a constant feature", "as many rows as components"])
def test_degenerate_data_leave_the_layer_finite(family, data, reg_covar, clusters):
    x = {
        "one point": torch.ones(20, 2),
        "duplicates": torch.tensor([[0.0, 0.0], [1.0, 2.0]]).repeat(10, 1),
        "a constant feature": torch.cat([clusters[:, :1].float(), torch.ones(300, 1)], 1),
        "as many rows as components": clusters[:3].float(),
    }[data]
    gmm = GaussianMixture(3, 2, family, reg_covar=reg_covar).fit(x)
    for buffer in gmm.buffers():
        assert torch.isfinite(buffer).all()
    assert gmm.weights_.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.isfinite(gmm(x)).all()


@pytest.mark.parametrize("method", ["fit", "initialize", "fit_predict"])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 2), "Expected `x` with at least n_components=3 rows, but got 0"),
        (torch.randn(2, 2), "Expected `x` with at least n_components=3 rows, but got 2"),
        (torch.randn(4, 5, 2), r"Expected `x` of shape \(n, 2\), but got \(4, 5, 2\)"),
        (torch.tensor([[0.0, 1.0]] * 4 + [[torch.nan, 0.0]]), "`x` to be finite, but 1 of 5 rows hold nan or infinity"),
        (
            torch.tensor([[0.0, 1.0]] * 3 + [[torch.inf, 0.0]] * 2),
            "`x` to be finite, but 2 of 5 rows hold nan or infin",
        ),
    ],
)
def test_data_that_cannot_be_fitted_raise_and_change_nothing(method, x, message, generator):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(ValueError, match=message):
        getattr(gmm, method)(x)


@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_rows_whose_squares_overflow_are_refused(family, scale, clusters):
    gmm = GaussianMixture(3, 2, family)
    before = copy_of_buffers(gmm)
    for method in (gmm.fit, gmm.initialize):
        with pytest.raises(ValueError, match="`x` small enough that its squares add up"):
            method((clusters / clusters.abs().max() * scale).float())
    assert_same_buffers(gmm, before)


def test_autocast_does_not_reach_a_fit(family, clusters):
    options = {"random_state": 0, "max_iter": 500}
    x = clusters.float()
    plain = GaussianMixture(3, 2, family, **options).fit(x)
    with torch.autocast("cpu", torch.bfloat16):
        within = GaussianMixture(3, 2, family, **options).fit(x)
        start = GaussianMixture(3, 2, family, **options).initialize(x)
        torch.testing.assert_close(within.covariances_, plain.covariances_, rtol=0, atol=0)
    assert_same_buffers(within, copy_of_buffers(plain))
    assert_same_buffers(start, copy_of_buffers(GaussianMixture(3, 2, family, **options).initialize(x)))


def test_lists_keep_the_digits_of_the_layer():
    gmm = GaussianMixture(1, 1, "diag", dtype=torch.float64).set_parameters([1.0], [[0.1]], [[0.3]])
    assert gmm.means_.item() == 0.1
    assert gmm.covariances_.item() == pytest.approx(0.3, rel=1e-15)


# ------------------------------------------------------------------------------------------- warm start, progress


@TO_THE_END
def test_a_warm_start_goes_on_from_the_mixture_as_it_is(family, clusters):
    options = {"tol": 0.0, "random_state": 0, "n_init": 3, "dtype": torch.float64}
    whole = GaussianMixture(3, 2, family, max_iter=9, **{**options, "n_init": 1}).fit(clusters)
    gmm = GaussianMixture(3, 2, family, max_iter=4, warm_start=True, **{**options, "n_init": 1}).fit(clusters)
    gmm.max_iter = 5
    gmm.fit(clusters)
    assert gmm.n_iter_ == 5
    assert_near(gmm.history_, whole.history_[4:], 1e-12)
    assert_near(parameters_of(gmm), parameters_of(whole), 1e-11)


def test_a_warm_start_of_a_fresh_layer_is_a_start_and_later_ones_are_one_run(clusters, monkeypatch):
    fits = []
    fit_from = learning.fit_from
    monkeypatch.setattr(learning, "fit_from", lambda *args: fits.append(fit_from(*args)) or fits[-1])
    gmm = GaussianMixture(3, 2, warm_start=True, n_init=3, max_iter=500).fit(clusters)
    assert len(fits) == 1
    gmm.fit(clusters)
    assert len(fits) == 2
    assert gmm.n_iter_ <= 2


def test_converged_does_not_survive_a_warm_start_that_did_not(clusters):
    gmm = GaussianMixture(3, 2, warm_start=True, max_iter=500).fit(clusters)
    assert gmm.converged_
    gmm.max_iter, gmm.tol = 1, 0.0
    with pytest.warns(UserWarning, match="EM did not converge"):
        gmm.fit(clusters + 1.0)
    assert not gmm.converged_


def test_given_means_are_run_once_whatever_n_init(clusters, monkeypatch):
    fits = []
    fit_from = learning.fit_from
    monkeypatch.setattr(learning, "fit_from", lambda *args: fits.append(fit_from(*args)) or fits[-1])
    gmm = GaussianMixture(3, 2, init_means=clusters[:3], n_init=5, max_iter=500).fit(clusters)
    assert len(fits) == 1
    once = GaussianMixture(3, 2, init_means=clusters[:3], max_iter=500).fit(clusters)
    assert_same_buffers(gmm, copy_of_buffers(once))


@TO_THE_END
def test_verbose_prints_every_interval_and_the_last(clusters, capsys):
    gmm = GaussianMixture(3, 2, verbose=True, verbose_interval=3, max_iter=7, tol=0.0).fit(clusters)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"EM: iteration {n}" for n in (0, 3, 6, 7)]
    assert lines[0] == f"EM: iteration 0, objective {gmm.history_[0]:.6f} nats per row"
    change = gmm.history_[7] - gmm.history_[6]
    assert lines[-1] == f"EM: iteration 7, objective {gmm.history_[7]:.6f} nats per row, change {change:+.2e}, stopped"


@TO_THE_END
def test_verbose_tells_of_the_race_and_of_the_start_that_is_kept(clusters, capsys):
    options = {"init_means": "random", "n_init": 4, "random_state": 0, "max_iter": 27, "tol": 0.0}
    gmm = GaussianMixture(3, 2, verbose=True, **options).fit(clusters)
    *race, first, _, _, last = capsys.readouterr().out.splitlines()
    pattern = r"EM, race of 4 starts: (\d) left, the best is (\d) with objective .* nats per row"
    assert [int(re.fullmatch(pattern, line)[1]) for line in race] == [4, 2, 1]
    assert first.startswith(f"EM: iteration 0, objective {gmm.history_[0]:.6f}")
    assert last.startswith(f"EM: iteration 27, objective {gmm.objective_:.6f}")
    GaussianMixture(3, 2, verbose="bar", **options).fit(clusters)
    out, err = capsys.readouterr()
    assert out == ""
    assert "EM, race of 4 starts: 100%" in err
    assert "3/3" in err


def test_a_fit_is_silent_unless_asked(clusters, capsys):
    GaussianMixture(3, 2, max_iter=500).fit(clusters)
    assert capsys.readouterr() == ("", "")


@TO_THE_END
def test_a_progress_bar_goes_to_standard_error_and_ends_where_the_fit_does(clusters, capsys):
    GaussianMixture(3, 2, verbose="bar", max_iter=7, tol=0.0).fit(clusters)
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/7" in err
    assert "objective=" in err


def test_not_converging_warns_once_over_all_starts(clusters):
    with pytest.warns(UserWarning, match="EM did not converge") as caught:
        GaussianMixture(3, 2, n_init=4, max_iter=1, tol=0.0).fit(clusters)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="EM did not converge") as caught:
        GaussianMixture(3, 2, max_iter=1, tol=0.0).fit_predict(clusters)
    assert caught[0].filename == __file__


def test_an_interrupted_fit_changes_nothing(clusters, monkeypatch, generator):
    gmm = random_layer("full", generator)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning, "fit_from", interrupted)
    with unchanged(gmm), pytest.raises(KeyboardInterrupt):
        gmm.fit(clusters)


# --------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:EM did not converge")
def test_with_a_relative_ridge_a_fit_in_other_units_is_the_same_but_for_units(family, scale, dtype, clusters):
    options = {"reg_covar": 1e-2, "reg_covar_relative": True, "random_state": 0, "max_iter": 500, "dtype": dtype}
    if dtype == torch.float32:  # in which an objective that hardly changes any more says little of when to stop
        options |= {"max_iter": 30, "tol": 0.0}
    x = clusters.to(dtype)
    one, other = (
        GaussianMixture(3, 2, family, **options).fit(x),
        GaussianMixture(3, 2, family, **options).fit(x * scale),
    )
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert one.n_iter_ == other.n_iter_
    assert_near(other.weights_, one.weights_, tolerance)
    assert_near(other.means_ / scale, one.means_, tolerance)
    assert_near(other.covariances_ / scale**2, one.covariances_, tolerance)
    assert other.lower_bound_ + 2 * np.log(scale) == pytest.approx(one.lower_bound_, abs=tolerance)
    for gmm, rows in ((one, x), (other, x * scale)):
        gmm.em_step(rows[:100], step_size=0.3)
    assert_near(other.means_ / scale, one.means_, tolerance)
    assert_near(other.covariances_ / scale**2, one.covariances_, tolerance)


def test_priors_add_nothing_to_the_relative_ridge(family, clusters, generator):
    """It is a fraction of the variance of the data, which a far prior is not part of."""
    prior = {"mean_prior": 1e3, "mean_precision_prior": 1e-9}
    options = {"reg_covar": 0.5, "reg_covar_relative": True}
    plain, ridged = (
        random_layer(family, torch.Generator().manual_seed(0), **prior, **o) for o in ({"reg_covar": 0.0}, options)
    )
    plain.em_step(clusters)
    ridged.em_step(clusters)
    got = ridged.covariance_matrices() - plain.covariance_matrices()
    expected = 0.5 * clusters.var(0, correction=0).mean() * torch.eye(2).double()
    assert_near(got, expected.expand(3, 2, 2), 1e-9)


# ------------------------------------------------------------------------------------- the limits of a dtype


@pytest.mark.parametrize("covariance_type", ["full", "diag", "spherical", "tied_full", "tied_diag", "tied_spherical"])
def test_a_dead_component_far_away_costs_no_digits(covariance_type):
    """A prior keeps its weight, and with it the mixture's mean, about which moments are taken, far from all rows."""
    generator = torch.Generator().manual_seed(0)
    x, means = torch.randn(2000, 4, generator=generator), torch.randn(6, 4, generator=generator)
    means[0] = 1e5
    options = {"init_means": means, "init_covariances": "eye", "weight_concentration_prior": 50.0, "max_iter": 300}
    fits = [
        GaussianMixture(6, 4, covariance_type, dtype=t, **options).fit(x.to(t)) for t in (torch.float32, torch.float64)
    ]
    assert (np.diff(fits[0].history_) > -2e-4).all()
    # The origin of the moments is some 4e3 away, where float32 resolves 5e-4.
    assert fits[0].score(x.double()) == pytest.approx(fits[1].score(x.double()), abs=2e-2)
    assert fits[0].lower_bound_ == pytest.approx(fits[0].score(x.double()), abs=2e-2)


def test_means_that_the_dtype_rounds_away_are_said(clusters):
    """The rows are in float64, the layer in float32: a warning, and none where the layer is wide enough."""
    x = clusters + 1e8
    with pytest.warns(
        UserWarning,
        match=r"The means of \[0, 1, 2\] are rounded to torch\.float32 by up to .* of their standard deviations",
    ):
        GaussianMixture(3, 2, random_state=0, max_iter=500).fit(x)
    gmm = GaussianMixture(3, 2, random_state=0, max_iter=500, dtype=torch.float64).fit(x)
    assert gmm.lower_bound_ == pytest.approx(gmm.score(x), abs=1e-6)


@pytest.mark.parametrize("scale", [1e30, 1e45, 1e-45])
def test_parameters_out_of_the_range_of_the_layer_raise_and_change_nothing(family, scale, clusters):
    gmm = GaussianMixture(3, 2, family, reg_covar=0.0, max_iter=500)
    message = r"Expected `x` in the range of torch\.float32, but the mixture leaves it; rescale the features"
    for method in (gmm.fit, gmm.initialize):
        with unchanged(gmm), pytest.raises(ValueError, match=message):
            method(clusters * scale)
    wide = GaussianMixture(3, 2, family, reg_covar=0.0, max_iter=500, dtype=torch.float64).fit(clusters * scale)
    assert np.isfinite(wide.score(clusters * scale))


@pytest.mark.parametrize(("mean", "variance"), [(1e300, 1.0), (0.0, 1e-90), (0.0, 1e300)])
def test_given_parameters_out_of_the_range_of_the_layer_raise_and_change_nothing(family, mean, variance):
    gmm = GaussianMixture(1, 1, family)
    covariance = torch.full(gmm.covariances_.shape, variance, dtype=torch.float64)
    with (
        unchanged(gmm),
        pytest.raises(ValueError, match=r"Expected `means` and `covariances` in the range of torch.float32"),
    ):
        gmm.set_parameters([1.0], [[mean]], covariance)


@pytest.mark.parametrize(
    "rows", [lambda x: torch.full_like(x, 3.0), lambda x: x[:, :1].expand(-1, 2)], ids=["a point", "a line"]
)
def test_a_singular_covariance_is_said(rows, clusters):
    gmm = GaussianMixture(1, 2, reg_covar=0.0, dtype=torch.float64)
    with pytest.warns(
        UserWarning, match=r"(?s)The rows of \[0\] \(by component, .*\) lie in a plane or on a point .*`reg_covar`"
    ):
        gmm.fit(rows(clusters))
    GaussianMixture(1, 2, dtype=torch.float64).fit(rows(clusters))  # no warning with the default ridge


@TO_THE_END
def test_rows_that_overflow_are_said(clusters):
    """Of many features, which are whitened in their own dtype."""
    clusters = clusters.repeat(1, 20)
    x = torch.cat([clusters.float(), torch.full((1, 40), 1e16)])
    options = {"init_means": clusters[:3], "init_covariances": 1e-8, "max_iter": 1}
    with pytest.warns(UserWarning, match=r"EM left out 1 rows, whose squared distance .* overflows torch\.float32"):
        GaussianMixture(3, 40, **options).fit(x)
    with pytest.warns(UserWarning, match="EM left out 1 rows"):
        GaussianMixture(3, 40, **options).fit(torch.utils.data.DataLoader(x, 64))


def test_a_singular_covariance_of_float32_rows_is_said():
    """Their sums carry seven digits: a factor may exist by rounding alone."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(500, 3, generator=generator)
        x[:, 2] = 0.3 * x[:, 0] + 0.7 * x[:, 1]
        with pytest.warns(UserWarning, match="lie in a plane or on a point to the precision of torch.float32"):
            GaussianMixture(1, 3, reg_covar=0.0).fit(x)


@pytest.mark.parametrize("n_features", [2, 50, 300])
def test_an_ill_conditioned_covariance_is_valid(n_features):
    """Features of other units, and strongly correlated ones: nothing is refused, lifted or warned of."""
    i = torch.arange(n_features, dtype=torch.float64)
    scale = torch.logspace(-3, 3, n_features, dtype=torch.float64)
    matrix = 0.999 ** (i[:, None] - i).abs() * scale[:, None] * scale
    gmm = GaussianMixture(1, n_features, dtype=torch.float64).set_parameters(
        [1.0], torch.zeros(1, n_features), matrix[None]
    )
    assert_near(gmm.covariances_[0] / (scale[:, None] * scale), matrix / (scale[:, None] * scale), 1e-9)
    samples, _ = gmm.sample(3 * n_features, generator=torch.Generator().manual_seed(0))
    gmm.reg_covar = 0.0
    gmm.fit(samples)
    centred = samples - samples.mean(0)
    expected = centred.mT @ centred / len(samples) / (scale[:, None] * scale)
    assert_near(gmm.covariances_[0] / (scale[:, None] * scale), expected, 1e-6)


@TO_THE_END
@pytest.mark.parametrize("cem", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_objective_does_not_fall_where_a_component_has_too_few_rows(cem, seed):
    """Rounding may make a singular covariance look positive in one step and not in the next."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(40, 3, generator=generator), torch.randn(3, 3, generator=generator) + 20]).double()
    gmm = GaussianMixture(2, 3, cem=cem, reg_covar=0.0, dtype=torch.float64, random_state=0, max_iter=200).fit(x)
    assert (np.diff(gmm.history_) > -1e-6).all()


def test_an_objective_that_fell_says_what_to_do(clusters, monkeypatch):
    fit_from = learning.fit_from
    fallen = lambda *args: (fit := fit_from(*args))._replace(history=[*fit.history, -99.0], converged=False)  # noqa: E731
    monkeypatch.setattr(learning, "fit_from", fallen)
    with pytest.warns(UserWarning, match="it fell: raise `reg_covar`"):
        GaussianMixture(3, 2, max_iter=500).fit(clusters)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("max_iter", "a", TypeError),
        ("tol", -1.0, ValueError),
        ("reg_covar", -5.0, ValueError),
        ("chunk_size", -5, ValueError),
        ("cem", 1, TypeError),
        ("verbose", "no", TypeError),
        ("random_state", 0.5, TypeError),
    ],
)
def test_options_that_are_changed_are_checked(option, value, error):
    gmm = GaussianMixture(3, 2)
    before = getattr(gmm, option)
    with pytest.raises(error, match=f"`{option}`"):
        setattr(gmm, option, value)
    assert getattr(gmm, option) == before


def test_numbers_of_numpy_are_kept_as_those_of_python(clusters):
    options = {"chunk_size": np.int64(10), "tol": np.float32(0.5), "n_init": np.int32(2), "random_state": np.int64(3)}
    gmm = GaussianMixture(3, 2, **options, reg_covar=np.float64(1e-3)).fit(clusters)
    gmm.em_step(clusters)
    gmm(clusters)
    assert [type(getattr(gmm, name)) for name in (*options, "reg_covar")] == [int, float, int, int, float]


@pytest.mark.parametrize("name", ["n_components", "n_features", "covariance_type", "priors"])
def test_what_shapes_the_layer_cannot_be_changed(name):
    gmm = GaussianMixture(3, 2)
    with pytest.raises(AttributeError):
        setattr(gmm, name, getattr(gmm, name))


def test_fit_takes_a_log_prior_of_rows_and_what_may_move(family, generator):
    """Rows of which a half is known to belong to component 0; and frozen covariances stay those of the start."""
    x = torch.cat([torch.randn(60, 2, generator=generator) - 3, torch.randn(60, 2, generator=generator) + 3]).double()
    log_prior = torch.zeros(120, 2, dtype=torch.float64)
    log_prior[:30, 1] = -torch.inf
    how = {"init_means": [[-3.0, -3.0], [3.0, 3.0]], "dtype": "float64", "max_iter": 500, "tol": 1e-10}
    gmm = GaussianMixture(2, 2, family, **how).fit(x, log_prior=log_prior)
    before = [p.clone() for p in gmm.mixture()]
    gmm.em_step(x, log_prior=log_prior)
    for one, other in zip(before, gmm.mixture(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # a fixed point of the step by hand
    assert bool((gmm.predict(x[:30]) == 0).all())
    fixed = GaussianMixture(2, 2, family, init_covariances="eye", **how)
    fixed.fit(x, learned=Learned.from_options(2, ["weights", "means"]))
    identity = fixed.covariance.public(fixed.covariance.identity(2, 2, fixed.running_second))
    torch.testing.assert_close(fixed.covariances_, identity, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="Expected `log_prior` only with rows in memory"):
        gmm.fit(DataLoader(TensorDataset(x)), log_prior=log_prior)
    with pytest.raises(ValueError, match=r"`log_prior` of shape \(120, 2\)"):
        gmm.fit(x, log_prior=log_prior[:3])


@TO_THE_END
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_component_that_collapses_in_one_step_is_found_where_moments_would_round_it_away(family, dtype, generator):
    """Half of the rows lie within .001, the others 30 away: from equal covariances the first step has to resolve it."""
    x = torch.cat([0.001 * torch.randn(300, 2, generator=generator), 30 + 3 * torch.randn(300, 2, generator=generator)])
    options = {"init_covariances": "global", "random_state": 0, "max_iter": 50}
    gmm = GaussianMixture(2, 2, family, dtype=dtype, **options).fit(x.to(dtype))
    kind = {"full": "full", "tied_full": "tied", "diag": "diag", "spherical": "spherical"}.get(family)
    if kind:
        start = {"means_init": gmm.means_.double().numpy(), "tol": 1e-8, "max_iter": 500}
        oracle = SklearnGaussianMixture(2, covariance_type=kind, **start).fit(x.double().numpy())
        assert gmm.lower_bound_ == pytest.approx(oracle.score(x.double().numpy()), abs=1e-3)
    assert gmm.score(x) == pytest.approx(gmm.lower_bound_, abs=1e-4)


# ------------------------------------------------------------------------------------------- which form an E-step takes


@pytest.mark.parametrize(
    ("d", "n_components", "sd", "moments"),
    [
        (4, 3, 1.0, True),
        (4, 3, 1e-3, False),  # the range is 1e6 variances: float32 has no digits for its square
        (20, 1, 1.0, True),  # by blocks: a row has 231 moments, where whitening forms 20 numbers
        (100, 60, 1.0, True),  # by blocks: too many moments to be formed
    ],
)
def test_fit_takes_moments_where_the_conditioning_allows(d, n_components, sd, moments, generator, monkeypatch):
    taken, expectations = set(), fitting.expectations

    def noted(*args, moments, **how):
        taken.add(moments)
        return expectations(*args, moments=moments, **how)

    monkeypatch.setattr(fitting, "expectations", noted)
    means = torch.randn(n_components, d, generator=generator)
    x = means.repeat(10, 1) + sd * torch.randn(10 * n_components, d, generator=generator)
    options = {"init_means": means, "init_covariances": sd**2, "reg_covar": sd**2}
    gmm = GaussianMixture(n_components, d, **options, max_iter=1, tol=1e9)
    gmm.fit(x)
    assert taken == {moments}


def test_of_starts_that_are_equal_but_for_rounding_the_first_wins(generator):
    x = torch.randn(300, 2, generator=generator) + 30 * torch.eye(3, 2).repeat(100, 1)
    fits = [
        GaussianMixture(3, 2, n_init=4, random_state=0, chunk_size=size, dtype=dtype).fit(x)
        for size, dtype in ((None, torch.float32), (17, torch.float32), (None, torch.float64))
    ]
    for other in fits[1:]:
        torch.testing.assert_close(other.means_.double(), fits[0].means_.double(), rtol=0, atol=1e-4)


def test_a_race_weighs_priors_against_all_rows(generator, monkeypatch):
    """Although it looks at a sample of them."""
    totals, expectations = set(), fitting.expectations

    def noted(rows, mixtures, covariance, weight, log_prior, **how):
        totals.add(None if weight is None else round(float(weight.sum())))
        return expectations(rows, mixtures, covariance, weight, log_prior, **how)

    monkeypatch.setattr(fitting, "expectations", noted)
    x = torch.randn(30_000, 1, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        GaussianMixture(2, 1, n_init=2, max_iter=1).fit(x)
    assert totals == {None, 30_000}
