"""Compare a race of ten starts with scikit-learn's ten runs, and measure what a start costs.

    python examples/benchmarks/restarts.py --datasets 20 --threads 2 --seeds 3

Each data set has 20,000 rows of 16 features in float32, and is fitted by eight components. Both sides get the same
tolerance, and each fit a process of its own, in turn; scikit-learn gets float64 where it fails in float32. Likelihoods
are of the final parameters, in float64. Where both depend on the seed, means over seeds are compared, and the error is
that of the difference's mean. Wanted: a third of the time, and at least the likelihood. The start of a mixture of 32
components on 200,000 rows of 64 features is told in iterations of EM; wanted below five.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings

import numpy as np

N, D, K = 20_000, 16, 8
WHO = ("tgmm_nn", "scikit-learn")


def clusters(rng, k, spread, shape, weights=None):
    """Draw rows from ``k`` normal components: ``"round"``, round of several sizes (``"sized"``) or ``"oblique"``."""
    labels = rng.choice(k, N, p=weights)
    means = spread * rng.standard_normal((k, D))
    factors = np.empty((k, D, D))
    for factor in factors:
        if shape == "oblique":
            factor[:] = np.linalg.qr(rng.standard_normal((D, D)))[0] * np.exp(0.6 * rng.standard_normal(D))
        else:
            factor[:] = np.eye(D) * (np.exp(0.7 * rng.standard_normal()) if shape == "sized" else 1.0)
    return means[labels] + np.einsum("nij,nj->ni", factors[labels], rng.standard_normal((N, D)))


def folded(rng):
    """Push clusters through a random network."""
    first, second = rng.standard_normal((D, 32)) / 4, rng.standard_normal((32, D)) / 5
    return 3 * np.tanh(clusters(rng, 8, 1.0, "round") @ first) @ second + 0.1 * rng.standard_normal((N, D))


def digits(rng):
    """Return images of digits in sixteen principal components, drawn again with noise."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA

    x = PCA(D, random_state=0).fit_transform(load_digits().data)
    return x[rng.integers(len(x), size=N)] + 2.0 * rng.standard_normal((N, D))


def polluted(rng):
    """Return clusters among which every twentieth row is uniform."""
    x, out = clusters(rng, 8, 2.0, "oblique"), rng.random(N) < 0.05
    x[out] = rng.uniform(-12, 12, (out.sum(), D))
    return x


DATA = {
    "round, far apart": lambda rng: clusters(rng, 8, 3.0, "round"),
    "round, apart": lambda rng: clusters(rng, 8, 1.0, "round"),
    "round, overlapping": lambda rng: clusters(rng, 8, 0.6, "round"),
    "round, one cloud": lambda rng: clusters(rng, 8, 0.4, "round"),
    "oblique, far apart": lambda rng: clusters(rng, 8, 3.0, "oblique"),
    "oblique, apart": lambda rng: clusters(rng, 8, 1.0, "oblique"),
    "oblique, overlapping": lambda rng: clusters(rng, 8, 0.5, "oblique"),
    "oblique, one mean": lambda rng: clusters(rng, 8, 0.0, "oblique"),
    "oblique, unequal": lambda rng: clusters(rng, 8, 1.0, "oblique", rng.dirichlet(np.ones(8))),
    "sizes, very unequal": lambda rng: clusters(rng, 8, 1.5, "sized", rng.dirichlet(np.full(8, 0.5))),
    "5 clusters": lambda rng: clusters(rng, 5, 1.0, "oblique"),
    "12 clusters": lambda rng: clusters(rng, 12, 1.0, "oblique"),
    "20 clusters": lambda rng: clusters(rng, 20, 1.5, "oblique"),
    "3 clusters": lambda rng: clusters(rng, 3, 0.7, "oblique"),
    "heavy tails": lambda rng: clusters(rng, 8, 1.0, "oblique") + 0.5 * rng.standard_t(2, (N, D)),
    "a cube": lambda rng: rng.uniform(-1, 1, (N, D)),
    "folded": folded,
    "digits": digits,
    "sizes, overlapping": lambda rng: clusters(rng, 8, 0.2, "sized"),
    "polluted": polluted,
}


