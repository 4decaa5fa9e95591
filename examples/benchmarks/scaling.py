"""Print how the time of an EM step grows with N, d and K, what ranks exchange, and what 10⁹ rows would take.

    python examples/benchmarks/scaling.py

Each table doubles one size and keeps the others. The slope is that of log time against log size over the last three:
1 in N and K, and at most 2 in d for full and 1 for diag. The message is what ranks sum once per step, as measured: a
vector in float64 whose length does not depend on N. The extrapolation takes the rows per second of this process for
each rank, the time of a ring all-reduce, 2 (P - 1) / P times the bytes over ``--bandwidth``, and the time to read the
rank's rows at ``--disk``, which is nothing where they fit its memory. A last table tells what an iteration of `fit`
takes over batches of a ``DataLoader``, and what the loader takes to give them.
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments.reports import format_table

SHAPE = {"N": 32_768, "d": 64, "K": 32}  # what stays where another size doubles
LEADING = {"full": "K d² / 2", "diag": "2 K d"}  # numbers that a step needs to exchange
SWEEPS = {"N": [4_096, 8_192, 16_384, 32_768, 65_536], "d": [8, 16, 32, 64, 128], "K": [4, 8, 16, 32, 64]}


def layer(rows, d, k, family):
    """Return a mixture at a start that overlaps, and rows of it."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(k, d, generator=generator) * 6 / (2 * d) ** 0.5
    x = torch.randn(rows, d, generator=generator) + means[torch.randint(k, (rows,), generator=generator)]
    return GaussianMixture(k, d, family, init_means=means, init_covariances="eye").initialize(x[: 20 * k]), x


def seconds(call, repeats):
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def seconds_per_step(gmm, x, repeats):
    """Return the median time of a step on all rows, after one that is not timed."""
    gmm.em_step(x)
    return seconds(lambda: gmm.em_step(x), repeats)


def sweep(size, values, shape, family, repeats):
    """Return a row of the table for each value of one size, the last with the slope."""
    rows, times, term = [], [], LEADING[family]
    for value in values:
        n, d, k = (shape | {size: value}).values()
        gmm, x = layer(n, d, k, family)
        times.append(seconds_per_step(gmm, x, repeats))
        numbers = gmm.statistics(x[:k]).flatten().numel()
        leading = k * d * d / 2 if family == "full" else 2 * k * d
        slope = np.polyfit(np.log(values[: len(times)][-3:]), np.log(times[-3:]), 1)[0] if len(times) > 2 else np.nan
        rows.append(
            {
                "family": family,
                "N": f"{n:,}",
                "d": str(d),
                "K": str(k),
                "ms": 1e3 * times[-1],
                "slope": f"{slope:.2f} in {size}" if value == values[-1] and len(values) > 2 else "",
                "million rows/s": n / times[-1] / 1e6,
                "numbers in the message": f"{numbers:,}",
                "leading term": f"{numbers / leading:.2f} × {term}",
                "KiB": numbers * 8 / 1024,
            }
        )
    return rows


def extrapolate(family, shape, arguments):
    """Print the time of one step on many ranks, from what one process measures."""
    gmm, x = layer(*shape.values(), family)
    rate = len(x) / seconds_per_step(gmm, x, arguments.repeats)
    ranks, rows = arguments.ranks, arguments.total
    message = 8 * gmm.statistics(x[: gmm.n_components]).flatten().numel()
    compute, reduce = rows / ranks / rate, 2 * (ranks - 1) / ranks * message / arguments.bandwidth
    share = 4 * gmm.n_features * rows / ranks
    print(
        f"{family}, {rows:,} rows of d = {gmm.n_features}, K = {gmm.n_components}, {ranks} ranks, one step:\n"
        f"  sums of {rows / ranks:,.0f} rows a rank at {rate:,.0f} rows/s: {compute:.3g} s\n"
        f"  all-reduce of {message:,} bytes at {arguments.bandwidth:.3g} bytes/s (assumed): {1e3 * reduce:.3g} ms, "
        f"{100 * reduce / (compute + reduce):.2g} % of both\n"
        f"  reading {share / 1e9:.3g} GB a rank at {arguments.disk:.3g} bytes/s (assumed), if not in memory: "
        f"{share / arguments.disk:.3g} s"
    )


def streamed(batch_size, shape, family, repeats):
    """Return a row of the table of a loader: the time that a pass takes alone, and that of an iteration of `fit`."""

    def of_fit(rows, n_iter):
        how = {"init_means": gmm.means_, "init_covariances": "eye", "tol": 0.0}
        return seconds(lambda: GaussianMixture(*gmm.means_.shape, family, max_iter=n_iter, **how).fit(rows), repeats)

    def of_iteration(rows):
        return (of_fit(rows, 4) - of_fit(rows, 1)) / 3

    gmm, x = layer(*shape.values(), family)
    loader = DataLoader(TensorDataset(x), batch_size)
    return {
        "family": family,
        "batch size": str(batch_size),
        "ms in memory": 1e3 * of_iteration(x),
        "ms of the loader": 1e3 * seconds(lambda: [None for _ in loader], repeats),
        "ms of an iteration over it": 1e3 * of_iteration(loader),
    }


def main():
    """Print the tables and the extrapolation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--families", nargs="+", choices=LEADING, default=list(LEADING))
    parser.add_argument("--total", type=int, default=10**9, help="rows of all ranks")
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="bytes per second of a link, here of 10 Gbit/s")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes per second that a rank reads")
    parser.add_argument("--quick", action="store_true", help="small sizes, measured once: a test")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, sweeps = SHAPE, SWEEPS
    if arguments.quick:
        arguments.repeats, shape = 1, {"N": 512, "d": 8, "K": 4}
        sweeps = {"N": [512, 1024, 2048], "d": [4, 8, 16], "K": [2, 4, 8]}
    print(f"EM steps in float32 on {arguments.threads} threads, torch {torch.__version__}, medians")
    for family in arguments.families:
        for size, values in sweeps.items():
            print(format_table(sweep(size, values, shape, family, arguments.repeats)), end="\n\n")
    for family in arguments.families:
        extrapolate(family, shape, arguments)
    sizes = [16, 64, 256, 1024] if not arguments.quick else [16]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EM did not converge")
        table = [streamed(size, shape, family, arguments.repeats) for family in arguments.families for size in sizes]
    print(f"\nfit on a DataLoader of {shape['N']:,} rows, d = {shape['d']}, K = {shape['K']}\n{format_table(table)}")


if __name__ == "__main__":
    main()
