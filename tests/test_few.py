"""Few rows on a CPU: by NumPy what the general forms find, and by the general forms what is not ordinary."""

import copy
import math

import numpy as np
import pytest
import torch
from dispatch import HostReads
from oracles import assert_near, assert_same_buffers, copy_of_buffers, distribution, random_layer
from torch.autograd import forward_ad

from tgmm_nn import GaussianMixture, few
from tgmm_nn.assignment import HARD, SOFT, Assignment
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.maximization import Learned
from tgmm_nn.statistics import statistics_of

PARAMETERS = ("weights_", "means_", "factor_")
SIZES = [(4, 1), (3, 2), (8, 5)]  # where components are fewer than features, full ones go by float32 in general


@pytest.fixture
def made(monkeypatch):
    """Note which functions of `few` did what they were asked for."""
    made, within = [], []

    def noting(name):
        function = getattr(few, name)

        def call(*args):
            within.append(name)
            value = function(*args)
            within.pop()
            if value is not None and value is not False and not within:
                made.append(name)
            return value

        return call

    for name in ("log_density", "expectation", "maximize", "update"):
        monkeypatch.setattr(few, name, noting(name))
    return made


@pytest.fixture
def general(monkeypatch):
    """Return a function after which the general forms are taken."""

    def switch():
        for limit in ("SCORED", "SUMMED", "ESTIMATED"):
            monkeypatch.setattr(few, limit, 0)

    return switch


def layer_and_rows(family, generator, size=(3, 2), offset=0.0, n_rows=60):
    """Return a random layer of float32, and rows in its region."""
    n_components, n_features = size
    gmm = GaussianMixture(n_components, n_features, family, reg_covar=1e-3)
    means = offset + 2.0 * torch.randn(size, generator=generator)
    weights = torch.rand(n_components, generator=generator) + 0.5
    gmm.set_parameters(weights / weights.sum(), means, 2.0 * gmm.covariances_)
    return gmm, offset + 2.0 * torch.randn(n_rows, n_features, generator=generator)


def assert_same_mixture(one, other, tolerance=2e-6):
    """Assert that parameters, running sums about one point, and counters are the same."""
    for name in PARAMETERS:
        assert_near(getattr(one, name), getattr(other, name), tolerance)
    sums, others = one.running_statistics(), other.running_statistics()
    point = others.origin
    for a, b in zip(sums.about(point).sums()[:3], others.sums()[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for name in ("running_step_size", "n_updates", "n_skipped", "fitted"):
        assert_near(getattr(one, name).double(), getattr(other, name).double())


# ------------------------------------------------------------------------------------------------ the ordinary case


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e5], ids=["near zero", "far from zero"])
@pytest.mark.parametrize("step_size", [None, 1.0, 0.3, torch.tensor(0.3)], ids=["exact", "whole", "share", "tensor"])
def test_steps_are_those_of_the_general_form(family, size, offset, step_size, generator, made, general):
    gmm, x = layer_and_rows(family, generator, size, offset, n_rows=300)
    twin = copy.deepcopy(gmm)
    values = [gmm.em_step(x + 0.1 * t, step_size=step_size) for t in range(3)]
    assert made == ["expectation", "update"] * 3
    general()
    others = [twin.em_step(x + 0.1 * t, step_size=step_size) for t in range(3)]
    assert len(made) == 6
    for value, other in zip(values, others, strict=True):
        assert value.dtype == other.dtype
        assert_near(value, other, 1e-5)
    assert_same_mixture(gmm, twin, 1e-4 if offset else 1e-5)


def test_a_step_is_that_in_float64(family, generator, made):
    gmm, x = layer_and_rows(family, generator, (5, 17), n_rows=300)
    wide = GaussianMixture(5, 17, family, reg_covar=1e-3, dtype=torch.float64)
    wide.set_parameters(gmm.weights_, gmm.means_, gmm.covariances_.double())
    values = gmm.em_step(x), wide.em_step(x.double())
    assert made[:2] == ["expectation", "update"]
    assert_near(values[0].double(), values[1], 1e-6)
    for name in PARAMETERS:
        assert_near(getattr(gmm, name).double(), getattr(wide, name), 2e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e5], ids=["near zero", "far from zero"])
