"""What can be drawn from a mixture, as a picture: all of it, cores, shells, tails, one component, slices.

python examples/sampling_gallery.py  # writes sampling_gallery.png
"""

from pathlib import Path

import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.plotting import new_axes, save

gmm = GaussianMixture(3, 2, random_state=0).set_parameters(
    weights=[0.5, 0.3, 0.2],
    means=[[-3.0, 0.0], [3.0, 1.0], [0.5, -4.0]],
    covariances=[[[2.0, 0.8], [0.8, 1.0]], [[0.6, -0.4], [-0.4, 1.5]], [[2.5, 0.0], [0.0, 0.3]]],
)
gallery = {
    "sample(1000)": {},
    "component=0": {"component": 0},
    "confidence=0.5: the inner half of each": {"confidence": 0.5},
    "std_range=(2, 2.2): a shell of each": {"std_range": (2.0, 2.2)},
    "std_range=(3, inf): what is rare, 1 in 90": {"std_range": (3.0, float("inf"))},
}
axes = new_axes(2, 3, size=(4.4, 3.6))
print("drawn                                        rows of each component   largest distance in sd")
for ax, (title, options) in zip(axes, gallery.items(), strict=False):
    x, components = gmm.sample(1000, **options)
    distances = gmm.squared_distances(x).gather(-1, components[:, None]).sqrt()  # to the component of each row
    print(f"{title:43} {torch.bincount(components, minlength=3).tolist()!s:>23} {distances.max():24.2f}")
    for k, marker in enumerate("o^s"):
        ax.scatter(*x[components == k].T, s=8, marker=marker, alpha=0.6, linewidths=0, label=f"component {k}")
    ax.set(title=title, xlim=(-9, 8), ylim=(-8, 6), xlabel="feature 0", ylabel="feature 1")
axes[0].legend()

# A slice is a mixture again: what feature 1 may be where feature 0 is known. `marginal` leaves the other feature out.
ax, grid = axes[-1], torch.linspace(-8, 6, 400)[:, None]
for value, style in ((-3.0, "-"), (0.5, "--"), (3.0, ":")):
    given = gmm.condition([0], [value])
    weights = ", ".join(f"{weight:.2f}" for weight in given.weights_.tolist())
    print(f"condition([0], [{value:4}]): weights {weights}, mean {float(given.weights_ @ given.means_[:, 0]):.2f}")
    ax.plot(grid[:, 0], given(grid).exp(), style, color="black", label=f"where feature 0 is {value}")
ax.plot(grid[:, 0], gmm.marginal([1])(grid).exp(), color="tab:orange", linewidth=4, alpha=0.6, label="marginal")
ax.set(title="condition([0], [value]), marginal([1])", xlabel="feature 1", ylabel="density")
ax.legend()

save(axes[0], Path("sampling_gallery.png"))
print("written: sampling_gallery.png")
