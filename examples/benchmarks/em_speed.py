"""Compare one EM iteration with scikit-learn's and tgmm's, and the density with that of torch.distributions.

    python examples/benchmarks/em_speed.py
    python examples/benchmarks/em_speed.py --cases "full" "diag, wide" --repeats 3

Each library runs in processes of its own, in turn, since in one process their thread pools spin against each other:
one process per case, library and dtype, and as many rounds of all of them as ``--repeats``, so that a drift of the
machine hits all alike. A process gives the median of its own measurements, and the table medians over the rounds.
All get OMP_NUM_THREADS and no OPENBLAS_* variable, which could slow scikit-learn down. `em_libraries.py` has the data.

- ours: what one iteration adds to `fit` from a given start, (T(n) - T(1)) / (n - 1); and `em_step` on all rows, whose
  form is chosen by shapes alone
- scikit-learn: its E-step and M-step called directly, without the checks of its `fit`, in its favour
- tgmm (optional: ``pip install tgmm``, or a folder with it on PYTHONPATH) and torch.distributions: likewise, on the
  first rows where all rows times K times d are more than 2²⁵ numbers, and scaled up
- limit: the least arithmetic, 2 N K d² for full, 8 N K d for diag, at the rate of the faster of torch.mm and oneDNN

Prints one table and one of small batches, and writes them with every round as ``em_speed.csv``, and ``em_speed.png``.
"""

import argparse
import csv
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from em_libraries import CASES, draw

from tgmm_nn.experiments.reports import format_table
from tgmm_nn.plotting import new_axes, save

HERE = Path(__file__).parent
BATCHES = {"full, batch": (250, 80), "diag, batch": (100, 80)}  # microseconds wanted of `em_step` and of `forward`
AGAINST_TGMM = {"full": 8, "diag": 30}
LEAST = {"full": lambda c: 2 * c.rows * c.k * c.d**2, "diag": lambda c: 8 * c.rows * c.k * c.d}
SHARE = {"full": 0.5}  # wanted of the limit
OURS, PEERS = ["ours float32", "ours float64"], ["sklearn float32", "sklearn float64"]
RUNS = [*OURS, *PEERS, "tgmm float32", "distributions float32"]


def measure(case, run, data, arguments):
    """Return what a process of its own measured, by name; raise with its last words if it failed."""
    library, dtype = run.split()
    asked = {"library": library, "dtype": dtype, "case": case, "data": str(data), "threads": arguments.threads}
    least = {"seconds": 0.0, "least": 1} if arguments.quick else {"seconds": arguments.seconds, "least": 3}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment["OMP_NUM_THREADS"] = str(arguments.threads)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(HERE / "em_libraries.py"), json.dumps(asked | least)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(cases, arguments):
    """Return the values of all rounds by case, run and quantity; say what is absent, and what does not agree."""
    found, absent = defaultdict(list), set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.repeats):
            for name, case in cases.items():
                data = Path(folder, f"{name}.npz")
                if not data.exists():
                    np.savez(data, **draw(case))
                extra = ["compiled float32"] * (name in BATCHES and not arguments.quick)
                product = ["product float32"] * (case.family in LEAST and name not in BATCHES)
                for run in [*arguments.runs, *extra, *product]:
                    if (name, run) in absent or ("", run) in absent:
                        continue
                    try:
                        for what, value in measure(case, run, data, arguments).items():
                            found[name, run, what].append(value)
                    except RuntimeError as error:
                        print(f"{name}, {run}: absent, {error}", flush=True)
                        absent.add(("" if "No module named" in str(error) else name, run))
                print(f"round {number + 1} of {arguments.repeats}: {name}", file=sys.stderr, flush=True)
    return found


class Medians:
    """Medians over rounds, nan where there is nothing."""

    def __init__(self, found):
        self.found = found

    def __call__(self, name, run, what="iteration"):
        """Return one."""
        return statistics.median(self.found.get((name, run, what), [float("nan")]))

    def speedup(self, name, ours, peer):
        """Return how many times as fast as a peer an iteration is."""
        return self(name, peer) / self(name, ours)


def cell(value, wanted=None, digits=1, least=True):
    """Return a number, and how it compares with what is wanted of it."""
    if math.isnan(value):
        return "–"
    sign = ("≥" if value >= wanted else "<") if least and wanted else ("≤" if wanted and value <= wanted else ">")
    return f"{value:.{digits}f}" + (f" {sign} {wanted:g}" if wanted else "")


