"""The plane in which rows and mixtures of many features are drawn, and what of it is drawn."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting.figures import percent

__all__ = ["Plane", "check_fitted", "limits_of", "principal_plane", "to_labels", "to_rows"]


class Plane(NamedTuple):
    """A plane in the space of features; of one feature its second direction is zero.

    Args:
        mean: A point of it, shape ``(d,)``.
        directions: Two orthonormal directions, shape ``(d, 2)``.
        names: What the two directions are.
    """

    mean: Tensor
    directions: Tensor
    names: tuple[str, str] = ("first direction", "second direction")

    def project(self, x: Tensor) -> Tensor:
        """Return the coordinates of rows ``(n, d)`` in the plane, shape ``(n, 2)``, float64, on the CPU."""
        return (x.detach().cpu().double() - self.mean.cpu().double()) @ self.directions.cpu().double()

    def project_mixture(self, gmm: GaussianMixture) -> GaussianMixture:
        r"""Return the distribution of a mixture's projected rows, again a mixture, exactly.

        .. math:: p(V^\top (x - m)) = \sum_k \pi_k N(V^\top (\mu_k - m), V^\top \Sigma_k V)

        It is of two features, and of one where the mixture is. Other features are not held fixed: the density is
        summed over them.

        Example:
            >>> gmm = GaussianMixture(1, 3).set_parameters([1.0], [[1.0, 0.0, 5.0]], torch.eye(3)[None] * 4)
            >>> flat = Plane(torch.zeros(3), torch.eye(3, 2)).project_mixture(gmm)
            >>> flat.means_, flat.covariances_.round()
            (tensor([[1., 0.]], dtype=torch.float64), tensor([[[4., 0.],
                     [0., 4.]]], dtype=torch.float64))
        """
        size = min(gmm.n_features, 2)
        directions = self.directions[:, :size].cpu().double()
        wide = copy.deepcopy(gmm).cpu().double()  # in float32 narrow components could lose their definiteness
        covariances = directions.mT @ wide.covariance_matrices() @ directions
        flat = GaussianMixture(gmm.n_components, size, dtype=torch.float64, device="cpu")
        flat.set_parameters(wide.weights_, self.project(wide.means_)[:, :size], (covariances + covariances.mT) / 2)
        return flat


def principal_plane(x: Any) -> Plane:
    """Return the plane through the mean of rows in which they vary most; of one or two features, these themselves.

    Args:
        x: Finite rows, shape ``(n, d)``.

    Raises:
        TypeError: If ``x`` holds no real numbers.
        ValueError: If ``x`` is not ``(n, d)`` with at least one row, or not finite.

    Example:
        >>> x = torch.tensor([[3.0, 0.0, 0.1], [-3.0, 0.0, 0.1], [0.0, 1.0, -0.1], [0.0, -1.0, -0.1]])
        >>> plane = principal_plane(x)
        >>> plane.directions.abs(), plane.names[0]
        (tensor([[1., 0.],
                [0., 1.],
                [0., 0.]], dtype=torch.float64), 'first principal direction (90 % of the variance)')
    """
    x = to_rows(x).cpu().double()
    d = x.shape[1]
    if d <= 2:
        return Plane(x.new_zeros(d), torch.eye(d, 2, dtype=x.dtype), ("feature 0", "feature 1"))
    mean = x.mean(0)
    _, scales, directions = torch.linalg.svd(x - mean, full_matrices=len(x) < 2)
    plane = directions[:2].mT
    # A direction's sign is arbitrary: fix it, so that pictures of successive epochs do not flip.
    largest = plane.gather(0, plane.abs().argmax(0, keepdim=True))
    plane = plane * torch.where(largest < 0, -1.0, 1.0)
    shares = [*(scales.square() / scales.square().sum().clamp(min=1e-300)).tolist(), 0.0]
    first, second = (
        f"{which} principal direction ({percent(share)} of the variance)"
        for which, share in zip(("first", "second"), shares, strict=False)
    )
    return Plane(mean, plane.contiguous(), (first, second))


def limits_of(points: Tensor, flat: GaussianMixture | None, radius: float) -> Tensor:
    """Return where a picture begins and ends, ``(2, 2)``: all points, and ellipses as far as they leave room for these.

    Points that hardly differ beside the ellipses, such as one point, leave the room to the widest ellipse.

    Args:
        points: Rows in the plane, shape ``(n, 2)``.
        flat: Mixture in the plane, or None.
        radius: Largest radius of the ellipses, in standard deviations.
    """
    low, high = points.amin(0), points.amax(0)
    span = (high - low).amax().clamp(min=max(1e-6, 1e-9 * float(points.abs().max())))
    if flat is None:
        return torch.stack([low - 0.05 * span, high + 0.05 * span])
    heavy = flat.weights_ * flat.n_components >= EMPTY
    means, reach = flat.means_[heavy], radius * flat.covariances_[heavy].diagonal(dim1=-2, dim2=-1).sqrt()
    widest = 2.0 * reach.amax()
    points_differ = bool(span >= 1e-3 * widest)
    span = span if points_differ else widest
    if flat.n_features == 2 or not points_differ:
        low = torch.maximum(torch.minimum(low, (means - reach).amin(0)), low - span / 2)
        high = torch.minimum(torch.maximum(high, (means + reach).amax(0)), high + span / 2)
    return torch.stack([low - 0.05 * span, high + 0.05 * span])


# A component with less than this share of an equal weight is drawn as empty.
EMPTY = 0.01


def to_rows(x: Any, n_features: int | None = None, name: str = "x") -> Tensor:
    """Return finite rows ``(n, d)`` with at least one row, or raise."""
    rows = checks.to_tensor(name, x, torch.float32).detach()
    if rows.is_complex() or rows.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to hold real numbers, but got {rows.dtype}.")
    d = "d" if n_features is None else n_features
    if rows.ndim != 2 or 0 in rows.shape or n_features not in (None, rows.shape[1]):
        raise ValueError(
            f"Expected `{name}` of shape (n, {d}) with at least one row, but got {tuple(rows.shape)}; flatten leading "
            f"dimensions by x.reshape(-1, {d})."
        )
    rows = rows if rows.is_floating_point() else rows.double()
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"Expected `{name}` to be finite, but it holds nan or infinity; drop these rows.")
    return rows


def to_labels(labels: Any, n: int, name: str = "labels") -> Tensor:
    """Return one integer for each of n rows, shape ``(n,)``, on the CPU, or raise."""
    if not isinstance(labels, Tensor) and np.asarray(labels).dtype.kind in "USO":
        raise TypeError(
            f"Expected `{name}` to hold integers, but got {np.asarray(labels).ravel()[:3].tolist()}; number the rows "
            f"and give what a number means by `names=`, such as {{0: 'cat', 1: 'dog'}}."
        )
    kept = labels if hasattr(labels, "__array__") else np.asarray(labels)  # a list of integers holds integers
    values = checks.to_tensor(name, kept, torch.float32).detach().cpu()
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"Expected `{name}` to hold integers, but got {values.dtype}.")
    if tuple(values.shape) != (n,):
        raise ValueError(f"Expected `{name}` of shape ({n},), one for each row of `x`, but got {tuple(values.shape)}.")
    return values.long()


def check_fitted(gmm: Any, name: str = "gmm") -> None:
    """Raise unless ``gmm`` is a mixture that is fitted."""
    if not isinstance(gmm, GaussianMixture):
        raise TypeError(f"Expected `{name}` to be a GaussianMixture, but got {type(gmm).__name__}.")
    if not gmm.fitted_:
        raise RuntimeError(f"Expected `{name}` to be fitted, but it is as it was made; call fit(x) first.")
