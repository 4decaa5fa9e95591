"""A user's own arrays: one ``.npz`` file, or a folder of ``.npy`` files that stay on the disk."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tgmm_nn.checks import check_integer
from tgmm_nn.experiments.rows import RowsDataModule
from tgmm_nn.experiments.tables import Table, scaling_of

__all__ = ["ArraysDataModule", "NpyFolderDataModule", "NpzDataModule"]

# Ends the name of the file that holds the labels of a shard's rows.
LABELS = ".labels.npy"
# With more classes than rows, and than this, labels are no class numbers but identifiers.
MOST_CLASSES = 1000


class ArraysDataModule(RowsDataModule):
    """Rows of arrays that a user brings.

    Args:
        path: The file or folder.
        image_shape: Height and width where rows are images and the file does not say so.
        scale: Of rows as networks see them: ``"auto"`` divides images by their largest absolute value and standardizes
            other rows; ``"standardize"``, a number that rows are divided by, or None for rows as they are.
        batch_size: Rows in a batch; the short last one is kept.
        n_neighbors: Neighbours, among the scaled rows, from which a row's positive is drawn; finding them takes all
            rows into memory.
        n_classes: Classes from 0 that are known; rows of the others are set aside. None takes all.
        test_size: Share of each known class that is held out; None holds out nothing.
        seed: Seed of the split.
        num_workers: Processes that load batches; 0 loads in the main one.

    Raises:
        TypeError: If an option or array has the wrong type.
        ValueError: If the file is missing, is not such a file or holds rows that are not finite, or an option is out of
            range; the message names the file and what is wrong.
    """

    def __init__(
        self,
        path: str,
        image_shape: Sequence[int] | None = None,
        scale: str | float | None = "auto",
        batch_size: int = 256,
        n_neighbors: int = 5,
        n_classes: int | None = None,
        test_size: float | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        parts, labels, own_shape = self.read(path)
        table = Table(parts, str(path))
        given = own_shape if image_shape is None else image_shape
        shape = None if given is None else _image_shape(given, table)
        if shape is None and parts[0].ndim == 3:
            height, width = parts[0].shape[1:]
            self.remark = (
                f"each of shape ({height}, {width}) is taken as {height * width} features; image_shape=({height}, "
                f"{width}) in an .npz file, or data.image_shape=[{height},{width}], makes them images"
            )
        table.scaling = scaling_of(scale, table, are_images=shape is not None)
        super().__init__(
            table,
            labels,
            shape,
            batch_size=batch_size,
            n_neighbors=n_neighbors,
            n_classes=n_classes,
            test_size=test_size,
            seed=seed,
            num_workers=num_workers,
        )

    @staticmethod
    @abstractmethod
    def read(path: str) -> tuple[list[NDArray[Any]], Tensor | None, Any]:
        """Return arrays of rows, the label of each row or None, and the shape of images or None; or raise."""


class NpzDataModule(ArraysDataModule):
    """Rows of an ``.npz`` file, as ``numpy.savez(path, x=x, y=y, image_shape=(28, 28))`` writes it.

    ``x``, ``(N, ...)``, holds integers or floating numbers, one row for each entry of its first axis; ``y``, ``(N,)``,
    integers: the class of each row from 0, negative where a row has none; ``image_shape`` height and width where rows
    are grey images. The last two may be left out. The file is read into memory; nothing in it is executed. Options and
    errors are those of `ArraysDataModule`.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/points.npz"
        >>> np.savez(path, x=np.arange(12.0).reshape(6, 2), y=np.arange(6) % 2)
        >>> data = NpzDataModule(path, test_size=0.5)
        >>> data.n_features, data.n_classes, len(data.x), len(data.x_test)
        (2, 2, 3, 3)
    """

    @staticmethod
    def read(path: str) -> tuple[list[NDArray[Any]], Tensor | None, Any]:
        """Return what the file holds."""
        arrays = _read_npz(_existing(path, "data.path=FILE.npz", Path.is_file))
        x = _rows(arrays["x"], path)
        y = _labels(arrays["y"], len(x), path) if "y" in arrays else None
        return [x], y, arrays.get("image_shape")


class NpyFolderDataModule(ArraysDataModule):
    """Rows of all ``.npy`` files of a folder, in the order of their names; they stay on the disk, mapped into memory.

    The labels of the rows in ``NAME.npy`` are in ``NAME.labels.npy``, for all files or for none. Rows and labels are as
    in `NpzDataModule`; options and errors are those of `ArraysDataModule`.
    """

    @staticmethod
    def read(path: str) -> tuple[list[NDArray[Any]], Tensor | None, Any]:
        """Return what the folder holds."""
        return *_read_shards(_existing(path, "data.path=FOLDER", Path.is_dir)), None


def _existing(path: Any, example: str, exists: Any) -> Path:
    """Return what ``path`` names, or raise if there is nothing of its kind."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise ValueError(f"Expected `path` to name your data; give {example}, but got {path!r}.")
    kind = "a folder" if exists is Path.is_dir else "a file"
    if not exists(found := Path(path).expanduser()):
        raise ValueError(f"Expected `path` to be {kind} that exists, but got {str(path)!r} in {Path.cwd()}.")
    return found