def fit(who, number, seed, options):
    """Fit a data set; return the seconds, on the clock and of the processor, and the mean log-likelihood."""
    import torch
    from sklearn.mixture import GaussianMixture as SklearnGaussianMixture

    from tgmm_nn import GaussianMixture

    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    x = list(DATA.values())[number](np.random.default_rng(1000 + number)).astype(np.float32)
    how = {"n_init": options.starts, "tol": options.tol, "max_iter": 100, "random_state": seed}
    family = options.covariance_type
    if who == "scikit-learn":
        model = SklearnGaussianMixture(K, covariance_type=family, **how)
        warm = SklearnGaussianMixture(2, max_iter=1)
    else:
        model, warm = GaussianMixture(K, D, family, **how), GaussianMixture(2, D, n_init=2, max_iter=1)
    warm.fit(x[:1000])
    clock, processor = time.perf_counter(), time.process_time()
    try:
        model.fit(x)
    except ValueError:  # of scikit-learn, where a covariance of float32 rows is not positive definite
        if who != "scikit-learn":
            raise
        clock, processor = time.perf_counter(), time.process_time()
        model.fit(x.astype(np.float64))
    seconds = (time.perf_counter() - clock, time.process_time() - processor)
    parameters = [np.asarray(value, dtype=np.float64) for value in (model.weights_, model.means_, model.covariances_)]
    parameters[0] /= parameters[0].sum()
    judge = GaussianMixture(K, D, family, dtype="float64").set_parameters(*parameters)
    return *seconds, judge.score(x.astype(np.float64))


def start_in_iterations(options):
    """Return the seconds that a start takes on many rows, and those of one iteration of EM there."""
    import torch

    from tgmm_nn import GaussianMixture

    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(32, 64, generator=generator)
    x = centres[torch.randint(32, (200_000,), generator=generator)] + torch.randn(200_000, 64, generator=generator)
    gmm = GaussianMixture(32, 64, random_state=0)
    gmm.initialize(x[:1000])
    begun = time.perf_counter()
    gmm.initialize(x)
    started = time.perf_counter()
    gmm.em_step(x)
    return started - begun, time.perf_counter() - started


def compare(options, number):
    """Return seconds and seconds of the processor, of ours and theirs, and ours minus theirs; a row for each seed."""
    rows = []
    for seed in range(options.seed, options.seed + options.seeds):
        one, other = (apart(options, who, number, seed) for who in WHO)
        if one is None or other is None:
            raise RuntimeError(f"{WHO[0] if one is None else WHO[1]} failed with seed {seed}")
        rows.append((*one[:2], *other[:2], one[2] - other[2]))
    return np.array(rows)


def apart(options, *task):
    """Run a task of this script in a process of its own, with so many threads."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    environment |= {"OMP_NUM_THREADS": str(options.threads)}
    command = [sys.executable, __file__, *sys.argv[1:], "--task", *map(str, task)]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main():
    """Print a row for each data set, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", type=int, default=len(DATA))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--tol", type=float, default=1e-3, help="of both; scikit-learn's default")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--covariance-type", choices=("full", "diag", "spherical"), default="full")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        who, *numbers = options.task
        print(json.dumps(fit(who, *map(int, numbers), options) if numbers else start_in_iterations(options)))
        return
    print(f"{'data':22s} {'seconds':>8s} {'scikit-learn':>12s} {'ratio':>6s} {'of CPU':>6s}  likelihood, ours - theirs")
    rows, times = [], []
    for number, name in enumerate(list(DATA)[: options.datasets]):
        try:
            found = compare(options, number)
        except RuntimeError as error:
            print(f"{name:22s} {error}", flush=True)
            continue
        ours, our_cpu, theirs, their_cpu, gain = found.mean(0)
        rows.append((ours / theirs, our_cpu / their_cpu, gain))
        times.append((ours, theirs))
        spread = f" ± {found[:, -1].std(ddof=1) / len(found) ** 0.5:.0e}" if len(found) > 1 else ""
        ratios = f"{rows[-1][0]:6.2f} {rows[-1][1]:6.2f}"
        print(f"{name:22s} {ours:8.2f} {theirs:12.2f} {ratios}  {gain:+.1e}{spread}", flush=True)
    clock, processor, gain = np.array(rows).T
    ours, theirs = np.sum(times, 0)
    print(
        f"ratio of times: median {np.median(clock):.2f}, largest {clock.max():.2f}, of the sums {ours / theirs:.2f}; "
        f"of CPU, median {np.median(processor):.2f}"
    )
    print(
        f"likelihood: least {gain.min():+.1e}, median {np.median(gain):+.1e} nats per row; "
        f"at least theirs - 1e-6 on {(gain >= -1e-6).sum()} of {len(gain)}"
    )
    start, iteration = apart(options, "start")
    print(f"a start on (200,000, 64), K = 32: {start:.2f} s, {start / iteration:.1f} iterations of EM")


if __name__ == "__main__":
    main()
