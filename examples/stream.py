"""Minibatch EM on a stream: each batch is seen once, and what its share in the running sums should be.

python examples/stream.py
"""

import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.schedules import PolynomialDecay

CENTRES = torch.tensor([[-4.0, 0.0], [4.0, 0.0], [0.0, 5.0]])


def stream(n_batches, drift, seed):
    """Yield batches of 64 rows of three clusters that move by `drift` to the right in each, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(n_batches):
        centres = CENTRES + torch.tensor([drift * t, 0.0])
        clusters = torch.randint(3, (64,), generator=generator)
        yield centres[clusters] + torch.randn(64, 2, generator=generator), centres


def follow(step_sizes, drift, n_batches=400):
    """Return the mean distance of a mixture's means to the centres, over the last 100 batches."""
    batches = stream(n_batches, drift, seed=0)
    first, _ = next(batches)
    gmm = GaussianMixture(3, 2, random_state=0).fit(first)  # a start: a fresh mixture has equal components
    distances = []
    for t, (x, centres) in enumerate(batches):
        if t % 50 == 0:
            x[0] = torch.nan  # a broken row costs nothing: it is left out, and counted
        gmm.em_step(x, step_size=step_sizes(t))
        distances.append(torch.cdist(centres, gmm.means_).amin(-1).mean())
    return torch.stack(distances[-100:]).mean(), int(gmm.n_skipped)


schedules = {
    "1: this batch alone": lambda t: 1.0,
    "0.2": lambda t: 0.2,
    "0.02": lambda t: 0.02,
    "(t + 2)^-0.6": PolynomialDecay(decay=0.6, offset=2.0),
    "1 / (t + 2): all batches alike": PolynomialDecay(decay=1.0, offset=2.0),
}
print(
    "distance of means to centres, in standard deviations of a cluster, over the last 100 of 400 batches of 64 rows\n"
)
print("share of a batch                  clusters rest   clusters move")
for name, step_sizes in schedules.items():
    (resting, skipped), (moving, _) = follow(step_sizes, 0.0), follow(step_sizes, 0.02)
    print(f"{name:32} {resting:14.3f} {moving:15.3f}")
print(f"\n{skipped} rows were not finite, and were left out. A small share averages more rows and follows less: let it")
print("fall where clusters rest, as (t + t0)^-κ with κ in (0.5, 1], and keep it constant where they move.")
