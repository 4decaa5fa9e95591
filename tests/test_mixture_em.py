"""`em_step`, `statistics` and `maximize`: one update without gradient, exact or on a minibatch."""

import copy
import math
from functools import partial

import pytest
import torch
from dispatch import HostReads
from oracles import assert_near, assert_same_buffers, copy_of_buffers, random_layer, unchanged

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES

PARAMETERS = ("weights_", "means_", "factor_")
SUMS = ("running_count", "running_first", "running_second")
pytestmark = pytest.mark.usefixtures("either_form")

STEP_SIZES = pytest.mark.parametrize("step_size", [None, 0.5], ids=["exact", "minibatch"])


@pytest.fixture
def layer(family, generator):
    """Make layers of one family, set to random mixtures of 3 components in 2 features."""
    return partial(random_layer, family, generator, reg_covar=0.0)


@pytest.fixture
def rows(generator):
    """Draw rows in the region of the random mixtures."""
    return lambda *shape, loc=0.0: loc + 2 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64)


def parameters_of(gmm):
    return [getattr(gmm, name).clone() for name in PARAMETERS]


def about_zero(statistics):
    """Return count, first and second moment about zero, per unit of weight."""
    return statistics.about(torch.zeros(2).double()).scale(1 / statistics.weight()).sums()[:3]


# --------------------------------------------------------------------------------------------------- exact EM


@STEP_SIZES
def test_em_step_returns_the_mean_log_likelihood_before_it(layer, rows, step_size):
    gmm, x, weight = layer(), rows(30), torch.arange(30.0).double()
    before = gmm(x)
    value = gmm.em_step(x, step_size=step_size)
    assert value.shape == ()
    assert_near(value, before.mean())
    before = gmm(x)
    assert_near(gmm.em_step(x, weight, step_size), (weight * before).sum() / weight.sum())


def test_em_step_never_lowers_the_likelihood(layer, rows):
    gmm, x = layer(), rows(80)
    values = torch.stack([gmm.em_step(x) for _ in range(30)])
    assert (values.diff() > -1e-13).all()
    assert values[-1] > values[0] + 0.01


def test_em_step_is_maximize_of_statistics(layer, rows):
    gmm, x = layer(), rows(30)
    twin = copy.deepcopy(gmm)
    gmm.em_step(x)
    twin.maximize(twin.statistics(x))
    assert_same_buffers(gmm, copy_of_buffers(twin), but=("n_updates",))
    assert (gmm.n_updates, twin.n_updates) == (1, 0)


def test_a_fresh_layer_is_fitted_after_an_update(family, rows):
    gmm = GaussianMixture(3, 2, family)
    gmm.em_step(rows(30))
    assert gmm.fitted_


@STEP_SIZES
def test_leading_dimensions_of_x_and_of_its_weights_are_rows(layer, rows, step_size):
    gmm, x, weight = layer(), rows(4, 5), torch.rand(4, 5).double()
    twin = copy.deepcopy(gmm)
    gmm.em_step(x, weight, step_size)
    twin.em_step(x.reshape(20, 2), weight.reshape(20), step_size)
    assert_same_buffers(gmm, copy_of_buffers(twin))


@STEP_SIZES
def test_em_step_does_not_depend_on_the_chunk_size(layer, rows, step_size):
    gmm, x = layer(chunk_size=7), rows(30)
    twin = copy.deepcopy(gmm)
    twin.chunk_size = None
    gmm.em_step(x, step_size=step_size)
    twin.em_step(x, step_size=step_size)
    assert_near(parameters_of(gmm), parameters_of(twin))


# ----------------------------------------------------------------------------------------------- minibatch EM


def test_a_step_size_of_one_is_exact_em(layer, rows):
    gmm, x = layer(), rows(30)
    gmm.em_step(rows(20))
    twin = copy.deepcopy(gmm)
    gmm.em_step(x, step_size=1.0)
    twin.em_step(x)
    assert_same_buffers(gmm, copy_of_buffers(twin))


def test_among_equal_batches_each_has_exactly_its_step_size_as_share(layer, rows):
    """The oracle is the convex combination of sums per row that Cappé and Moulines write."""
    gmm, share = layer(), None
    for step_size in (None, 0.5, 0.3, 0.3, 1.0, 0.7):
        x = rows(20)
        batch = about_zero(gmm.statistics(x))
        rho = step_size or 1.0
        share = batch if share is None else [(1 - rho) * old + rho * new for old, new in zip(share, batch, strict=True)]
        gmm.em_step(x, step_size=step_size)
        running = gmm.running_statistics()
        assert_near(about_zero(running), tuple(share))
        assert running.weight().item() == pytest.approx(20 / rho, rel=1e-13)


