"""EMCallback under the trainer's settings: precision, limits, loaders, averaging, compiled parts, foreign modules."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from test_callback import assert_same_state, started
from torch.utils.data import DataLoader, IterableDataset
from toy import QUIET, Toy, loader, rows, state, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import EMCallback

pytestmark = QUIET

MODES = pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])


def constant(mode):
    """Options under which an update by hand needs no schedule."""
    return {"mode": mode, **({"step_size": 0.2} if mode == "minibatch" else {})}


def by_hand(gmm, seen, mode, epochs):
    """The updates of ``epochs`` epochs of the batches seen."""
    n = len(seen) // epochs
    for epoch in range(epochs):
        batches = seen[n * epoch : n * (epoch + 1)]
        for z in batches if mode == "minibatch" else [torch.cat(batches)]:
            gmm.em_step(z, step_size=0.2 if mode == "minibatch" else None)
    return gmm


def assert_near_state(gmm, other, tolerance=1e-6):
    expected = dict(other.named_buffers())
    sums = other.running_statistics().about(gmm.running_origin)  # few rows may be summed about another point
    expected |= {f"running_{name}": getattr(sums, name) for name in ("count", "first", "second", "origin")}
    for name, buffer in expected.items():
        torch.testing.assert_close(getattr(gmm, name), buffer, rtol=tolerance, atol=tolerance, equal_nan=True, msg=name)


# ---------------------------------------------------------------------------------------------- mixtures of others


class Outsider(BoringModel):
    """Lightning's own demo, as it is: nobody wrote it for us, and it has no mixture."""


def boring_loader():
    return DataLoader(RandomDataset(32, 64), batch_size=8)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_foreign_module_is_clustered_untouched_and_its_checkpoint_carries_the_mixture(tmp_path):
    def run(max_epochs, name, ckpt_path=None):
        torch.manual_seed(0)
        data = boring_loader()
        gmm = GaussianMixture(3, 2, random_state=0, reg_covar=1e-3)
        callback = EMCallback(gmm, "layer", name="clusters", step_size=0.1)
        checkpoint = ModelCheckpoint(tmp_path, filename=name, enable_version_counter=False)
        model = Outsider()
        trainer(checkpoint, callback, max_epochs=max_epochs, enable_checkpointing=True).fit(
            model, data, ckpt_path=ckpt_path, weights_only=True
        )
        assert model.clusters is gmm
        assert gmm.fitted_
        return gmm

    whole = run(4, "whole")
    run(2, "half")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert "clusters.means_" in saved
    resumed = run(4, "resumed", tmp_path / "half.ckpt")
    assert_same_state(state(whole), state(resumed))


def test_validation_of_a_checkpoint_finds_the_attached_mixture(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    gmm = GaussianMixture(3, 2, random_state=0)
    trainer(checkpoint, EMCallback(gmm, "layer"), max_epochs=1, enable_checkpointing=True).fit(
        Outsider(), boring_loader()
    )
    other = GaussianMixture(3, 2)
    run = trainer(checkpoint, EMCallback(other, "layer"), enable_checkpointing=True)
    run.validate(Outsider(), boring_loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert_same_state(state(gmm), state(other))


def test_a_name_that_is_taken_raises_and_the_same_mixture_may_be_attached_twice():
    with pytest.raises(ValueError, match="Expected `name` to be free in Toy, but 'encoder' is there already"):
        trainer(EMCallback(GaussianMixture(3, 2), name="encoder")).fit(Toy(), loader())
    callback, model = EMCallback(GaussianMixture(3, 2), name="mine"), Toy()
    for _ in range(2):
        trainer(callback, max_epochs=1).fit(model, loader())
    assert int(model.mine.n_updates) == 5  # the first epoch starts it


def test_attaching_moves_the_mixture_with_the_module_and_gives_it_no_part_in_training():
    gmm, model = GaussianMixture(3, 2, random_state=0), Toy()
    run = trainer(EMCallback(gmm, name="mine"), precision="64-true")
    run.fit(model.double(), loader(rows().double()))
    assert gmm.means_.dtype == torch.float64
    assert not any(name.startswith("mine") for name, _ in model.named_parameters())


# -------------------------------------------------------------------------------------------------------- precision


@MODES
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16-true", torch.float32), ("64-true", torch.float64)]
)
def test_the_mixture_keeps_its_precision_under_the_trainers(mode, precision, dtype):
    """The hook receives halves; the parameters stay at float32 or wider, the sums in float64."""
    model = started()
    x = rows().double() if precision == "64-true" else rows()
    model.training_step = lambda batch, batch_idx: seen(model, batch)
    twin = copy.deepcopy(model.gmm)
    twin = twin.double() if dtype == torch.float64 else twin
    trainer(EMCallback(**constant(mode)), precision=precision).fit(model, loader(x))
    assert model.gmm.means_.dtype == model.gmm.factor_.dtype == dtype
    assert model.gmm.running_second.dtype == torch.float64
    assert model.seen[0].dtype == (torch.float64 if precision == "64-true" else torch.bfloat16)
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, 2), 1e-5)


