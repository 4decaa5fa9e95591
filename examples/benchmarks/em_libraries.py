"""What `em_speed.py` measures, in a process for each library, dtype and case: prints one line of JSON.

Data: K Gaussians of the case's own family and of equal weight, variances log-uniform in [.5, 2] along random axes,
means drawn so that two are about six standard deviations apart. Start, of every library: means off by one standard
deviation, covariances and weights as drawn. One case has fewer rows per component than features: its ridge is 0.1.
"""

import json
import statistics
import sys
import time
import warnings
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np


class Case(NamedTuple):
    """Shape of a problem, and how many times as fast as scikit-learn in float32 and in float64 is wanted, and hoped."""

    rows: int
    d: int
    k: int
    family: str
    wanted: tuple[float, float] = (0.0, 0.0)
    hoped: tuple[float, float] = (0.0, 0.0)
    reg_covar: float = 1e-6


CASES = {
    "full": Case(50_000, 64, 32, "full", (3, 7), (5.5, 12)),
    "full, small": Case(100_000, 16, 16, "full", (7, 11), (15, 25)),
    "full, wide": Case(5_000, 512, 20, "full", (1.3, 3), (2.2, 5), 0.1),
    "full, many components": Case(50_000, 32, 512, "full", (8, 15), (14, 28)),
    "diag": Case(100_000, 64, 64, "diag", (2.5, 6), (4.5, 12)),
    "diag, wide": Case(20_000, 256, 100, "diag", (1.2, 3.5), (1.9, 5.5)),
    "tied_full": Case(100_000, 64, 32, "tied_full", (16, 50), (35, 110)),
    "spherical": Case(100_000, 64, 64, "spherical", (4, 10), (8, 20)),
    "full, batch": Case(256, 16, 10, "full"),
    "diag, batch": Case(256, 16, 10, "diag"),
}


def draw(case, seed=0):
    """Return rows and a start: weights, means and covariances in the public shape."""
    rng = np.random.default_rng(seed)
    n, d, k, family = case[:4]
    variances = np.exp2(rng.uniform(-1, 1, {"tied_full": (1, d), "spherical": (k, 1)}.get(family, (k, d))))
    axes = np.eye(d)
    if family.endswith("full"):
        axes = np.linalg.qr(rng.standard_normal((len(variances), d, d)))[0]
    roots = np.broadcast_to(axes * np.sqrt(variances)[:, None, :], (k, d, d))
    means = rng.standard_normal((k, d)) * 6 / (2 * d) ** 0.5
    labels = rng.integers(k, size=n)
    x = rng.standard_normal((n, d))
    for j in range(k):
        x[labels == j] = x[labels == j] @ roots[j].T + means[j]
    given = {"diag": variances, "spherical": variances[:, 0]}.get(family, roots @ roots.swapaxes(-1, -2))
    start = means + rng.standard_normal((k, d)) / d**0.5
    return {"x": x, "w": np.full(k, 1 / k), "m": start, "c": given[0] if family == "tied_full" else given}


