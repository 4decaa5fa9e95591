"""Where a mixture expects rows, and which rows it does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.outliers import OutlierScore
from tgmm_nn.plotting.figures import count, new_axes, number
from tgmm_nn.plotting.places import add_colorbar, add_legend, is_narrow, is_small, label
from tgmm_nn.plotting.planes import Plane, check_fitted, limits_of, principal_plane, to_rows

__all__ = ["density_levels", "plot_density"]

OUTLIER = "#D55E00"
LINES = ("-", "--", "-.", ":")


def density_levels(gmm: GaussianMixture, mass: Sequence[float], n_samples: int = 100_000, seed: int = 0) -> Tensor:
    r"""Return the log-densities above which given shares of a mixture's mass lie: its regions of highest density.

    .. math:: \log c_m \quad \text{with} \quad P(p(Z) \ge c_m) = m, \qquad Z \sim p,

    as quantiles over samples, whose standard error in m is :math:`\sqrt{m (1 - m) / n}`, .001 for .9.

    Args:
        gmm: Fitted mixture.
        mass: Shares, each in (0, 1).
        n_samples: Number n of samples.
        seed: Their seed; the layer's own stream is not advanced.

    Returns:
        Log-densities in nats, shape ``(len(mass),)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a share is not in (0, 1).
        RuntimeError: If ``gmm`` is not fitted.

    References:
        Hyndman, Computing and graphing highest density regions, 1996.

    Example:
        >>> gmm = GaussianMixture(1, 2).set_parameters([1.0], [[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])
        >>> density_levels(gmm, [0.5]).round(decimals=1)
        tensor([-2.5000])
        >>> gmm(torch.tensor([1.1774, 0.0]))  # on the circle that holds half of a Gaussian
        tensor(-2.5310)
    """
    check_fitted(gmm)
    mass = _check_mass(mass)
    checks.check_integer("n_samples", n_samples)
    samples, _ = gmm.sample(n_samples, generator=torch.Generator(gmm.means_.device).manual_seed(seed))
    values = gmm(samples).sort().values
    places = [min(int((1.0 - share) * n_samples), n_samples - 1) for share in mass]
    return values[places]


def plot_density(
    gmm: GaussianMixture,
    x: Any,
    score: OutlierScore | None = None,
    *,
    mass: Sequence[float] = (0.5, 0.9, 0.99),
    plane: Plane | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Draw the density of a mixture as shades of grey, contours that hold given shares of its mass, and rows.

    Of two features this is the density itself. Of more it is that of the rows' projection to a plane, which is again a
    Gaussian mixture and exact: the density summed over all other directions, not a cut. Contours are those of the
    density that is drawn; the ``score`` is taken in all features, so that a row that it finds may lie within them. Of
    one feature the density is a curve, and contours are lines at its height.

    Args:
        gmm: Fitted mixture of d features.
        x: Finite rows, shape ``(n, d)``.
        score: Calibrated `OutlierScore` of as many features: rows above its threshold are marked by crosses.
        mass: Shares of the probability that contours hold, each in (0, 1).
        plane: Where to draw; None takes the principal plane of ``x``.
        title: Title of the axes; None says what is drawn.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, ``x`` is not finite, or a share is not in (0, 1).
        RuntimeError: If ``gmm`` is not fitted, or ``score`` not calibrated.

    Example:
        >>> x = torch.randn(500, 3)
        >>> gmm = GaussianMixture(1, 3).fit(x)
        >>> score = OutlierScore(gmm).calibrate(torch.randn(500, 3), quantile=0.9)
        >>> ax = plot_density(gmm, torch.cat([x, torch.full((20, 3), 9.0)]), score)
        >>> print(ax.get_title().replace("\n", " "))
        Density in the plane, summed over 1 other direction
    """
    check_fitted(gmm)
    x, mass = to_rows(x, gmm.n_features), _check_mass(mass)
    plane, ax = plane or principal_plane(x), ax or new_axes(size=(7.0, 7.2))[0]
    flat = plane.project_mixture(gmm)
    *levels, lowest = density_levels(flat, [*mass, 0.999]).tolist()
    if score is not None and not isinstance(score, OutlierScore):
        raise TypeError(f"Expected `score` to be an OutlierScore or None, but got {type(score).__name__}.")
    outlying = torch.zeros(len(x), dtype=torch.bool) if score is None else score.is_outlier(x).cpu()
    points = plane.project(x)
    limits = limits_of(points, flat, 2.0)
    if gmm.n_features == 1:
        marks = _draw_curve(ax, flat, limits, levels, mass)
        points[:, 1] = -0.02 * ax.get_ylim()[1]
    else:
        marks = _draw_map(ax, flat, limits, levels, mass, lowest - 2.0)
    add_legend(ax, marks + _draw_rows(ax, points, outlying, score, gmm.n_features), below=True, columns=2)
    hidden = gmm.n_features - 2
    summed = f"Density in the plane, summed over {hidden} other direction{'s'[: hidden > 1]}"
    if title is None:
        title = summed if hidden > 0 else "Density of the mixture"
    label(ax, title, plane.names[0], plane.names[1] if gmm.n_features > 1 else "density")
    return ax


def _check_mass(mass: Any) -> tuple[float, ...]:
    """Return shares of a mass, or raise."""
    if isinstance(mass, str) or not isinstance(mass, Iterable):
        raise TypeError(f"Expected `mass` to be a list of numbers, but got {mass!r}.")
    shares = tuple(mass)
    for share in shares:
        checks.check_number("mass", share)
        checks.check_share("mass", float(share))
    return shares


# What each score of an `OutlierScore` is, in words.
NAMES = {
    "log_density": "−log p(x)",
    "max_component": "−log of the largest component",
    "mahalanobis": "squared distance to the nearest mean",
    "relative_mahalanobis": "squared distance, relative",
}


def _draw_rows(ax: Axes, points: Tensor, outlying: Tensor, score: OutlierScore | None, n_features: int) -> list[Any]:
    """Draw rows as dots, and outliers as large crosses with an edge; return what a legend shows."""
    inside, outside = points[~outlying], points[outlying]
    kept = ax.scatter(inside[:, 0], inside[:, 1], s=7, c="#0072B2", alpha=0.6, linewidths=0, zorder=3)
    kept.set_label(count(len(inside), "row"))
    if score is None:
        return [kept]
    kept.set_label(f"{count(len(inside), 'row')}, no outliers")
    size = 30 if is_small(ax) else 70
    cross = ax.scatter(
        outside[:, 0], outside[:, 1], s=size, c=OUTLIER, marker="X", ec="black", linewidths=1.0, zorder=5
    )
    hidden = n_features - 2
    found = f"{count(len(outside), 'outlier')}: {NAMES[score.score]} > {number(float(score.threshold), 3)}"
    amid = f"\n(those amid rows are far out in the\n{count(hidden, 'direction')} not drawn)"
    cross.set_label(found + (amid if hidden > 0 and not is_narrow(ax) else ""))
    return [kept, cross]


def _draw_map(
    ax: Axes, flat: GaussianMixture, limits: Tensor, levels: Sequence[float], mass: Sequence[float], low: float
) -> list[Any]:
    """Shade the density in a plane, below ``low`` in white, and draw its contours; return what a legend shows."""
    limits = _around(flat, limits, min(levels, default=math.inf))
    (left, bottom), (right, top) = limits.tolist()
    xs, ys, density = _on_grid(flat, limits, 300)
    image = ax.imshow(
        density.clamp(min=low).numpy(), cmap="Greys", origin="lower", extent=(left, right, bottom, top), alpha=0.7,
        interpolation="bilinear", vmin=low, vmax=float(density.max()) + 1.5, aspect="equal",
    )  # fmt: skip
    add_colorbar(image, ax, "log-density, nats")
    marks = []
    for level, share, line in zip(levels, mass, LINES * len(mass), strict=False):
        ax.contour(xs, ys, density, levels=[level], colors="black", linewidths=1.2, linestyles=line, zorder=4)
        marks.append(Line2D([], [], color="black", lw=1.2, ls=line, label=f"holds {100 * share:.4g} % of the mass"))
    return marks


def _on_grid(flat: GaussianMixture, limits: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return n places across and up, and the log-density there, shape ``(n, n)``, from the lowest row up."""
    xs, ys = (torch.linspace(low, high, n, dtype=torch.float64) for low, high in limits.mT.tolist())
    return xs, ys, flat(torch.cartesian_prod(xs, ys)).reshape(n, n).mT


def _around(flat: GaussianMixture, limits: Tensor, level: float) -> Tensor:
    """Return limits that also hold the contour of a level, as far as a picture's width beyond."""
    span = limits[1] - limits[0]
    xs, ys, density = _on_grid(flat, torch.stack([limits[0] - span, limits[1] + span]), 300)
    high = density >= level
    if not bool(high.any()):
        return limits
    across, up = xs[high.any(0)], ys[high.any(1)]
    room = 0.03 * span  # a point of the grid is a hundredth of it
    low = torch.minimum(limits[0], torch.stack([across[0], up[0]]) - room)
    return torch.stack([low, torch.maximum(limits[1], torch.stack([across[-1], up[-1]]) + room)])


def _draw_curve(
    ax: Axes, flat: GaussianMixture, limits: Tensor, levels: Sequence[float], mass: Sequence[float]
) -> list[Any]:
    """Draw the density of one feature, and lines above which given shares of its mass lie."""
    low, high = limits[:, 0].tolist()
    grid = torch.linspace(low, high, 1000, dtype=torch.float64)
    marks = ax.plot(grid, flat(grid[:, None]).exp(), color="black", lw=2.0, label="density")
    for level, share, line in zip(map(math.exp, levels), mass, LINES * len(mass), strict=False):
        name = f"above: {100 * share:.4g} % of the mass"
        marks.append(ax.axhline(level, color="0.4", lw=1.2, ls=line, label=name))
    ax.set(xlim=(low, high))
    return list(marks)
