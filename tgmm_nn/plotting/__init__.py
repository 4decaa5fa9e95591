"""Pictures of mixtures. Each function draws into axes that are given, or into new ones, and returns them.

They are meant to be read in grey and by the colour-blind: what a colour tells apart, a marker, a line style, a hatch
or a number tells apart as well. Rows, labels and tables may be tensors, arrays or lists.
"""

from tgmm_nn.plotting.curves import plot_criterion, plot_curves, plot_likelihood, plot_weights
from tgmm_nn.plotting.density import density_levels, plot_density
from tgmm_nn.plotting.figures import animate, new_axes, save
from tgmm_nn.plotting.latent import plot_latent, plot_samples
from tgmm_nn.plotting.planes import Plane, limits_of, principal_plane
from tgmm_nn.plotting.tables import plot_contingency, plot_images, plot_reliability, plot_scores

__all__ = [
    "Plane",
    "animate",
    "density_levels",
    "limits_of",
    "new_axes",
    "plot_contingency",
    "plot_criterion",
    "plot_curves",
    "plot_density",
    "plot_images",
    "plot_latent",
    "plot_likelihood",
    "plot_reliability",
    "plot_samples",
    "plot_scores",
    "plot_weights",
    "principal_plane",
    "save",
]