class Bench:
    """The measurements, in a process of one library; each method returns seconds, or what its name says."""

    def __init__(self, case, dtype, data, threads, seconds, least):
        self.case, self.threads, self.seconds, self.least = case, threads, seconds, least
        self.x, self.w, self.m, self.c = (data[name].astype(dtype) for name in "xwmc")

    def median(self, function):
        """Return the median time of a call, after one that is not timed."""
        function()
        times, begun = [], time.perf_counter()
        while len(times) < self.least or time.perf_counter() - begun < self.seconds:
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def torch(self):
        """Return torch, and the problem as tensors."""
        import torch

        torch.set_num_threads(self.threads)
        return torch, *map(torch.from_numpy, (self.x, self.w, self.m, self.c))

    def layer(self):
        """Return a layer at the start, and the rows."""
        _, x, w, m, c = self.torch()
        from tgmm_nn import GaussianMixture

        start = {"init_weights": w, "init_means": m, "init_covariances": c}
        options = {"reg_covar": self.case.reg_covar, "tol": 0.0, "dtype": x.dtype, **start}
        return GaussianMixture(self.case.k, self.case.d, self.case.family, **options).set_parameters(w, m, c), x

    def ours(self):
        """Measure our iteration, step and density."""
        gmm, x = self.layer()

        def fit(n):
            gmm.max_iter, start = n, time.perf_counter()
            gmm.fit(x)
            return time.perf_counter() - start

        gmm.em_step(x)
        found = {"log-likelihood": float(gmm.em_step(x))}
        fit(1)
        n = 1 + min(max(int(self.seconds / fit(1)), 2), 50)
        pairs, begun = [], time.perf_counter()
        while len(pairs) < self.least or time.perf_counter() - begun < self.seconds:
            pairs.append((fit(n) - fit(1)) / (n - 1))
        found["iteration"] = statistics.median(pairs)
        found["em_step"] = self.median(lambda: gmm.em_step(x))
        import torch

        with torch.no_grad():
            found["density"] = self.median(lambda: gmm(x))
        return found

    def compiled(self):
        """Measure a compiled step."""
        gmm, x = self.layer()
        import torch

        step = torch.compile(gmm.em_step, fullgraph=True)
        return {"em_step": self.median(lambda: step(x))}

    def sklearn(self):
        """Measure scikit-learn's iteration."""
        from sklearn.mixture import GaussianMixture
        from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky

        family = self.case.family.removesuffix("_full") if self.case.family == "tied_full" else self.case.family
        model = GaussianMixture(self.case.k, covariance_type=family, reg_covar=self.case.reg_covar)
        model.weights_, model.means_, model.covariances_ = self.w, self.m, self.c
        model.precisions_cholesky_ = _compute_precision_cholesky(self.c, family)

        def step():
            log_likelihood, log_r = model._e_step(self.x)
            model._m_step(self.x, log_r)
            return float(log_likelihood)

        step()
        return {"log-likelihood": step(), "iteration": self.median(step)}

    def part(self, x):
        """Return as many rows as give 2²⁵ numbers times K times d, and by what to scale their time up."""
        rows = x[: max(2**25 // (self.case.k * self.case.d), self.case.k)]
        return rows, len(x) / len(rows)

    def tgmm(self):
        """Measure tgmm's iteration."""
        torch, x, w, m, c = self.torch()
        sys.modules.setdefault("seaborn", MagicMock())  # only its plots need it
        import tgmm

        rows, factor = self.part(x)
        start = {"init_weights": w, "init_means": m, "init_covariances": c, "reg_covar": self.case.reg_covar}
        shape = {"n_components": self.case.k, "n_features": self.case.d, "covariance_type": self.case.family}
        model = tgmm.GaussianMixture(**shape, **start, max_iter=1, device="cpu").fit(rows)
        with torch.no_grad():
            return {"iteration": factor * self.median(lambda: model._m_step(rows, model._e_step(rows)[0]))}

    def distributions(self):
        """Measure the density of torch.distributions."""
        torch, x, w, m, c = self.torch()
        from torch import distributions as td

        if self.case.family.endswith("full"):
            components = td.MultivariateNormal(m, c.expand(self.case.k, -1, -1))
        else:
            components = td.Independent(td.Normal(m, c.reshape(self.case.k, -1).sqrt()), 1)
        rows, factor = self.part(x)
        mixture = td.MixtureSameFamily(td.Categorical(w), components, validate_args=False)
        with torch.no_grad():
            return {"density": factor * self.median(lambda: mixture.log_prob(rows))}

    def product(self):
        """Measure the rate of matrix products, of 2048³ and of the case's own shape, by torch.mm and oneDNN."""
        torch, *_ = self.torch()
        width = 1 + self.case.d + (self.case.d * (self.case.d + 1) // 2 if self.case.family == "full" else self.case.d)
        n = min(max(1_200_000 // width, 256), 8192)
        rates = []
        for rows, inner, columns in ((n, width, self.case.k), (2048, 2048, 2048)):
            x, a = torch.randn(rows, inner), torch.randn(columns, inner)
            b = a.mT.contiguous()
            times = [self.median(lambda x=x, b=b: torch.mm(x, b))]
            if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                linear = torch.ops.mkldnn._linear_pointwise
                times.append(self.median(lambda x=x, a=a, f=linear: f(x, a, None, "none", [], "")))
            rates.append(2 * rows * inner * columns / min(times))
        return {"rate": max(rates)}


def main():
    """Measure what the arguments, one JSON object, ask for."""
    asked = json.loads(sys.argv[1])
    case = Case(*asked["case"])
    with np.load(asked["data"]) as data:
        bench = Bench(case, asked["dtype"], data, asked["threads"], asked["seconds"], asked["least"])
    warnings.filterwarnings("ignore")  # a few iterations do not converge
    print(json.dumps(getattr(bench, asked["library"])()))


if __name__ == "__main__":
    main()