def test_densities_are_those_of_torch_in_float64(family, size, offset, generator, made):
    gmm, x = layer_and_rows(family, generator, size, offset)
    value = gmm(x)
    assert made == ["log_density"]
    assert (value.dtype, value.shape) == (torch.float32, (60,))
    wide = [t.double() for t in (gmm.weights_, gmm.means_, gmm.covariance_matrices())]
    expected = distribution(*wide).log_prob(x.double())
    # The layer's covariances are read from a factor of float32.
    torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-5)


def test_rows_far_from_all_components_have_their_density(family, generator, made, general):
    gmm, x = layer_and_rows(family, generator)
    x = x * torch.logspace(0, 6, 60)[:, None]
    value = gmm(x)
    assert made == ["log_density"]
    general()
    torch.testing.assert_close(value, gmm(x), rtol=1e-6, atol=1e-4)
    assert value.isfinite().all()


def test_sums_are_those_of_the_general_form(family, generator, made, general):
    gmm, x = layer_and_rows(family, generator)
    sums = gmm.statistics(x)
    assert made == ["expectation"]
    general()
    others = gmm.statistics(x)
    for a, b in zip(sums.sums(), others.about(sums.origin).sums(), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_steps_of_sums_are_steps_of_rows(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    twin = copy.deepcopy(gmm)
    assert_near(gmm.em_step(x, step_size=0.4), twin.update(twin.statistics(x), 0.4), 0.0)
    assert_same_buffers(gmm, copy_of_buffers(twin))
    gmm.em_step(x)
    twin.maximize(twin.statistics(x))
    assert made == ["expectation", "update"] * 3 + ["expectation", "maximize"]
    assert_same_buffers(gmm, copy_of_buffers(twin), but=("n_updates",))


def test_sums_stay_as_they_are_when_the_mixture_moves_on(family, generator):
    gmm, x = layer_and_rows(family, generator)
    sums = gmm.statistics(x)
    before = [t.clone() for t in sums.sums()]
    gmm.update(sums)
    gmm.em_step(x, step_size=0.5)
    assert all(torch.equal(a, b) for a, b in zip(sums.sums(), before, strict=True))


def test_equal_calls_have_equal_bits(family, generator):
    """Products of MKL round by where memory begins."""
    size = (64, 16) if family in ("diag", "tied_full") else (10, 16)  # of a density, products by either library
    gmm, x = layer_and_rows(family, generator, size, n_rows=256)
    kept = []
    for i in range(20):
        kept.append(torch.zeros(7 * i + 1))  # moves what is allocated next
        twin = copy.deepcopy(gmm)
        twin.em_step(x, step_size=0.5)
        found = [twin(x), *copy_of_buffers(twin).values()]
        if i == 0:
            first = found
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, first, strict=True))


