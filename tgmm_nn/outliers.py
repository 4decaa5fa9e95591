"""Out-of-distribution scores of a mixture on embeddings, with a threshold that is calibrated on rows that belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tgmm_nn import checks
from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.covariance import Full
from tgmm_nn.density import MixtureDensity
from tgmm_nn.functional import Parameters, mixture_mean
from tgmm_nn.persistence import keep_wide

__all__ = ["OutlierScore", "whole_gaussian"]


def log_density(model: MixtureDensity, x: Any) -> Tensor:
    """Return −log p(x)."""
    return -model(x)


def max_component(model: MixtureDensity, x: Any) -> Tensor:
    """Return −max_k log π_k N(x; μ_k, Σ_k)."""
    return -model.log_joint(x).amax(-1)


def mahalanobis(model: MixtureDensity, x: Any) -> Tensor:
    """Return the squared Mahalanobis distance to the nearest component; one of weight 0 is none."""
    return torch.where(model.mixture().weights > 0, model.squared_distances(x), torch.inf).amin(-1)


def relative_mahalanobis(model: MixtureDensity, x: Any) -> Tensor:
    """Return the squared distance to the nearest component less that to the Gaussian of the whole mixture."""
    whole, nearest = whole_gaussian(model), mahalanobis(model, x)
    x = x if isinstance(x, Tensor) else checks.to_tensor("x", x, nearest.dtype)
    y = (x.to(whole.means) - whole.means) @ whole.factor[0]
    return nearest - y.square().sum(-1).to(nearest.dtype)


SCORES: dict[str, Callable[[MixtureDensity, Any], Tensor]] = {
    "log_density": log_density,
    "max_component": max_component,
    "mahalanobis": mahalanobis,
    "relative_mahalanobis": relative_mahalanobis,
}


class OutlierScore(nn.Module):
    r"""How far rows are from what a mixture has seen; larger is more out of distribution.

    ==========================  ====================================================================================
    ``score``                   value
    ==========================  ====================================================================================
    ``"log_density"``           :math:`-\log p(x)`, in nats
    ``"max_component"``         :math:`-\max_k \log \pi_k N(x; \mu_k, \Sigma_k)`, in nats
    ``"mahalanobis"``           :math:`\min_k d_k^2(x)`, :math:`d_k^2(x) = (x - \mu_k)^\top \Sigma_k^{-1} (x - \mu_k)`
    ``"relative_mahalanobis"``  :math:`\min_k d_k^2(x) - d_0^2(x)`, 0 being the Gaussian with the mixture's moments
    ==========================  ====================================================================================

    The last factorises the whole covariance at each call, and is the only one that has no ONNX form.

    Args:
        model: A `GaussianMixture`, or a `MixtureClassifier`, whose classes together are the distribution.
        score: One of the names above.

    Attributes:
        threshold: What `calibrate` found, shape ``(1,)``; nan before.

    Raises:
        TypeError: If ``model`` is neither.
        ValueError: If ``score`` is unknown.

    References:
        Lee, Lee, Lee and Shin, A simple unified framework for detecting out-of-distribution samples and adversarial
        attacks, 2018.
        Ren, Fort, Liu, Roy, Padhy and Lakshminarayanan, A simple fix to Mahalanobis distance for improving near-OOD
        detection, 2021.

    Example:
        >>> from tgmm_nn import GaussianMixture
        >>> detect = OutlierScore(GaussianMixture(1, 2)).calibrate(torch.randn(1000, 2), quantile=0.95)
        >>> detect.is_outlier(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
        tensor([False,  True])
    """

    threshold: Tensor

    def __init__(
        self,
        model: MixtureDensity | MixtureClassifier,
        score: Literal["log_density", "max_component", "mahalanobis", "relative_mahalanobis"] = "log_density",
    ) -> None:
        super().__init__()
        if not isinstance(model, (MixtureDensity, MixtureClassifier)):
            raise TypeError(
                f"Expected `model` to be a GaussianMixture or a MixtureClassifier, but got {type(model).__name__}."
            )
        checks.check_choice("score", score, SCORES)
        self.model, self.score = model, score
        means = self._mixture().mixture().means
        self.register_buffer("threshold", torch.full((1,), torch.nan, dtype=means.dtype, device=means.device))

    def forward(self, x: Any) -> Tensor:
        """Return the score of rows ``(..., d)``, shape ``(...)``; differentiable in ``x``."""
        return SCORES[self.score](self._mixture(), x)

    @torch.no_grad()
    def calibrate(self, x: Any, quantile: float = 0.95) -> OutlierScore:
        """Set the threshold to a quantile of the scores of rows that belong; about that share is then accepted.

        To be called last: where the mixture learns on, the threshold stays that of the mixture before.

        Args:
            x: Rows of the distribution, that the mixture was not fitted to, shape ``(..., d)``.
            quantile: Share to accept, in (0, 1).

        Returns:
            The module itself.

        Raises:
            TypeError: If ``quantile`` is no number, or ``x`` holds no real numbers.
            ValueError: If ``quantile`` is not in (0, 1), or a score is not finite; the threshold is then left.
        """
        checks.check_number("quantile", quantile)
        checks.check_share("quantile", float(quantile))
        scores = self(x).flatten().double().sort().values
        if not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError("Expected `x` with at least one row, all of finite score; drop rows with nan or infinity.")
        place = quantile * (len(scores) - 1)  # torch.quantile takes no more than 16 million
        below, above = scores[int(place)], scores[min(int(place) + 1, len(scores) - 1)]
        self.threshold.copy_(below + (place - int(place)) * (above - below))
        return self

    def is_outlier(self, x: Any) -> Tensor:
        """Return which rows score above the threshold, booleans, shape ``(...)``; a row that is not finite does.

        Raises:
            RuntimeError: If `calibrate` was not called.
        """
        if not torch.compiler.is_compiling() and bool(self.threshold.isnan().any()):
            raise RuntimeError("Expected a calibrated score, but `threshold` is nan; call calibrate(x) first.")
        return ~(self(x) <= self.threshold)

    def get_extra_state(self) -> dict[str, str]:
        """Return the score that the threshold belongs to, which travels with ``state_dict``."""
        return {"score": self.score}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Do nothing: the score was compared before the threshold was written."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}_extra_state", self.get_extra_state())
        if found != self.get_extra_state():
            raise ValueError(f"Expected the state of {self.get_extra_state()}, but got that of {found}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the score and its threshold."""
        return f"score={self.score!r}, threshold={float(self.threshold):.6g}"

    def _mixture(self) -> MixtureDensity:
        return self.model.mixture if isinstance(self.model, MixtureClassifier) else self.model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OutlierScore:
        """Move or cast, but keep the threshold at float32 or wider."""
        before = {"threshold": self.threshold}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(keep_wide(before, {"threshold": self.threshold}, ()))
        return self


def whole_gaussian(model: MixtureDensity) -> Parameters:
    r"""Return the Gaussian with the mean and the covariance of a whole mixture, as parameters of one component.

    .. math:: \mu_0 = \sum_k \pi_k \mu_k, \qquad
        \Sigma_0 = \sum_k \pi_k \big( \Sigma_k + (\mu_k - \mu_0)(\mu_k - \mu_0)^\top \big)
    """
    weights, means, factor = model.mixture().to(torch.float64)
    covariance = model.covariance
    elements = covariance.square(covariance.root(factor))
    within = covariance.matrix(elements, means.shape[-1]).expand(len(means), -1, -1)
    away = means - mixture_mean(Parameters(weights, means, factor))
    total = (weights[:, None, None] * (within + away[:, :, None] * away[:, None, :])).sum(0, keepdim=True)
    root, _ = Full().factor(total)
    return Parameters(weights.new_ones(1), mixture_mean(Parameters(weights, means, factor))[None], root)
