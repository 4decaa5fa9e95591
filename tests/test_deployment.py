"""A network with a density head leaves Python, is compiled, runs in half precision and is differentiated once more."""

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch
from oracles import assert_compiled_steps_are_eager_ones, assert_near, random_layer
from torch import nn

EXAMPLE = Path(__file__).parents[1] / "examples" / "density_head_onnx.py"
BATCHES = (1, 2, 7, 100, 5000)
BATCH = ({0: torch.export.Dim("batch")},)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),  # by torch's own exporter
    pytest.mark.no_cover,
]


@pytest.fixture
def head(family, generator):
    """Make the layer, its parameters as buffers."""
    return lambda dtype=torch.float32: random_layer(family, generator, dtype=dtype)


@pytest.fixture(params=["buffers", "parameters"])
def either_head(request, head):
    """Make the layer, its parameters as buffers or trainable."""
    return head if request.param == "buffers" else lambda dtype=torch.float32: head(dtype).to_parameters()


def network(head):
    """Put a head of 2 features on an encoder of 5."""
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)).to(head.mixture().means.dtype)
    return nn.Sequential(encoder, head)


def rows(n, generator, dtype=torch.float32):
    return 3 * torch.randn(n, 5, generator=generator, dtype=dtype)


class Outputs(nn.Module):
    """What a service asks of a network: density, responsibilities and the most probable component."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z = self.net[0](x)
        return self.net[1](z), self.net[1].predict_proba(z), self.net[1].predict(z)


# ---------------------------------------------------------------------------------------------------------- export


def test_an_exported_network_takes_any_batch(either_head, generator):
    net = Outputs(network(either_head()))
    exported = torch.export.export(net, (rows(4, generator),), dynamic_shapes=BATCH).module()
    for n in BATCHES:
        x = rows(n, generator)
        assert_near(exported(x), net(x), 1e-6)


def test_an_exported_network_scores_maps_of_any_size(head, generator):
    """One row per pixel, (batch, height, width, features)."""
    net, size = network(head()), dict(enumerate(torch.export.Dim.DYNAMIC for _ in range(3)))
    exported = torch.export.export(net, (torch.zeros(2, 3, 4, 5),), dynamic_shapes=(size,)).module()
    x = torch.randn(3, 8, 6, 5, generator=generator)
    assert_near(exported(x), net(x), 1e-6)


def in_onnxruntime(net, x):
    """Write a network as ONNX for any batch and return what runs it, tensor to tensors."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(net.eval(), (x,), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (given,) = session.get_inputs()
    assert isinstance(given.shape[0], str)  # a name, so any number of rows
    return lambda x: tuple(map(torch.from_numpy, session.run(None, {given.name: x.numpy()})))


def test_onnxruntime_gives_what_torch_gives_for_any_batch(head, generator):
    net = Outputs(network(head()))
    run = in_onnxruntime(net, rows(4, generator))
    for n in BATCHES:
        x = rows(n, generator)
        assert_near(run(x), net(x), 1e-4)


@pytest.mark.parametrize("trainable", [False, True])
def test_onnxruntime_gives_what_torch_gives_at_the_edges(trainable, generator):
    """Rows that are not finite, and a component of weight 0 whose logarithm is not."""
    gmm = random_layer("full", generator, dtype=torch.float32)
    gmm.set_parameters([0.25, 0.0, 0.75], gmm.means_, gmm.covariances_)
    gmm = gmm.to_parameters() if trainable else gmm
    run = in_onnxruntime(gmm, torch.zeros(4, 2))
    x = torch.tensor([[0.0, 0.0], [torch.inf, 0.0], [torch.nan, 0.0], [1e30, 0.0], [1e3, 0.0]])
    assert gmm(x).isinf().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(run(x)[0], gmm(x), rtol=1e-4, atol=1e-4, equal_nan=True)


def test_the_example_says_where_there_is_no_onnxruntime(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name[:4] == "onnx" else find(name, *rest)
    )
    runpy.run_path(str(EXAMPLE))
    assert capsys.readouterr().out.endswith("not exported: pip install onnx onnxscript onnxruntime\n")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- compile


def test_a_compiled_network_is_the_eager_one(either_head, generator):
    torch._dynamo.reset()
    net, x = network(either_head()), rows(20, generator)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), net(x), 1e-6)
    for value, expected in zip(gradients_of(compiled(x).mean(), net), gradients_of(net(x).mean(), net), strict=True):
        assert_near(value, expected, 1e-5)


def gradients_of(value, net):
    return torch.autograd.grad(value, list(net.parameters()))


@pytest.mark.parametrize("step_size", [None, 0.2])
def test_compiled_updates_on_an_encoders_rows_are_eager_ones(head, step_size, generator):
    net = network(head())
    batches = [net[0](rows(30, generator)).detach() for _ in range(3)]
    assert_compiled_steps_are_eager_ones(net[1], batches, step_size)


# -------------------------------------------------------------------------------------------------- half precision


def test_a_head_under_autocast_is_the_head_on_the_encoders_bfloat16_rows(either_head, generator):
    net, x = network(either_head()), rows(50, generator)
    with torch.autocast("cpu", torch.bfloat16):
        density, z = net(x), net[0](x)
    assert (z.dtype, density.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(density, net[1](z.float()), rtol=0, atol=0)
    density.mean().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in net.parameters())


# ------------------------------------------------------------------------------------------------------ derivatives


def test_input_gradients_of_each_sample_are_those_of_vmap(either_head, generator):
    net, x = network(either_head(torch.float64)), rows(20, generator, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x)
    assert_near(torch.func.vmap(torch.func.grad(net))(x.detach()), gradient)


def test_parameter_gradients_of_each_sample_are_those_of_vmap(either_head, generator):
    net, x = network(either_head(torch.float64)), rows(6, generator, torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    density = lambda parameters, x: torch.func.functional_call(net, parameters, (x,))  # noqa: E731
    each = torch.func.vmap(torch.func.grad(density), in_dims=(None, 0))(parameters, x)
    for n, row in enumerate(x):
        for value, expected in zip(each.values(), gradients_of(net(row), net), strict=True):
            assert_near(value[n], expected)


def test_the_density_of_a_network_can_be_differentiated_twice(either_head, generator):
    net, x = network(either_head(torch.float64)), rows(3, generator, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x)


def test_a_penalty_on_the_input_gradient_reaches_every_parameter(either_head, generator):
    net, x = network(either_head(torch.float64)), rows(20, generator, torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
