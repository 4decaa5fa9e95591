"""The layer as a PyTorch module: its buffers through casts, copies, checkpoints and compilation."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from oracles import assert_near, assert_same_buffers, copy_of_buffers, random_layer, unchanged
from torch import nn

from tgmm_nn import GaussianMixture

PARAMETERS = {"weights_", "means_", "factor_"}
COUNTERS = {"n_iter", "n_updates", "n_skipped", "fitted", "converged"}


@pytest.fixture
def layer(family, generator):
    """Make layers of one family, set to random mixtures of 3 components in 2 features."""
    return partial(random_layer, family, generator, dtype=torch.float32)


@pytest.fixture
def x(generator):
    return 2 * torch.randn(40, 2, generator=generator)


def through_a_file(state):
    """Return a state as `torch.load` with ``weights_only=True`` reads it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -------------------------------------------------------------------------------------------------- the buffers


def test_no_buffer_is_boolean_and_none_has_no_dimension(layer):
    """Averaging callbacks subtract buffers, and compiled code drops writes to float64 of no dimension."""
    for name, buffer in layer().named_buffers():
        assert buffer.dtype == (
            torch.int64 if name in COUNTERS else torch.float32 if name in PARAMETERS else torch.float64
        )
        assert buffer.ndim > 0


def test_all_that_is_learned_is_a_persistent_buffer_and_nothing_is_a_parameter(layer):
    gmm = layer()
    assert not list(gmm.parameters())
    assert {*gmm.state_dict()} == {*dict(gmm.named_buffers()), "_extra_state"}


@pytest.mark.parametrize(
    ("cast", "parameters"),
    [
        (nn.Module.half, torch.float32),
        (nn.Module.bfloat16, torch.float32),
        (nn.Module.float, torch.float32),
        (nn.Module.double, torch.float64),
        (partial(nn.Module.to, dtype=torch.float16), torch.float32),
        (partial(nn.Module.to, dtype=torch.float64), torch.float64),
    ],
    ids=["half", "bfloat16", "float", "double", "to half", "to double"],
)
def test_casts_keep_parameters_at_least_float32_and_sums_float64(layer, x, cast, parameters):
    gmm = layer()
    gmm.em_step(x)
    before = copy_of_buffers(gmm)
    cast(nn.Sequential(gmm))
    for name, buffer in gmm.named_buffers():
        assert buffer.dtype == (parameters if name in PARAMETERS else before[name].dtype)
        torch.testing.assert_close(buffer, before[name].to(buffer.dtype), rtol=0, atol=0, equal_nan=True)


def test_narrowing_a_float64_layer_rounds_parameters_and_keeps_sums(layer, x):
    gmm = layer(dtype=torch.float64)
    before = copy_of_buffers(gmm)
    gmm.half()
    for name, buffer in gmm.named_buffers():
        if name in PARAMETERS:
            assert buffer.dtype == torch.float32
        torch.testing.assert_close(buffer, before[name].to(buffer.dtype), rtol=0, atol=0, equal_nan=True)


def test_buffers_stay_the_same_tensors_whatever_is_written(layer, x):
    """An assignment in place of a copy breaks data parallelism, compiled code and inference mode."""
    gmm, other = layer(), layer()
    where = {name: buffer.data_ptr() for name, buffer in gmm.named_buffers()}
    gmm.em_step(x)
    gmm.em_step(x, step_size=0.5)
    gmm.initialize(x)
    gmm.max_iter, gmm.tol = 2, 1e9
    gmm.fit(x)
    gmm.set_parameters(gmm.weights_, gmm.means_, gmm.covariances_)
    gmm.load_state_dict(other.state_dict())
    gmm.reset_parameters()
    assert {name: buffer.data_ptr() for name, buffer in gmm.named_buffers()} == where


def test_buffers_written_in_inference_mode_serve_autograd_afterwards(layer, x):
    gmm = layer()
    with torch.inference_mode():
        gmm.em_step(x)
    x.requires_grad_()
    gmm(x).sum().backward()
    assert torch.isfinite(x.grad).all()