def _read(file: Path, **options: Any) -> Any:
    """Return what NumPy reads from a file without executing anything in it, or raise."""
    try:
        return np.load(file, allow_pickle=False, **options)
    except (ValueError, OSError, EOFError, BadZipFile, UnpicklingError) as error:
        # NumPy takes anything that it does not know for a pickle, and advises to execute it.
        why = "it holds something else" if "pickle" in str(error) else error
        raise ValueError(
            f"Expected `path` with arrays of numbers that NumPy wrote, but {file} can't be read as such: {why}."
        ) from error


def _read_npz(file: Path) -> Mapping[str, NDArray[Any]]:
    """Return the arrays ``x``, ``y`` and ``image_shape`` that an ``.npz`` file holds."""
    archive = _read(file)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(
            f"Expected `path` to be an .npz file, but {file} holds one array; write it by numpy.savez(path, x=rows)."
        )
    with archive:
        if "x" not in archive.files:
            raise ValueError(
                f"Expected `path` to hold the rows under the key 'x', but {file} holds {sorted(archive.files)}; write "
                "it by numpy.savez(path, x=rows)."
            )
        return {key: _member(archive, key, file) for key in ("x", "y", "image_shape") if key in archive.files}


def _member(archive: Mapping[str, NDArray[Any]], key: str, file: Path) -> NDArray[Any]:
    """Return one array of an archive, or raise."""
    try:
        return archive[key]
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"Expected `{key}` of {file} to hold numbers, but it can't be read: {error}") from error


def _read_shards(folder: Path) -> tuple[list[NDArray[Any]], Tensor | None]:
    """Return the mapped arrays of a folder, and all labels."""
    files = sorted(file for file in folder.glob("*.npy") if not file.name.endswith(LABELS))
    if not files:
        raise ValueError(f"Expected `path` to be a folder of .npy files, but {folder} holds none.")
    parts = [_rows(_read(file, mmap_mode="r"), f"{file}") for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"Expected `x` of {file} with rows of shape {parts[0].shape[1:]}, those of {files[0].name}, but got "
                f"{part.shape[1:]}."
            )
    beside = [file.with_name(file.name.removesuffix(".npy") + LABELS) for file in files]
    there = [label for label in beside if label.is_file()]
    if not there:
        return parts, None
    if missing := [label.name for label in beside if label not in there]:
        raise ValueError(
            f"Expected labels for all files of {folder} or for none, but {missing[0]} is missing "
            f"({len(there)} of {len(files)} are there)."
        )
    labels = [_labels(_read(label), len(part), f"{label}") for label, part in zip(beside, parts, strict=True)]
    known = [part for part in labels if part is not None]
    if not known:
        return parts, None
    none = [torch.full((len(part),), -1) for part in parts]
    return parts, torch.cat([empty if y is None else y for y, empty in zip(labels, none, strict=True)])


def _rows(x: NDArray[Any], source: str) -> NDArray[Any]:
    """Return an array of rows, or raise unless it holds some, of numbers."""
    if x.dtype.kind not in "fiu":
        raise TypeError(
            f"Expected `x` of {source} to hold integers or floating numbers, but got {x.dtype}; convert it by "
            "x.astype(numpy.float32)."
        )
    if x.ndim < 2:
        raise ValueError(
            f"Expected `x` of {source} of shape (N, ...), one row for each entry of the first axis, but got {x.shape}; "
            "write one feature as x[:, None]."
        )
    if x.size == 0:
        raise ValueError(f"Expected `x` of {source} with at least one row and feature, but got shape {x.shape}.")
    return x


def _labels(y: NDArray[Any], n_rows: int, source: str) -> Tensor | None:
    """Return labels, None where all are negative, or raise unless they are class numbers, one for each row."""
    if y.dtype.kind not in "iu":
        raise TypeError(
            f"Expected `y` of {source} to hold integers, the class of each row from 0, but got {y.dtype}; number the "
            "classes by numpy.unique(y, return_inverse=True)[1]."
        )
    if y.shape != (n_rows,):
        raise ValueError(f"Expected `y` of {source} of shape ({n_rows},), one label for each row, but got {y.shape}.")
    if (largest := int(y.max())) >= max(MOST_CLASSES, n_rows):
        raise ValueError(
            f"Expected `y` of {source} to number classes from 0, but the largest of {n_rows} labels is {largest}; "
            "number the classes by numpy.unique(y, return_inverse=True)[1]."
        )
    return None if largest < 0 else torch.from_numpy(np.maximum(y.astype(np.int64), -1))


def _image_shape(image_shape: Any, table: Table) -> list[int]:
    """Return height and width, or raise unless they make up a row."""
    shape = np.asarray(image_shape)
    if shape.ndim != 1 or len(shape) != 2 or shape.dtype.kind not in "iu":
        raise ValueError(
            f"Expected `image_shape` of {table.source} to be height and width, two integers, but got {image_shape}."
        )
    for size in shape.tolist():
        check_integer("image_shape", size)
    if math.prod(shape.tolist()) != table.n_features:
        raise ValueError(
            f"Expected `image_shape` of {table.source} to multiply to its {table.n_features} features, but got "
            f"{shape.tolist()}."
        )
    return [int(size) for size in shape]
