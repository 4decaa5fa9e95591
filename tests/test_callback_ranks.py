"""EM in training on two and three ranks: at every step they hold one mixture, that of one process with all rows."""

import lightning
import pytest
import torch
from toy import QUIET, Toy, rows, state, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import EMCallback

pytestmark = [*QUIET, pytest.mark.no_cover]

WAYS = {
    "minibatch": {},
    "minibatch, constant": {"step_size": 0.2},
    "minibatch, every other step": {"every_n_steps": 2},
    "minibatch, sinkhorn": {"assignment": "sinkhorn", "epsilon": 0.5},
    "minibatch, hard": {"assignment": "hard"},
    "minibatch, annealed": {"assignment": "soft", "temperature": 4.0, "temperature_epochs": 2},
    "minibatch, frozen": {"update": ["weights", "means"], "frozen_components": [1]},
    "minibatch, health": {"min_weight": 0.25, "patience": 1, "step_size": 0.5},
    "accumulate": {"mode": "accumulate"},
    "accumulate, three steps": {"mode": "accumulate", "every_n_steps": 3},
    "accumulate, sinkhorn": {"mode": "accumulate", "assignment": "sinkhorn", "marginals": "weights"},
    "full": {"mode": "full", "n_iterations": 3},
    "full, to convergence": {"mode": "full", "n_iterations": 50, "tol": 1e-3},
    "full, sinkhorn": {"mode": "full", "assignment": "sinkhorn"},
    "full, newest rows": {"mode": "full", "bank_size": 17, "every_n_steps": 1},
    "full, newest rows of each": {"mode": "full", "bank_size": 18, "bank_per_component": True, "min_fill": 5},
    "full, refit": {"mode": "full", "refit": True, "n_iterations": 5},
    "full, encoded anew": {"mode": "full", "refresh": True},
}


class Parts:
    """Batches of 10 rows; rank r of n reads rows ``cuts[r]`` to ``cuts[r + 1]`` of each, one process reads them all."""

    def __init__(self, x, cuts):
        self.x, self.cuts = x, cuts

    def __iter__(self):
        grouped = torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if grouped else 0
        first, end = (self.cuts[rank], self.cuts[rank + 1]) if grouped else (0, 10)
        for batch in self.x.split(10):
            yield (batch[first:end],)

    def __len__(self):
        return 4


CUTS = {2: (0, 6, 10), 3: (0, 7, 7, 10)}  # of three ranks the second has no rows at all


class Frozen(Toy):
    """The encoder stands still, also where rows are not finite, so that ranks and one process see the same rows."""

    def __init__(self, **options):
        super().__init__(learning_rate=0.0, dtype="float64", **options)

    def training_step(self, batch, batch_idx):
        self.encoder(batch[0])
        return sum(p.square().sum() for p in self.encoder.parameters())

    def predict_step(self, batch, batch_idx):
        return self.encoder(batch[0])


class Record(lightning.Callback):
    """Write down each rank's buffers after every batch, before a broadcast hides a difference, and what is logged."""

    def __init__(self, folder):
        self.folder, self.states = folder, []

    def on_train_batch_end(self, run, pl_module, *args):
        self.states.append(state(pl_module.gmm))

    def on_train_end(self, run, pl_module):
        logged = {name: value.clone() for name, value in run.callback_metrics.items()}
        torch.save({"states": self.states, "logged": logged}, self.folder / f"{run.world_size}-{run.global_rank}.pt")


def run(folder, x, devices, *, fitted=True, accumulate=1, **options):
    """Train; return what each rank wrote down."""
    torch.manual_seed(0)
    model = Frozen()
    if fitted:
        model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    how = {"devices": devices, "accumulate_grad_batches": accumulate}
    if devices > 1:
        how |= {"strategy": "ddp_fork", "use_distributed_sampler": False}
    loader = Parts(x, CUTS.get(devices))
    trainer(EMCallback(**options), Record(folder), **how).fit(model, loader)
    return [torch.load(folder / f"{devices}-{rank}.pt", weights_only=True) for rank in range(devices)]


