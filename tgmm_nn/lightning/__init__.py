"""EM while a network trains, as Lightning callbacks, and what they tell of it."""

from tgmm_nn.lightning.callback import EMCallback
from tgmm_nn.lightning.clusters import ClusterMetricsCallback
from tgmm_nn.lightning.pictures import LatentPlotCallback
from tgmm_nn.lightning.sources import Embeddings
from tgmm_nn.lightning.weights import WeightHistoryCallback

__all__ = ["ClusterMetricsCallback", "EMCallback", "Embeddings", "LatentPlotCallback", "WeightHistoryCallback"]
