"""Contrastive learning of an embedding that a mixture clusters while it is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tgmm_nn.checks import check_integer, check_number
from tgmm_nn.experiments.networks import Perceptron, as_input, check_kind, check_network
from tgmm_nn.experiments.reports import Row, clustering_report
from tgmm_nn.experiments.rows import RowsDataModule, check_components
from tgmm_nn.mixture import GaussianMixture

__all__ = ["ContrastiveClustering", "Encoder", "FeatureNoise", "RandomAffine", "Rescale", "augmentation_of", "nt_xent"]


class Encoder(nn.Module):
    """`Perceptron` with unit-norm output, ``(..., sizes[0])`` to ``(..., sizes[-1])``.

    Example:
        >>> torch.allclose(Encoder([4, 8, 3])(torch.randn(2, 4)).norm(dim=-1), torch.ones(2))
        True
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = Perceptron(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings of length one."""
        return F.normalize(self.layers(x), dim=-1)


class Rescale(nn.Module):
    """Scale unit vectors of d features by √d, so that a feature has unit mean square: what the mixture sees."""

    def forward(self, z: Tensor) -> Tensor:
        """Return ``z``, shape ``(..., d)``, times the root of d."""
        return z * math.sqrt(z.shape[-1])


class RandomAffine(nn.Module):
    """Resample images, each by a small random affine map of its own, bilinearly and with zeros outside.

    Args:
        image_shape: Height and width; rows are flattened images.
        shift: Largest shift in pixels along each axis.
        degrees: Largest rotation.
        scale: Largest relative change of size along each axis.
        shear: Largest shear along each axis.

    Raises:
        ValueError: If an option is out of range, or rows have other than height · width features.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        shift: float = 0.5,
        degrees: float = 5.0,
        scale: float = 0.1,
        shear: float = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(image_shape, (list, tuple)) or len(image_shape) != 2:
            raise ValueError(f"Expected `image_shape` to be height and width, but got {image_shape!r}.")
        for size in image_shape:
            check_integer("image_shape", size)
        for name, value in (("shift", shift), ("degrees", degrees), ("scale", scale), ("shear", shear)):
            check_number(name, value)
        self.height, self.width = int(image_shape[0]), int(image_shape[1])
        self.shift, self.degrees, self.scale, self.shear = shift, degrees, scale, shear

    def forward(self, x: Tensor) -> Tensor:
        """Return rows ``(B, height · width)`` of the resampled images."""
        if x.shape[-1] != self.height * self.width:
            raise ValueError(
                f"Expected `image_shape` to multiply to the {x.shape[-1]} features of a row, but got "
                f"{[self.height, self.width]}."
            )
        images = x.reshape(-1, 1, self.height, self.width)
        grid = F.affine_grid(self._maps(len(images), x.device), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False).reshape(x.shape)

    def _maps(self, n: int, device: torch.device) -> Tensor:
        """Draw maps ``(n, 2, 3)`` in the coordinates of ``affine_grid``, where an image spans [-1, 1]."""

        def uniform(bound: float) -> Tensor:
            return (2 * torch.rand(n, device=device) - 1) * bound

        deform = torch.stack(
            [1 + uniform(self.scale), uniform(self.shear), uniform(self.shear), 1 + uniform(self.scale)]
        )
        angle = uniform(math.radians(self.degrees))
        rotate = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()])
        shift = torch.stack([uniform(2 * self.shift / self.width), uniform(2 * self.shift / self.height)], -1)
        linear = rotate.mT.reshape(-1, 2, 2) @ deform.mT.reshape(-1, 2, 2)
        return torch.cat([linear, shift[:, :, None]], -1)


class FeatureNoise(nn.Module):
    """Add Gaussian noise to rows, to each feature in proportion to its standard deviation in the batch.

    Args:
        noise: Standard deviation of the noise over that of the feature; 0 leaves rows as they are.

    Example:
        >>> rows = torch.randn(5000, 2) * torch.tensor([1.0, 100.0])
        >>> (FeatureNoise(0.1)(rows) - rows).std(0).div(rows.std(0)).round(decimals=1)
        tensor([0.1000, 0.1000])
    """

    def __init__(self, noise: float = 0.1) -> None:
        super().__init__()
        check_number("noise", noise)
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        """Return noisy rows of the same shape."""
        return x + self.noise * x.std(0, correction=0) * torch.randn_like(x)


