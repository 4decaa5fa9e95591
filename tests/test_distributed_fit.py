"""`fit` over ranks is `fit` of one process that has all rows; what fails on one rank raises on all."""

import re
import warnings
from functools import partial

import pytest
import torch
from oracles import assert_near, copy_of_buffers
from test_distributed import FORK_IS_WANTED, on_two_ranks
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture, MixtureClassifier
from tgmm_nn.data import Rows
from tgmm_nn.distributed import is_rank_zero, on_all_ranks, rows_of_each_rank
from tgmm_nn.survey import look

pytestmark = FORK_IS_WANTED

N, D, K = 150, 2, 3


@pytest.fixture
def x(generator):
    """Three clusters, shuffled, some rows twice."""
    z = torch.randn(N - 20, D, generator=generator, dtype=torch.float64)
    z += 4 * torch.eye(K, D, dtype=torch.float64)[torch.arange(len(z)) % K]
    return torch.cat([z, z[:20]])


class Empty:
    """A stream without a batch."""

    def __iter__(self):
        return iter(())


def parts_of(x, cut):
    return x[:cut], x[cut:]


def streamed(rows, batch_size=16):
    return DataLoader(TensorDataset(rows), batch_size) if len(rows) else Empty()


def layer(family="full", **options):
    return GaussianMixture(K, D, family, **{"random_state": 0, "max_iter": 500, "dtype": torch.float64, **options})


def result(gmm):
    return {**copy_of_buffers(gmm), "history": torch.tensor(gmm.history_)}


