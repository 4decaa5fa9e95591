"""Draw a mixture: one that is fitted here or, with ``--run FOLDER``, the latent space of a run over time."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from tgmm_nn import GaussianMixture, OutlierScore
from tgmm_nn.lightning.pictures import read_frame
from tgmm_nn.plotting import (
    limits_of,
    new_axes,
    plot_criterion,
    plot_density,
    plot_latent,
    plot_likelihood,
    plot_samples,
    principal_plane,
    save,
)
from tgmm_nn.plotting.marks import component_marks


def clusters(n: int) -> torch.Tensor:
    """Draw rows about three centres in five dimensions."""
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, 5, generator=generator)
    return centres[torch.arange(n) % 3] + torch.randn(n, 5, generator=generator)


def draw_fit(folder: Path) -> None:
    """Fit mixtures to rows, and write a picture of each kind."""
    x, fresh = clusters(900).split(600)
    fits = [GaussianMixture(k, 5, "diag", random_state=0, max_iter=500).fit(x) for k in range(1, 5)]
    best = min(fits, key=lambda fit: fit.bic(x))
    score = OutlierScore(best).calibrate(fresh, quantile=0.95)
    far = torch.cat([x, 8 * torch.randn(30, 5)])
    pictures = {
        "criterion": plot_criterion([fit.n_components for fit in fits], [fit.bic(x) for fit in fits]),
        "likelihood": plot_likelihood(best),
        "latent": plot_latent(best, x),
        "density": plot_density(best, far, score),
        "samples": plot_samples(best, x)[0],
    }
    for name, ax in pictures.items():
        save(ax, folder / f"{name}.png")
        print(folder / f"{name}.png")


def draw_run(run: Path, file: Path) -> None:
    """Draw the latent space before EM, soon after its start and at the end of training, side by side."""
    frames = [read_frame(path) for path in sorted((run / "latent_frames").glob("*.pt"))]
    started = [frame for frame in frames if frame[0].fitted_]
    chosen = [frames[0], started[0], started[-1]]
    plane = principal_plane(chosen[-1][1])
    points = torch.cat([plane.project(rows) for _, rows, _ in chosen])
    limits = limits_of(points, plane.project_mixture(chosen[-1][0]), 2.0)
    axes = new_axes(1, 3, size=(4.6, 4.9))
    what = ("before EM", "EM has begun", "the end of training")
    marks = component_marks(plane.project_mixture(chosen[-1][0]).means_)
    for ax, (gmm, rows, epoch), text in zip(axes, chosen, what, strict=True):
        plot_latent(gmm, rows, n_std=(2.0,), marks=marks, plane=plane, limits=limits, ax=ax)
        ax.set(title=f"Epoch {epoch}: {text}", xlabel="", ylabel="", xticks=[], yticks=[])
    title = "Embeddings of handwritten digits, learned without labels, and the mixture that EM carries along"
    axes[0].figure.suptitle(title, fontsize=15)
    save(axes[0], file)
    with Image.open(file) as image:
        image.convert("RGB").quantize(128).save(file, optimize=True)  # a third of the size
    print(f"epochs {[epoch for _, _, epoch in chosen]}\n{file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="folder of a run, with its latent_frames")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder, or with --run file, to write")
    arguments = parser.parse_args()
    if arguments.run is None:
        draw_fit(arguments.out)
    else:
        draw_run(arguments.run, arguments.out)