def test_decreasing_steps_over_equal_batches_of_one_component_are_one_exact_step(family, generator, rows):
    """Also for batches that lie far apart, where scatters about each batch's own mean would not add."""
    gmm = random_layer(family, generator, n_components=1, reg_covar=0.0)
    twin = copy.deepcopy(gmm)
    batches = [rows(20, loc=loc) for loc in (-5.0, 0.0, 5.0)]
    for t, x in enumerate(batches, start=1):
        gmm.em_step(x, step_size=1 / t)
    twin.em_step(torch.cat(batches))
    assert_near(parameters_of(gmm), parameters_of(twin))
    assert_near(
        gmm.running_statistics().about(torch.zeros(2)).sums()[:3],
        twin.running_statistics().about(torch.zeros(2)).sums()[:3],
        1e-12,
    )


def test_a_short_batch_counts_by_its_rows(family, generator, rows):
    gmm = random_layer(family, generator, n_components=1, reg_covar=0.0)
    twin = copy.deepcopy(gmm)
    long, short = rows(30), rows(1, loc=9.0)
    gmm.em_step(long, step_size=1.0)
    gmm.em_step(short, step_size=0.5)
    twin.em_step(torch.cat([long, short]))
    assert_near(parameters_of(gmm), parameters_of(twin))


@pytest.mark.parametrize("start", ["set_parameters", "initialize", "fit"])
@pytest.mark.parametrize("step_size", [1.0, 0.5, 0.1])
def test_the_first_batch_moves_a_given_mean_by_exactly_its_share(family, start, step_size, generator, rows):
    gmm, x = random_layer(family, generator, n_components=1), rows(20, loc=3.0)
    given = gmm.weights_.clone(), gmm.means_.clone(), gmm.covariances_
    gmm.em_step(rows(7), step_size=0.3)  # what was learned before a start is forgotten
    getattr(gmm, start)(*given if start == "set_parameters" else (rows(50),))
    old = gmm.means_.clone()
    gmm.em_step(x, step_size=step_size)
    assert_near(gmm.means_, (1 - step_size) * old + step_size * x.mean(0))


@pytest.mark.parametrize("start", ["set_parameters", "initialize", "fit"])
def test_the_running_sums_of_a_start_are_those_of_its_parameters(family, start, generator, rows):
    """A negligible batch then leaves the mixture where it is."""
    gmm = random_layer(family, generator, reg_covar=0.0, tol=1e-12, max_iter=5000)
    if start != "set_parameters":
        getattr(gmm, start)(rows(50))
    old = parameters_of(gmm)
    gmm.em_step(rows(20), step_size=1e-10)
    assert_near(parameters_of(gmm), old, 1e-7)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_step_size_may_be_a_tensor(layer, rows, shape):
    gmm, x = layer(), rows(30)
    twin = copy.deepcopy(gmm)
    gmm.em_step(x, step_size=torch.full(shape, 0.3, dtype=torch.float64))
    twin.em_step(x, step_size=0.3)
    assert_same_buffers(gmm, copy_of_buffers(twin))


@pytest.mark.parametrize(
    ("step_size", "error", "message"),
    [
        (0.0, ValueError, "`step_size` to be above 0 and at most 1, but got 0.0"),
        (-0.5, ValueError, "`step_size` to be above 0 and at most 1, but got -0.5"),
        (1.5, ValueError, "`step_size` to be above 0 and at most 1, but got 1.5"),
        (float("nan"), ValueError, "`step_size` to be above 0 and at most 1, but got nan"),
        ("0.5", TypeError, "`step_size` to be a number, but got '0.5'"),
        (True, TypeError, "`step_size` to be a number, but got True"),
        (torch.tensor([0.5, 0.5]), ValueError, r"`step_size` to hold one real number, but got shape \(2,\)"),
        (torch.tensor(True), ValueError, r"`step_size` to hold one real number, but got shape \(\) of torch.bool"),
    ],
)
def test_bad_step_sizes_raise_and_change_nothing(step_size, error, message, generator, rows):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(error, match=message):
        gmm.em_step(rows(10), step_size=step_size)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (
            torch.ones(9),
            ValueError,
            r"`sample_weight` of shape \(10,\), one number for each row of `x`, but got \(9,\)",
        ),
        (torch.tensor(1.0), ValueError, r"`sample_weight` of shape \(10,\), .*, but got \(\)"),
        (
            ["a"] * 10,
            TypeError,
            "`sample_weight` to be a tensor, array, list or number that holds real numbers, but got",
        ),
    ],
)
@pytest.mark.parametrize("method", ["em_step", "statistics"])
def test_bad_sample_weights_raise_and_change_nothing(method, weight, error, message, generator, rows):
    gmm = random_layer("full", generator)
    with unchanged(gmm), pytest.raises(error, match=message):
        getattr(gmm, method)(rows(10), weight)


