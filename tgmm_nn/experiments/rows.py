"""The data of the experiments: batches of rows, with labels and held-out rows where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch
from sklearn.model_selection import train_test_split
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tgmm_nn.checks import check_integer, check_number, check_share
from tgmm_nn.experiments.tables import Scaling, Table
from tgmm_nn.mixture import GaussianMixture

__all__ = ["NeighbourPairs", "Rows", "RowsDataModule", "check_components"]


class Rows(Dataset[dict[str, Tensor]]):
    """Rows with their labels, a whole batch at a time.

    Args:
        x: Rows, shape ``(N, d)``.
        y: Labels, shape ``(N,)``; None where there are none.
        chosen: Places of the rows that are given; None gives all.
    """

    def __init__(self, x: Tensor | Table, y: Tensor | None, chosen: Tensor | None = None) -> None:
        self.x, self.y = x, y
        self.chosen = torch.arange(len(x)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch: ``x``, ``(B, d)``, and ``y``, ``(B,)``, where there are labels."""
        rows = self.chosen[torch.as_tensor(indices)]
        return {"x": self.x[rows]} if self.y is None else {"x": self.x[rows], "y": self.y[rows]}


class NeighbourPairs(Rows):
    """Rows, each with one of its nearest neighbours, drawn anew each time: a contrastive loss's positives.

    Args:
        x: Rows, shape ``(N, d)``.
        y: Labels, for scoring only, shape ``(N,)``; None where there are none.
        n_neighbors: Number of neighbours to draw from.
        chosen: Places of the rows that are given, and that neighbours are taken from; None gives all.

    Raises:
        ValueError: If a row has fewer neighbours.
    """

    def __init__(self, x: Tensor | Table, y: Tensor | None, n_neighbors: int, chosen: Tensor | None = None) -> None:
        super().__init__(x, y, chosen)
        if n_neighbors >= len(self):
            raise ValueError(
                f"Expected `n_neighbors` below the number of rows, {len(self)}, but got {n_neighbors}; take more "
                "rows, or a smaller data.n_neighbors."
            )
        index = NearestNeighbors(n_neighbors=n_neighbors).fit(x[self.chosen].numpy())
        self.neighbours = torch.from_numpy(index.kneighbors(return_distance=False))  # of no query: a row is not its own

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a whole batch: ``x`` and ``neighbour``, both ``(B, d)``, and ``y``, ``(B,)``, where it is there."""
        rows = torch.as_tensor(indices)
        draw = torch.randint(self.neighbours.shape[1], rows.shape)
        neighbours = self.chosen[self.neighbours[rows, draw]]
        return {**super().__getitems__(indices), "neighbour": self.x[neighbours]}


class RowsDataModule(lightning.LightningDataModule):
    """Batches of rows in shuffled order, the short last one kept.

    A model with ``wants_neighbours = True`` gets each row together with one of its neighbours.

    Args:
        rows: All rows, with the scaling of the training, which a checkpoint carries.
        labels: Class of each row from 0, shape ``(N,)``, negative where a row has none; None where no row has.
        image_shape: Height and width where rows are images.
        batch_size: Rows in a batch.
        n_neighbors: Neighbours from which a row's positive is drawn.
        n_classes: Classes from 0 that are known; rows of the others are set aside. None takes all.
        test_size: Share of each known class that is held out; None holds out nothing.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads in the main one.

    Attributes:
        n_features: Number of features.
        n_classes: Number of known classes; None without labels.
        y: Labels of the training rows; None without.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option is out of range, or needs labels that are not there.
    """

    # What else there is to say of the rows.
    remark = ""

    def __init__(
        self,
        rows: Table,
        labels: Tensor | None,
        image_shape: Sequence[int] | None,
        *,
        batch_size: int = 256,
        n_neighbors: int = 5,
        n_classes: int | None = None,
        test_size: float | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_integer("batch_size", batch_size)
        check_integer("n_neighbors", n_neighbors)
        check_integer("seed", seed, minimum=0)
        check_integer("num_workers", num_workers, minimum=0)
        self.batch_size, self.n_neighbors, self.num_workers = batch_size, n_neighbors, num_workers
        self.rows, self.labels, self.n_features = rows, labels, rows.n_features
        self.image_shape = None if image_shape is None else (int(image_shape[0]), int(image_shape[1]))
        found = None if labels is None else int(labels.max()) + 1
        check_integer("n_classes", n_classes, optional=True)
        if found is not None and n_classes is not None and n_classes > found:
            raise ValueError(
                f"Expected `n_classes` to be at most {found}, the classes of {rows.source}, but got {n_classes}."
            )
        if test_size is not None:
            check_number("test_size", test_size)
            check_share("test_size", float(test_size))
        self.n_classes = found if n_classes is None else n_classes
        self.train, self.test, self.unknown = self._split(n_classes, test_size, seed)
        self.y = None if labels is None else labels[self.train]
        self._batches = Rows(rows, labels, self.train)

    @property
    def x(self) -> Tensor:
        """Training rows, all of them in memory, shape ``(n, d)``."""
        return self.rows[self.train]

    @property
    def x_test(self) -> Tensor:
        """Held-out rows of known classes, shape ``(m, d)``."""
        return self.rows[self.test]

    @property
    def y_test(self) -> Tensor:
        """Their classes, shape ``(m,)``."""
        if self.labels is None:
            raise ValueError(f"Expected `y` of {self.rows.source}, the classes of its rows, but it has none.")
        return self.labels[self.test]

    @property
    def x_unknown(self) -> Tensor:
        """Rows of classes that are not known, shape ``(u, d)``."""
        return self.rows[self.unknown]

    def inputs(self) -> dict[str, Any]:
        """Return what the networks and metrics of a config have to know of the rows."""
        return {
            "n_features": self.n_features,
            "image_shape": None if self.image_shape is None else list(self.image_shape),
            "n_classes": self.n_classes,
            "targets": None if self.labels is None else "y",
        }

    def description(self) -> str:
        """Return in a line what was understood of the rows and their labels."""
        size = f"{len(self.rows)} rows of {self.n_features} features"
        kind = "no images" if self.image_shape is None else "images of {} x {}".format(*self.image_shape)
        return "; ".join(filter(None, (f"Rows of {self.rows.source}: {size}, {kind}", self._of_labels(), self.remark)))

    def _of_labels(self) -> str:
        """Return how many classes there are, and what is odd about their labels."""
        if self.labels is None:
            return "no labels"
        counts = self.labels[self.labels >= 0].bincount()
        said = f"{len(counts)} classes, labels 0 to {len(counts) - 1}"
        if empty := (counts == 0).nonzero()[:, 0].tolist():
            numbers = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            said += f", of which no row has {numbers}: numpy.unique(y, return_inverse=True)[1] numbers them from 0"
        missing = int((self.labels < 0).sum())
        return f"{said}, {missing} rows without a label" if missing else said

    def sample(self, max_rows: int = 20_000) -> tuple[Tensor, Tensor | None]:
        """Return training rows and their labels: all, or as many as ``max_rows``, the same at each call."""
        chosen = self.train
        if len(chosen) > max_rows:
            drawn = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:max_rows]
            chosen = chosen[drawn.sort().values]
        return self.rows[chosen], None if self.labels is None else self.labels[chosen]

    def setup(self, stage: str) -> None:
        """Find the neighbours, where the model wants them."""
        model = None if self.trainer is None else self.trainer.lightning_module
        if stage == "fit" and getattr(model, "wants_neighbours", False):
            self._batches = NeighbourPairs(self.rows, self.labels, self.n_neighbors, self.train)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return shuffled batches of training rows."""
        return DataLoader(
            self._batches,
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_already_a_batch,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the scaling of the rows: what is evaluated later has to be scaled in the same way."""
        return {"scaling": dict(self.rows.scaling._asdict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Scale the rows as in the training that is resumed."""
        self.rows.scaling = Scaling(**state_dict["scaling"])

    def _split(self, n_classes: int | None, test_size: float | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the places of training rows, of held-out ones, and of those of unknown classes."""
        none = torch.zeros(0, dtype=torch.int64)
        if n_classes is None and test_size is None:
            return torch.arange(len(self.rows)), none, none
        if self.labels is None or self.n_classes is None:
            raise ValueError(
                f"Expected `y` of {self.rows.source}, the class of each row, for an experiment with "
                f"n_classes={n_classes} and test_size={test_size}, but it has none; add labels, or take an experiment "
                "without: digits_contrastive, digits_vade or embeddings."
            )
        known = ((self.labels >= 0) & (self.labels < self.n_classes)).nonzero()[:, 0]
        unknown = (self.labels >= self.n_classes).nonzero()[:, 0]
        if test_size is None:
            return known, none, unknown
        try:
            train, test = train_test_split(
                known.numpy(), test_size=test_size, stratify=self.labels[known].numpy(), random_state=seed
            )
        except ValueError as error:  # a class too small to be divided, in scikit-learn's words
            raise ValueError(
                f"Expected `test_size` and rows of {self.rows.source} of which each class has some to learn from and "
                f"some to hold out, but got test_size={test_size}: {error}"
            ) from error
        return torch.from_numpy(train), torch.from_numpy(test), unknown


def check_components(gmm: GaussianMixture, data: Any) -> None:
    """Raise if the data have fewer training rows than a mixture has components, before any time is spent."""
    if isinstance(data, RowsDataModule) and len(data.train) < gmm.n_components:
        raise ValueError(
            f"Expected `n_components` of at most the {len(data.train)} rows of {data.rows.source}, but got "
            f"{gmm.n_components}."
        )


def _already_a_batch(batch: Any) -> Any:
    return batch