# -------------------------------------------------------------------------------------------- copies, checkpoints


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_state_and_shares_no_memory(layer, x, copied):
    gmm = layer(max_iter=3, tol=1e9).fit(x.requires_grad_())
    gmm.em_step(x * 2)
    twin = copied(gmm)
    assert_same_buffers(twin, copy_of_buffers(gmm))
    assert (twin.history_, repr(twin)) == (gmm.history_, repr(gmm))
    with unchanged(gmm):
        twin.em_step(x)
        assert not torch.equal(twin.means_, gmm.means_)


@pytest.mark.parametrize("through", [lambda s: s, through_a_file], ids=["in memory", "by a file"])
def test_a_parent_module_carries_the_mixture_in_its_state(family, layer, x, through):
    gmm = layer(tol=1e9)
    gmm.fit(x)
    gmm.em_step(x[:20], step_size=0.3)
    net, other = (
        nn.ModuleDict({"encoder": nn.Linear(2, 2), "density": m}) for m in (gmm, GaussianMixture(3, 2, family))
    )
    keys = other.load_state_dict(through(net.state_dict()))
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert_same_buffers(other, copy_of_buffers(net))
    assert other["density"].history_ == gmm.history_
    for attribute in ("fitted_", "converged_", "n_iter_", "lower_bound_", "objective_"):
        assert getattr(other["density"], attribute) == getattr(gmm, attribute)


@pytest.mark.parametrize("step_size", [None, 0.3])
def test_em_goes_on_after_a_reload_bit_for_bit(family, layer, x, step_size):
    gmm, other = layer(), GaussianMixture(3, 2, family)
    gmm.em_step(x, step_size=0.5)
    other.load_state_dict(through_a_file(gmm.state_dict()))
    for batch in x.split(15):
        gmm.em_step(batch, step_size=step_size)
        other.em_step(batch, step_size=step_size)
    assert_same_buffers(other, copy_of_buffers(gmm))


def test_a_loaded_state_is_not_shared(family, layer, x):
    gmm, other = layer(), GaussianMixture(3, 2, family)
    other.load_state_dict(gmm.state_dict())
    with unchanged(gmm):
        other.em_step(x)
    assert not torch.equal(other.means_, gmm.means_)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("within", [False, True], ids=["alone", "within a parent"])
@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ((3, 2, "diag"), "Expected the state of a GaussianMixture with .*'full'.*, but got one with .*'diag'"),
        ((3, 2, "tied_full"), "with .*'covariance_type': 'full'.*, but got one with .*'tied_full'"),
        ((4, 2, "full"), "with .*'n_components': 3.*, but got one with .*'n_components': 4"),
        ((3, 5, "full"), "with .*'n_features': 2.*, but got one with .*'n_features': 5.*; build the layer with these"),
    ],
)
def test_loading_another_mixture_raises_one_error_and_changes_nothing(theirs, message, within, strict, generator, x):
    gmm, other = random_layer("full", generator), GaussianMixture(*theirs)
    gmm.history_ = [1.0]
    ours, theirs = (nn.Sequential(gmm), nn.Sequential(other)) if within else (gmm, other)
    with unchanged(ours), pytest.raises(RuntimeError, match=message) as error:
        ours.load_state_dict(theirs.state_dict(), strict=strict)
    assert str(error.value).count("Expected") == 1
    assert "size mismatch" not in str(error.value)
    assert gmm.history_ == [1.0]


def test_families_that_agree_in_every_shape_are_still_told_apart(generator):
    """With one component, tied or not is the same shape."""
    gmm = random_layer("full", generator, n_components=1)
    with unchanged(gmm), pytest.raises(RuntimeError, match=r"but got one with .*'tied_full'"):
        gmm.load_state_dict(random_layer("tied_full", generator, n_components=1).state_dict())


