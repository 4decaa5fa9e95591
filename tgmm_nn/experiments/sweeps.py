"""`SweepTable`: what a sweep reached, as one table with mean and standard deviation over its seeds."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tgmm_nn.checks import check_string
from tgmm_nn.experiments.reports import Row, column_names, format_table
from tgmm_nn.experiments.running import discard

__all__ = ["SweepTable", "combine", "read_sweep"]


class SweepTable(Callback):
    """Print a table at the end of a sweep, and write it as ``sweep.csv`` into the sweep's folder.

    Each run left its ``results.csv``. Runs whose overrides are equal but for ``over`` are one line for each method,
    with mean ± standard deviation (of a sample, ddof = 1) of every number.

    Args:
        over: Key of the override over whose values means are taken.

    Raises:
        TypeError: If ``over`` is no string.
    """

    # The sweep that runs in this process: Hydra ends a sweep in which a run failed without calling its callbacks.
    _running: ClassVar[tuple[Path, str] | None] = None

    def __init__(self, over: str = "seed") -> None:
        check_string("over", over)
        self.over = over

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep writes."""
        type(self)._running = Path(config.hydra.sweep.dir).absolute(), self.over

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table."""
        self.end_early()

    @classmethod
    def end_early(cls) -> None:
        """Print and write the table of the runs that came to their end; remove the folder of a sweep without one."""
        if cls._running is None:
            return
        (folder, over), cls._running = cls._running, None
        runs = read_sweep(folder)
        if not any(rows for _, rows in runs):
            for path in [*folder.glob("*/"), folder]:
                discard(path)
            return
        table = combine(runs, over)
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, column_names(table))
            writer.writeheader()
            writer.writerows(table)
        missing = sum(not rows for _, rows in runs)
        told = f"\n{missing} of {len(runs)} runs came to no end, and are missing above." if missing else ""
        print(f"\n{format_table(_with_spread(table))}{told}\n\nEverything lies in {folder}\n  sweep.csv  the table")


def read_sweep(folder: Path) -> list[tuple[dict[str, str], list[dict[str, str]]]]:
    """Return the overrides of each run of a sweep, and the rows of its table; none where it came to no end."""
    runs = []
    files = folder.rglob(".hydra/overrides.yaml")
    for file in sorted(files, key=lambda path: (len(str(path)), path)):  # run 2 before run 10
        overrides = dict(str(text).lstrip("+").split("=", 1) for text in OmegaConf.load(file) if "=" in str(text))
        results = file.parents[1] / "results.csv"
        rows: list[dict[str, str]] = []
        if results.exists():
            with results.open(newline="") as lines:
                rows = list(csv.DictReader(lines))
        runs.append((overrides, rows))
    return runs


def combine(runs: Sequence[tuple[dict[str, str], list[dict[str, str]]]], over: str = "seed") -> list[Row]:
    """Take mean and standard deviation over the runs that differ in ``over`` alone.

    Args:
        runs: Overrides and rows of each run, as from `read_sweep`.
        over: Key that is averaged over.

    Returns:
        A row for each combination of the other overrides that differ and each method: those, the number of runs, and
        of each number ``x`` of the runs' tables ``x`` and ``x_sd``, the latter of two runs or more; of each column of
        marks, such as a star at what was chosen, how many of the runs have one.

    Example:
        >>> runs = [({"seed": s, "k": "2"}, [{"method": "a", "nmi": n}]) for s, n in (("0", ".4"), ("1", ".6"))]
        >>> [{name: round(v, 3) if name != "method" else v for name, v in row.items()} for row in combine(runs)]
        [{'method': 'a', 'runs': 2, 'nmi': 0.5, 'nmi_sd': 0.141}]
    """
    keys = list(dict.fromkeys(key for overrides, _ in runs for key in overrides if key != over))
    varied = [key for key in keys if len({overrides.get(key) for overrides, _ in runs}) > 1]
    cells = [(name, cell) for _, rows in runs for row in rows for name, cell in row.items()]
    marks = {name for name, cell in cells if cell and not _is_number(cell)} - {"method"}
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for overrides, rows in runs:
        for row in rows:
            place = (*(overrides.get(key, "") for key in varied), row["method"])
            groups.setdefault(place, []).append(row)
    return [
        {**dict(zip([*varied, "method"], place, strict=True)), "runs": len(rows), **_moments(rows, marks)}
        for place, rows in groups.items()
    ]


def _moments(rows: Sequence[dict[str, str]], marks: Collection[str]) -> Row:
    """Return mean and deviation of each column of numbers, and how many cells of a column of marks are filled."""
    moments: Row = {}
    for name in [name for name in column_names(rows) if name != "method"]:
        cells = [cell for row in rows if (cell := row.get(name))]
        if name in marks:
            moments[name] = len(cells)
            continue
        values = [float(cell) for cell in cells]
        moments[name] = statistics.fmean(values) if values else ""
        moments[f"{name}_sd"] = statistics.stdev(values) if len(values) > 1 else ""
    return moments


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _with_spread(table: Sequence[Row]) -> list[Row]:
    """Return rows in which mean and standard deviation are one cell."""
    shown = []
    for row in table:
        cells = {name: value for name, value in row.items() if not name.endswith("_sd")}
        for name, value in cells.items():
            spread = row.get(f"{name}_sd", "")
            if isinstance(value, float):
                cells[name] = f"{value:.3f} ± {spread:.3f}" if isinstance(spread, float) else f"{value:.3f}"
        shown.append(cells)
    return shown
