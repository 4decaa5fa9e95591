"""Rows to fit on: any container, any batches, any order, and the sample that a start is made from."""

import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from dispatch import Largest
from oracles import assert_near, assert_same_buffers, copy_of_buffers, random_layer, unchanged
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from tgmm_nn import GaussianMixture, data, learning
from tgmm_nn.data import BATCH, Rows, gathered
from tgmm_nn.survey import Candidates, look

PARAMETERS = ("weights_", "means_", "covariances_")


@pytest.fixture
def x(generator):
    """Three overlapping clusters, with some rows twice."""
    z = torch.randn(120, 2, generator=generator, dtype=torch.float64)
    z[:40] += torch.tensor([4.0, 0.0])
    z[40:80] *= torch.tensor([0.5, 2.0])
    return torch.cat([z, z[:20]])


@pytest.fixture(autouse=True)
def _several_groups(monkeypatch):
    """Batches of few rows are put together, but not all rows of these tests."""
    monkeypatch.setattr(data, "SMALL", 60)
    monkeypatch.setattr(data, "GATHERED", 60)


@pytest.fixture
def layer(family):
    return partial(GaussianMixture, 3, 2, family, random_state=0, max_iter=500, dtype=torch.float64)


def parameters_of(gmm):
    return tuple(getattr(gmm, name) for name in PARAMETERS)


class Frame:
    """What a data frame offers to NumPy."""

    def __init__(self, x):
        self.x = x

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.x, dtype)