def assert_ranks_are_one_process(folder, x, devices, **options):
    (one,), ranks = run(folder, x, 1, **options), run(folder, x, devices, **options)
    for rank in ranks:
        assert len(rank["states"]) == len(one["states"])
        for step, (state_here, state_there) in enumerate(zip(rank["states"], ranks[0]["states"], strict=True)):
            for name, value in state_here.items():
                note = f"{name} in step {step}"
                torch.testing.assert_close(value, state_there[name], rtol=0, atol=0, equal_nan=True, msg=note)
                torch.testing.assert_close(
                    value, one["states"][step][name], rtol=1e-8, atol=1e-8, equal_nan=True, msg=note
                )
        assert rank["logged"].keys() == one["logged"].keys()
        for name, value in rank["logged"].items():
            torch.testing.assert_close(value, one["logged"][name], rtol=1e-5, atol=1e-5, msg=name)
    return one


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_ranks_hold_the_mixture_of_one_process_at_every_step(way, devices, tmp_path):
    """Uneven shares of rows, and with three ranks one that has none."""
    one = assert_ranks_are_one_process(tmp_path, rows(40), devices, **WAYS[way])
    assert not torch.equal(one["states"][-1]["means_"], one["states"][0]["means_"])


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("way", ["minibatch", "accumulate", "full", "minibatch, sinkhorn"])
def test_accumulated_batches_and_rows_that_are_not_finite_neither_hang_nor_part_the_ranks(way, devices, tmp_path):
    x = rows(40)
    x[[3, 8, 17, 29]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan])[:, None]
    one = assert_ranks_are_one_process(tmp_path, x, devices, accumulate=2, **WAYS[way])
    assert int(one["states"][-1]["n_skipped"]) == 8


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("options", [{}, {"init_samples": 25}, {"init": "fit"}, {"mode": "full"}], ids=str)
def test_a_fresh_mixture_starts_alike_on_any_number_of_ranks(options, devices, tmp_path):
    """The gathered rows come in another order than in one process."""
    one = assert_ranks_are_one_process(tmp_path, rows(40), devices, fitted=False, **options)
    assert bool(one["states"][-1]["fitted"])


class OtherSeeds(Record):
    """Rank one draws from another seed, as it does where nobody seeds everything."""

    def on_train_start(self, run, pl_module):
        torch.manual_seed(run.global_rank + 5)


def test_ranks_with_seeds_of_their_own_start_alike(tmp_path):
    """The start of rank zero is broadcast; before any further step."""
    model = Frozen()
    model.gmm = GaussianMixture(3, 2, init_means="random", reg_covar=0.1)
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 1}
    trainer(OtherSeeds(tmp_path), EMCallback(), Record(tmp_path), **options).fit(model, Parts(rows(40), CUTS[2]))
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)["states"][-1] for rank in (0, 1))
    assert bool(first["fitted"])
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", ["minibatch", "accumulate", "full, newest rows"])
def test_a_row_that_is_not_finite_on_one_rank_raises_on_all(way, tmp_path):
    x = rows(40)
    x[9] = torch.nan  # of the second rank alone; the first must not wait for it
    with pytest.raises(Exception, match="Expected finite rows, with on_nonfinite='raise', but got 1 over all ranks"):
        run(tmp_path, x, 2, on_nonfinite="raise", **WAYS[way])


def test_a_reservoir_over_ranks_holds_as_many_rows_as_it_should_and_moves_all_alike(tmp_path):
    ranks = run(tmp_path, rows(40), 2, mode="full", bank_size=12, bank_policy="reservoir", every_n_steps=1)
    for one, other in zip(*(rank["states"] for rank in ranks), strict=True):
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)
    counts = [float(one["running_count"].sum()) for one in ranks[0]["states"]]
    assert counts == pytest.approx([10.0] + [12.0] * 7)


def test_the_density_in_the_loss_under_ddp_and_accumulation(tmp_path):
    """Gradients are averaged over equal shares of rows: the encoder goes the way that it would in one process."""
    weights = {}
    for devices in (1, 2):
        torch.manual_seed(0)
        model = Toy(density_weight=0.1, learning_rate=0.02)
        model.gmm = GaussianMixture(3, 2, reg_covar=0.1, random_state=0)
        model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
        loader = Parts(rows(40), (0, 5, 10))
        how = {"devices": devices, "accumulate_grad_batches": 2}
        if devices > 1:
            how |= {"strategy": "ddp_fork", "use_distributed_sampler": False}
        keep = Keep(tmp_path / f"{devices}.pt")
        trainer(EMCallback(step_size=0.2), keep, **how).fit(model, loader)
        weights[devices] = torch.load(tmp_path / f"{devices}.pt", weights_only=True)
    torch.testing.assert_close(weights[1], weights[2], rtol=1e-5, atol=1e-5, equal_nan=True)


class Keep(lightning.Callback):
    """Write rank zero's module down at the end."""

    def __init__(self, file):
        self.file = file

    def on_train_end(self, run, pl_module):
        if run.is_global_zero:
            torch.save(
                {name: value for name, value in pl_module.state_dict().items() if "extra" not in name}, self.file
            )


@pytest.mark.slow
def test_spawned_ranks_can_be_pickled_and_agree(tmp_path):
    model = Frozen()
    options = {"devices": 2, "strategy": "ddp_spawn", "use_distributed_sampler": False}
    trainer(EMCallback(GaussianMixture(3, 2), name="other", mode="full"), Record(tmp_path), **options).fit(
        model, Parts(rows(40), CUTS[2])
    )
    ranks = [torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["logged"] == ranks[1]["logged"]
