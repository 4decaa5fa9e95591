"""What changes: over epochs of a training, over iterations of EM, and over the number of components."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting.figures import count, mark, new_axes, number
from tgmm_nn.plotting.places import add_colorbar, add_legend, has_layout, is_small, label
from tgmm_nn.plotting.planes import check_fitted

__all__ = ["plot_criterion", "plot_curves", "plot_likelihood", "plot_weights"]

BIRTH, DEATH = "#0072B2", "#D55E00"
# Components whose weights are lines; more are rows of a map.
MOST_LINES = 16


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    axes: Sequence[Axes] | None = None,
    *,
    start: float | None = None,
    title: str = "",
) -> list[Axes]:
    """Draw one curve over epochs under another, over the same epochs; one that begins late, over its own.

    A curve that begins after a quarter of all epochs would leave its axes empty for long. Of one value the picture says
    what it is.

    The scale of each is that of its values, and spans at least a hundredth of them: a curve that hardly changes is
    drawn as one that hardly changes.

    Args:
        curves: Epochs and values of each curve, shape ``(E,)`` each, by its name, which should end with the unit.
        axes: As many axes; None makes new ones.
        start: First epoch of EM; a line marks it where others came before. None marks nothing.
        title: What stands above all.

    Returns:
        The axes.

    Raises:
        TypeError: If epochs or values are no real numbers.
        ValueError: If there is no curve, epochs and values differ in number, or axes do not fit.

    Example:
        >>> axes = plot_curves({"loss": ([0, 1, 2], [2.0, 1.0, 0.9]), "accuracy": ([1, 2], [0.5, 0.9])}, start=1)
        >>> [ax.get_ylabel() for ax in axes]
        ['loss', 'accuracy']
    """
    if not curves:
        raise ValueError("Expected `curves` with at least one curve, but got none.")
    curves = {name: (_numbers("epochs", epochs), _numbers(name, values)) for name, (epochs, values) in curves.items()}
    axes = list(new_axes(len(curves), 1, size=(7.5, 2.3)) if axes is None else axes)
    if len(axes) != len(curves):
        raise ValueError(f"Expected `axes` for each of the {len(curves)} curves, but got {len(axes)}.")
    everywhere = [epoch for epochs, _ in curves.values() for epoch in epochs]
    for ax, (name, (epochs, values)) in zip(axes, curves.items(), strict=True):
        if len(epochs) != len(values):
            raise ValueError(
                f"Expected `curves` with a value for each epoch, but {name!r} has {len(epochs)} and {len(values)}."
            )
        few = "o" if len(values) <= 30 else ""
        ax.plot(epochs, values, color=mark(0).color, marker=few, ms=4)
        _scale(ax, values)
        if start is not None and start > min(everywhere, default=0):
            ax.axvline(start, color="0.4", ls="--", lw=1.2)
        if len(values) == 1:
            ax.annotate(number(values[0]), (epochs[0], values[0]), (6, 6), textcoords="offset points", fontsize=10)
        ax.set(xlim=_around(epochs if _begins_late(epochs, everywhere) else everywhere))
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    note = "\ndashed: first epoch of EM" if any(len(ax.lines) > 1 for ax in axes) else ""
    for ax, (name, (epochs, _)) in zip(axes, curves.items(), strict=True):
        late = _begins_late(epochs, everywhere)
        below = f"epoch, from {epochs[0]:g} on" if late else "epoch" if ax is axes[-1] else ""
        label(ax, (title + note).strip() if ax is axes[0] else "", below, name)
    return axes


def plot_weights(
    weights: Any,
    epochs: Sequence[float] | None = None,
    *,
    births: Any = None,
    deaths: Any = None,
    title: str = "Weight of each component over training",
    ax: Axes | None = None,
) -> Axes:
    """Draw the weights of components over epochs: lines with names at their ends, or of many a map of shades.

    A cross marks an epoch in which a component died, that is fell below the smallest weight of a living one, and a
    triangle one in which it was born again; where births and deaths are given and there were none, the title says so.
    Of more than 16 components each is a row of a map, whose shades are about an equal weight.

    Args:
        weights: Weights at the end of each epoch, shape ``(E, K)``.
        epochs: The epochs, E numbers that rise by steps of one size; None counts from 0.
        births: How often each component was born in each epoch, shape ``(E, K)``; None marks none.
        deaths: How often each died, shape ``(E, K)``; None marks none.
        title: What the title of the axes begins with.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If an argument holds no real numbers.
        ValueError: If shapes do not fit.

    Example:
        >>> weights = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.6, 0.4]])
        >>> ax = plot_weights(weights, births=[[0, 0], [0, 0], [0, 1]], deaths=[[0, 0], [0, 1], [0, 0]])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['component died', 'component was born']
    """
    weights = checks.to_tensor("weights", weights, torch.float32).detach().cpu()
    if weights.ndim != 2 or 0 in weights.shape:
        raise ValueError(f"Expected `weights` of shape (E, K), with an epoch at least, but got {tuple(weights.shape)}.")
    places = list(range(len(weights))) if epochs is None else _numbers("epochs", epochs)
    if len(places) != len(weights):
        raise ValueError(f"Expected `epochs` for each of the {len(weights)} rows of `weights`, but got {len(places)}.")
    k = weights.shape[1]
    as_lines = k <= MOST_LINES
    ax = ax or new_axes(size=(8.0, 4.6 if as_lines else max(4.0, min(9.0, 1.6 + 0.2 * k))))[0]
    (_draw_lines if as_lines else _draw_shades)(ax, weights, places)
    events = (("deaths", deaths, "X", DEATH, "component died"), ("births", births, "^", BIRTH, "component was born"))
    happened = 0
    for name, counts, marker, color, text in events:
        numbers = _counts(name, counts, weights)
        _mark_events(ax, numbers, weights if as_lines else None, places, marker, color, text)
        happened += int(numbers.sum())
    ticks = MaxNLocator(4 if is_small(ax) else 8, integer=True).tick_values(places[0], places[-1])
    ax.set_xticks([tick for tick in ticks if places[0] <= tick <= places[-1]] if len(places) > 1 else places)
    add_legend(ax, below=True)
    nothing = "" if happened or births is None or deaths is None else "; none died or was born"
    label(ax, title + nothing, "epoch", "weight, %" if as_lines else "component")
    return ax


def plot_likelihood(gmm: GaussianMixture, *, title: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw what the last `fit` climbed over its iterations: the mean log-likelihood or, with priors, the posterior.

    Args:
        gmm: Mixture that was fitted by `fit`.
        title: Title of the axes; None says whether EM converged.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If ``gmm`` is no mixture.
        RuntimeError: If ``gmm`` is not fitted.
        ValueError: If it was fitted by other means than `fit`, and so has no history.

    Example:
        >>> gmm = GaussianMixture(2, 1, random_state=0).fit([[0.0], [1.0], [2.0], [7.0], [8.0], [9.0]])
        >>> ax = plot_likelihood(gmm)
        >>> ax.get_title().startswith("EM converged after"), ax.get_ylabel()
        (True, 'log-likelihood, nats per row')
    """
    check_fitted(gmm)
    history = list(gmm.history_)
    if not history:
        raise ValueError("Expected `gmm` with the history of a fit, but it has none; call fit(x).")
    ax = ax or new_axes()[0]
    iterations = range(gmm.n_iter_ + 1 - len(history), gmm.n_iter_ + 1)
    ax.plot(iterations, history, color=mark(0).color, marker="o", ms=4)
    _scale(ax, history, share=0.0)
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    how = "converged after" if gmm.converged_ else "did not converge in"
    climbed = "log-likelihood" if all(prior is None for prior in gmm.priors) else "log-posterior"
    title = f"EM {how} {count(gmm.n_iter_, 'iteration')}" if title is None else title
    label(ax, title, "iteration of EM", f"{climbed}, nats per row")
    return ax


