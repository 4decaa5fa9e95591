"""What the callback's options demand of each other, and of the callbacks beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import WeightAveraging

from tgmm_nn import checks
from tgmm_nn.maximization import PARTS
from tgmm_nn.mixture import GaussianMixture

__all__ = ["check_dependencies", "check_learned", "check_neighbours"]

Options = Mapping[str, Any]

# What it takes, in words and as a predicate of the options, for others to be read at all.
DEPENDENCIES: tuple[tuple[str, Callable[[Options], bool], tuple[str, ...]], ...] = (
    ("a mixture given as `module`", lambda o: isinstance(o["module"], GaussianMixture), ("name",)),
    (
        "mode='minibatch' and without a `step_size`",
        lambda o: o["mode"] == "minibatch" and o["step_size"] is None,
        ("decay", "offset"),
    ),
    (
        "mode='full'",
        lambda o: o["mode"] == "full",
        ("n_iterations", "tol", "refit", "bank_size", "min_fill", "refresh"),
    ),
    ("a `bank_size`", lambda o: o["bank_size"] is not None, ("bank_policy", "bank_per_component", "save_bank")),
    ("a bank without a size", lambda o: o["bank_size"] is None, ("refresh",)),
    (
        "assignment='sinkhorn'",
        lambda o: o["assignment"] == "sinkhorn",
        ("epsilon", "sinkhorn_iterations", "marginals"),
    ),
    ("assignment='soft' or 'sinkhorn'", lambda o: o["assignment"] in ("soft", "sinkhorn"), ("temperature",)),
    ("a `temperature` other than 1", lambda o: o["temperature"] != 1.0, ("temperature_epochs",)),
    ("a `min_weight`", lambda o: o["min_weight"] is not None, ("patience",)),
)


def check_dependencies(constructor: Callable[..., Any], options: Options) -> None:
    """Raise if an option is set that no other option lets the callback read: it would be ignored in silence.

    Args:
        constructor: Gives the defaults.
        options: Every option that was given.
    """
    parameters = inspect.signature(constructor).parameters
    for condition, predicate, names in DEPENDENCIES:
        for name in names:
            value, default = options[name], parameters[name].default
            if value != default and not predicate(options):
                raise ValueError(
                    f"Expected `{name}` only with {condition}, but got {value!r}; leave it at {default!r}."
                )


def check_learned(update: Any, frozen_components: Any, min_weight: float | None, refit: bool) -> None:
    """Raise unless ``update`` and ``frozen_components`` say what is learned, and leave what other options need."""
    if isinstance(update, str) or not isinstance(update, Collection):
        raise TypeError(f"Expected `update` to be a list of names among {', '.join(PARTS)}, but got {update!r}.")
    for part in update:
        checks.check_choice("update", part, PARTS)
    if not update:
        raise ValueError(f"Expected `update` to name at least one of {', '.join(PARTS)}, but got none.")
    if isinstance(frozen_components, str) or not isinstance(frozen_components, Sequence):
        raise TypeError(f"Expected `frozen_components` to be a list of integers, but got {frozen_components!r}.")
    for component in frozen_components:
        checks.check_integer("frozen_components", component, minimum=0)
    if refit and (set(update) != set(PARTS) or frozen_components):
        raise ValueError(
            "Expected `refit` only where everything is learned, since it starts anew, but got it with "
            f"update={list(update)} and frozen_components={list(frozen_components)}; set refit=false."
        )
    if min_weight is not None and set(update) != set(PARTS):
        raise ValueError(
            f"Expected `min_weight` only where weights, means and covariances are learned, but got {min_weight} with "
            f"update={list(update)}; set min_weight=null."
        )


def check_neighbours(trainer: lightning.Trainer, callback: Any) -> None:
    """Raise if another callback averages weights in a way that breaks a mixture, or logs the same names."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for number, other in enumerate(callbacks):
        if other is not callback and type(other) is type(callback) and other.prefix == callback.prefix:
            raise ValueError(
                f"Expected a `prefix` of its own for each EMCallback, but two log under {callback.prefix!r}, where "
                "Lightning would average them."
            )
        if not isinstance(other, WeightAveraging):
            continue
        # Lightning offers no public name for this option.
        if getattr(other, "_use_buffers", True):
            raise ValueError(
                f"Expected {type(other).__name__} with use_buffers=False beside EMCallback: it averages weights, "
                "factors and counters of the mixture one by one, and the averages are no mixture."
            )
        if number < callbacks.index(callback):
            raise ValueError(
                f"Expected EMCallback before {type(other).__name__} among the trainer's callbacks, but it comes after: "
                "the averaged model would carry the mixture of the step before."
            )
