"""Full-data EM over processes on a folder of .npy shards, which no process holds in memory; resumes after a kill.

python examples/fit_distributed.py                                                        # writes shards; one process
torchrun --nproc-per-node=2 examples/fit_distributed.py --checkpoint two.pt               # the same mixture
torchrun --nproc-per-node=2 examples/fit_distributed.py --checkpoint other.pt --trainer   # the same, within Lightning

Each iteration writes the checkpoint. Where it is there, EM goes on from it: delete it, or name another, to begin anew.
"""

import argparse
import os
from pathlib import Path

import lightning
import numpy as np
import torch
import torch.distributed as dist

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import EMCallback


def make(folder, n_shards=5, n_features=4):
    """Write shards of unequal length, of three clusters."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(n_shards):
        clusters = generator.choice(3, size=400 + 150 * number, p=[0.5, 0.3, 0.2])
        x = 4 * np.eye(3, n_features)[clusters] + generator.normal(size=(len(clusters), n_features))
        np.save(folder / f"{number:03}.npy", x.astype(np.float32))


class Shards:
    """Rows of this rank's share of files, batch by batch; each rank gives as many batches, the last of them empty."""

    def __init__(self, files, rank, n_ranks, batch_size):
        shares = [[np.load(file, mmap_mode="r") for file in files[r::n_ranks]] for r in range(n_ranks)]
        self.mine, self.none, self.batch_size = shares[rank], shares[0][0][:0], batch_size
        self.n_batches = max(sum(-(-len(x) // batch_size) for x in share) for share in shares)

    def __len__(self):
        return self.n_batches

    def __iter__(self):
        batches = [(x, start) for x in self.mine for start in range(0, len(x), self.batch_size)]
        for x, start in batches + [(self.none, 0)] * (len(self) - len(batches)):
            yield torch.from_numpy(np.array(x[start : start + self.batch_size]))


def save(gmm, file):
    """Write a checkpoint, whole or not at all: who is killed while writing leaves the one before."""
    if dist.get_rank() == 0:
        gmm.save(file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
        means = [round(mean, 4) for mean in gmm.means_[:, 0].tolist()]
        print(f"iteration {int(gmm.n_updates)}, first feature of the means {means}", flush=True)


class Embedded(lightning.LightningModule):
    """Stands for a network: its embeddings are the rows themselves, and it has one parameter, which learns nothing."""

    def __init__(self, gmm, file):
        super().__init__()
        self.gmm, self.file, self.nothing = gmm, file, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, x, batch_idx):
        """Return the rows for EM, and a loss that moves nothing."""
        return {"loss": 0.0 * self.nothing, "x": x}

    def on_train_epoch_end(self):
        """Write a checkpoint: an epoch is an iteration."""
        save(self.gmm, self.file)

    def configure_optimizers(self):
        """Give the trainer its steps."""
        return torch.optim.SGD([self.nothing], lr=0.0)


def main():
    """Start or resume, and iterate EM on all rows of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("shards"), help="of .npy files, shape (n, d)")
    parser.add_argument("--make", action="store_true", help="write shards first; done anyhow where there are none")
    parser.add_argument("--components", type=int, help="3, or as many as the checkpoint has")
    parser.add_argument("--iterations", type=int, default=10, help="in all, those of the checkpoint included")
    parser.add_argument("--batch-size", type=int, default=256, help="rows that a process reads at once")
    parser.add_argument("--checkpoint", type=Path, default=Path("mixture.pt"), help="file to write, and to go on from")
    parser.add_argument("--trainer", action="store_true", help="let EMCallback make an iteration in each epoch")
    arguments = parser.parse_args()
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # torchrun sets it
    dist.init_process_group("gloo", **alone)
    if dist.get_rank() == 0 and (arguments.make or not any(arguments.folder.glob("*.npy"))):
        make(arguments.folder)
    dist.barrier()

    files = sorted(arguments.folder.glob("*.npy"))
    shards = Shards(files, dist.get_rank(), dist.get_world_size(), arguments.batch_size)
    if arguments.checkpoint.exists():
        gmm = GaussianMixture.load(arguments.checkpoint)
        if (arguments.components or gmm.n_components, shards.none.shape[1]) != (gmm.n_components, gmm.n_features):
            parser.error(
                f"{arguments.checkpoint} is a mixture of {gmm.n_components} components in {gmm.n_features} features, "
                "which are not those that were asked for: delete it, or name another by --checkpoint"
            )
        if dist.get_rank() == 0:
            print(f"goes on from {arguments.checkpoint}: {int(gmm.n_updates)} iterations of {arguments.iterations}")
    else:
        gmm = GaussianMixture(arguments.components or 3, shards.none.shape[1], random_state=0).initialize(shards)
    left = arguments.iterations - int(gmm.n_updates)
    if not arguments.trainer:
        for _ in range(left):
            gmm.update(gmm.statistics(shards).over_ranks())  # an E-step on this rank's rows, an M-step of all
            save(gmm, arguments.checkpoint)
    elif left > 0:
        # Exact EM on the sums of all steps, an iteration in each epoch.
        callback = EMCallback(module="gmm", embeddings="outputs:x", mode="accumulate")
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        how = {"accelerator": "cpu", "devices": dist.get_world_size(), "strategy": "ddp", **quiet}
        trainer = lightning.Trainer(max_epochs=left, callbacks=callback, **how)
        trainer.fit(Embedded(gmm, arguments.checkpoint), shards)
    if dist.get_rank() == 0:
        weights = [round(weight, 3) for weight in gmm.weights_.tolist()]
        print(f"{dist.get_world_size()} processes, {len(files)} shards, weights {weights}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
