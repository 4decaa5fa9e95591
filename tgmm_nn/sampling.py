r"""Samples of a mixture, also of shells about the component that each is drawn from, without rejection.

A row of a component is :math:`x = \mu + r L u` with :math:`\Sigma = L L^\top`, u uniform on the unit sphere and r, its
Mahalanobis distance, of the chi law with d degrees of freedom. Restricting x to a shell restricts r, whose law is
inverted exactly.
"""

from __future__ import annotations

import math
import numbers
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.covariance import Covariance
from tgmm_nn.functional import Parameters

__all__ = ["check_shell", "draw", "radii", "stream"]

Shell = tuple[float, float]


def stream(random_state: int | None, n_draws: int, parameters: Parameters) -> torch.Generator:
    """Return the generator of draw number ``n_draws``.

    A given seed alone decides, so that its draws hold on other machines. Without one the parameters are mixed into
    torch's seed: two different mixtures of one process do not share their noise then.
    """
    if random_state is None:
        content = b"".join(parameter.detach().cpu().numpy().tobytes() for parameter in parameters)
        entropy = [torch.initial_seed(), n_draws, zlib.crc32(content)]
    else:
        entropy = [int(random_state), n_draws]
    seed = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


def check_shell(confidence: Any, std_range: Any, n_features: int) -> Shell | None:
    """Return the smallest and largest Mahalanobis distance that a user asked for, None where there is no bound.

    Raises:
        TypeError: If ``confidence`` is no number, or ``std_range`` no pair of numbers.
        ValueError: If both are given, or one is out of range.
    """
    if confidence is not None and std_range is not None:
        raise ValueError("Expected `confidence` or `std_range`, but got both; they bound the same distance.")
    if confidence is not None:
        from scipy import special

        checks.check_number("confidence", confidence, 0.0, 1.0, strict=True)
        return 0.0, math.sqrt(2.0 * special.gammaincinv(0.5 * n_features, confidence))
    if std_range is None:
        return None
    if not isinstance(std_range, (tuple, list)) or len(std_range) != 2:
        raise TypeError(f"Expected `std_range` to be a pair of numbers, but got {std_range!r}.")
    for bound in std_range:
        if isinstance(bound, bool) or not isinstance(bound, numbers.Real):
            raise TypeError(f"Expected `std_range` to be a pair of numbers, but got {std_range!r}.")
    low, high = map(float, std_range)
    if not 0.0 <= low < high:
        raise ValueError(f"Expected `std_range` as (low, high) with 0 <= low < high, but got {std_range!r}.")
    return low, high


def radii(n: int, n_features: int, bounds: Shell, generator: torch.Generator) -> Tensor:
    r"""Draw from the chi law with d degrees of freedom between two bounds, by its inverse distribution function.

    .. math:: r = F^{-1}(F(a) + u (F(b) - F(a))), \qquad F(r) = P(d/2, r^2/2),

    or the same with the survival function :math:`Q = 1 - P`, whichever is the smaller number and has the digits.

    Args:
        n: Number of draws.
        n_features: d.
        bounds: a and b; b may be infinite.
        generator: Source of randomness.

    Returns:
        Tensor of shape ``(n,)``, float64, on the CPU.

    Raises:
        ValueError: If the probability of the shell is below what float64 can represent.
    """
    from scipy import special

    shape, (low, high) = 0.5 * n_features, bounds
    # Below the bulk of the law its distribution function has the digits, and from there on its survival function.
    below = high * high < n_features
    function, inverse = (special.gammainc, special.gammaincinv) if below else (special.gammaincc, special.gammainccinv)
    ends = sorted(float(function(shape, 0.5 * bound * bound)) for bound in bounds)
    mass = ends[1] - ends[0]
    if mass < np.finfo(np.float64).tiny:
        raise ValueError(
            f"Expected `std_range` (or `confidence`) to hold a probability that float64 can represent, but between "
            f"{low:g} and {high:g} standard deviations lies less than 2e-308 in {n_features} features; most of it lies "
            f"about {math.sqrt(n_features):.3g}."
        )
    # In (0, 1]: the survival of 0 would be at infinity.
    u = 1.0 - torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    quantile = torch.from_numpy(np.atleast_1d(inverse(shape, ends[0] + mass * u.numpy())))
    return (2.0 * quantile).sqrt().clamp(low, high)


def draw(
    n: int,
    parameters: Parameters,
    covariance: Covariance,
    component: int | None,
    bounds: Shell | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw rows and say from which component each is; differentiable in means and factor.

    Args:
        n: Number of rows.
        parameters: Mixture in float64.
        covariance: Structure of the covariances.
        component: The only component to draw from; None draws by weight.
        bounds: Smallest and largest Mahalanobis distance from the row's own component.
        generator: Source of randomness.

    Returns:
        Rows of shape ``(n, d)`` in float64, and their components of shape ``(n,)``, on the mixture's device.
    """
    weights, means, factor = parameters
    where: dict[str, Any] = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    if component is None:
        edges = weights.cumsum(0)
        ids = torch.searchsorted(edges, torch.rand(n, **where).to(edges) * edges[-1], right=True)
        ids = ids.clamp(max=len(weights) - 1)
    else:
        ids = torch.full((n,), component, device=means.device)
    z = torch.randn(n, means.shape[-1], **where)
    if bounds is not None:
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        z = z / length * radii(n, means.shape[-1], bounds, generator).to(z.device)[:, None]
    z, root = z.to(means), covariance.root(factor).expand(len(means), *factor.shape[1:])
    size = max(1, 1_000_000 // max(1, root[0].numel()))
    parts = zip(z.split(size), ids.split(size), strict=True)
    rows = [means[k] + covariance.apply(root[k], part) for part, k in parts]
    return torch.cat(rows), ids