# ------------------------------------------------------------------------------------------ rows that are unusable


@STEP_SIZES
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e200])
def test_rows_that_are_not_finite_are_left_out_and_counted(layer, rows, step_size, bad):
    gmm, x = layer(), rows(30)
    twin = copy.deepcopy(gmm)
    dirty = x.clone()
    dirty[[3, 17], [0, 1]] = bad
    clean = x[[n for n in range(30) if n not in (3, 17)]]
    assert_near(gmm.em_step(dirty, step_size=step_size), twin.em_step(clean, step_size=step_size))
    assert_near(parameters_of(gmm), parameters_of(twin))
    assert gmm.n_skipped.item() == 2


@STEP_SIZES
@pytest.mark.parametrize("used", [False, True], ids=["given", "after a batch"])
@pytest.mark.parametrize("batch", ["empty", "not finite", "of weight zero"])
def test_without_a_usable_row_em_step_returns_nan_and_changes_nothing(layer, rows, step_size, used, batch):
    gmm = layer(reg_covar=1e-3, dtype=torch.float32)
    if used:
        gmm.em_step(rows(20), step_size=0.3)
    before = copy_of_buffers(gmm)
    x, weight = {
        "empty": (rows(0), None),
        "not finite": (torch.full((4, 2), torch.nan), None),
        "of weight zero": (rows(4), torch.zeros(4)),
    }[batch]
    assert torch.isnan(gmm.em_step(x, weight, step_size))
    assert_same_buffers(gmm, before, but=("n_skipped",))
    assert gmm.n_skipped.item() == (4 if batch == "not finite" else 0)
    gmm.maximize(gmm.statistics(x, weight))
    assert_same_buffers(gmm, before, but=("n_skipped",))


# ------------------------------------------------------------------------------------------- effects and memory


@STEP_SIZES
def test_em_step_and_forward_read_nothing_on_the_host(layer, rows, step_size):
    gmm, x = layer(dtype=torch.float32), rows(30)
    with HostReads(forbidden=True):
        gmm.em_step(x, torch.ones(30), step_size)
        gmm.em_step(x, step_size=None if step_size is None else torch.tensor(step_size))
        gmm.maximize(gmm.statistics(x))
        gmm(x)
        gmm.log_responsibilities(x)
        gmm.predict(x)
    assert gmm.n_updates.item() == 2


@STEP_SIZES
def test_nor_with_priors_a_relative_ridge_hard_assignments_or_a_log_prior(layer, rows, step_size):
    priors = {"mean_prior": 0.0, "mean_precision_prior": 1.0, "covariance_prior": 1.0, "degrees_of_freedom_prior": 3.0}
    options = {"weight_concentration_prior": 2.0, "cem": True, "reg_covar_relative": True, **priors}
    gmm, x = layer(dtype=torch.float32, **options), rows(30)
    with HostReads(forbidden=True):
        gmm.em_step(x, torch.ones(30), step_size, log_prior=torch.zeros(30, 3))
    assert gmm.n_updates.item() == 1


def test_the_guard_against_host_reads_sees_them():
    reads = (torch.Tensor.item, bool, torch.Tensor.nonzero, torch.Tensor.unique)
    for read in (*reads, lambda t: t[t > 0], lambda t: torch.equal(t, t), lambda t: torch.allclose(t, t)):
        with pytest.raises(AssertionError, match="reads a value on the host"), HostReads(forbidden=True):
            read(torch.ones(1))


@STEP_SIZES
def test_em_step_leaves_no_graph(layer, rows, step_size):
    gmm, x = layer(), rows(30).requires_grad_()
    value = gmm.em_step(x * 2, torch.ones(30).double().requires_grad_(), step_size)
    assert not value.requires_grad
    assert not any(buffer.requires_grad for buffer in gmm.buffers())
    assert x.grad is None
    assert not any(s.requires_grad for s in gmm.statistics(x).sums())


