"""`SweepTable`: what a sweep reached, as one table with mean and standard deviation over its seeds."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from tgmm_nn.checks import check_string
from tgmm_nn.experiments.reports import Row, column_names, format_table
from tgmm_nn.experiments.running import discard

__all__ = ["SweepTable", "combine", "planned_runs", "read_sweep"]


class _Sweep(NamedTuple):
    """Where a sweep writes, the key over which means are taken, and the overrides of its runs, as far as known."""

    folder: Path
    over: str
    planned: list[dict[str, str]]


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
    _running: ClassVar[_Sweep | None] = None

    def __init__(self, over: str = "seed") -> None:
        check_string("over", over)
        self.over = over

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember where the sweep writes, and which runs it makes.

        Raises:
            ValueError: If several runs would be resumed from one checkpoint.
        """
        planned = planned_runs(config)
        if config.get("train") and config.get("ckpt_path") is not None and len(planned) != 1:
            raise ValueError(
                f"Expected no `ckpt_path` for all runs of a sweep, each of which would go on from it, but got "
                f"{config.ckpt_path!r}; resume each run by a command of its own, or leave ckpt_path out."
            )
        type(self)._running = _Sweep(Path(config.hydra.sweep.dir).absolute(), self.over, planned)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print and write the table."""
        self.end_early()

    @classmethod
    def end_early(cls, *, interrupted: bool = False) -> None:
        """Print and write the table of the runs that came to their end; remove the folder of a sweep without one.

        Args:
            interrupted: Whether the sweep was: which of its runs are left is then said.
        """
        if cls._running is None:
            return
        (folder, over, planned), cls._running = cls._running, None
        runs = read_sweep(folder)
        left = _left(planned, [overrides for overrides, rows in runs if rows]) if interrupted else ""
        if not any(rows for _, rows in runs):
            for path in [*(hydra.parent for hydra in folder.glob("*/.hydra")), folder]:
                discard(path)
            print(left, end="\n" if left else "")
            return
        table = combine(runs, over)
        with (folder / "sweep.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, column_names(table))
            writer.writeheader()
            writer.writerows(table)
        missing = sum(not rows for _, rows in runs)
        failed = f"{missing} of {len(runs)} runs failed, and are missing above." if missing and not interrupted else ""
        said = (format_table(_with_spread(table)), left, failed, f"Everything lies in {folder}\n  sweep.csv  the table")
        print("\n" + "\n\n".join(filter(None, said)))


def planned_runs(config: DictConfig) -> list[dict[str, str]]:
    """Return the overrides of each run that a sweep makes, in their order; none where its sweeper decides on the way.

    Args:
        config: The config of the sweep, with Hydra's own.
    """
    sweeper = config.hydra.sweeper
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    if not sweeper._target_.endswith(".BasicSweeper"):
        return []
    values: dict[str, list[str]] = {}
    try:
        for override in OverridesParser.create().parse_overrides([*given, *config.hydra.overrides.task]):
            swept = override.is_sweep_override()
            found = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
            values[override.get_key_element().lstrip("+")] = list(found)
    except HydraException:  # a pattern of names, which Hydra alone can look up
        return []
    return [dict(zip(values, run, strict=True)) for run in itertools.product(*values.values())]


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


def _left(planned: Sequence[dict[str, str]], finished: Collection[dict[str, str]]) -> str:
    """Return lines on the runs that have not come to their end."""
    left = [run for run in planned if run not in finished]
    if not left:
        return "The sweep was interrupted."
    varied = [key for key in planned[0] if len({run[key] for run in planned}) > 1]
    lines = ["  " + " ".join(f"{key}={run[key]}" for key in varied) for run in left]
    return "\n".join([f"The sweep was interrupted; {len(left)} of {len(planned)} runs are left:", *lines])


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
