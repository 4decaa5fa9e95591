"""What changes: over epochs of a training, over iterations of EM, and over the number of components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator
from torch import Tensor

from tgmm_nn import checks
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.plotting.figures import add_legend, label, mark, new_axes
from tgmm_nn.plotting.planes import check_fitted

__all__ = ["plot_criterion", "plot_curves", "plot_likelihood", "plot_weights"]

BIRTH, DEATH = "#0072B2", "#D55E00"


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    axes: Sequence[Axes] | None = None,
    *,
    start: float | None = None,
    title: str = "",
) -> list[Axes]:
    """Draw one curve over epochs under another, over the same epochs.

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
        ax.set(xlim=_around(everywhere))
        ax.grid(alpha=0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        label(ax, "", "epoch" if ax is axes[-1] else "", name)
    note = "\ndashed: first epoch of EM" if any(len(ax.lines) > 1 for ax in axes) else ""
    label(axes[0], (title + note).strip(), axes[0].get_xlabel(), axes[0].get_ylabel())
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
    """Draw the weights of components over epochs as a heat map, dark where they are large; last weights at the right.

    A cross marks an epoch in which a component died, that is fell below the smallest weight of a living one, and a
    triangle one in which it was born again.

    Args:
        weights: Weights at the end of each epoch, shape ``(E, K)``.
        epochs: The epochs, E numbers that rise by steps of one size; None counts from 0.
        births: How often each component was born in each epoch, shape ``(E, K)``; None marks none.
        deaths: How often each died, shape ``(E, K)``; None marks none.
        title: Title of the axes.
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
    ax = ax or new_axes(size=(8.0, max(3.0, min(9.0, 1.6 + 0.3 * weights.shape[1]))))[0]
    step = (places[-1] - places[0]) / max(1, len(places) - 1) or 1.0
    k = weights.shape[1]
    top = max(float(weights.max()), 2.0 / k)  # so that equal weights are of a middle grey
    extent = (places[0] - step / 2, places[-1] + step / 2, k - 0.5, -0.5)
    image = ax.imshow(
        weights.T.numpy(), cmap="Greys", vmin=0.0, vmax=top, aspect="auto", extent=extent, interpolation="nearest"
    )
    for number in range(1, k):
        ax.axhline(number - 0.5, color="white", lw=1.0)
    events = (("deaths", deaths, "x", DEATH, "component died"), ("births", births, "^", BIRTH, "component was born"))
    for name, counts, marker, color, text in events:
        _mark_events(ax, _counts(name, counts, weights), places, marker, color, text)
    _name_weights(ax, weights[-1])
    ax.figure.colorbar(image, ax=ax, label="weight", pad=0.12 if k <= 40 else 0.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True) if len(places) > 1 else FixedLocator(places))
    label(ax, title, "epoch", "component")
    add_legend(ax, below=True)
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
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    how = "converged after" if gmm.converged_ else "did not converge in"
    climbed = "log-likelihood" if all(prior is None for prior in gmm.priors) else "log-posterior"
    title = f"EM {how} {gmm.n_iter_} iteration{'s'[: gmm.n_iter_ != 1]}" if title is None else title
    label(ax, title, "iteration of EM", f"{climbed}, nats per row")
    return ax


def plot_criterion(
    n_components: Sequence[int],
    values: Any,
    *,
    name: str = "BIC",
    best: Literal["smallest", "largest"] = "smallest",
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
    ax.plot(numbers[place], float(mean[place]), marker="*", ms=18, color=mark(5).color, mec="black", ls="", zorder=3)
    ax.ticklabel_format(axis="y", useOffset=False)
    ax.grid(alpha=0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    runs = f", mean ± sd of {len(table)} runs" if len(table) > 1 else ""
    found = f"{name.split(',', maxsplit=1)[0]} is {best} at {numbers[place]} component{'s'[: numbers[place] != 1]}"
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


def _mark_events(ax: Axes, counts: Tensor, places: Sequence[float], marker: str, color: str, text: str) -> None:
    """Draw a mark where something happened to a component in an epoch; a birth a little below a death."""
    when, which = counts.nonzero(as_tuple=True)
    if len(when):
        shift = 0.15 if marker == "^" else -0.15
        at = [places[i] for i in when.tolist()]
        ax.scatter(at, (which + shift).tolist(), marker=marker, c=color, s=46, lw=1.8, label=text, zorder=3)


def _name_weights(ax: Axes, last: Tensor) -> None:
    """Number the components, and say beside each what it weighs at the end, where there is room."""
    k = len(last)
    if k > 40:
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        return
    size = 11 if k <= 15 else 8
    ax.set_yticks(range(k), [str(number) for number in range(k)], fontsize=size)
    for number, weight in enumerate(last.tolist()):
        ax.text(1.01, number, f"{100 * weight:.1f} %", transform=ax.get_yaxis_transform(), va="center", fontsize=size)
