"""Derivatives of the density: each way in which torch takes them gives the same, and none makes a nan of an infinity.

What keeps infinities out of a gradient is left away where none is recorded, which transforms and dual numbers hide.
"""

import pytest
import torch
from oracles import assert_near, random_layer
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.functional import Parameters, log_density

PARTS = Parameters._fields
FAR = [[torch.inf, 0.0], [torch.nan, 0.0], [1e200, 0.0]]


@pytest.fixture
def mixture(family, generator):
    """Three components, the last of weight zero."""
    weights = torch.tensor([0.4, 0.6, 0.0], dtype=torch.float64)
    means = torch.randn(3, 2, dtype=torch.float64, generator=generator)
    return Parameters(weights, means, COVARIANCES[family].identity(3, 2, means))


@pytest.fixture(params=["whole", "by blocks"])
def matrices(request, monkeypatch):
    """Densities by whole matrices, and by blocks of a feature each, as only those of wide ones are."""
    if request.param == "by blocks":
        monkeypatch.setattr("tgmm_nn.forms.WIDE", 1)
        monkeypatch.setattr("tgmm_nn.triangular.BLOCK", 1)


@pytest.fixture
def rows(generator):
    return torch.randn(5, 2, dtype=torch.float64, generator=generator)


@pytest.fixture
def density(family, mixture):
    """Return log-densities of rows, with one part of the mixture replaced."""
    return lambda part, value, x: log_density(x, mixture._replace(**{part: value}), COVARIANCES[family])


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("matrices")
def test_gradients_of_parameters_ignore_rows_that_have_none(part, mixture, rows, density):
    value = getattr(mixture, part).clone().requires_grad_()
    far = torch.cat([rows, torch.tensor(FAR, dtype=rows.dtype)])
    (expected,) = torch.autograd.grad(density(part, value, rows).sum(), value)
    (gradient,) = torch.autograd.grad(density(part, value, far)[:5].sum(), value)
    assert expected.isfinite().all()
    assert_near(gradient, expected)
    assert_near(grad(lambda v: density(part, v, far)[:5].sum())(value.detach()), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward derivatives
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("matrices")
def test_every_way_to_a_derivative_gives_the_same(part, mixture, rows, density):
    value = getattr(mixture, part)
    direction = torch.randn_like(value)
    each = vmap(grad(lambda v, row: density(part, v, row[None]).sum()), in_dims=(None, 0))(value, rows)
    expected = (each * direction).flatten(1).sum(1)
    assert expected.isfinite().all()
    for recorded in (True, False):  # forward derivatives are taken without gradients as well
        with torch.set_grad_enabled(recorded), forward_ad.dual_level():
            dual = forward_ad.make_dual(value, direction)
            assert_near(forward_ad.unpack_dual(density(part, dual, rows)).tangent, expected)
        with torch.set_grad_enabled(recorded):
            _, along = jvp(lambda v: density(part, v, rows), (value,), (direction,))
        assert_near(along, expected)
    if part != "weights":  # of one that is zero there is no derivative, and none is made of it
        step = 1e-6 * direction
        numeric = (density(part, value + step, rows) - density(part, value - step, rows)) / 2e-6
        assert_near(along, numeric, 1e-7)


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.usefixtures("matrices")
def test_forward_derivatives_of_a_compiled_density_are_those_of_the_eager_one(family, generator, rows):
    layer, directions = random_layer(family, generator), torch.randn_like(rows)

    def along(x, direction):
        return jvp(layer, (x,), (direction,))[1]

    torch._dynamo.reset()
    compiled = torch.compile(along, backend="aot_eager")
    assert_near(compiled(rows, directions), along(rows, directions), 1e-12)


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")  # by torch's own exporter
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_density_has_finite_gradients_although_none_was_recorded_then(strict, family, generator, rows):
    layer, far = random_layer(family, generator), torch.cat([rows, torch.tensor(FAR, dtype=rows.dtype)])
    exported = torch.export.export(layer, (far,), strict=strict).module()
    gradients = []
    for density in (layer, exported):
        x = far.clone().requires_grad_()
        density(x)[[0, 1, 2, 3, 4, 5, 7]].sum().backward()
        gradients.append(x.grad)
    assert (gradients[1][5:] == 0).all()
    assert_near(*gradients)


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.")  # by torch's own exporter
@pytest.mark.usefixtures("matrices")
@pytest.mark.parametrize("strict", [True, False])
def test_a_density_is_exported_for_any_number_of_rows(strict, family, generator, rows):
    layer = random_layer(family, generator)
    exported = torch.export.export(layer, (rows,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    more = torch.cat([rows, rows + 1.0])
    assert_near(exported.module()(more), layer(more), 1e-12)


@pytest.mark.usefixtures("matrices")
def test_a_density_is_the_same_number_whether_a_gradient_is_recorded_or_not(mixture, rows, density):
    far = torch.cat([rows, torch.tensor(FAR, dtype=rows.dtype)])
    with torch.no_grad():
        bare = density("means", mixture.means, far)
    assert torch.equal(bare.isnan(), far.isnan().any(1))
    assert (bare[[5, 7]] == -torch.inf).all()
    for x in (far, far.clone().requires_grad_()):
        torch.testing.assert_close(density("means", mixture.means, x), bare, rtol=0, atol=0, equal_nan=True)