def test_returned_statistics_stay_as_they_are(layer, rows):
    gmm, x = layer(), rows(30)
    statistics = gmm.statistics(x)
    copies = [s.clone() for s in (*statistics.sums(), statistics.origin)]
    gmm.em_step(rows(20, loc=4.0))
    gmm.em_step(rows(20, loc=-4.0), step_size=0.5)
    for now, then in zip((*statistics.sums(), statistics.origin), copies, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("covariance_type", COVARIANCES)
def test_float32_updates_far_from_zero_agree_with_float64(covariance_type, generator):
    """Sums about zero would have lost the variances altogether at this offset."""
    wide = random_layer(covariance_type, generator, n_components=2, offset=1e4)
    gmm = GaussianMixture(2, 2, covariance_type, dtype=torch.float32).set_parameters(
        wide.weights_, wide.means_.float(), wide.covariances_
    )
    wide.set_parameters(gmm.weights_, gmm.means_, wide.covariances_)
    x = (torch.randn(200, 2, generator=generator) + 1e4).split(50)
    for t, batch in enumerate(x, start=1):
        gmm.em_step(batch, step_size=1 / t)
        wide.em_step(batch, step_size=1 / t)
    torch.testing.assert_close(gmm.means_.double(), wide.means_, rtol=0, atol=1e-3)
    torch.testing.assert_close(gmm.covariances_.double(), wide.covariances_, rtol=0, atol=3e-4)


def test_a_transposed_weight_is_refused(generator):
    x = torch.randn(3, 4, 2, generator=generator)
    gmm = GaussianMixture(2, 2)
    assert gmm.statistics(x, torch.ones(3, 4)).weight() == 12
    with pytest.raises(ValueError, match=r"`sample_weight` of shape \(3, 4\), .*, but got \(4, 3\)"):
        gmm.statistics(x, torch.ones(4, 3))


@pytest.mark.parametrize("step_size", [0.0, -1.0, 1.5, math.nan, math.inf])
def test_a_tensor_step_size_out_of_range_changes_nothing(family, step_size, generator):
    """Its value is not read on the host, so it can't raise."""
    x = torch.randn(20, 2, generator=generator)
    gmm = GaussianMixture(2, 2, family, random_state=0).initialize(x)
    before = copy_of_buffers(gmm)
    assert torch.isnan(gmm.em_step(x, step_size=torch.tensor(step_size)))
    assert_same_buffers(gmm, before)


@pytest.mark.parametrize("weight", [1e38, 1e300])
def test_weights_that_overflow_leave_a_valid_mixture(family, weight, generator):
    x = torch.randn(20, 2, generator=generator)
    gmm = GaussianMixture(2, 2, family, random_state=0).initialize(x)
    gmm.em_step(x, torch.full((20,), weight, dtype=torch.float64))
    assert float(gmm.weights_.sum()) == pytest.approx(1.0, abs=1e-6)
    assert all(bool(torch.isfinite(b).all()) for name, b in gmm.named_buffers() if name.endswith("_"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_component_too_narrow_for_far_rows_keeps_finite_sums(family, dtype):
    """The squared whitened distance overflows there; times a responsibility of zero it must stay zero."""
    tiny = 1e-28 if dtype == torch.float32 else 1e-300
    gmm = GaussianMixture(2, 1, family, reg_covar=0.0, dtype=dtype)
    shape = gmm.covariances_.shape
    covariances = torch.full(shape, tiny, dtype=dtype)
    gmm.set_parameters([0.5, 0.5], [[0.0], [1e6]], covariances)
    x = torch.cat([torch.arange(5.0)[:, None] * tiny**0.5, 1e6 + torch.arange(5.0)[:, None]]).to(dtype)
    for _ in range(2):
        gmm.em_step(x, step_size=0.5)
    for name, buffer in gmm.named_buffers():
        if name not in ("lower_bound", "objective"):
            assert bool(torch.isfinite(buffer).all()), name


def test_em_step_goes_through_maximize(generator):
    """A subclass may take its M-step elsewhere."""
    taken = []

    class Mine(GaussianMixture):
        def maximize(self, statistics):
            taken.append(statistics)

    gmm = Mine(2, 2, random_state=0)
    before = copy_of_buffers(gmm)
    gmm.em_step(torch.randn(20, 2, generator=generator), step_size=0.5)
    assert len(taken) == 1
    assert_same_buffers(gmm, before, but=("n_updates", "running_step_size"))
