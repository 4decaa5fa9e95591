"""EM over several processes with plain ``torch.distributed``: `em_step` adds the sums of all ranks before it updates.

torchrun --nproc-per-node=2 examples/em_on_ranks.py
python examples/em_on_ranks.py                       # one process: the same mixture
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

from tgmm_nn import GaussianMixture


def main():
    """Fit the digits, of which each rank holds its share of rows, and say how likely they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=3, help="minibatch steps after these")
    parser.add_argument("--save", help="file for the fitted mixture")
    arguments = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # torchrun sets it
    dist.init_process_group("gloo", **alone)
    rank, n_ranks = dist.get_rank(), dist.get_world_size()

    x = torch.from_numpy(load_digits().data).float() / 16
    mine = x.tensor_split(n_ranks)[rank]  # uneven shares are fine, also none at all
    gmm = GaussianMixture(10, 64, "diag", reg_covar=1e-2, random_state=0)
    gmm.initialize(mine)  # the start of all rows, the same on each rank

    for step in range(arguments.steps):
        log_likelihood = gmm.em_step(mine)  # of the rows of all ranks, the same number on each
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: {float(log_likelihood):.3f} nats per row")
    for batch in mine.split(100)[: arguments.batches]:  # minibatch EM: each rank has to make the same number of steps
        gmm.em_step(batch, step_size=0.1)
    if rank == 0:
        print(f"{n_ranks} ranks, {len(mine)} rows on rank 0, weights {[round(w, 3) for w in gmm.weights_.tolist()]}")
        if arguments.save:
            gmm.save(arguments.save)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