def seen(model, batch):
    z = model.encoder(batch[0])
    model.seen.append(z.detach().clone())
    return (z.float() - 1).square().mean() - 0.01 * model.gmm(z).mean()


# ----------------------------------------------------------------------------------------------- limits and loaders


@MODES
@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"fast_dev_run": True, "max_epochs": 1},
        {"val_check_interval": 2},
        {"val_check_interval": 0.4},
        {"limit_train_batches": 0.5},
        {"reload_dataloaders_every_n_epochs": 1},
    ],
    ids=str,
)
def test_limits_of_the_trainer_end_an_epoch_where_it_ends(mode, options):
    model = started(dtype="float64")
    twin = copy.deepcopy(model.gmm)
    trainer(EMCallback(**constant(mode)), **options).fit(model, loader(), loader())
    epochs = options.get("max_epochs", 2)
    assert len(model.seen) in (6, 1, 10, 4)
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, epochs))


class Endless(IterableDataset):
    """A stream whose length nobody knows."""

    def __iter__(self):
        yield from rows()


@MODES
@pytest.mark.parametrize(
    "data",
    [
        lambda: DataLoader(Endless(), batch_size=10, collate_fn=lambda x: (torch.stack(x),)),
        lambda: loader(num_workers=1, persistent_workers=True),
    ],
    ids=["iterable dataset", "persistent workers"],
)
def test_streams_and_workers_give_the_updates_that_rows_in_memory_give(mode, data):
    model = started(dtype="float64")
    twin = copy.deepcopy(model.gmm)
    trainer(EMCallback(**constant(mode)), max_epochs=3).fit(model, data())
    assert len(model.seen) == 15
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, 3))


def test_early_stopping_may_monitor_what_is_logged_from_the_first_epoch():
    stop = EarlyStopping("em/log_likelihood", mode="max", patience=1, min_delta=100.0)
    run = trainer(EMCallback(start_epoch=1, mode="full"), stop, max_epochs=9)
    run.fit(Toy(), loader())
    assert 1 <= run.current_epoch < 9


# ------------------------------------------------------------------------------------------------------- averaging


def test_averaging_that_would_average_the_mixture_is_refused():
    with pytest.raises(ValueError, match="Expected WeightAveraging with use_buffers=False beside EMCallback"):
        trainer(EMCallback(), WeightAveraging()).fit(started(), loader())
    with pytest.raises(ValueError, match="Expected EMCallback before WeightAveraging"):
        trainer(WeightAveraging(use_buffers=False), EMCallback()).fit(started(), loader())


@MODES
def test_averaging_of_parameters_alone_leaves_the_mixture_exact(mode):
    model = started(dtype="float64")
    twin = copy.deepcopy(model.gmm)
    average = WeightAveraging(use_buffers=False)
    checked = []

    class Compare(lightning.Callback):
        def on_validation_epoch_start(self, run, pl_module):
            checked.append(state(pl_module.gmm))  # of the averaged model, which is swapped in

    trainer(EMCallback(**constant(mode)), average, Compare()).fit(model, loader(), loader())
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, 2))
    assert_same_state(checked[-1], state(model.gmm))


# -------------------------------------------------------------------------------------------------- compiled parts


@pytest.mark.no_cover
@MODES
def test_a_compiled_submodule_gives_its_rows(mode):
    torch._dynamo.reset()
    model = started(dtype="float64")
    twin = copy.deepcopy(model.gmm)
    model.encoder = torch.compile(model.encoder, backend="aot_eager")
    trainer(EMCallback(**constant(mode)), max_epochs=1).fit(model, loader(batch_size=11))
    assert len(model.seen) == 4
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, 1))


# ------------------------------------------------------------------------------------------ manual optimization


class ByHand(Toy):
    """Two optimizer steps in every batch, as adversarial training makes them."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            z = self.encoder(batch[0])
            optimizer.zero_grad()
            self.manual_backward((z - 1).square().mean())
            optimizer.step()
        self.seen.append(z.detach().clone())
        return {"z": z}


@MODES
def test_optimizers_that_step_by_hand_make_one_update_for_each_batch(mode):
    model = ByHand()
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    twin = copy.deepcopy(model.gmm)
    trainer(EMCallback(embeddings="outputs:z", **constant(mode))).fit(model, loader())
    assert_near_state(model.gmm, by_hand(twin, model.seen, mode, 2))


def test_nothing_that_arrives_in_the_first_step_is_told_of_also_where_the_mixture_is_fitted():
    with pytest.raises(RuntimeError, match="embeddings='idle' to give rows in every training step"):
        trainer(EMCallback(embeddings="idle")).fit(started(), loader())
