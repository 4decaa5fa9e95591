"""Rows that are read while EM computes, passes that wait for nothing, and arrays in files that are not copied whole."""

import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from dispatch import HostReads, Largest
from oracles import assert_near, random_layer
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture, data, fitting, learning
from tgmm_nn.data import is_mapped, pieces, read_ahead

SECONDS = 5


def readers():
    """Return the threads that read ahead now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("tgmm_nn.read_ahead")]


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not readers()


@pytest.fixture(autouse=True)
def _as_they_come(monkeypatch):
    """Batches of few rows are not put together, except where a test asks for that."""
    monkeypatch.setattr(data, "SMALL", 0)


@pytest.fixture
def x(generator):
    z = torch.randn(120, 2, generator=generator, dtype=torch.float64)
    return z + 4 * torch.eye(3, 2, dtype=torch.float64)[torch.arange(120) % 3]


# -------------------------------------------------------------------------------------------------- read ahead


class Told:
    """A stream that says which batch it has begun to read, and waits until it may."""

    def __init__(self, n, begun):
        self.n, self.begun = n, begun

    def __iter__(self):
        for number in range(self.n):
            self.begun[number].set()
            yield number


def test_the_next_batch_is_read_while_the_caller_holds_the_last_and_no_further_one():
    begun = [threading.Event() for _ in range(4)]
    for number in (elements := read_ahead(Told(4, begun))):
        assert number == 3 or begun[number + 1].wait(SECONDS)
        if number == 1:
            assert not begun[3].wait(0.05)
            break
    elements.close()


def test_a_fit_reads_the_next_batch_while_it_computes_with_the_last(x, monkeypatch):
    """In every pass the stream gives batch two while the E-step of batch one has not begun to return."""
    begun = threading.Event()

    class Stream:
        def __iter__(self):
            begun.clear()
            yield x[:60]
            begun.set()
            yield x[60:]

    overlapped = []
    expectations = fitting.expectations

    def slow(rows, *args, **how):
        overlapped.append(begun.wait(SECONDS))
        return expectations(rows, *args, **how)

    monkeypatch.setattr(fitting, "expectations", slow)
    gmm = GaussianMixture(3, 2, random_state=0).fit(Stream())
    assert len(overlapped) == 2 * (gmm.n_iter_ + 1)
    assert all(overlapped)


def test_small_batches_are_put_together_while_the_last_group_is_computed_with(x, monkeypatch):
    """The thread that reads does so: as long as an E-step takes it fills the next group, and no further one."""
    monkeypatch.setattr(data, "SMALL", 80)
    monkeypatch.setattr(data, "GATHERED", 80)
    full, passes = threading.Event(), []

    class Stream:
        def __iter__(self):
            full.clear()
            for number, rows in enumerate(x.split(10)):
                if number == 7:
                    full.set()  # four to a group: the second is there
                yield rows

    expectations = fitting.expectations

    def slow(rows, *args, **how):
        passes.append((len(rows), full.wait(SECONDS)))
        return expectations(rows, *args, **how)

    monkeypatch.setattr(fitting, "expectations", slow)
    gmm = GaussianMixture(3, 2, random_state=0).fit(Stream())
    assert passes == [(40, True)] * 3 * (gmm.n_iter_ + 1)


def test_a_loader_with_workers_needs_no_thread(x, monkeypatch):
    names = []
    checked = data.checked
    monkeypatch.setattr("tgmm_nn.survey.checked", lambda *args: names.append(len(readers())) or checked(*args))
    rows = TensorDataset(x)
    GaussianMixture(3, 2).initialize(DataLoader(rows, 30, num_workers=1))
    assert names == [0] * 4
    GaussianMixture(3, 2).initialize(DataLoader(rows, 30))
    assert names[4:] == [1] * 4
    monkeypatch.setattr(data, "SMALL", 2**15)
    GaussianMixture(3, 2).initialize(DataLoader(rows, 30, num_workers=1))
    assert names[8:] == [0]


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt("stop"), KeyError(3)], ids=repr)
def test_an_error_of_a_stream_comes_out_as_it_is_where_its_batch_would_have(error):
    def stream():
        yield 0
        yield 1
        raise error

    seen = []

    def read():
        for element in read_ahead(stream()):
            seen.append(element)  # noqa: PERF402  # those that came before the error

    with pytest.raises(type(error)) as caught:
        read()
    assert caught.value is error
    assert seen == [0, 1]
    assert not readers()


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_a_group_that_is_being_filled_is_not_waited_for(how):
    """Of a slow stream it may take minutes."""
    begun, go_on, read = threading.Event(), threading.Event(), []

    def stream():
        for number in range(1000):
            read.append(number)
            if number == 5:
                begun.set()
                go_on.wait(SECONDS)
            yield number

    def pairs_then_all(elements):
        yield next(elements), next(elements)
        yield list(elements)

    ahead = read_ahead(stream(), pairs_then_all)
    assert next(ahead) == (0, 1)
    assert begun.wait(SECONDS)
    threading.Timer(0.05, go_on.set).start()
    if how == "closed":
        ahead.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            ahead.throw(KeyboardInterrupt)
    assert read == list(range(6))
    assert not readers()


@pytest.mark.parametrize("stream", [3, None], ids=repr)
def test_what_cannot_be_iterated_raises_as_it_does_without_a_thread(stream):
    with pytest.raises(TypeError, match="not iterable"):
        next(read_ahead(stream))


def test_the_thread_ends_where_the_caller_stops_early(x):
    elements = read_ahead(iter(range(10)))
    assert next(elements) == 0
    assert len(readers()) == 1
    elements.close()
    assert not readers()
    gmm = GaussianMixture(3, 2)
    with pytest.raises(ValueError, match=r"of shape \(..., 2\)"):
        gmm.fit(DataLoader(TensorDataset(torch.cat([x, x], 1)), 10))
    assert not readers()


def test_a_stream_that_encodes_on_the_fly_builds_no_graph(x):
    """The thread takes over that `fit` needs no gradient."""
    layer, modes = torch.nn.Linear(2, 2).double(), []

    class Encoded:
        def __iter__(self):
            for rows in x.split(40):
                modes.append(torch.is_grad_enabled())
                yield layer(rows)

    GaussianMixture(3, 2, max_iter=500).fit(Encoded())
    assert not any(modes)
    assert all(rows.requires_grad for rows in read_ahead(Encoded()))


# -------------------------------------------------------------------------------- nothing is read while a pass goes on


def reads_of_passes(monkeypatch, gmm, x, **options):
    """Return how often each pass but the first reads a value of a tensor."""
    found = []
    sum_over = fitting.sum_over

    def counted(*args, **how):
        with HostReads() as reads:
            sums = sum_over(*args, **how)
        found.append(reads.counts.total())
        return sums

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "sum_over", counted)
        gmm.fit(x, **options)
    assert len(found) == gmm.n_iter_ + 1
    return set(found)


@pytest.mark.parametrize("cem", [False, True])
def test_a_pass_over_rows_reads_no_value_of_a_batch(cem, family, x, monkeypatch):
    """What is read at the end of a pass over a stream, as a list of two numbers, the mode does not see."""
    monkeypatch.setattr(data, "BATCH", 80)
    gmm = partial(GaussianMixture, 3, 2, family, random_state=0, max_iter=2, tol=1e9, cem=cem, chunk_size=15)
    weights = torch.rand(120, generator=torch.Generator().manual_seed(0))
    assert reads_of_passes(monkeypatch, gmm(), x, sample_weight=weights) == {0}
    loader = DataLoader(TensorDataset(x, weights), 20)
    assert reads_of_passes(monkeypatch, gmm(), loader) == {0}
    assert reads_of_passes(monkeypatch, gmm(), loader, sample_weight=1) == {0}


def test_between_passes_the_host_reads_as_often_for_many_batches_as_for_few(x):
    def reads(batch_size, max_iter):
        gmm = GaussianMixture(3, 2, random_state=0, max_iter=max_iter, tol=0.0)
        with HostReads() as found, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gmm.fit(DataLoader(TensorDataset(x), batch_size))
        return found.counts.total()

    of_iteration = [reads(batch_size, 3) - reads(batch_size, 2) for batch_size in (20, 120)]
    assert of_iteration[0] == of_iteration[1] <= 7


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_row_of_a_later_pass_raises_at_the_end_of_that_pass(value, x):
    class Changing:
        passes = rows = 0

        def __iter__(self):
            self.passes += 1
            for number, rows in enumerate(x.split(20)):
                self.rows += len(rows)
                bad = self.passes == 2 and number < 2
                yield rows.index_fill(0, torch.tensor([3, 7]), value) if bad else rows

    stream = Changing()
    with pytest.raises(ValueError, match="`x` to be finite, but 4 of 120 rows hold nan or infinity"):
        GaussianMixture(3, 2).fit(stream)
    assert (stream.passes, stream.rows) == (2, 240)


def test_a_bad_weight_of_a_later_pass_raises_at_its_end(x):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            weights = torch.ones(120)
            weights[5] = -1.0 if self.passes == 2 else 0.0
            yield from zip(x.split(20), weights.split(20), strict=True)

    with pytest.raises(ValueError, match="`sample_weight` to be finite and at least 0, but 1 of 120 are negative"):
        GaussianMixture(3, 2).fit(Changing(), sample_weight=1)


# ------------------------------------------------------------------------------------------------ arrays in files


KINDS = ["<f4", "<f2", "<f8", "<i2", "<i8", "<u1", ">f4", ">f8", ">i4"]


def in_a_file(folder, x, kind="<f4"):
    np.save(folder / "x.npy", np.asarray(x).astype(kind))
    return np.load(folder / "x.npy", mmap_mode="r")


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_in_a_file_is_fitted_and_scored_as_its_numbers_are(kind, x, tmp_path, monkeypatch):
    """Read-only, of any numbers and byte order; without a warning, which would be an error here."""
    monkeypatch.setattr(data, "BATCH", 50)
    whole = np.asarray(10 * x.abs()).round()
    mapped, rows = in_a_file(tmp_path, whole, kind), torch.from_numpy(whole.astype(kind).astype(kind[1:]))
    assert not mapped.flags.writeable
    one, other = (GaussianMixture(3, 2, random_state=0, max_iter=500).fit(r) for r in (mapped, rows))
    assert_near(one.means_, other.means_, 1e-4)
    for method in ("score_samples", "predict_proba", "predict", "squared_distances"):
        value = getattr(one, method)(mapped)
        assert_near(value, getattr(one, method)(rows), 1e-5)
        assert value.dtype == getattr(one, method)(rows).dtype
    assert one.score(mapped) == pytest.approx(one.score(rows), rel=1e-6)
    assert_near(one.statistics(mapped).sums(), one.statistics(rows).sums(), 1e-3)
    log_prior = torch.zeros(120, 3).index_fill(1, torch.tensor([1]), -torch.inf)
    weights = torch.arange(120.0)
    sums = (one.statistics(r, weights, log_prior).sums() for r in (mapped, rows))
    assert_near(*sums, 1e-3)
    assert_near(one.em_step(mapped), other.em_step(rows), 1e-5)
    assert_near(one.means_, other.means_, 1e-4)


@pytest.mark.parametrize("kind", ["<f4", "<f2", "<f8", "<i8", ">f4"])
@pytest.mark.parametrize("part", ["whole", "a part of the columns", "every other row"])
def test_an_array_in_a_file_is_never_copied_whole(kind, part, tmp_path, monkeypatch):
    """No tensor is made that is larger than a batch times a few numbers for each of its own, in any pass."""
    n, d = 12_000, 4
    monkeypatch.setattr(data, "BATCH", 800)
    monkeypatch.setattr(learning, "n_candidates", lambda n_components: 100)
    generator = np.random.default_rng(0)
    mapped = in_a_file(tmp_path, 9 * generator.random((n, 2 * d)), kind)
    mapped = {
        "whole": mapped[:, :d],
        "a part of the columns": mapped[:, 3 : 3 + d],
        "every other row": mapped[::2, ::2],
    }[part]
    gmm = GaussianMixture(2, d, "diag", random_state=0, max_iter=1, tol=1e9)
    copies = []
    contiguous = np.ascontiguousarray
    monkeypatch.setattr(np, "ascontiguousarray", lambda a, **how: copies.append(a.size) or contiguous(a, **how))
    with Largest() as largest:
        gmm.fit(mapped)
        gmm.em_step(mapped)
        gmm.score(mapped)
    assert max(copies) <= 800
    assert largest.bytes <= 32 * 800 < n * d
    with Largest() as largest:
        gmm.score_samples(mapped)
    assert largest.bytes <= 8 * n  # what is returned
    assert max(copies) <= 800


@pytest.mark.parametrize(
    ("shape", "kind", "error", "message"),
    [
        ((20, 3), "<f4", ValueError, r"`x` of shape \(..., 2\) for a mixture of 2 features, but got \(20, 3\)"),
        ((20, 2), "<c8", TypeError, "`x` to be a tensor, array, list or number that holds real numbers, but got"),
        ((2, 2), "<f4", ValueError, "`x` with at least n_components=3 rows, but got 2"),
    ],
)
def test_an_array_in_a_file_that_cannot_be_fitted_raises(shape, kind, error, message, tmp_path):
    mapped = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", kind, shape)
    with pytest.raises(error, match=message):
        GaussianMixture(3, 2).fit(mapped)


@pytest.mark.parametrize("shape", [(1, 2), (7, 5, 2), (40, 2)])
def test_pieces_are_the_whole_in_its_order(shape, tmp_path, monkeypatch, generator):
    monkeypatch.setattr(data, "BATCH", 12)
    file = tmp_path / "x.dat"
    mapped = np.memmap(file, "<f8", "w+", shape=shape)
    mapped[...] = torch.randn(shape, generator=generator)
    assert is_mapped(mapped)
    parts = list(pieces(mapped))
    assert np.array_equal(np.concatenate(parts), mapped)
    assert max(part.size for part in parts) <= 12
    gmm = random_layer("full", generator)
    assert_near(gmm(mapped), gmm(torch.from_numpy(np.array(mapped))))


def test_an_array_without_rows_is_not_taken_for_a_file(x):
    assert not is_mapped(x.numpy())
    assert not is_mapped(x)


def test_an_array_in_a_file_may_be_read_backwards(x, tmp_path):
    mapped = in_a_file(tmp_path, x)[::-1]
    one, other = (GaussianMixture(3, 2, random_state=0, max_iter=500).fit(rows) for rows in (mapped, x.flip(0)))
    torch.testing.assert_close(one.means_, other.means_)


# --------------------------------------------------------------------------------------- memory, beside rows and result


@pytest.mark.parametrize("what", ["em_step", "statistics", "forward", "score_samples", "predict", "backward"])
def test_what_a_pass_forms_is_of_the_size_of_a_chunk_and_not_of_the_rows(what, family, generator):
    """Beside a gradient of the size of the rows: of these, all responsibilities would be 400,000 numbers."""
    gmm = GaussianMixture(10, 8, family).set_parameters(
        torch.full((10,), 0.1), 3 * torch.randn(10, 8, generator=generator), GaussianMixture(10, 8, family).covariances_
    )
    gmm.chunk_size, x = 1000, torch.randn(40_000, 8, generator=generator)
    allowed = x.numel() if what == "backward" else 1000 * 10 * 8
    with Largest() as largest:
        if what == "backward":
            gmm(x.requires_grad_()).sum().backward()
        else:
            getattr(gmm, what)(x)
    assert largest.bytes <= allowed * 8
