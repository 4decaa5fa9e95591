"""EM while a network trains, as Lightning callbacks."""

from tgmm_nn.lightning.callback import EMCallback
from tgmm_nn.lightning.pictures import LatentPlotCallback
from tgmm_nn.lightning.sources import Embeddings

__all__ = ["EMCallback", "Embeddings", "LatentPlotCallback"]
