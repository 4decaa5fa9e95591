"""What the tests compare with, written without the package's own algebra: dense matrices and `torch.distributions`."""

import copy
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES, Covariance
from tgmm_nn.functional import Parameters


class Mixture(NamedTuple):
    """A mixture for a test: its covariances as elements (leading axis K, or 1 when tied) beside the parameters."""

    parameters: Parameters
    covariance: Covariance
    covariances: torch.Tensor

    @property
    def public(self):
        """Arguments of `GaussianMixture.set_parameters`."""
        return self.parameters.weights, self.parameters.means, self.covariance.public(self.covariances)


def dense(element, n_features):
    """Write elements of any structure as d × d matrices."""
    n_axes = element.ndim - 1
    if n_axes == 0:
        element = element[:, None].expand(-1, n_features)
    return torch.diag_embed(element) if n_axes < 2 else element


def restrict(matrices, family):
    """Keep what a family keeps of one d × d matrix per component; a tied family sums over components."""
    part = {
        "full": lambda m: m,
        "diag": lambda m: m.diagonal(dim1=-2, dim2=-1),
        "spherical": lambda m: m.diagonal(dim1=-2, dim2=-1).mean(-1),
    }[family.removeprefix("tied_")](matrices)
    return part.sum(0, keepdim=True) if family.startswith("tied_") else part


def random_covariances(family, n_components, n_features, generator, dtype=torch.float64):
    """Draw positive definite elements with variances of order one."""
    a = torch.randn(n_components, n_features, n_features, generator=generator, dtype=torch.float64)
    matrices = a @ a.mT / n_features + 0.3 * torch.eye(n_features, dtype=torch.float64)
    share = n_components if family.startswith("tied_") else 1
    return (restrict(matrices, family) / share).to(dtype)


def random_mixture(family, generator, n_components=3, n_features=2, *, spread=2.0, offset=0.0, dtype=torch.float64):
    """Draw a mixture whose means lie ``spread`` apart, about ``offset``."""
    covariance = COVARIANCES[family]
    weights = torch.rand(n_components, generator=generator, dtype=torch.float64) + 0.5
    means = offset + spread * torch.randn(n_components, n_features, generator=generator, dtype=torch.float64)
    covariances = random_covariances(family, n_components, n_features, generator, dtype)
    factor, _ = covariance.factor(covariances.double())
    parameters = Parameters(weights / weights.sum(), means, factor).to(dtype)
    return Mixture(parameters, covariance, covariances)


def random_layer(family, generator, n_components=3, n_features=2, *, dtype=torch.float64, offset=0.0, **options):
    """Return a layer that was set to a random mixture."""
    mixture = random_mixture(family, generator, n_components, n_features, offset=offset)
    gmm = GaussianMixture(n_components, n_features, family, dtype=dtype, **options)
    return gmm.set_parameters(*mixture.public)


def distribution(weights, means, covariances):
    """Return the mixture as `torch.distributions` has it, from elements of any structure; differentiable."""
    matrices = dense(covariances, means.shape[-1]).expand(len(means), -1, -1)
    normals = MultivariateNormal(means, (matrices + matrices.mT) / 2, validate_args=False)
    return MixtureSameFamily(Categorical(weights, validate_args=False), normals, validate_args=False)


def joint(x, weights, means, covariances):
    """Return log(weight times density) of each component, shape ``(n, K)``, by `torch.distributions`."""
    components = distribution(weights, means, covariances).component_distribution
    return weights.log() + components.log_prob(x[:, None])


def assert_near(actual, expected, tolerance=1e-13):
    """Assert equality up to rounding, ``tolerance`` being both relative and absolute."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def copy_of_buffers(module):
    """Return the buffers as they are now."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_buffers(module, expected, *, but=()):
    """Assert bitwise equality with `copy_of_buffers`, nan equal to nan."""
    for name, buffer in module.named_buffers():
        if name not in but:
            torch.testing.assert_close(
                buffer, expected[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@contextmanager
def unchanged(module):
    """Assert that the block leaves every buffer as it was."""
    before = copy_of_buffers(module)
    yield
    assert_same_buffers(module, before)


def assert_compiled_steps_are_eager_ones(gmm, batches, step_size):
    """Assert that compiled updates on batches give what eager ones give, to the rounding of float32."""
    torch._dynamo.reset()
    twin = copy.deepcopy(gmm)
    step = torch.compile(gmm.em_step, fullgraph=True, backend="aot_eager")
    for batch in batches:
        assert_near(step(batch, step_size=step_size), twin.em_step(batch, step_size=step_size), 1e-6)
    for one, other in zip(gmm.mixture(), twin.mixture(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