def line(name, case, median):
    """Return a row of the table: times in milliseconds, and ratios."""
    cells = {"case": f"{name} ({case.rows:,}, {case.d}, {case.k})"}
    short = {"ours float32": "ours", "ours float64": "ours f64", "sklearn float32": "sklearn f32"}
    short |= {"sklearn float64": "sklearn f64", "tgmm float32": "tgmm"}
    cells |= {label: cell(1e3 * median(name, run)) for run, label in short.items()}
    cells["em_step"] = cell(1e3 * median(name, "ours float32", "em_step"))
    for peer, wanted in zip(PEERS, case.wanted, strict=True):
        cells[f"× {short[peer]}"] = cell(median.speedup(name, "ours float32", peer), wanted)
    cells["f64 × f64"] = cell(median.speedup(name, "ours float64", PEERS[1]), 1)
    cells["× tgmm"] = cell(median.speedup(name, "ours float32", "tgmm float32"), AGAINST_TGMM.get(case.family))
    arithmetic = LEAST[case.family](case) if case.family in LEAST else float("nan")
    share = arithmetic / median(name, "product float32", "rate") / median(name, "ours float32")
    cells["of the limit"] = cell(share, SHARE.get(case.family), digits=2)
    cells["density"] = cell(1e3 * median(name, "ours float32", "density"))
    cells["torch.distributions"] = cell(1e3 * median(name, "distributions float32", "density"))
    return cells


def batch_line(name, case, median):
    """Return a row of the table of small batches, in microseconds."""
    step, forward = BATCHES[name]
    return {
        "microseconds": f"{name} ({case.rows}, {case.d}, {case.k})",
        "em_step": cell(1e6 * median(name, "ours float32", "em_step"), step, 0, least=False),
        "compiled": cell(1e6 * median(name, "compiled float32", "em_step"), step, 0, least=False),
        "forward": cell(1e6 * median(name, "ours float32", "density"), forward, 0, least=False),
        **{run: cell(1e6 * median(name, run), digits=0) for run in [*PEERS, "tgmm float32"]},
        "torch.distributions": cell(1e6 * median(name, "distributions float32", "density"), digits=0),
    }


def draw_ratios(cases, median, title, path):
    """Write a plot of the ratios to scikit-learn, with what is wanted and hoped as marks."""
    (ax,) = new_axes(size=(8, 1.2 + 0.7 * len(cases)))
    for column, (peer, shade) in enumerate(zip(PEERS, ("0.35", "0.75"), strict=True)):
        places = [row + (column - 0.5) * 0.38 for row in range(len(cases))]
        ratios = [median.speedup(name, "ours float32", peer) for name in cases]
        ax.barh(places, np.subtract(ratios, 1), 0.36, left=1, color=shade, label=f"scikit-learn, {peer.split()[1]}")
        for values, mark, label in (("wanted", "|", "wanted"), ("hoped", "D", "hoped for")):
            marks = [getattr(case, values)[column] for case in cases.values()]
            style = {"s": 260 if mark == "|" else 22, "color": "black"} | (
                {} if mark == "|" else {"facecolor": "white"}
            )
            ax.scatter(marks, places, marker=mark, zorder=3, label=None if column else label, **style)
    ax.axvline(1, color="black", linewidth=0.8)
    ax.set_xscale("log")
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.set_yticks(range(len(cases)), [f"{name}\n({c.rows:,}, {c.d}, {c.k})" for name, c in cases.items()])
    ax.invert_yaxis()
    ax.set(title=title, xlabel="times as fast as scikit-learn, our iteration in float32 (logarithmic)")
    ax.minorticks_off()
    ax.figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    save(ax, path)


def machine(threads):
    """Return the processor and the versions in a line."""
    names = [text.partition(":")[2].strip() for text in _read("/proc/cpuinfo") if text.startswith("model name")]
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "scikit-learn"))
    return f"{names[0] if names else platform.processor() or platform.machine()}, {threads} threads, {libraries}"


def _read(path):
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main():
    """Measure, print the tables and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, help="rounds, each in new processes: 5, or 1 where --quick")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for a quantity in a process")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS, help="libraries and dtypes")
    parser.add_argument("--out", type=Path, default=Path("outputs", "em_speed"), help="folder for the plot and the csv")
    parser.add_argument("--quick", action="store_true", help="few rows and components, measured once: a test")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 5)
    cases = {name: CASES[name] for name in arguments.cases}
    if arguments.quick:
        cases = {name: case._replace(rows=256, d=min(case.d, 16), k=4) for name, case in cases.items()}
    found = measure_all(cases, arguments)
    median, title = Medians(found), machine(arguments.threads)
    large = {name: case for name, case in cases.items() if name not in BATCHES}
    print(f"{title}; medians of {arguments.repeats}, milliseconds (rows, d, K)")
    if large:
        print(format_table([line(name, case, median) for name, case in large.items()]))
    if batches := [batch_line(name, case, median) for name, case in cases.items() if name in BATCHES]:
        print("", format_table(batches), sep="\n")
    for name in cases:
        ours, theirs = (median(name, run, "log-likelihood") for run in (OURS[1], PEERS[1]))
        if abs(ours - theirs) > 1e-6 * abs(theirs):
            print(f"{name}: after one step our log-likelihood is {ours}, scikit-learn's {theirs}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "em_speed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "rows", "d", "k", "library and dtype", "quantity", "median", "rounds"])
        for (name, run, what), values in found.items():
            writer.writerow([name, *cases[name][:3], run, what, statistics.median(values), json.dumps(values)])
    if large:
        draw_ratios(large, median, title, arguments.out / "em_speed.png")


if __name__ == "__main__":
    main()