def augmentation_of(
    image_shape: Sequence[int] | None,
    *,
    shift: float = 0.5,
    degrees: float = 5.0,
    scale: float = 0.1,
    shear: float = 0.1,
    noise: float = 0.1,
) -> nn.Module:
    """Return what augments rows: `RandomAffine` where they are images, else `FeatureNoise`.

    Args:
        image_shape: Height and width of images; None where rows are none.
        shift: Of images; largest shift in pixels.
        degrees: Of images; largest rotation.
        scale: Of images; largest relative change of size.
        shear: Of images; largest shear.
        noise: Of other rows; standard deviation of noise over that of the feature.

    Example:
        >>> augmentation_of([8, 8]), augmentation_of(None)
        (RandomAffine(), FeatureNoise())
    """
    if image_shape is None:
        return FeatureNoise(noise)
    return RandomAffine(image_shape, shift=shift, degrees=degrees, scale=scale, shear=shear)


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    r"""Return the normalised temperature-scaled cross-entropy of two views of a batch.

    .. math:: -\frac{1}{2B} \sum_i \log \frac{\exp(z_i^\top z_{j(i)} / \tau)}{\sum_{k \ne i} \exp(z_i^\top z_k / \tau)}

    over the 2B unit vectors of both views, j(i) being the other view of i.

    Args:
        a: Unit vectors of the first view, shape ``(B, d)``.
        b: Unit vectors of the second view, shape ``(B, d)``.
        temperature: τ.

    References:
        Chen, Kornblith, Norouzi and Hinton, A simple framework for contrastive learning of visual representations,
        2020.

    Example:
        >>> z = torch.eye(2)
        >>> nt_xent(z, z, temperature=1.0)
        tensor(0.5514)
    """
    z = torch.cat([a, b])
    similarity = (z @ z.mT / temperature).fill_diagonal_(-math.inf)
    other_view = torch.arange(len(z), device=z.device).roll(len(a))
    return F.cross_entropy(similarity, other_view)


class ContrastiveClustering(lightning.LightningModule):
    """Learn an embedding by NT-Xent, and show a mixture the clean embeddings of each batch.

    The loss compares two augmented views, of a row and of one of its neighbours. The mixture has no part in it: the
    un-augmented rows pass without gradient through ``latent``, where `EMCallback` picks them up.

    Args:
        encoder: Network to unit vectors.
        gmm: Mixture of as many features.
        augmentation: Random map of rows.
        temperature: Temperature of NT-Xent.
        learning_rate: Of Adam.
        weight_decay: Of Adam.
    """

    wants_neighbours = True

    def __init__(
        self,
        encoder: nn.Module,
        gmm: GaussianMixture,
        augmentation: nn.Module,
        *,
        temperature: float = 0.5,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, strict=True)
        check_number("learning_rate", learning_rate, strict=True)
        check_number("weight_decay", weight_decay)
        check_kind("gmm", gmm, GaussianMixture, "default")
        self.encoder, self.gmm, self.augmentation, self.latent = encoder, gmm, augmentation, Rescale()
        self.temperature, self.learning_rate, self.weight_decay = temperature, learning_rate, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        """Return the embeddings that the mixture clusters, shape ``(B, d)``."""
        return self.latent(self.encoder(x))

    def on_fit_start(self) -> None:
        """Raise if the data have fewer rows than the mixture has components, or widths do not fit."""
        data = getattr(self.trainer, "datamodule", None)
        check_components(self.gmm, data)
        if isinstance(data, RowsDataModule):
            check_network(self, "augmentation", data.n_features, data.n_features)
            check_network(self, "encoder", data.n_features, self.gmm.n_features)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return NT-Xent of two views; pass the clean rows by the mixture."""
        views = torch.cat([self.augmentation(batch["x"]), self.augmentation(batch["neighbour"])])
        first, second = self.encoder(views).chunk(2)
        loss = nt_xent(first, second, self.temperature)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(batch["x"]))
        with torch.no_grad():
            self(batch["x"])
        return loss

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the embeddings of a batch."""
        embeddings: Tensor = self(batch["x"])
        return embeddings

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.encoder.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    @torch.no_grad()
    def report(self, data: RowsDataModule, folder: Path, seed: int) -> list[Row]:
        """Score the mixture that training carried along beside its baselines, and draw what it found."""
        self.eval()
        x, y = data.sample()
        return clustering_report(self.gmm, self(as_input(self, x)), x, y, data.image_shape, folder, seed)