def test_buffers_of_another_shape_without_options_raise_and_change_nothing(generator):
    gmm, state = random_layer("full", generator), random_layer("full", generator, n_components=4).state_dict()
    del state["_extra_state"]
    with unchanged(gmm), pytest.raises(RuntimeError, match=r"Expected `weights_` of shape \(3,\), but got \(4,\)"):
        gmm.load_state_dict(state, strict=False)


def test_a_missing_buffer_is_missed(generator):
    gmm, state = random_layer("full", generator), random_layer("full", generator).state_dict()
    del state["means_"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "means_"'):
        gmm.load_state_dict(state)


# --------------------------------------------------------------------------------------------------- compilation


@pytest.mark.no_cover
@pytest.mark.parametrize("covariance_type", ["full", "tied_diag", "spherical"])
def test_the_compiled_density_is_the_eager_one(covariance_type, generator, x):
    torch._dynamo.reset()
    gmm = random_layer(covariance_type, generator, dtype=torch.float32)
    compiled = torch.compile(gmm, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), gmm(x), 1e-6)
    gradients = [torch.autograd.grad(f(y).sum(), y)[0] for f in (compiled, gmm) for y in [x.clone().requires_grad_()]]
    assert_near(*gradients, 1e-5)


@pytest.mark.no_cover
@pytest.mark.parametrize("step_size", [None, 0.5, torch.tensor(0.3)], ids=["exact", "number", "tensor"])
@pytest.mark.parametrize("covariance_type", ["full", "full by blocks", "tied_diag", "spherical"])
def test_three_compiled_updates_are_three_eager_ones(covariance_type, step_size, generator, x, monkeypatch):
    """One would not show a write that compiled code drops."""
    torch._dynamo.reset()
    family, _, blocks = covariance_type.partition(" ")
    if blocks:
        monkeypatch.setattr("tgmm_nn.forms.WIDE", 1)
        monkeypatch.setattr("tgmm_nn.triangular.BLOCK", 1)
        monkeypatch.setattr("tgmm_nn.few.SUMMED", 0)  # which has no blocks
    gmm = random_layer(family, generator, dtype=torch.float32)
    twin = copy.deepcopy(gmm)
    step = torch.compile(gmm.em_step, fullgraph=True, backend="aot_eager")
    for batch in (x[:20], x[20:], x[10:30]):
        assert_near(step(batch, step_size=step_size), twin.em_step(batch, step_size=step_size), 1e-6)
    for name, buffer in gmm.named_buffers():
        expected = getattr(twin, name)
        torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert gmm.n_updates.item() == 3


@pytest.mark.no_cover
def test_the_density_can_be_exported(layer, x):
    gmm = layer()
    exported = torch.export.export(gmm, (x,)).module()
    assert_near(exported(x), gmm(x), 1e-6)


@pytest.mark.parametrize("how", ["initialize", "set_parameters", "reset_parameters"])
def test_what_a_fit_reports_does_not_outlive_its_parameters(how, generator):
    x = torch.randn(50, 2, generator=generator)
    gmm = GaussianMixture(2, 2, max_iter=500).fit(x)
    gmm.em_step(x, step_size=0.1)
    assert (gmm.converged_, int(gmm.n_updates)) == (True, 1)
    arguments = {
        "initialize": (x,),
        "set_parameters": (gmm.weights_.clone(), gmm.means_.clone(), gmm.covariances_),
        "reset_parameters": (),
    }
    getattr(gmm, how)(*arguments[how])
    assert (gmm.converged_, gmm.n_iter_, gmm.history_, int(gmm.n_updates)) == (False, 0, [], 0)
    assert math.isnan(gmm.lower_bound_)
    assert math.isnan(gmm.objective_)


def test_a_layer_on_the_meta_device_has_shapes():
    gmm = GaussianMixture(3, 2, device="meta")
    x = torch.empty(5, 2, device="meta")
    assert gmm(x).shape == (5,)
    assert gmm.predict_proba(x).shape == (5, 3)
    assert gmm.em_step(x).shape == ()