def test_sums_in_float32_are_taken_as_well(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    twin, sums = copy.deepcopy(gmm), gmm.statistics(x)
    gmm.update(sums._replace(**{name: getattr(sums, name).float() for name in ("count", "first", "second")}))
    assert made == ["expectation"]
    twin.update(sums)
    assert_same_mixture(gmm, twin, 1e-5)


def test_skipped_rows_of_given_sums_are_counted(generator, made):
    gmm, x = layer_and_rows("diag", generator)
    x[3] = math.nan
    gmm.update(gmm.statistics(x))
    assert made == ["expectation", "update"]
    assert (gmm.n_skipped, gmm.n_updates) == (1, 1)


# ------------------------------------------------------------------------------------------ what is not ordinary


def with_row(value):
    return lambda x: x.index_fill(0, torch.tensor([3]), value)


ROWS = {
    "nan": with_row(math.nan),
    "inf": with_row(math.inf),
    "too large to square": with_row(3e19),
    "almost too large to square": with_row(1e18),
    "of nan alone": lambda x: torch.full_like(x, math.nan),
    "one point": lambda x: x[:1].expand(60, -1),
    "none": lambda x: x[:0],
    "fewer than components": lambda x: x[:2],
    "float64": lambda x: x.double(),
}


@pytest.mark.parametrize("step_size", [None, 0.5], ids=["exact", "share"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_any_kind_do_what_they_do_in_the_general_form(family, kind, step_size, generator, made, general):
    gmm, x = layer_and_rows(family, generator)
    twin, x = copy.deepcopy(gmm), ROWS[kind](x)
    values = gmm(x), gmm.em_step(x, step_size=step_size)
    assert ("expectation" in made) == (kind not in ("none", "fewer than components", "float64"))
    general()
    others = twin(x), twin.em_step(x, step_size=step_size)
    for value, other in zip(values, others, strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert_same_mixture(gmm, twin, 1e-4)


def test_shares_that_are_none_do_not_move_a_component(family, generator, made, general):
    gmm, x = layer_and_rows(family, generator)
    far = torch.tensor([[0.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    gmm.set_parameters([0.5, 0.4, 0.1], far, gmm.covariances_ / 3.0)
    x, twin = 0.1 * x, copy.deepcopy(gmm)
    assert 0.0 < gmm.log_responsibilities(x.double())[:, 2].exp().max() < 1e-35
    assert gmm.statistics(x).count[2] == 0.0
    made.clear()
    gmm.em_step(x)
    assert made == ["expectation"]
    general()
    twin.em_step(x)
    assert gmm.weights_[2] == twin.weights_[2] == 0.0
    assert_same_mixture(gmm, twin, 1e-5)


def test_a_component_without_rows_stays(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    gmm.set_parameters([0.5, 0.5, 0.0], [[0.0, 0.0], [1.0, 1.0], [1e3, 1e3]], gmm.covariances_)
    gmm.em_step(x)
    assert made == ["expectation"]
    assert (gmm.weights_[2], gmm.means_[2].tolist()) == (0.0, [1e3, 1e3])


def test_a_density_with_a_component_of_weight_zero_has_no_part_of_it(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    two = GaussianMixture(2, 2, family)
    two.set_parameters([0.5, 0.5], gmm.means_[:2], 2.0 * two.covariances_)
    gmm.set_parameters([0.5, 0.5, 0.0], gmm.means_, gmm.covariances_)
    assert_near(gmm(x), two(x), 1e-5)
    assert made == ["log_density"] * 2


SUMS = {  # counts, and a variance or what remains of it
    "a variance that vanishes in float32": ([0.5, 0.3, 0.2], 1e-80),
    "a covariance of a part in 1e16": ([0.5, 0.3, 0.2], 2.3e-16),
    "a component without rows": ([0.5, 0.5, 0.0], 1.0),
    "a component of a weight below float32": ([0.5, 0.5, 1e-40], 1.0),
    "no weight": ([0.0, 0.0, 0.0], 1.0),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("method", ["maximize", "update"])
def test_sums_that_determine_no_mixture_go_by_the_general_form(family, name, method, generator, made, general):
    gmm, _ = layer_and_rows(family, generator)
    gmm.reg_covar, (count, small) = 0.0, SUMS[name]
    twin, covariance = copy.deepcopy(gmm), COVARIANCES[family]
    element = covariance.identity(3, 2, torch.zeros(()).double()) * (small if small < 1e-20 else 1.0)
    if small == 2.3e-16:
        element[..., -1] = 1.0 + small
        element[..., 0] = 1.0
    elif covariance.shape(2) == (2, 2):
        element = element + 0.5 * element.flip(-1)
    sums = statistics_of(torch.tensor(count).double(), gmm.means_.double() + 1.0, element, covariance)
    getattr(gmm, method)(sums)
    if "covariance" not in name or family in ("full", "tied_full"):
        assert made == []
    general()
    getattr(twin, method)(sums)
    assert_same_buffers(gmm, copy_of_buffers(twin))


def test_a_singular_covariance_is_lifted_by_the_general_form(generator, made):
    gmm, x = layer_and_rows("full", generator)
    gmm.reg_covar = 0.0
    x[:, 1] = x[:, 0]
    gmm.em_step(x)
    assert made == ["expectation"]
    assert gmm.factor_.isfinite().all()


def given(**options):
    return lambda gmm, x: gmm.em_step(x, **options)


def with_option(name, value):
    def step(gmm, x):
        setattr(gmm, name, value)
        return gmm.em_step(x)

    return step


OF_ROWS = {
    "weights of rows": given(sample_weight=torch.linspace(0.1, 2.0, 60)),
    "a log-prior": given(log_prior=torch.linspace(-2.0, 0.0, 180).reshape(60, 3)),
    "hard shares": given(assignment=HARD),
    "a temperature": given(assignment=Assignment(temperature=2.0)),
    "classification EM": with_option("cem", True),
    "a chunk size": with_option("chunk_size", 7),
}
OF_STEPS = {
    "frozen parts": given(learned=Learned.from_options(3, ["means"])),
    "a relative ridge": with_option("reg_covar_relative", True),
    "a step size out of range": given(step_size=torch.tensor(1.5)),
}


@pytest.mark.parametrize("name", [*OF_ROWS, *OF_STEPS])
def test_what_has_no_form_for_few_is_not_left_out(family, name, generator, made, general):
    gmm, x = layer_and_rows(family, generator)
    twin = copy.deepcopy(gmm)
    step = {**OF_ROWS, **OF_STEPS}[name]
    value = step(gmm, x)
    assert ("expectation" in made) == (name in OF_STEPS)
    assert "update" not in made or name in OF_ROWS
    general()
    torch.testing.assert_close(value, step(twin, x), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert_same_mixture(gmm, twin, 1e-5)


def test_soft_shares_may_be_asked_for(generator, made):
    gmm, x = layer_and_rows("diag", generator)
    gmm.em_step(x, assignment=SOFT)
    assert made == ["expectation", "update"]


PRIORS = [{"weight_concentration_prior": 3.0}, {"mean_prior": 1.0, "mean_precision_prior": 5.0}]


@pytest.mark.parametrize("prior", PRIORS, ids=["weights", "means"])
def test_priors_are_met(prior, generator, made, general):
    _, x = layer_and_rows("full", generator)
    gmm = GaussianMixture(3, 2, random_state=0, **prior).initialize(x)
    twin = copy.deepcopy(gmm)
    gmm.em_step(x, step_size=0.5)
    assert made == ["expectation"]
    general()
    twin.em_step(x, step_size=0.5)
    assert_same_mixture(gmm, twin, 1e-5)


@pytest.mark.parametrize("method", ["maximize", "update"])
def test_a_step_that_was_put_into_a_layer_is_taken(method, generator, made, monkeypatch):
    gmm, x = layer_and_rows("diag", generator)
    calls, given = [], getattr(gmm, method)
    monkeypatch.setattr(gmm, method, lambda *args, **kwargs: (calls.append(method), given(*args, **kwargs))[1])
    gmm.em_step(x)
    assert calls == [method]
    assert made[0] == "expectation"


@pytest.mark.parametrize("method", ["maximize", "update"])
def test_a_subclass_has_its_own_m_step(method, generator, made):
    calls = []

    class Own(GaussianMixture):
        pass

    def own(self, *args, **kwargs):
        calls.append(method)
        return getattr(super(Own, self), method)(*args, **kwargs)

    setattr(Own, method, own)
    _, x = layer_and_rows("diag", generator)
    Own(3, 2, "diag", random_state=0).initialize(x).em_step(x)
    assert calls == [method]
    assert made == ["expectation"]


# --------------------------------------------------------------------------------------- what torch has to know of


def test_a_backward_pass_finds_out_that_the_mixture_moved(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    [expected] = torch.autograd.grad(gmm(x.requires_grad_()).sum(), x)
    value = gmm(x)
    assert made == []  # gradients are recorded by torch
    gmm.em_step(x)
    assert made == ["expectation", "update"]
    try:
        [found] = torch.autograd.grad(value.sum(), x)
    except RuntimeError as error:
        message = str(error)
        assert "modified by an inplace operation" in message
    else:  # of the parameters that it needs, copies in float64 were kept
        assert family != "full"
        assert torch.equal(found, expected)


def test_every_buffer_that_changes_has_a_new_version(family, generator):
    gmm, x = layer_and_rows(family, generator)
    before, versions = copy_of_buffers(gmm), {name: b._version for name, b in gmm.named_buffers()}
    places = {name: b.data_ptr() for name, b in gmm.named_buffers()}
    gmm.em_step(x, step_size=0.5)
    changed = {name for name, b in gmm.named_buffers() if not torch.equal(b.nan_to_num(), before[name].nan_to_num())}
    assert {*PARAMETERS, "running_first", "n_updates", "running_step_size"} <= changed
    assert all(b._version > versions[name] for name, b in gmm.named_buffers() if name in changed)
    assert places == {name: b.data_ptr() for name, b in gmm.named_buffers()}


def test_gradients_of_few_rows_are_those_of_many(family, generator):
    gmm, x = layer_and_rows(family, generator)
    assert torch.autograd.gradcheck(gmm, x[:3].double().requires_grad_())
    inner = torch.func.vmap(torch.func.grad(gmm))(x)
    [expected] = torch.autograd.grad(gmm(x.requires_grad_()).sum(), x)
    assert_near(inner, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward derivatives
def test_forward_derivatives_are_taken(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    direction = torch.randn(60, 2, generator=generator)
    leaf = x.clone().requires_grad_()
    [gradient] = torch.autograd.grad(gmm(leaf).sum(), leaf)
    expected = (gradient * direction).sum(-1)
    with torch.no_grad(), forward_ad.dual_level():
        value = gmm(forward_ad.make_dual(x, direction))
        assert_near(forward_ad.unpack_dual(value).tangent, expected, 1e-4)
    assert_near(torch.func.jvp(gmm, (x,), (direction,))[1], expected, 1e-4)
    assert made == []


def test_a_batch_of_functions_is_one(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    assert_near(torch.func.vmap(gmm)(x.reshape(5, 12, 2)).flatten(), gmm(x), 1e-5)
    assert made == ["log_density"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_density_is_no_constant(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    traced = torch.jit.trace(gmm, x, check_trace=False)
    assert_near(traced(x + 1.0), gmm(x + 1.0), 1e-5)
    assert made == ["log_density"]


def test_no_gradient_is_recorded_where_the_general_step_follows(generator, made):
    """Matrices of so many features are factorised by halves, unless gradients are recorded."""
    gmm = GaussianMixture(1, 100, reg_covar=1e-3)
    x, twin = torch.randn(8, 100, generator=generator), copy.deepcopy(gmm)
    x[:, 1] = x[:, 0]
    gmm.reg_covar = twin.reg_covar = 1e-12
    for step in (None, 0.5):
        gmm.em_step(x, step_size=step)
        with torch.no_grad():
            twin.em_step(x, step_size=step)
    assert made == ["expectation"] * 4
    assert_same_buffers(gmm, copy_of_buffers(twin))


def test_a_trainable_mixture_keeps_its_gradients(family, generator, made):
    gmm, x = layer_and_rows(family, generator)
    trainable = gmm.to_parameters()
    trainable(x).sum().backward()
    assert made == []
    assert all(p.grad.isfinite().all() for p in trainable.parameters())


def test_a_mode_that_watches_operations_sees_them(generator, made):
    gmm, x = layer_and_rows("full", generator)
    with HostReads(forbidden=True):
        gmm.em_step(x)
        gmm(x)
    assert made == []


def test_tensors_without_memory_go_by_torch(made):
    gmm = GaussianMixture(3, 2, device="meta")
    assert gmm(torch.zeros(60, 2, device="meta")).shape == (60,)
    gmm.em_step(torch.zeros(60, 2, device="meta"))
    assert made == []


def test_rows_whose_memory_holds_their_negatives_are_read_as_they_are():
    gmm = GaussianMixture(1, 2, reg_covar=1.0)
    negative = torch.complex(torch.zeros(60, 2), torch.ones(60, 2)).conj().imag
    assert negative.is_neg()
    assert_near(gmm(negative), gmm(-torch.ones(60, 2)), 1e-6)
    gmm.em_step(negative)
    assert_near(gmm.means_, -torch.ones(1, 2), 1e-6)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, 0)[::2], lambda x: x.reshape(5, 12, 2)],
    ids=["columns", "every other", "leading dimensions"],
)
def test_rows_may_lie_in_any_order(view, generator, made):
    gmm, x = layer_and_rows("full", generator)
    twin = copy.deepcopy(gmm)
    assert_near(gmm(view(x)).flatten(), gmm(x), 1e-6)
    assert_near(gmm.em_step(view(x)), twin.em_step(x), 1e-6)
    assert made == ["log_density"] * 2 + ["expectation", "update"] * 2
    assert_same_mixture(gmm, twin, 1e-6)


def test_what_torch_does_not_write_into_is_not_written_into(generator, made):
    gmm, x = layer_and_rows("diag", generator)
    state = {**gmm.state_dict(), "means_": torch.zeros(1, 2).expand(3, 2)}
    gmm.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="single memory location"):
        gmm.em_step(x)
    with torch.inference_mode():
        gmm = GaussianMixture(3, 2, "diag")
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        gmm.em_step(x)
    assert made == ["expectation"] * 2


def test_a_likelihood_beyond_float32_is_infinite_without_a_warning(family, made):
    gmm = GaussianMixture(3, 2, family)
    gmm.set_parameters(torch.ones(3) / 3, torch.tensor([[0.0], [0.1], [0.2]]).expand(3, 2), 5e-7 * gmm.covariances_)
    x = 0.1 * torch.randn(60, 2)
    x[0] = 1e18
    assert gmm.em_step(x) == -math.inf
    assert made[0] == "expectation"


@pytest.mark.parametrize("step_size", [np.float16(0.3), np.float32(0.3), np.float64(0.3)], ids=lambda v: str(v.dtype))
def test_step_sizes_of_numpy_are_what_they_are_in_float64(step_size, generator, made):
    gmm, x = layer_and_rows("full", generator)
    twin = copy.deepcopy(gmm)
    gmm.em_step(x, step_size=step_size)
    twin.em_step(x, step_size=float(step_size))
    assert made == ["expectation", "update"] * 2
    assert_same_buffers(gmm, copy_of_buffers(twin))


def test_rows_of_a_kind_of_their_own_keep_it(generator, made):
    class Named(torch.Tensor):
        pass

    gmm, x = layer_and_rows("diag", generator)
    assert isinstance(gmm(x.as_subclass(Named)), Named)
    assert made == []


@pytest.mark.parametrize("n_rows", [11, 12])
def test_rows_are_few_from_four_a_component_on(n_rows, generator, made):
    gmm, x = layer_and_rows("diag", generator, n_rows=n_rows)
    gmm.em_step(x)
    assert ("expectation" in made) == (n_rows == 12)


def test_rows_are_few_up_to_a_number_of_what_they_become(made):
    gmm = GaussianMixture(2, 31, "diag")
    for n_rows in (few.SUMMED // 63, few.SUMMED // 63 + 1):
        gmm.statistics(torch.zeros(n_rows, 31))
    assert made == ["expectation"]
    for n_rows in (few.SCORED // 31, few.SCORED // 31 + 1):
        gmm(torch.zeros(n_rows, 31))
    assert made == ["expectation", "log_density"]


def test_a_layer_made_in_inference_mode_learns(family):
    with torch.inference_mode():
        gmm = GaussianMixture(2, 3, family, reg_covar=1e-3)
        before = gmm.means_.clone()
        gmm.em_step(torch.randn(30, 3))
        assert not torch.equal(gmm.means_, before)


def test_integers_and_lists_are_rows_too(made):
    gmm = GaussianMixture(1, 1, reg_covar=0.0)
    gmm.em_step([[1], [2], [3], [4]])
    gmm.em_step(torch.tensor([[1], [2], [3], [4]], dtype=torch.int8))
    assert made == ["expectation", "update"] * 2
    assert_near(gmm.means_, torch.tensor([[2.5]]))


def test_a_moment_of_a_mixture_is_no_step_of_it(family, generator):
    """Its own expected sums leave a mixture as it is, by either M-step."""
    gmm = random_layer(family, generator, reg_covar=0.0)
    before = [getattr(gmm, name).clone() for name in PARAMETERS]
    covariance = COVARIANCES[family]
    gmm.maximize(statistics_of(gmm.weights_, gmm.means_, covariance.internal(gmm.covariances_), covariance))
    for name, value in zip(PARAMETERS, before, strict=True):
        assert_near(getattr(gmm, name), value, 1e-12)