def plot_criterion(
    n_components: Sequence[int],
    values: Any,
    *,
    name: str = "BIC",
    best: Literal["smallest", "largest"] = "smallest",
    star: bool = True,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a criterion over the number of components, and mark the best.

    Args:
        n_components: Numbers of components, M of them.
        values: The criterion, shape ``(M,)``; or that of several runs, ``(R, M)``, whose mean is drawn, with bars of
            one standard deviation.
        name: What the criterion is, with its unit.
        best: Which value is best: of BIC, AIC and ICL the ``"smallest"``, of a likelihood the ``"largest"``.
        star: Whether a star marks the best; of several pictures, that of the one that is chosen may.
        title: Title of the axes; None says which number is best.
        ax: Axes to draw into; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: If ``values`` hold no real numbers.
        ValueError: If shapes do not fit, a mean is not finite, or ``best`` is neither.

    Example:
        >>> ax = plot_criterion([1, 2, 3], [[310.0, 205.0, 220.0], [300.0, 207.0, 212.0]])
        >>> ax.get_title()
        'BIC is smallest at 2 components'
    """
    checks.check_bool("star", star)
    checks.check_choice("best", best, ("smallest", "largest"))
    table = torch.atleast_2d(checks.to_tensor("values", values, torch.float64).detach().cpu().double())
    if table.ndim != 2 or table.shape[1] != len(n_components) or 0 in table.shape:
        raise ValueError(
            f"Expected `values` of shape ({len(n_components)},) or (R, {len(n_components)}), one for each of "
            f"`n_components`, but got {tuple(table.shape)}."
        )
    mean = table.mean(0)
    checks.check_values("values", mean)
    deviation = table.std(0).tolist() if len(table) > 1 else None
    ax, numbers = ax or new_axes()[0], list(n_components)
    ax.errorbar(numbers, mean.tolist(), deviation, color=mark(0).color, marker="o", capsize=4)
    place = int(mean.argmin() if best == "smallest" else mean.argmax())
    if star:
        ax.plot(numbers[place], float(mean[place]), "*", ms=18, color=mark(5).color, mec="black", zorder=3)
    ax.margins(0.08, 0.12)  # for the star
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.grid(alpha=0.3)
    if len(numbers) <= 20:
        ax.set_xticks(sorted(set(numbers)))
    runs = f", mean ± sd of {len(table)} runs" if len(table) > 1 else ""
    found = f"{name.split(',', maxsplit=1)[0]} is {best} at {count(numbers[place], 'component')}"
    label(ax, found if title is None else title, "number of components", name + runs)
    return ax


def _numbers(name: str, values: Any) -> list[float]:
    """Return real numbers, of a tensor, an array or a list, as a list."""
    if not hasattr(values, "__array__"):
        values = [value.item() if isinstance(value, Tensor) else value for value in values]
    numbers: list[float] = checks.to_tensor(name, values, torch.float64).detach().flatten().tolist()
    return numbers


def _scale(ax: Axes, values: Sequence[float], share: float = 0.01) -> None:
    """Let an axis span its finite values, and a share of their size at least, in plain numbers without an offset."""
    finite = [value for value in values if abs(value) < float("inf")]
    ax.ticklabel_format(axis="y", useOffset=False)
    if finite:
        middle, half = (max(finite) + min(finite)) / 2, (max(finite) - min(finite)) / 2
        half = max(1.08 * half, share * abs(middle) / 2, 1e-9)
        ax.set_ylim(middle - half, middle + half)


def _begins_late(epochs: Sequence[float], everywhere: Sequence[float]) -> bool:
    """Return whether a curve of several values leaves more than a quarter of all epochs empty before it."""
    low, high = min(everywhere, default=0), max(everywhere, default=0)
    return len(epochs) > 1 and min(epochs) - low > 0.25 * (high - low)


def _around(epochs: Sequence[float]) -> tuple[float, float]:
    """Return limits that leave a little room about epochs."""
    low, high = min(epochs, default=0), max(epochs, default=0)
    room = max(0.02 * (high - low), 0.5)
    return low - room, high + room


def _counts(name: str, counts: Any, weights: Tensor) -> Tensor:
    if counts is None:
        return torch.zeros_like(weights)
    counts = checks.to_tensor(name, counts, torch.float32).detach().cpu()
    if counts.shape != weights.shape:
        raise ValueError(
            f"Expected `{name}` of shape {tuple(weights.shape)} as `weights`, but got {tuple(counts.shape)}."
        )
    return counts


def _draw_lines(ax: Axes, weights: Tensor, places: Sequence[float]) -> None:
    """Draw the weights of each component in per cent, and write its name and last weight at the end of its line."""
    shares, k = 100 * weights, weights.shape[1]
    for component, values in enumerate(shares.mT):
        color, marker, line, _ = mark(component)
        few = marker if len(values) <= 3 else None
        ax.plot(places, values.tolist(), color=color, ls=line, lw=1.8, marker=few)
    ax.axhline(100 / k, color="0.7", lw=0.8, zorder=0)
    lowest, highest = float(shares.min()), float(shares.max())
    middle, half = (lowest + highest) / 2, max((highest - lowest) / 2, 5 / k) * 1.15
    ax.set_ylim(max(middle - half, -0.05 * highest), middle + half)
    left, right = _around(places)
    small = 6 if is_small(ax) else 10
    # Room for a thread and eleven letters, in axes that a layout may still make narrower.
    share = min(0.5, (6.2 * small + 18) / (0.85 * 72 * ax.get_window_extent().width / ax.figure.dpi))
    end = right + share / (1 - share) * (right - left)
    ax.set_xlim(left, end)
    ax.grid(alpha=0.3)
    heights = _apart(shares[-1], *ax.get_ylim())
    for component, (height, value) in enumerate(zip(heights, shares[-1].tolist(), strict=True)):
        color = mark(component).color
        thread = {"arrowstyle": "-", "lw": 0.8, "color": color, "shrinkA": 0, "shrinkB": 0}
        ax.annotate(
            f"c{component}  {value:.1f} %", (places[-1], value), (right + 0.2 * (end - right), height),
            va="center", fontsize=small, arrowprops={**thread, "relpos": (0.0, 0.5)},
        )  # fmt: skip


def _apart(values: Tensor, low: float, high: float) -> list[float]:
    """Return heights in the order of values, near these and so far apart that names beside them do not overlap."""
    gap = min(0.055, 0.96 / len(values)) * (high - low)
    order, heights = values.argsort().tolist(), values.tolist()
    for lower, upper in itertools.pairwise(order):
        heights[upper] = max(heights[upper], heights[lower] + gap)
    heights[order[-1]] = min(heights[order[-1]], high - gap / 2)
    for lower, upper in reversed(list(itertools.pairwise(order))):
        heights[lower] = min(heights[lower], heights[upper] - gap)
    return heights


def _draw_shades(ax: Axes, weights: Tensor, places: Sequence[float]) -> None:
    """Draw a row of shades for each component, and say beside it what it weighs at the end, where there is room."""
    k = weights.shape[1]
    step = (places[-1] - places[0]) / max(1, len(places) - 1) or 1.0
    farthest = max(float((weights - 1 / k).abs().max()), 0.1 / k)  # an equal weight is of a middle grey
    image = ax.imshow(
        100 * weights.T.numpy(), cmap="Greys", vmin=100 * (1 / k - farthest), vmax=100 * (1 / k + farthest),
        extent=(places[0] - step / 2, places[-1] + step / 2, k - 0.5, -0.5), aspect="auto", interpolation="nearest",
    )  # fmt: skip
    for row in range(1, k):
        ax.axhline(row - 0.5, color="white", lw=0.6)
    room = k <= 40 and has_layout(ax)
    add_colorbar(image, ax, "weight, %", pad=0.12 if room else 0.02)
    if not room:
        ticks = [tick for tick in MaxNLocator(integer=True).tick_values(0, k - 1) if 0 <= tick < k]
        ax.set_yticks(ticks, [f"c{tick:.0f}" for tick in ticks])
        return
    ax.set_yticks(range(k), [f"c{row}" for row in range(k)], fontsize=8)
    for row, weight in enumerate(weights[-1].tolist()):
        ax.text(1.01, row, f"{100 * weight:.1f} %", transform=ax.get_yaxis_transform(), va="center", fontsize=8)


def _mark_events(
    ax: Axes,
    counts: Tensor,
    weights: Tensor | None,
    places: Sequence[float],
    marker: str,
    color: str,
    text: str,
) -> None:
    """Draw a mark where something happened to a component in an epoch: on its line or, of a map, in its row."""
    when, which = counts.nonzero(as_tuple=True)
    if len(when):
        heights = which if weights is None else 100 * weights[when, which]
        at = [places[i] for i in when.tolist()]
        halo = [withStroke(linewidth=3.0, foreground="white")]  # a mark is seen on dark and on light shades
        ax.scatter(
            at, heights.tolist(), marker=marker, c=color, s=30 if is_small(ax) else 70, ec="black", linewidths=0.8,
            label=text, zorder=4, path_effects=halo,
        )  # fmt: skip