@pytest.mark.parametrize("extra", [None, torch.zeros(1), "full"])
def test_a_foreign_extra_state_is_one_error(extra, family):
    gmm = GaussianMixture(3, 2, family)
    state = gmm.state_dict()
    state["_extra_state"] = extra
    before = copy_of_buffers(gmm)
    with pytest.raises(RuntimeError, match="`_extra_state` to be a dictionary of options, but got"):
        gmm.load_state_dict(state)
    assert_same_buffers(gmm, before)


def test_a_state_that_is_assigned_stays_wide(family, generator):
    gmm = GaussianMixture(3, 2, family).fit(
        torch.randn(60, 2, generator=generator) * 3,
    )
    half = {
        k: v.half() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in gmm.state_dict().items()
    }
    other = GaussianMixture(3, 2, family)
    other.load_state_dict(half, assign=True)
    kinds = {name: buffer.dtype for name, buffer in other.named_buffers() if buffer.is_floating_point()}
    assert all(kinds[name] == torch.float32 for name in PARAMETERS)
    assert all(dtype == torch.float64 for name, dtype in kinds.items() if name not in PARAMETERS)


@pytest.mark.no_cover
def test_a_compiled_update_takes_one_step_size_after_another(generator):
    """A schedule gives another number each time, which the compiler turns into a symbol."""
    torch._dynamo.reset()
    x = torch.randn(30, 2, generator=generator)
    eager = GaussianMixture(2, 2, random_state=0).initialize(x)
    compiled = copy.deepcopy(eager)
    step = torch.compile(compiled.em_step, fullgraph=True, backend="aot_eager")
    for step_size in (0.5, 0.4, 0.3, 0.2):
        eager.em_step(x, step_size=step_size)
        step(x, step_size=step_size)
    for name in PARAMETERS:
        assert_near(getattr(compiled, name), getattr(eager, name), 1e-6)


# ------------------------------------------------------------------------------------------- what a module must bear


@pytest.mark.no_cover
def test_an_exported_density_takes_any_batch(layer, generator):
    gmm = layer()
    x = torch.randn(7, 2, generator=generator)
    exported = torch.export.export(gmm, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}}).module()
    for n in (2, 7, 500):
        rows = torch.randn(n, 2, generator=generator)
        assert_near(exported(rows), gmm(rows), 1e-6)


@pytest.mark.no_cover
def test_an_exported_network_has_the_mixture_inside(generator):
    net = nn.Sequential(nn.Linear(3, 2), random_layer("full", generator, dtype=torch.float32))
    x = torch.randn(5, 3, generator=generator)
    exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    assert_near(exported.module()(x[:3]), net(x[:3]), 1e-6)


