"""Gaussian mixtures that live inside networks: a density layer, EM as a no-grad update, EM while a network trains."""

from tgmm_nn.classifier import MixtureClassifier
from tgmm_nn.mixture import GaussianMixture
from tgmm_nn.outliers import OutlierScore
from tgmm_nn.statistics import Statistics
from tgmm_nn.trainable import TrainableGaussianMixture

__all__ = ["GaussianMixture", "MixtureClassifier", "OutlierScore", "Statistics", "TrainableGaussianMixture"]
__version__ = "0.1.0"
