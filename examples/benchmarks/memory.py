"""What a fit of an array larger than memory holds: extra anonymous memory, which a file that is mapped has no part in.

python examples/benchmarks/memory.py --gigabytes 4
"""

import argparse
import re
import resource
import tempfile
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import sklearn.cluster  # noqa: F401  # before memory is limited, as is everything that a start imports

from tgmm_nn import GaussianMixture

MB = 2**20


def status(name):
    """Return a number of bytes that the kernel tells of this process."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def write(file, gigabytes, n_features):
    """Write normal rows about three centres, a part at a time, and return them as a read-only map."""
    n_rows, generator = int(gigabytes * 2**30) // (4 * n_features), np.random.default_rng(0)
    x = np.lib.format.open_memmap(file, "w+", np.float32, (n_rows, n_features))
    for start in range(0, n_rows, 2**17):
        part = x[start : start + 2**17]
        part[:] = generator.standard_normal(part.shape, np.float32)
        part[:, 0] += 6 * (np.arange(len(part)) % 3)
    x.flush()
    return np.load(file, mmap_mode="r")


@contextmanager
def peak_memory(task, before):
    """Print the most anonymous memory that the block held above what there was before all of them."""
    peak, done = [before], threading.Event()

    def sample():
        while not done.wait(0.005):
            peak[0] = max(peak[0], status("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    print(f"{task}: at most {(peak[0] - before) / MB:.0f} MB more", flush=True)


def main():
    """Fit and score a mapped array with less extra memory than it is large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the array")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument(
        "--limit", type=float, default=1.0, help="gigabytes of extra memory, above which allocation fails"
    )
    parser.add_argument("--folder", help="where the array is written; a temporary folder if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        x = write(Path(folder) / "x.npy", arguments.gigabytes, arguments.features)
        gmm = GaussianMixture(arguments.components, arguments.features, "diag", random_state=0, max_iter=2)
        warnings.filterwarnings("ignore", "EM did not converge")
        gmm.initialize(x[:1000])  # what libraries set up once is not what rows take
        limit = status("VmData") + int(arguments.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
        print(f"{x.nbytes / MB:.0f} MB of rows, {x.shape}; at most {arguments.limit * 1024:.0f} MB more may be taken")
        before = status("RssAnon")
        with peak_memory("fit, two iterations", before):
            gmm.fit(x)
        with peak_memory("score_samples", before):
            density = gmm.score_samples(x)
        with peak_memory("em_step", before):
            gmm.em_step(x)
        print(f"{len(density)} log-densities take {density.nbytes / MB:.0f} MB; their mean is {density.mean():.3f}")


if __name__ == "__main__":
    main()