def test_gradients_of_each_row_by_vmap_are_those_of_a_loop(layer, x):
    gmm = layer()
    per_row = torch.func.vmap(torch.func.grad(gmm))(x)
    loop = torch.stack([torch.func.grad(gmm)(row) for row in x])
    assert_near(per_row, loop, 1e-5)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_parallel_training_with_the_density_in_the_loss_runs(family, generator, tmp_path):
    """One process is enough to make DDP broadcast and check buffers."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(nn.Linear(3, 2), random_layer(family, generator, dtype=torch.float32))
        parallel = nn.parallel.DistributedDataParallel(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        x = torch.randn(20, 3, generator=generator)
        before = copy_of_buffers(net)
        for _ in range(3):
            optimizer.zero_grad()
            (-parallel(x).mean()).backward()
            optimizer.step()
            net[1].em_step(net[0](x), step_size=0.5)
        assert not torch.equal(net[1].means_, before["1.means_"])
        assert torch.isfinite(parallel(x)).all()
    finally:
        torch.distributed.destroy_process_group()


def test_autograd_goes_through_rows_after_an_update_in_inference_mode(layer, x):
    gmm = layer()
    with torch.inference_mode():
        gmm.em_step(x)
        density = gmm(x)
    assert_near(gmm(x), density.clone(), 0.0)
    rows = x.clone().requires_grad_()
    gmm(rows).sum().backward()
    assert torch.isfinite(rows.grad).all()


def test_a_layer_can_be_fitted_and_sampled_under_inference_mode(layer, x):
    gmm = layer(max_iter=500)
    with torch.inference_mode():
        gmm.fit(x).sample(5)
        gmm.initialize(x)
        marginal = gmm.marginal(0)
    rows = x.clone().requires_grad_()
    gmm(rows).sum().backward()
    assert torch.isfinite(rows.grad).all()
    assert torch.isfinite(marginal(rows[:, :1].detach())).all()


@pytest.mark.parametrize("step_size", [None, 0.5])
def test_a_log_prior_of_labels_keeps_each_row_to_its_component(family, step_size, layer, x, generator):
    """Three components with one label each are three Gaussians, one for each class."""
    gmm = layer(dtype=torch.float64, reg_covar=0.0)
    labels = torch.arange(40) % 3
    log_prior = torch.full((40, 3), -torch.inf).scatter(1, labels[:, None], 0.0)
    gmm.em_step(x.double(), log_prior=log_prior.numpy() if step_size is None else log_prior.tolist())
    expected = torch.stack([x[labels == k].double().mean(0) for k in range(3)])
    assert_near(gmm.means_, expected)
    gmm.em_step(x.reshape(8, 5, 2), log_prior=log_prior.reshape(8, 5, 3), step_size=step_size)
    assert_near(gmm.means_, expected, 1e-6)
    with (
        unchanged(gmm),
        pytest.raises(ValueError, match=r"`log_prior` of shape \(40, 3\), one number for each row and comp"),
    ):
        gmm.em_step(x, log_prior=log_prior[:, :2])


# ------------------------------------------------------------------------------------------------------- devices


def test_under_a_default_device_a_layer_works_where_it_was_put(family, x):
    """A context that says where new tensors go must not reach into a layer that says otherwise."""
    options = {"covariance_prior": 1.0, "degrees_of_freedom_prior": 5.0, "init_covariances": 1.0, "random_state": 0}
    oracle = GaussianMixture(3, 2, family, max_iter=500, device="cpu", **options).fit(x)
    with torch.device("meta"):
        assert GaussianMixture(3, 2, family, **options).means_.device.type == "meta"
        gmm = GaussianMixture(3, 2, family, max_iter=500, device="cpu", **options).fit(x)
        assert gmm.sample(5, std_range=(1.0, 2.0))[0].device.type == "cpu"
        assert gmm.marginal(0).means_.device.type == gmm.condition(0, 0.0).means_.device.type == "cpu"
        for init_means in ("kpp", "random"):
            GaussianMixture(3, 2, family, init_means=init_means, init_covariances="eye", device="cpu").initialize(x)
    assert_same_buffers(gmm, copy_of_buffers(oracle))


@pytest.mark.parametrize("device", ["", "foo", "cuda:99", 3.5, True, 0 if torch.version.cuda is None else "foo"])
def test_a_device_that_is_none_is_named(device):
    with pytest.raises(
        ValueError, match="`device` to be a device such as 'cpu' or 'cuda:0' that is there, or None, but got"
    ):
        GaussianMixture(2, 2, device=device)


@pytest.mark.parametrize("dtype", ["float64", "torch.float64", torch.float64])
def test_a_dtype_may_be_named_as_yaml_can(dtype):
    assert GaussianMixture(2, 2, dtype=dtype).means_.dtype == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_are_moved_to_the_device_of_the_layer(family, x):
    gmm = GaussianMixture(3, 2, family, device="cuda", random_state=0, max_iter=500).fit(x)
    assert gmm(x).device.type == gmm.sample(3)[0].device.type == "cuda"
    assert_near(gmm(x).cpu(), GaussianMixture(3, 2, family, random_state=0, max_iter=500).fit(x)(x), 1e-3)
