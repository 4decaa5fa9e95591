"""EM over two processes is EM of one process that has all rows."""

import datetime
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracles import assert_near, random_layer
from torch import multiprocessing

from tgmm_nn import GaussianMixture
from tgmm_nn.distributed import broadcast_from_rank_zero, is_distributed, sum_over_ranks

ROOT = Path(__file__).parents[1]
FORK_IS_WANTED = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SECONDS = 60


def in_group(rank, function, folder):
    """Run ``function(rank)`` in a world of two and write down what it returns."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    try:
        torch.save(function(rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(function, folder):
    """Return what ``function(rank)`` gives on each of two ranks."""
    ranks = multiprocessing.start_processes(in_group, (function, folder), nprocs=2, join=False, start_method="fork")
    try:
        for _ in range(2):  # returns when the first rank ends, and true when all have
            ranks.join(timeout=SECONDS)
        assert not any(process.is_alive() for process in ranks.processes)
    finally:
        for process in ranks.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def rows(generator):
    x = 2 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
    x[3] = torch.nan
    return x


def steps(layer, parts):
    """Make an exact and two minibatch steps; return the buffers and the log-likelihoods."""
    gmm = layer()
    values = [gmm.em_step(part, step_size=rho) for part, rho in zip(parts, (None, 0.5, 0.3), strict=True)]
    return {"values": torch.stack(values), **dict(gmm.named_buffers())}


PRIORS = {"mean_prior": 1.0, "mean_precision_prior": 3.0, "covariance_prior": 2.0, "degrees_of_freedom_prior": 4.0}


@FORK_IS_WANTED
@pytest.mark.parametrize("options", [{}, {"weight_concentration_prior": 2.0, **PRIORS}, {"cem": True}], ids=len)
def test_em_step_on_two_ranks_is_em_step_on_all_rows(family, options, generator, tmp_path):
    """Ranks hold uneven shares, one of them nothing in the last step; priors enter once, not once for each rank."""
    mixture_seed = generator.get_state()
    layer = lambda: random_layer(family, torch.Generator().set_state(mixture_seed), **options)  # noqa: E731
    x = rows(torch.Generator().manual_seed(1))
    whole = [x, x[:20], x[20:]]
    parts = ([x[:13], x[:2], x[20:]], [x[13:], x[2:20], x[:0]])
    ranks = on_two_ranks(partial(_steps_of_rank, layer, parts), tmp_path)
    alone = steps(layer, whole)
    for rank in ranks:
        assert rank.keys() == alone.keys()
        for name, value in rank.items():
            torch.testing.assert_close(
                value, alone[name], rtol=1e-12, atol=1e-12, equal_nan=True, msg=f"{name} differs"
            )
    for name, value in ranks[0].items():
        torch.testing.assert_close(value, ranks[1][name], rtol=0, atol=0, equal_nan=True)


def _steps_of_rank(layer, parts, rank):
    return steps(layer, parts[rank])


@FORK_IS_WANTED
def test_ranks_of_few_and_of_fewer_rows_have_one_reference_point(family, tmp_path):
    """Also where alone each would sum about another: 40 rows, 3, and 40 of which one is not finite."""
    seed = torch.Generator().manual_seed(0).get_state()
    layer = lambda: random_layer(family, torch.Generator().set_state(seed), dtype=torch.float32)  # noqa: E731
    x = rows(torch.Generator().manual_seed(1)).float().nan_to_num()
    broken = x.index_fill(0, torch.tensor([7]), torch.nan)
    parts = ([x[:40], x[:40], x[:3]], [x[40:43], broken[:40], broken[:40]])
    whole = [torch.cat(batch) for batch in zip(*parts, strict=True)]
    ranks, alone = on_two_ranks(partial(_steps_of_rank, layer, parts), tmp_path), steps(layer, whole)
    for name in ("values", "weights_", "means_", "factor_", "n_skipped"):
        torch.testing.assert_close(ranks[0][name], alone[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(ranks[0][name], ranks[1][name])


@FORK_IS_WANTED
def test_without_sync_each_rank_goes_its_own_way(generator, tmp_path):
    layer = partial(random_layer, "diag", generator)
    x = rows(torch.Generator().manual_seed(1))

    def step(rank):
        gmm = layer()
        gmm.em_step(x[rank::2], sync=False)
        return gmm.means_

    ranks = on_two_ranks(step, tmp_path)
    assert not torch.equal(*ranks)


@FORK_IS_WANTED
def test_sums_and_broadcasts_over_ranks(tmp_path):
    def talk(rank):
        assert is_distributed()
        mine = torch.tensor([1.0, 10.0]) * (rank + 1)
        total = sum_over_ranks(mine)
        assert torch.equal(mine, torch.tensor([1.0, 10.0]) * (rank + 1))  # the message is not overwritten
        broadcast_from_rank_zero([mine])
        return total, mine

    for total, said in on_two_ranks(talk, tmp_path):
        assert_near((total, said), (torch.tensor([3.0, 30.0]), torch.tensor([1.0, 10.0])))


@FORK_IS_WANTED
def test_sinkhorn_balances_the_rows_of_all_ranks_together(generator, tmp_path):
    """One rank has a third of the rows, and another weight; alone it would balance to other shares."""
    gmm = random_layer("full", generator)
    x = rows(generator)
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    whole = gmm.sinkhorn(x, weight, n_iterations=40)

    def balance(rank):
        part = slice(0, 17) if rank == 0 else slice(17, 50)
        return gmm.sinkhorn(x[part], weight[part], n_iterations=40).offset

    for offset in on_two_ranks(balance, tmp_path):
        assert_near(offset, whole.offset, 1e-10)


def test_alone_there_is_nothing_to_do():
    x = torch.ones(3)
    assert not is_distributed()
    assert sum_over_ranks(x) is x
    broadcast_from_rank_zero([x])
    assert torch.equal(x, torch.ones(3))


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_the_example_gives_under_torchrun_what_it_gives_in_one_process(n_ranks, tmp_path):
    """Plain torch.distributed, without Lightning: uneven shares of the rows, exact steps; and all ranks end."""
    script = [str(ROOT / "examples" / "em_on_ranks.py"), "--steps", "8", "--save"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    how = {"env": environment, "capture_output": True, "text": True, "timeout": 120}
    together = subprocess.run([*ranks, *script, str(tmp_path / "ranks.pt"), "--batches", "0"], check=True, **how)
    alone = subprocess.run([sys.executable, *script, str(tmp_path / "one.pt"), "--batches", "0"], check=True, **how)
    assert f"{n_ranks} ranks, {-(-1797 // n_ranks)} rows on rank 0" in together.stdout
    assert alone.stdout.splitlines()[:2] == together.stdout.splitlines()[:2]
    one, several = (GaussianMixture.load(tmp_path / f"{name}.pt") for name in ("one", "ranks"))
    assert int(one.n_updates) == 8
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(getattr(several, name), buffer, rtol=1e-4, atol=1e-4, equal_nan=True, msg=name)