class Stream(IterableDataset):
    """Rows without a length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


class Noisy(Dataset):
    """Rows with noise of every global generator, as augmentation adds it."""

    def __len__(self):
        return 60

    def __getitem__(self, n):
        noise = torch.tensor([random.gauss(0.0, 0.5), np.random.randn() / 2])  # noqa: NPY002
        return torch.tensor([n % 3 * 5.0, 0.0]) + torch.randn(2) + noise.float()


# --------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        Frame,
        lambda x: x.numpy()[::-1],
        lambda x: tuple(map(tuple, x.tolist())),
    ],
    ids=["array", "list", "frame", "reversed array", "tuple"],
)
def test_arrays_and_lists_are_fitted_and_scored_as_tensors_are(layer, convert, x):
    one, other = layer().fit(x), layer().fit(convert(x))
    assert_near(parameters_of(other), parameters_of(one), 1e-10)
    given = convert(x)
    for method in ("predict_proba", "score_samples"):
        assert_near(getattr(other, method)(given), getattr(other, method)(torch.as_tensor(np.array(given))), 1e-14)
    assert other.predict(given).shape == (140,)
    twin = layer().set_parameters(*parameters_of(other))
    other.set_parameters(*parameters_of(other))
    assert_near(other.em_step(given), twin.em_step(torch.as_tensor(np.array(given))))
    assert_same_buffers(other, copy_of_buffers(twin))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint16, torch.float16, torch.bfloat16])
def test_rows_of_any_dtype_are_those_numbers(family, dtype, x):
    whole = (10 * x).abs().round().float()
    one, other = (GaussianMixture(3, 2, family, random_state=0, max_iter=500).fit(r) for r in (whole.to(dtype), whole))
    assert one.means_.dtype == torch.float32
    assert_near(parameters_of(one), parameters_of(other), 1e-6)
    assert one(whole.to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("as_given", [torch.Tensor.clone, torch.Tensor.numpy, partial(DataLoader, batch_size=50)])
def test_integers_that_float32_rounds_have_to_come_in_float64(dtype, as_given, x):
    """Such as times in seconds: all rows could fall onto one point, without a word."""
    whole = (10 * x).round().to(dtype) + 10**9
    gmm = GaussianMixture(3, 2, random_state=0, max_iter=500)
    before = copy_of_buffers(gmm)
    with pytest.raises(
        ValueError, match=r"`x`, which holds torch.int\d\d, to be at most 2\*\*24 .* 10000000\d\d; give"
    ):
        gmm.fit(as_given(whole))
    assert_same_buffers(gmm, before)
    wide = GaussianMixture(3, 2, random_state=0, max_iter=500, dtype="float64").fit(whole)
    twin = GaussianMixture(3, 2, random_state=0, max_iter=500, dtype="float64").fit(whole.double() - 10**9)
    assert wide.lower_bound_ == pytest.approx(twin.lower_bound_, abs=1e-6)
    assert GaussianMixture(1, 1).fit(torch.tensor([[-(2**24)], [2**24]])).means_.item() == 0.0


def test_a_memory_map_is_not_copied_and_not_written(tmp_path, x):
    file = tmp_path / "x.npy"
    np.save(file, x.numpy())
    mapped = np.load(file, mmap_mode="r")
    assert_near(parameters_of(GaussianMixture(3, 2).fit(mapped)), parameters_of(GaussianMixture(3, 2).fit(x)), 1e-7)
    rows = Rows(mapped, None, 2, torch.zeros(1))
    with rows.batches() as batches:
        (batch, *_), *_ = batches
    assert np.shares_memory(batch.numpy(), rows.x)
    assert torch.equal(torch.from_numpy(np.load(file)), x)


def test_more_rows_than_are_looked_at_at_once_are_all_looked_at(generator):
    x = torch.randn(BATCH // 8 + 7, 8, generator=generator)
    x[-1] = torch.nan
    gmm = GaussianMixture(1, 8, "diag", dtype=torch.float64)
    with unchanged(gmm), pytest.raises(ValueError, match="`x` to be finite, but 1 of 7 rows hold nan or infinity"):
        gmm.fit(x)
    gmm.fit(x[:-1])
    assert_near(gmm.means_[0], x[:-1].double().mean(0), 1e-7)
    assert_near(gmm.covariances_[0], x[:-1].double().var(0, correction=0) + 1e-6, 1e-6)


# ---------------------------------------------------------------------------------------------------- weights


def test_integer_weights_are_repeated_rows_in_everything(layer, x, generator):
    times = torch.randint(0, 4, (140,), generator=generator)
    repeated = x.repeat_interleave(times, 0)
    one, other = layer().fit(x, sample_weight=times), layer().fit(repeated)
    assert one.n_iter_ == other.n_iter_
    assert_near(parameters_of(one), parameters_of(other), 1e-11)
    for method in ("score", "bic", "aic", "icl"):
        assert getattr(one, method)(x, sample_weight=times) == pytest.approx(getattr(one, method)(repeated), rel=1e-13)
    assert one.lower_bound_ == pytest.approx(one.score(repeated), rel=1e-12)


def test_weights_of_another_scale_move_nothing_without_priors(layer, x, generator):
    weights = torch.rand(140, generator=generator)
    one, other = (layer().fit(x, sample_weight=w) for w in (weights, (1e-3 * weights).numpy()))
    assert_near(parameters_of(one), parameters_of(other), 1e-6)


@pytest.mark.parametrize("method", ["fit", "initialize", "score", "bic", "aic", "icl"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            torch.ones(139),
            ValueError,
            r"`sample_weight` of shape \(140,\), one number for each row of `x`, but got \(139,\)",
        ),
        (
            -torch.ones(140),
            ValueError,
            "`sample_weight` to be finite and at least 0, but 140 of 140 are negative, nan or",
        ),
        ([float("nan")] + [1.0] * 139, ValueError, "`sample_weight` to be finite and at least 0, but 1 of 140"),
        (torch.zeros(140), ValueError, "Expected `x` with at least .* of positive weight, but got"),
        ("uniform", TypeError, "`sample_weight` to be a tensor, array, list or number"),
    ],
)
def test_bad_weights_raise_and_change_nothing(method, weight, error, message, x, generator):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(error, match=message):
        getattr(gmm, method)(x, sample_weight=weight)


@pytest.mark.parametrize("weight", [1e-50, 1e37, 1e200])
@pytest.mark.parametrize("init_means", ["kmeans", "random"])
def test_weights_out_of_the_range_of_the_rows_are_refused(weight, init_means, x):
    gmm = GaussianMixture(3, 2, init_means=init_means)
    weights = torch.full((140,), weight, dtype=torch.float64)
    with unchanged(gmm), pytest.raises(ValueError, match=r"`sample_weight` in the range of torch\.float32, but got"):
        gmm.fit(x.float(), sample_weight=weights)
    if weight != 1e200:
        wide = GaussianMixture(3, 2, init_means=init_means, dtype=torch.float64, max_iter=500)
        assert wide.fit(x, sample_weight=weights).converged_


# ---------------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_a_loader_gives_the_fit_of_its_rows_in_memory(layer, batch_size, shuffle, x):
    loader = DataLoader(TensorDataset(x, torch.arange(140)), batch_size, shuffle=shuffle)
    one, other = layer().fit(loader), layer().fit(x)
    assert (one.n_iter_, one.converged_) == (other.n_iter_, True)
    assert_near(parameters_of(one), parameters_of(other), 1e-11)
    assert_near(one.lower_bound_, other.lower_bound_, 1e-12)
    started = layer().initialize(loader)
    assert_near(parameters_of(started), parameters_of(layer().initialize(x)), 1e-12)
    for method in ("score", "bic", "aic", "icl"):
        assert getattr(one, method)(loader) == pytest.approx(getattr(one, method)(x), rel=1e-13)
    assert_near(one.statistics(loader).sums(), one.statistics(x).sums(), 1e-11)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.filterwarnings("ignore:EM did not converge")
def test_a_loader_gives_the_fit_of_its_rows_in_memory_in_float32_too(family, offset, x):
    rows = (x + offset).float()
    loader = DataLoader(TensorDataset(rows), 17, shuffle=True)
    one, other = (
        # Where it stopped by the objective, a step more or less would be a matter of rounding.
        GaussianMixture(3, 2, family, random_state=0, max_iter=60, tol=0.0).fit(r)
        for r in (loader, rows)
    )
    assert_near(parameters_of(one), parameters_of(other), 2e-3)
    assert one.lower_bound_ == pytest.approx(other.lower_bound_, abs=1e-4)


@pytest.mark.parametrize("weighted", [False, True])
def test_small_batches_are_put_together_in_their_order_as_far_as_they_are_of_one_kind(weighted, generator):
    sizes = [5, 25, 0, 31, 40, 1, 12, 7, 3]  # of two features each: 60 numbers are 30 rows
    kinds = [torch.float32] * 6 + [torch.int64] * 3
    rows = [(9 * torch.randn(n, 2, generator=generator)).to(kind) for n, kind in zip(sizes, kinds, strict=True)]
    weights = [torch.rand(n, generator=generator) if weighted else None for n in sizes]
    if weighted:
        weights[-1] = weights[-1].double()
    groups = list(gathered(zip(rows, weights, strict=True)))
    places = [[0, 1], [2], [3], [4], [5], *([[6, 7], [8]] if weighted else [[6, 7, 8]])]
    assert groups[3][0] is rows[4]  # what is large enough is not copied
    for (r, w), group in zip(groups, places, strict=True):
        assert torch.equal(r, torch.cat([rows[i] for i in group]))
        assert r.dtype == rows[group[0]].dtype
        assert not weighted or torch.equal(w, torch.cat([weights[i] for i in group]))
        assert not weighted or w.dtype == weights[group[0]].dtype
        assert weighted or w is None


def test_batches_are_put_together_up_to_so_many_numbers(monkeypatch):
    monkeypatch.undo()
    parts = [(torch.zeros(511, 64), None)] * 40 + [(torch.zeros(512, 64), None)] * 2
    assert [len(rows) for rows, _ in gathered(parts)] == [32 * 511, 8 * 511, 512, 512]


def test_a_group_is_given_before_the_batch_after_it_is_read():
    def parts():
        for number in range(4):
            read.append(number)
            yield torch.zeros(15, 2), None

    read = []
    for place, (rows, _) in enumerate(gathered(parts())):
        assert len(rows) == 30
        assert read == list(range(2 * place + 2))


def test_small_batches_are_copied_when_they_come(layer, x):
    """A stream may use their memory again, and a batch may be a small part of a large array."""

    class Ring:
        def __iter__(self):
            places = [torch.empty(4, 2, dtype=x.dtype) for _ in range(3)]
            for number, rows in enumerate(x.split(4)):
                yield places[number % 3].copy_(rows)

    one, other = layer().fit(Ring()), layer().fit(x)
    assert_near(parameters_of(one), parameters_of(other), 1e-11)
    [(rows, weight)] = gathered([(torch.zeros(1000, 8)[:3, :2], torch.zeros(500)[:3])] * 2)
    assert len(rows) == len(weight) == 6
    assert rows.untyped_storage().nbytes() == 4 * 60  # room for a group, not what the parts are views of
    assert weight.untyped_storage().nbytes() == 4 * 30


def test_batches_of_any_dtypes_in_turn_are_a_fit_of_all_their_rows(layer, x):
    kinds = (torch.float32, torch.float64, torch.int32)
    batches = [rows.round().to(kinds[i % 3]) for i, rows in enumerate(x.split(9))]
    one, other = layer().fit({i: rows for i, rows in enumerate(batches)}.values()), layer().fit(x.round())
    assert_near(parameters_of(one), parameters_of(other), 1e-11)


def test_integers_that_float32_rounds_are_refused_wherever_in_a_stream_they_are():
    batches = [torch.randn(5, 2), torch.full((5, 2), 2**24 + 3), torch.randn(5, 2)]
    with pytest.raises(ValueError, match=r"`x`, which holds torch.int64, to be at most 2\*\*24 in size"):
        GaussianMixture(3, 2).fit({i: rows for i, rows in enumerate(batches)}.values())


@pytest.mark.parametrize("change", ["a nan", "a row less"])
def test_a_stream_that_changes_between_passes_is_an_error(change, x, generator):
    class Changing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            rows = x.clone()
            if self.passes > (1 if change == "a row less" else 2):
                rows = rows[1:] if change == "a row less" else rows.index_fill(0, torch.tensor([3]), torch.nan)
            return iter(rows.split(30))

    gmm = random_layer("full", generator)
    with (
        unchanged(gmm),
        pytest.raises(
            ValueError,
            match=r"`x` to give the same rows in each pass, but after one of 140|`x` to be finite, but 1 of 140 rows",
        ),
    ):
        gmm.fit(Changing())


@pytest.mark.parametrize(
    "stream",
    [
        lambda x: DataLoader(Stream(x), 32),
        lambda x: DataLoader(x, 32, num_workers=1),
        lambda x: DataLoader(TensorDataset(x), 32, generator=torch.Generator().manual_seed(1), shuffle=True),
        lambda x: {i: rows for i, rows in enumerate(x.numpy().reshape(14, 10, 2))}.values(),
        lambda x: DataLoader(TensorDataset(x.reshape(14, 10, 2)), 3),
    ],
    ids=["without length", "a worker", "own generator", "any iterable of arrays", "more dimensions"],
)
def test_any_stream_of_batches_will_do(stream, x):
    gmm = partial(GaussianMixture, 3, 2, random_state=0, max_iter=500, dtype=torch.float64)
    assert_near(parameters_of(gmm().fit(stream(x))), parameters_of(gmm().fit(x)), 1e-11)


def test_weights_come_from_the_batches_of_a_stream(layer, x, generator):
    weights = torch.rand(140, generator=generator).double()
    loader = DataLoader(TensorDataset(x, torch.zeros(140), weights), 32, shuffle=True)
    one, other = layer().fit(loader, sample_weight=2), layer().fit(x, sample_weight=weights)
    assert_near(parameters_of(one), parameters_of(other), 1e-11)
    assert one.score(loader, sample_weight=2) == pytest.approx(one.score(x, sample_weight=weights), rel=1e-13)


def test_iterating_a_loader_advances_no_generator(x):
    own = torch.Generator().manual_seed(1)
    loader = DataLoader(TensorDataset(x), 32, shuffle=True, generator=own)
    sampled = DataLoader(TensorDataset(x), 32, sampler=RandomSampler(x, generator=own))
    before = torch.get_rng_state(), own.get_state(), random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    GaussianMixture(3, 2, max_iter=500).fit(loader).score(DataLoader(TensorDataset(x), 32, shuffle=True))
    GaussianMixture(3, 2, max_iter=500).fit(sampled)
    GaussianMixture(3, 2, max_iter=500, reg_covar=0.1).fit(DataLoader(Noisy(), 16))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(own.get_state(), before[1])
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before[2:]  # noqa: NPY002


def test_random_augmentation_is_the_same_in_each_pass():
    """Otherwise EM would climb another likelihood each time; in float64, where rounding takes no step back."""
    options = {"reg_covar": 0.0, "tol": 1e-6, "max_iter": 2000, "dtype": torch.float64}
    gmm = GaussianMixture(3, 2, **options).fit(DataLoader(Noisy(), 16, shuffle=True))
    assert (np.diff(gmm.history_) > -1e-12).all()
    assert gmm.converged_


@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [
        (lambda x: iter([x]), TypeError, "`x` to be iterable more than once, but got list_iterator"),
        (lambda x: (rows for rows in [x]), TypeError, "`x` to be iterable more than once, but got generator"),
        (lambda x: DataLoader(TensorDataset(x[:, :1]), 8), ValueError, r"`x` of shape \(..., 2\) .*, but got \(8, 1\)"),
        (lambda x: DataLoader(TensorDataset(x[:2]), 1), ValueError, "with at least n_components=3 rows, but got 2"),
        (
            lambda x: DataLoader([{"x": row} for row in x], 8),
            TypeError,
            "batches of `x` to be tensors, or tuples .* dict",
        ),
        (
            lambda x: DataLoader(TensorDataset(x * torch.nan), 8),
            ValueError,
            "`x` to be finite, but 24 of 24 rows hold nan",
        ),
        (lambda x: DataLoader(TensorDataset(x * 1e200), 8), ValueError, "`x` small enough that its squares add up in"),
        (lambda x: {}.values(), ValueError, "`x` with at least n_components=3 rows, but got 0"),
        (lambda x: {0: ()}.values(), TypeError, "batches of `x` to be tensors, or tuples whose first element is one"),
    ],
)
def test_streams_that_cannot_be_fitted_raise_and_change_nothing(stream, error, message, x, generator):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(error, match=message):
        gmm.fit(stream(x))


def test_what_needs_rows_at_hand_says_so(x, generator):
    gmm, loader = random_layer("full", generator), DataLoader(TensorDataset(x, torch.ones(140)), 8)
    with unchanged(gmm):
        with pytest.raises(
            TypeError, match="Expected `x` as rows, but got DataLoader; call fit, then predict batch by b"
        ):
            gmm.fit_predict(loader)
        for method in (gmm.predict, gmm.predict_proba, gmm, gmm.em_step):
            with pytest.raises(
                TypeError, match="Expected `x` as rows, but got DataLoader; take its batches one by one"
            ):
                method(loader)
        with pytest.raises(TypeError, match=r"`x` to be a tensor, array, list or number .*, but got {'x': .* \(dict\)"):
            gmm.fit({"x": x})
        with pytest.raises(
            TypeError, match="`sample_weight` to be the index of the weights in the batches of DataLoader, but got T"
        ):
            gmm.fit(loader, sample_weight=torch.ones(140))
        with pytest.raises(ValueError, match="weights at index sample_weight=2, but got 2 elements"):
            gmm.fit(loader, sample_weight=2)
        with pytest.raises(ValueError, match="weights at index sample_weight=1, but got no elements"):
            gmm.fit(DataLoader(x, 8), sample_weight=1)
        with pytest.raises(ValueError, match="`log_prior` only with rows, but got it with a stream"):
            gmm.statistics(loader, log_prior=torch.zeros(140, 3))
    with pytest.raises(ValueError, match="`x` to give at least one batch of rows, but it gave none"):
        gmm.statistics({}.values())


# -------------------------------------------------------------------------------------------------- candidates


def looked_at(x, size, batch_size=None, weights=None):
    rows = Rows(x, weights, x.shape[1], torch.zeros(1, dtype=x.dtype))
    if batch_size is not None:
        rows = Rows(
            DataLoader(TensorDataset(x), batch_size, shuffle=True), None, x.shape[1], torch.zeros(1, dtype=x.dtype)
        )
    return look(rows, size).survey(rows, size, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("whole", [False, True], ids=["real numbers", "integers"])
def test_few_rows_are_all_candidates_sorted_with_their_counts(dtype, whole, generator):
    x = torch.randn(300, 2, generator=generator).to(dtype)
    x = x.round() if whole else x
    found = looked_at(x, 1000).candidates
    rows, counts = torch.unique(x + 0.0, dim=0, return_counts=True)
    assert torch.equal(found.rows, rows)
    assert torch.equal(found.weights, counts.double())


def test_of_many_rows_the_candidates_depend_neither_on_order_nor_on_batches(generator):
    x = torch.randn(1000, 3, generator=generator)
    whole = looked_at(x, 50).candidates
    assert whole.rows.shape == (50, 3)
    for other in (looked_at(x.flip(0), 50), looked_at(x, 50, 7), looked_at(x, 50, 999), looked_at(x.repeat(2, 1), 50)):
        assert torch.equal(other.candidates.rows, whole.rows)
    assert torch.equal(looked_at(x.repeat(2, 1), 50, 7).candidates.weights, 2 * whole.weights)


def test_candidates_are_a_uniform_sample(generator):
    """Their mean and spread are those of all rows, within four standard errors; also for whole numbers in float64."""
    for x in (torch.randn(20_000, 1, generator=generator), torch.arange(20_000.0)[:, None].double()):
        rows = looked_at(x, 2000).candidates.rows.double()
        standard_error = x.std().item() / 2000**0.5
        assert rows.mean().item() == pytest.approx(x.mean().item(), abs=4 * standard_error)
        assert rows.std().item() == pytest.approx(x.std().item(), rel=0.07)


def test_minus_zero_is_zero(generator):
    """Also where a row is chosen by the hash of its bits."""
    assert looked_at(torch.tensor([[0.0], [-0.0]]), 5).candidates.weights.tolist() == [2.0]
    x = torch.randn(1000, 2, generator=generator) * torch.tensor([1.0, 0.0])
    assert torch.equal(looked_at(x, 50).candidates.rows, looked_at(x.abs() * x.sign(), 50).candidates.rows)
    assert torch.equal(looked_at(x, 50).candidates.rows, looked_at(x + 0.0, 50).candidates.rows)


def test_the_scale_of_a_survey_is_the_weighted_standard_deviation(generator):
    x, weights = (
        torch.randn(300, 2, generator=generator).double() * 3 + 1e6,
        torch.rand(300, generator=generator).double(),
    )
    mean = (weights[:, None] * x).sum(0) / weights.sum()
    expected = ((weights[:, None] * (x - mean).square()).sum(0) / weights.sum()).sqrt()
    assert_near(looked_at(x, 10, weights=weights).scale(mean), expected, 1e-9)
    assert_near(looked_at(x, 10, 7).scale(x.mean(0)), x.std(0, correction=0), 1e-9)
    shifted = (x.std(0, correction=0).square() + 9.0).sqrt()
    assert_near(looked_at(x, 10, 7).scale(x.mean(0) + 3.0), shifted, 1e-9)


@pytest.mark.slow
def test_a_start_on_many_rows_is_a_start_on_a_sample(generator):
    """More rows than are candidates: starts from a loader and from memory are the same, and near the clusters."""
    centres = torch.tensor([[-6.0, 0.0], [0.0, 0.0], [6.0, 0.0]])
    x = (centres[torch.arange(60_000) % 3] + torch.randn(60_000, 2, generator=generator)).double()
    options = {"random_state": 0, "dtype": torch.float64}
    one = GaussianMixture(3, 2, **options).initialize(DataLoader(TensorDataset(x), 5000, shuffle=True))
    other = GaussianMixture(3, 2, **options).initialize(x.flip(0))
    assert torch.equal(one.means_, other.means_)
    assert_near(one.means_[one.means_[:, 0].argsort()], centres.double(), 0.1)


def test_many_small_batches_take_no_longer_than_few_large_ones(generator, monkeypatch):
    """The sample is not made anew for each batch."""
    monkeypatch.setattr(data, "SMALL", 0)
    calls = []
    smallest = Candidates.smallest
    monkeypatch.setattr(Candidates, "smallest", lambda self, size: calls.append(len(self.rows)) or smallest(self, size))
    looked_at(torch.randn(1000, 2, generator=generator), 100, 1)
    assert len(calls) <= 11
    assert max(calls) <= 201


# ------------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("method", ["score_samples", "predict", "predict_proba", "em_step", "statistics"])
def test_the_chunk_size_bounds_memory(family, method, generator):
    """Beyond what is returned nothing is larger than a chunk times K d, or the products of a chunk."""
    n, d, k, chunk = 3000, 6, 5, 50
    gmm = random_layer(family, generator, k, d, chunk_size=chunk)
    x = torch.randn(n, d, generator=generator).double()
    with Largest() as largest:  # without no_grad: for rows that need no gradient no graph is kept
        result = getattr(gmm, method)(x)
    returned = result.numel() if isinstance(result, torch.Tensor) else 0
    assert largest.elements <= max(returned, chunk * (k * d + d * d))


def test_a_fit_keeps_no_copy_of_the_rows(family, generator, monkeypatch):
    """What is as large as the rows is looked at in parts of bounded size."""
    monkeypatch.setattr(data, "BATCH", 600)
    monkeypatch.setattr(learning, "n_candidates", lambda n_components: 100)
    x = torch.randn(3000, 6, generator=generator).double()
    gmm = GaussianMixture(3, 6, family, chunk_size=50, max_iter=2, tol=1e9, dtype=torch.float64)
    with Largest() as largest:
        gmm.fit(x)
    assert largest.elements <= 100 * max(3 * 6, 6 * 6)