def assert_all_have(ranks, gmm, tolerance=1e-10):
    """Assert that ranks hold equal bits, and one process's numbers to rounding."""
    for name, value in result(gmm).items():
        torch.testing.assert_close(ranks[0][name], ranks[1][name], rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(ranks[0][name], value, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


# ---------------------------------------------------------------------------------------------- one data set


@pytest.mark.parametrize("cut", [75, 2, N], ids=["halves", "two rows on rank zero", "none on rank one"])
@pytest.mark.parametrize("form", [torch.Tensor.contiguous, streamed], ids=["in memory", "streamed"])
def test_a_fit_on_two_ranks_is_that_of_one_process(form, cut, family, x, tmp_path):
    def fit(rank):
        return result(layer(family).fit(form(parts_of(x, cut)[rank])))

    assert_all_have(on_two_ranks(fit, tmp_path), layer(family).fit(x))


@pytest.mark.parametrize("init_means", ["kmeans", "kpp", "random"])
def test_a_start_on_two_ranks_is_that_of_one_process_whatever_seed_the_other_has(init_means, x, tmp_path):
    def initialize(rank):
        return result(layer(init_means=init_means, random_state=rank).initialize(parts_of(x, 40)[rank]))

    assert_all_have(on_two_ranks(initialize, tmp_path), layer(init_means=init_means).initialize(x))


OPTIONS = {
    "priors": {"mean_prior": 1.0, "mean_precision_prior": 3.0, "weight_concentration_prior": 2.0},
    "classification": {"cem": True},
    "restarts": {"n_init": 3, "init_means": "random"},
    "given": {"init_means": [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], "init_weights": "kmeans", "init_covariances": "eye"},
    "float32": {"dtype": torch.float32},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_means_over_ranks_what_it_means_alone(name, x, tmp_path):
    """Priors enter once, not once for each rank; weights weigh; the best of the starts is the same on all."""
    weight = torch.rand(N, generator=torch.Generator().manual_seed(1)).round(decimals=1)  # some are zero

    def fit(rank):
        rows, of_rows = parts_of(x, 60)[rank], parts_of(weight, 60)[rank]
        return result(layer(**OPTIONS[name]).fit(rows, sample_weight=of_rows))

    tolerance = 1e-4 if name == "float32" else 1e-9
    assert_all_have(on_two_ranks(fit, tmp_path), layer(**OPTIONS[name]).fit(x, sample_weight=weight), tolerance)


@pytest.mark.parametrize("cut", [60, N], ids=["both have rows", "none on rank one"])
def test_starts_race_over_the_rows_of_all_ranks_where_each_row_has_its_prior(cut, family, x, generator, tmp_path):
    """Then it is no sample that they race on: a rank's pass sums for all mixtures, and each is added over ranks."""
    log_prior = torch.randn(N, K, generator=generator, dtype=torch.float64)
    options = {"n_init": 3, "init_means": "random"}

    def fit(rank):
        rows, of_rows = parts_of(x, cut)[rank], parts_of(log_prior, cut)[rank]
        return result(layer(family, **options).fit(rows, log_prior=of_rows))

    assert_all_have(on_two_ranks(fit, tmp_path), layer(family, **options).fit(x, log_prior=log_prior), 1e-9)


def test_each_rank_predicts_its_own_rows_and_one_that_asks_fits_alone(x, tmp_path):
    def labels(rank):
        mine = parts_of(x, 60)[rank]
        return layer().fit_predict(mine), layer().fit_predict(mine, sync=False), layer().fit(mine, sync=False).means_

    together, alone, means = zip(*on_two_ranks(labels, tmp_path), strict=True)
    assert torch.equal(torch.cat(together), layer().fit_predict(x))
    for rank, mine in enumerate(parts_of(x, 60)):
        gmm = layer().fit(mine)
        assert torch.equal(alone[rank], gmm.predict(mine))
        assert torch.equal(means[rank], gmm.means_)


def test_a_warm_start_goes_on_from_rank_zero(x, tmp_path):
    """Also where the other rank has another mixture, or none yet."""
    first = layer(max_iter=3, tol=1e9).fit(x)

    def fit(rank):
        gmm = layer(warm_start=True)
        if rank == 0:
            gmm.load_state_dict(first.state_dict())
        return result(gmm.fit(parts_of(x, 60)[rank]))

    alone = layer(warm_start=True)
    alone.load_state_dict(first.state_dict())
    assert_all_have(on_two_ranks(fit, tmp_path), alone.fit(x))


def test_ranks_of_different_dtypes_compute_in_the_wider(x, tmp_path):
    def fit(rank):
        return result(layer(dtype=torch.float32).fit(parts_of(x, 60)[rank].to((torch.float32, torch.float64)[rank])))

    narrow_first = torch.cat([x[:60].float().double(), x[60:]])
    assert_all_have(on_two_ranks(fit, tmp_path), layer(dtype=torch.float32).fit(narrow_first), 1e-5)


@pytest.mark.parametrize("cut", [500, 3, 1000])
def test_candidates_over_ranks_are_exactly_those_of_one_process(cut, tmp_path):
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # rows recur on both ranks
    like = torch.zeros(1)

    def merged(rank):
        data = Rows(parts_of(x, cut)[rank], None, 3, like, shared=True)
        found = look(data, 50).over_ranks(data, 50).survey(data, 50, 1)
        return found.n_rows, found.mean, found.variance, *found.candidates

    rows = Rows(x, None, 3, like)
    one = look(rows, 50).survey(rows, 50, 1)
    for n_rows, mean, variance, rows, weights in on_two_ranks(merged, tmp_path):
        assert n_rows == 1000
        assert torch.equal(rows, one.candidates.rows)
        assert torch.equal(weights, one.candidates.weights)
        assert_near((mean, variance), (one.mean, one.variance), 1e-6)


@pytest.mark.parametrize("method", ["fit", "initialize"])
def test_a_classifier_on_two_ranks_is_that_of_one_process(method, x, tmp_path):
    """One rank holds all rows of a class, the other most of those without a label."""
    y = torch.where(torch.arange(N) % 5 == 0, -1, torch.arange(N) % K)
    order = torch.argsort(y == 2, stable=True)
    x, y = x[order], y[order]
    model = partial(MixtureClassifier, K, D, 2, random_state=0, max_iter=500, dtype=torch.float64)

    def learn(rank):
        one = model()
        getattr(one, method)(parts_of(x, 100)[rank], parts_of(y, 100)[rank])
        return result(one.mixture)

    alone = model()
    getattr(alone, method)(x, y)
    assert_all_have(on_two_ranks(learn, tmp_path), alone.mixture)


# ------------------------------------------------------------------------------------------------------ errors


def said(function):
    """Return the error that a function raises, as text."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Breaking:
    """A stream that fails, or gives other rows, in one of its passes."""

    def __init__(self, x, fault, at):
        self.x, self.fault, self.at, self.passes = x, fault, at, 0

    def __iter__(self):
        self.passes += 1
        x = self.x.clone()
        if self.passes == self.at and self.fault == "nan":
            x[3] = torch.nan
        yield x[:30]
        if self.passes == self.at and self.fault == "raise":
            raise OSError("the disk is gone")
        if self.passes != self.at or self.fault != "fewer":
            yield x[30:]


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize(
    ("fault", "own", "other"),
    [
        ("raise", "OSError: the disk is gone", "RuntimeError: .* but rank 1 failed with OSError: the disk is gone"),
        ("nan", "ValueError: .*`x` to be finite, but 1 of", "RuntimeError: .* rank 1 failed with ValueError: .*finite"),
        ("fewer", "ValueError: .*same rows in each pass", "ValueError: .*same rows in each pass, but after one of"),
    ],
)
def test_what_fails_on_one_rank_raises_on_all_and_changes_nothing(fault, own, other, at, x, tmp_path):
    """In the first pass, in that of the first E-step, and later."""

    def fit(rank):
        gmm = layer(tol=0.0)
        before = copy_of_buffers(gmm)
        stream = Breaking(x[75:], fault, at) if rank else streamed(x[:75])
        error = said(lambda: gmm.fit(stream))
        same = [torch.equal(buffer.nan_to_num(), before[name].nan_to_num()) for name, buffer in gmm.named_buffers()]
        return error, all(same)

    (there, kept), (here, kept_here) = on_two_ranks(fit, tmp_path)
    assert kept
    assert kept_here
    assert re.search(own, here)
    assert re.search(other, there)


@pytest.mark.parametrize("method", ["fit", "initialize", "fit_predict"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(9, D + 1), "of shape .* but got .9, 3."),
        ("rows", "to be a tensor, array, list or number"),
        (torch.full((9, D), torch.nan), "to be finite, but 9 of 9"),
        (torch.full((9, D), 1e200, dtype=torch.float64), "small enough that its squares add up"),
    ],
)
def test_bad_rows_of_one_rank_raise_on_all(method, bad, message, x, tmp_path):
    def fit(rank):
        return said(lambda: getattr(layer(), method)(x if rank else bad))

    here, there = on_two_ranks(fit, tmp_path)
    for error, kind in ((here, "Error"), (there, "RuntimeError: .* rank 0 failed with")):
        with pytest.raises(RuntimeError, match=f"{kind}.*{message}"):
            raise RuntimeError(error)


def test_labels_of_one_rank_that_are_no_classes_raise_on_all(x, tmp_path):
    def fit(rank):
        labels = torch.arange(N) % (K + rank)
        return said(lambda: MixtureClassifier(K, D).fit(x, labels))

    here, there = on_two_ranks(fit, tmp_path)
    assert "ValueError: Expected `y` to hold classes" in there
    assert "rank 1 failed with ValueError: Expected `y`" in here


@pytest.mark.parametrize("option", [{"n_components": 4}, {"covariance_type": "diag"}, {"tol": 0.5}, {"n_init": 2}])
@pytest.mark.parametrize("method", ["fit", "initialize"])
def test_options_that_differ_between_ranks_raise_on_all(method, option, x, tmp_path):
    [name] = option

    def run(rank):
        options = {"n_components": K, "n_features": D, "covariance_type": "full", **(option if rank else {})}
        gmm = GaussianMixture(**options)
        with pytest.raises(ValueError, match=f"Expected all ranks to have the same `{name}`, but got .* on rank 0 and"):
            getattr(gmm, method)(parts_of(x, 75)[rank])
        return torch.tensor(gmm.fitted_)

    assert on_two_ranks(run, tmp_path) == [False, False]


def test_too_few_rows_over_all_ranks_raise_alike(x, tmp_path):
    errors = on_two_ranks(lambda rank: said(lambda: layer().fit(x[rank : rank + 1])), tmp_path)
    assert errors[0] == errors[1]
    assert "`x` with at least n_components=3 rows over all ranks, but got 2" in errors[0]


def test_a_start_that_fails_on_rank_zero_raises_on_all(x, tmp_path, monkeypatch):
    def broken(*args):
        raise MemoryError("too many candidates")

    monkeypatch.setattr("tgmm_nn.initialization.nearest", broken)
    here, there = on_two_ranks(lambda rank: said(lambda: layer().fit(x)), tmp_path)
    assert here == "MemoryError: too many candidates"
    assert "rank 0 failed with MemoryError: too many candidates" in there


# ------------------------------------------------------------------------------------------------ rank zero speaks


def test_rank_zero_alone_prints_and_warns(x, tmp_path, capfd):
    def fit(rank):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layer(verbose=True, max_iter=1, tol=0.0, n_init=2).fit(parts_of(x, 60)[rank])
        return len(caught)

    assert on_two_ranks(fit, tmp_path) == [1, 0]
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("EM")]
    assert [line.split(",")[0] for line in lines][-2:] == ["EM: iteration 0", "EM: iteration 1"]
    assert len(lines) == 4  # two of the race


def test_an_iteration_is_one_message(x, tmp_path, monkeypatch):
    """The sums, with the word that a rank failed among them."""
    messages = []
    all_reduce = torch.distributed.all_reduce
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda flat, *args: messages.append(flat.dtype) or all_reduce(flat, *args)
    )

    def fit(rank):
        found = []
        for n_iter in (2, 7):
            messages.clear()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                layer(max_iter=n_iter, tol=0.0).fit(parts_of(x, 60)[rank])
            found.append(len(messages))
        return found, messages[-1] == torch.float64

    for (short, long), wide in on_two_ranks(fit, tmp_path):
        assert long - short == 5
        assert wide


# ------------------------------------------------------------------------------------------------------ messages


def test_rows_of_each_rank_come_in_the_order_of_ranks(tmp_path):
    def take(rank):
        mine = torch.arange(6.0).reshape(3, 2)[: 3 * rank] + rank
        return [part.clone() for part in rows_of_each_rank(mine)], is_rank_zero()

    for rank, (parts, speaks) in enumerate(on_two_ranks(take, tmp_path)):
        assert [part.tolist() for part in parts] == [[], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]
        assert speaks == (rank == 0)


def test_alone_work_is_done_and_its_error_is_raised_as_it_is():
    assert on_all_ranks(lambda: 3, torch.device("cpu")) == 3
    assert is_rank_zero()
    with pytest.raises(ZeroDivisionError):
        on_all_ranks(lambda: 1 / 0, torch.device("cpu"))
