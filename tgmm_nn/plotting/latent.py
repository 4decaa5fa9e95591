"""Rows and the components of a mixture among them: in their plane or, of one feature, along their line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting.figures import SIZE, count, dot, mark, new_axes
from tgmm_nn.plotting.marks import component_marks, match_labels, spread_marks
from tgmm_nn.plotting.places import MOST_NAMES, add_legend, is_small, label
from tgmm_nn.plotting.planes import EMPTY, Plane, check_fitted, limits_of, principal_plane, to_labels, to_rows

__all__ = ["plot_latent", "plot_samples"]

NO_LABEL, GREY = -1, "0.5"
# Size of the largest curve with dashes, in pictures.
MOST_DASHED = 1e3


def plot_latent(
    gmm: GaussianMixture,
    x: Any,
    labels: Any = None,
    *,
    n_std: Sequence[float] = (1.0, 2.0),
    names: Mapping[int, str] | None = None,
    marks: Mapping[int, int] | None = None,
    plane: Plane | None = None,
    limits: Tensor | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    r"""Scatter rows in a plane, with each component's ellipses; of one feature, draw their histogram and densities.

    A component projects to :math:`N(V^\top (\mu - m), V^\top \Sigma V)`: its ellipses are the curves of equal density
    of that at ``n_std`` standard deviations, and its name, "c0" and so on, stands at its mean, or beside it on a thread
    where names would overlap. Rows have a colour and a marker for each component, or for each label: a label has those
    of the component that is matched to it, as in `MatchedAccuracy`, so that equal marks mean agreement, and the legend
    names the component. Components that are near each other have different colours. A component of less than a
    hundredth of an equal weight is drawn dotted and in grey, without bounds to the picture, and called empty. A mixture
    that is not fitted shows no ellipses, and the title says so.

    Args:
        gmm: Mixture of d features.
        x: Finite rows, shape ``(n, d)``.
        labels: Integer of each row, shape ``(n,)``, which colours it; a negative one is none, and grey. None takes the
            most probable component.
        n_std: Radii of the ellipses in standard deviations. Two standard deviations hold 86 % of a Gaussian in the
            plane, and 95 % along a line.
        names: What the legend calls a label, where that is not its number.
        marks: Number of the mark of each label or, without labels, of each component; None chooses as told above.
        plane: Where to draw; None takes the principal plane of ``x``.
        limits: Smallest and largest coordinates that are shown, shape ``(2, 2)``; None shows all rows. Of one feature
            only the first column is used.
        title: Title of the axes; None says what is drawn.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If ``gmm`` is no mixture, or ``x`` or ``labels`` hold something else than numbers and integers.
        ValueError: If shapes do not fit, ``x`` is not finite, or a radius is not above 0.

    Example:
        >>> x = torch.cat([torch.randn(100, 3), torch.randn(100, 3) + 6])
        >>> ax = plot_latent(GaussianMixture(2, 3, random_state=0).fit(x), x)
        >>> print(ax.get_title().replace("\n", " "))
        Rows by component; ellipses at 1 and 2 sd
        >>> len(ax.patches)
        4
    """
    if not isinstance(gmm, GaussianMixture):
        raise TypeError(f"Expected `gmm` to be a GaussianMixture, but got {type(gmm).__name__}.")
    n_std = check_radii(n_std)
    x, own_colors = to_rows(x, gmm.n_features), labels is None
    components = gmm.predict(x).cpu() if gmm.fitted_ else None
    labels = components if own_colors else to_labels(labels, len(x))
    if ax is None:
        ax = new_axes(size=(6.2, 5.6) if own_colors and gmm.n_features > 1 else (SIZE[0] + legend_room(labels), 5.2))[0]
    plane = plane or principal_plane(x)
    flat = plane.project_mixture(gmm) if gmm.fitted_ else None
    points = plane.project(x)
    limits = limits_of(points, flat, max(n_std, default=0.0)) if limits is None else limits
    of_components = {} if flat is None else component_marks(flat.means_)
    matched = {} if own_colors or components is None or marks is not None else match_labels(components, labels)
    if own_colors:
        marks = of_components = {**of_components, **(marks or {})}
    elif marks is None:
        values = labels.unique().tolist()
        marks = {v: v for v in values} if flat is None else spread_marks(values, matched, of_components)
    called = {} if own_colors else _called(labels, names or {}, matched, "class " if gmm.n_features == 1 else "")
    if gmm.n_features == 1:
        _draw_line(ax, points[:, 0], None if own_colors else labels, marks, called, limits)
        if flat is not None:
            _draw_densities(ax, flat, of_components, limits)
        ax.set(xlim=limits[:, 0].tolist())
        add_legend(ax)
    else:
        draw_points(ax, points, labels, marks)
        if flat is not None:
            _draw_components(ax, flat, n_std, limits, of_components if own_colors else None)
        frame(ax, limits)
        if called:
            add_legend(ax, _explained(called, marks), title=_heading(names, matched))
    title = _described(gmm, n_std, own_colors=own_colors) if title is None else title
    started = "" if flat is not None else " (mixture not started)"
    label(ax, title + started, plane.names[0], plane.names[1] if gmm.n_features > 1 else "density")
    return ax


def plot_samples(
    gmm: GaussianMixture,
    x: Any,
    n_samples: int | None = None,
    *,
    seed: int = 0,
    plane: Plane | None = None,
    axes: Sequence[Axes] | None = None,
) -> list[Axes]:
    """Draw rows and, in axes of the same plane and limits, as many samples of the mixture: do they look alike?

    Args:
        gmm: Fitted mixture of d features.
        x: Finite rows, shape ``(n, d)``.
        n_samples: Number of samples; None takes that of the rows.
        seed: Seed of the samples; the layer's own stream is not advanced.
        plane: Where to draw; None takes the principal plane of ``x``.
        axes: Two axes; None makes new ones.

    Returns:
        The two axes.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, or ``axes`` are not two.
        RuntimeError: If ``gmm`` is not fitted.

    Example:
        >>> x = torch.randn(50, 2)
        >>> rows, samples = plot_samples(GaussianMixture(1, 2).fit(x), x)
        >>> rows.get_title(), samples.get_xlim() == rows.get_xlim()
        ('50 rows of the data', True)
    """
    check_fitted(gmm)
    x = to_rows(x, gmm.n_features)
    n_samples = len(x) if n_samples is None else n_samples
    checks.check_integer("n_samples", n_samples)
    axes = list(new_axes(1, 2) if axes is None else axes)
    if len(axes) != 2:
        raise ValueError(f"Expected `axes` to be two, for rows and for samples, but got {len(axes)}.")
    plane = plane or principal_plane(x)
    generator = torch.Generator(gmm.means_.device).manual_seed(seed)
    samples, components = gmm.sample(n_samples, generator=generator)
    shown: dict[str, Any] = {
        "n_std": (),
        "plane": plane,
        "limits": limits_of(torch.cat([plane.project(x), plane.project(samples)]), None, 0.0),
        "marks": component_marks(plane.project_mixture(gmm).means_),
    }
    plot_latent(gmm, x, **shown, title=count(len(x), "row") + " of the data", ax=axes[0])
    title = count(n_samples, "sample") + " of the mixture"
    own = components if gmm.n_features > 1 else None
    names = {k: f"component c{k}" for k in range(gmm.n_components)}
    plot_latent(gmm, samples, own, names=names, title=title, ax=axes[1], **shown)
    return axes


def legend_room(labels: Any) -> float:
    """Return the inches that further columns of a legend of labels take, beyond its first."""
    return 0.0 if labels is None else 1.3 * ((min(len(set(labels.tolist())), MOST_NAMES + 1) - 1) // 16)


def check_radii(n_std: Any) -> tuple[float, ...]:
    """Return radii of ellipses, or raise."""
    if isinstance(n_std, str) or not isinstance(n_std, Iterable):
        raise TypeError(f"Expected `n_std` to be a list of numbers, but got {n_std!r}.")
    radii = tuple(n_std)
    for radius in radii:
        checks.check_number("n_std", radius, strict=True)
    return radii


def draw_points(ax: Axes, points: Tensor, labels: Tensor | None, marks: Mapping[int, int]) -> None:
    """Scatter points, of each label with its mark; small grey ones where there is no label."""
    size = min(22.0, max(8.0, 3e4 / len(points)))
    labels = torch.full((len(points),), NO_LABEL) if labels is None else labels.clamp(min=NO_LABEL)
    for value in labels.unique().tolist():
        of, look = points[labels == value], mark(marks.get(value, 0))
        if value == NO_LABEL:
            ax.scatter(of[:, 0], of[:, 1], s=size / 2, alpha=0.5, linewidths=0, c=GREY)
        else:
            ax.scatter(of[:, 0], of[:, 1], s=size, alpha=0.55, linewidths=0, c=look.color, marker=look.marker)


def frame(ax: Axes, limits: Tensor) -> None:
    """Show a part of the plane, as long as it is wide in the same units."""
    (left, bottom), (right, top) = limits.tolist()
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_aspect("equal", adjustable="datalim" if right - left < 1e-9 else "box")


def name_components(ax: Axes, flat: GaussianMixture, anchors: Tensor, gap: tuple[float, float]) -> None:
    """Write each component's name at its place, or beside it on a thread from a dot there where two would overlap."""
    scale = torch.tensor(gap, dtype=anchors.dtype)
    places = spread(anchors / scale) * scale
    empty = flat.weights_ * flat.n_components < EMPTY
    for k, (place, anchor) in enumerate(zip(places.tolist(), anchors.tolist(), strict=True)):
        text = f"c{k} (empty)" if empty[k] else f"c{k}"
        box = {"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
        thread = {"arrowstyle": "-", "lw": 0.7, "color": "0.25", "shrinkA": 0, "shrinkB": 0}
        moved = math.dist(place, anchor) > 1e-6 * math.hypot(*gap)
        if moved:
            ax.plot(*anchor, marker="o", ms=4, color="black", mec="white", mew=0.8, zorder=5)
        ax.annotate(
            text, anchor, place, ha="center", va="center", weight="bold", bbox=box, zorder=6,
            fontsize=7 if is_small(ax) else 11, color="0.45" if empty[k] else "black",
            arrowprops=thread if moved else None,
        )  # fmt: skip


def spread(places: Tensor, most: int = 300) -> Tensor:
    """Push places apart until no two of them are closer than 1; those with room stay where they are.

    Example:
        >>> first, second, third = spread(torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 0.0]]))
        >>> bool((first - second).norm() >= 0.99), third
        (True, tensor([5., 0.]))
    """
    angle = torch.arange(len(places)) * math.pi  # where two are the same, they part by their numbers
    unit = torch.stack([angle.cos(), 0.7 * torch.arange(len(places)).fmod(3.0) * angle.cos()], -1).to(places)
    for _ in range(most):
        away = places[:, None] - places
        same = away.norm(dim=-1) < 1e-9
        away = torch.where(same[..., None], 1e-3 * (unit[:, None] - unit), away)
        distance = away.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        missing = (1.0 - distance).clamp(min=0.0)
        missing.diagonal()[:] = 0.0
        if float(missing.max()) < 1e-3:
            break
        push = (0.51 * missing * away / distance).sum(1)
        places = places + push / (missing > 0).sum(1).clamp(min=1)  # the sum would scatter a crowd
    return places


def _described(gmm: GaussianMixture, n_std: Sequence[float], *, own_colors: bool) -> str:
    """Return what a picture of rows and components shows."""
    if not gmm.fitted_:
        return "Rows" if own_colors else "Rows by class"
    rows = "component" if own_colors else "class"
    if gmm.n_features == 1:
        return ("Rows" if own_colors else "Rows by class") + ", and the density of each component"
    radii = " and ".join(f"{radius:g}" for radius in n_std)
    of = "" if own_colors else " of components"
    return f"Rows by {rows}" + (f"; ellipses{of} at {radii} sd" if radii else "")


def _draw_components(
    ax: Axes, flat: GaussianMixture, n_std: Sequence[float], limits: Tensor, marks: Mapping[int, int] | None
) -> None:
    """Add each component's ellipses and name, with the mark of its rows or in black."""
    empty, span = flat.weights_ * flat.n_components < EMPTY, float((limits[1] - limits[0]).max())
    for k, centre in enumerate(flat.means_.tolist()):
        color, line = ("black", "-") if marks is None else (mark(marks[k]).color, mark(marks[k]).line)
        for radius in n_std:
            ellipse = _ellipse(centre, flat.covariances_[k], radius)
            # Matplotlib makes every dash, in the picture or not: of a curve of a million pictures it would not end.
            dashes = (":" if empty[k] else line) if max(ellipse.width, ellipse.height) < MOST_DASHED * span else "-"
            ellipse.set(ec=GREY if empty[k] else color, ls=dashes, zorder=4)
            ax.add_patch(ellipse)
    if n_std:
        name_components(ax, flat, flat.means_, (0.075 * span, 0.05 * span))


def _ellipse(centre: Sequence[float], covariance: Tensor, radius: float) -> Ellipse:
    """Return the curve of Mahalanobis distance ``radius`` about ``centre``; the wider, the thinner drawn."""
    variances, directions = torch.linalg.eigh(covariance)
    width, height = (2.0 * radius * variances.clamp(min=0).sqrt()).tolist()
    angle = float(torch.rad2deg(torch.atan2(directions[1, 0], directions[0, 0])))
    x, y = centre
    return Ellipse((x, y), width, height, angle=angle, fill=False, lw=1.8 / max(1.0, radius) ** 0.5)


def _called(labels: Tensor, names: Mapping[int, str], matched: Mapping[int, int], what: str) -> dict[int, str]:
    """Return what a legend calls labels: a name or what they are, and the component that is matched."""
    values = labels[labels >= 0].unique().tolist()
    called = {v: names.get(v, f"{what}{v}") + (f" (c{matched[v]})" if v in matched else "") for v in values}
    return called if bool((labels >= 0).all()) else {NO_LABEL: "no label", **called}


def _heading(names: Mapping[int, str] | None, matched: Mapping[int, int]) -> str | None:
    """Return what stands above the names of labels."""
    return "class (component\nmatched to it)" if matched else None if names else "class"


def _explained(called: Mapping[int, str], marks: Mapping[int, int]) -> list[Line2D]:
    """Return what a legend shows of labels."""
    grey = Line2D([], [], ls="", marker="o", ms=4, color=GREY, label="no label")
    return [grey if value == NO_LABEL else dot(marks[value], text) for value, text in called.items()]


def _draw_line(
    ax: Axes,
    points: Tensor,
    labels: Tensor | None,
    marks: Mapping[int, int],
    called: Mapping[int, str],
    limits: Tensor,
) -> None:
    """Draw the histogram of one feature, by labels where there are some."""
    low, high = limits[:, 0].tolist()
    labels = torch.full((len(points),), NO_LABEL) if labels is None else labels.clamp(min=NO_LABEL)
    values = labels.unique().tolist()
    looks = [mark(marks[value]) if value != NO_LABEL else None for value in values]
    colors = ["0.85" if look is None else look.color for look in looks]
    names = [called.get(value, "rows") for value in values]
    bins = torch.linspace(low, high, 51, dtype=torch.float64).tolist()
    data = [points[labels == value].numpy() for value in values]
    ax.hist(data, bins, density=True, stacked=True, color=colors, alpha=0.6, label=names)
    for look, group in zip(looks, ax.containers, strict=True):
        for bar in group.get_children():
            bar.set(hatch="" if look is None else look.hatch, ec="white", lw=0.0)


def _draw_densities(ax: Axes, flat: GaussianMixture, marks: Mapping[int, int], limits: Tensor) -> None:
    """Draw the density of a mixture of one feature, and what each of its components adds to it."""
    low, high = limits[:, 0].tolist()
    grid = torch.linspace(low, high, 500, dtype=torch.float64)[:, None]
    for k, values in enumerate(flat.log_joint(grid).exp().mT):
        ax.plot(grid[:, 0], values, color=mark(marks[k]).color, ls=mark(marks[k]).line, lw=1.6)
    density = flat(grid).exp()
    ax.plot(grid[:, 0], density, color="black", lw=2.2, label="mixture")
    peaks = flat.log_joint(flat.means_).exp().diagonal()
    anchors = torch.stack([flat.means_[:, 0].clamp(low, high), peaks], -1)
    top = max(float(density.max()), ax.get_ylim()[1])
    name_components(ax, flat, anchors, (0.07 * (high - low), 0.05 * top))
