"""Metrics of clusters and mixtures that torchmetrics does not have, as torchmetrics metrics with additive states."""

from tgmm_nn.metrics.clusters import Contingency, MatchedAccuracy, Purity, ResponsibilityCalibration
from tgmm_nn.metrics.densities import BIC, EffectiveComponents, NegativeLogLikelihood, detection_scores

__all__ = [
    "BIC",
    "Contingency",
    "EffectiveComponents",
    "MatchedAccuracy",
    "NegativeLogLikelihood",
    "Purity",
    "ResponsibilityCalibration",
    "detection_scores",
]
