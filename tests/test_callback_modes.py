"""What each mode of the callback makes of the rows. Oracle: the same EM steps made by hand."""

import copy
import re
from pathlib import Path

import lightning
import lightning.pytorch.demos.boring_classes
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_callback import assert_same_state, started
from torch.utils.data import DataLoader, TensorDataset
from toy import QUIET, Toy, loader, rows, state, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.assignment import HARD, Assignment
from tgmm_nn.lightning import ClusterMetricsCallback, EMCallback, LatentPlotCallback
from tgmm_nn.lightning.assigning import Assigning
from tgmm_nn.lightning.batch import Batch
from tgmm_nn.lightning.learner import Learner
from tgmm_nn.lightning.schedule import Schedule
from tgmm_nn.maximization import Learned

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Sparse invariant checks")]


def assert_near_state(gmm, by_hand, tolerance=1e-6):
    for name, buffer in by_hand.named_buffers():
        torch.testing.assert_close(
            getattr(gmm, name),
            buffer,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# ------------------------------------------------------------------------------------------------- accumulate


def test_accumulated_statistics_of_an_epoch_are_one_exact_step_on_its_rows():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="accumulate")).fit(model, loader())
    for epoch in (0, 1):
        by_hand.em_step(torch.cat(model.seen[5 * epoch : 5 * epoch + 5]))
    assert_near_state(model.gmm, by_hand)
    assert int(model.gmm.n_updates) == 2


def test_a_window_of_steps_ends_at_every_so_many_steps_and_with_the_epoch():
    """Of 5 steps in an epoch: steps 1 to 3, 4 and 5 | 6, 7 to 9, 10."""
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="accumulate", every_n_steps=3)).fit(model, loader())
    for first, end in ((0, 3), (3, 5), (5, 6), (6, 9), (9, 10)):
        by_hand.em_step(torch.cat(model.seen[first:end]))
    assert_near_state(model.gmm, by_hand)


@pytest.mark.parametrize("mode", ["accumulate", "full"])
def test_a_step_size_blends_the_sums_of_an_epoch_into_the_running_ones(mode):
    """Momentum, as GMMSeg has it."""
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode=mode, step_size=0.3)).fit(model, loader())
    for epoch in (0, 1):
        by_hand.em_step(torch.cat(model.seen[5 * epoch : 5 * epoch + 5]), step_size=0.3)
    assert_near_state(model.gmm, by_hand)


@pytest.mark.parametrize("mode", ["accumulate", "full"])
def test_rows_that_came_before_the_start_count_in_the_epochs_update(mode):
    model = Toy()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode=mode, init_samples=25), max_epochs=1).fit(model, loader())
    by_hand.initialize(torch.cat(model.seen[:3]))
    by_hand.em_step(torch.cat(model.seen))
    assert_near_state(model.gmm, by_hand)


@pytest.mark.parametrize("mode", ["accumulate", "full"])
def test_training_that_ends_by_max_steps_uses_what_its_last_epoch_has(mode):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    run = trainer(EMCallback(mode=mode), max_epochs=-1, max_steps=8)
    run.fit(model, loader())
    by_hand.em_step(torch.cat(model.seen[:5]))
    by_hand.em_step(torch.cat(model.seen[5:8]))
    assert_near_state(model.gmm, by_hand)
    assert torch.isfinite(run.callback_metrics["em/log_likelihood"])


# -------------------------------------------------------------------------------------------------------- full


def test_a_bank_of_a_size_goes_on_from_epoch_to_epoch():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="full", bank_size=60, n_iterations=2)).fit(model, loader())
    for end in (5, 10):
        bank = torch.cat(model.seen[:end])[-60:]
        for _ in range(2):
            by_hand.em_step(bank)
    assert_near_state(model.gmm, by_hand)


def test_updates_wait_for_a_bank_that_is_full_enough():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="full", bank_size=40, min_fill=30, every_n_steps=1), max_epochs=1).fit(model, loader())
    for end in (3, 4, 5):
        by_hand.em_step(torch.cat(model.seen[:end])[-40:])
    assert_near_state(model.gmm, by_hand)


def test_a_bank_for_each_component_keeps_rows_of_the_rare_ones():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    options = {"bank_size": 12, "bank_per_component": True, "every_n_steps": 1}
    trainer(EMCallback(mode="full", **options), max_epochs=1).fit(model, loader())
    kept = [torch.empty(0, 2)] * 3
    for z in model.seen:
        labels = by_hand.predict(z)
        kept = [torch.cat([old, z[labels == k]])[-4:] for k, old in enumerate(kept)]
        by_hand.em_step(torch.cat(kept))
    assert_near_state(model.gmm, by_hand, 1e-5)


def test_iterations_stop_where_the_likelihood_settles():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="full", n_iterations=100, tol=1e-3), max_epochs=1).fit(model, loader())
    values, z = [], torch.cat(model.seen)
    while len(values) < 2 or abs(values[-1] - values[-2]) >= 1e-3:
        values.append(float(by_hand.em_step(z)))
    assert 2 < len(values) < 100
    assert int(model.gmm.n_updates) == len(values)
    assert_near_state(model.gmm, by_hand)


def test_a_refit_starts_anew_and_keeps_the_indices_of_components():
    """DeepDPM-like refits. k-means numbers its centres by chance; the mixture before says which is which."""
    model = Toy(learning_rate=0.0, reg_covar=1e-3)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    generator = torch.Generator().manual_seed(3)
    z = centres.repeat(20, 1) + 0.3 * torch.randn(60, 2, generator=generator)
    model.encoder = torch.nn.Identity()
    model.training_step = lambda batch, batch_idx: model.encoder(batch[0]).sum() + 0 * model.head.weight.sum()
    model.head = torch.nn.Linear(1, 1)
    model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.0)
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        model.gmm.set_parameters([0.2, 0.3, 0.5], centres[order] + 1.0, 4 * torch.eye(2).expand(3, 2, 2))
        run = trainer(EMCallback(mode="full", refit=True, n_iterations=20, tol=1e-6), max_epochs=1)
        run.fit(model, loader(z))
        torch.testing.assert_close(model.gmm.means_, centres[order], rtol=0, atol=0.3)
        torch.testing.assert_close(model.gmm.weights_, torch.full((3,), 1 / 3), rtol=1e-4, atol=1e-4)
        assert run.callback_metrics["em/moved"] > 0.3
    updates = int(model.gmm.n_updates)
    fresh = copy.deepcopy(model.gmm).initialize(z)
    for _ in range(updates):
        fresh.em_step(z)
    assert updates > 1
    torch.testing.assert_close(fresh(z).mean(), model.gmm(z).mean(), rtol=1e-4, atol=1e-4)


class Dropout(Toy):
    """Rows of training pass through dropout, others do not; and predict_step takes whole batches."""

    def __init__(self, **options):
        super().__init__(**options)
        self.encoder = torch.nn.Sequential(self.encoder, torch.nn.Dropout(0.5))

    def predict_step(self, batch, batch_idx):
        return {"z": self.encoder(batch[0])}


@pytest.mark.parametrize("embeddings", ["encoder", "outputs:z"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_refreshed_rows_are_those_of_the_network_at_the_epochs_end(embeddings, num_workers):
    model = Dropout(learning_rate=0.002)
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    by_hand = copy.deepcopy(model.gmm)
    options = {"num_workers": num_workers, "persistent_workers": num_workers > 0, "shuffle": True}
    ends = []
    optimize = model.on_train_batch_start

    def keep(batch, batch_idx):
        ends.append(None)
        return optimize(batch, batch_idx)

    model.on_train_batch_start = keep
    callback = EMCallback(mode="full", embeddings=embeddings, refresh=True, n_iterations=2)
    weights = []
    callback_end = callback.on_train_epoch_end

    def at_end(run, pl_module):
        weights.append(copy.deepcopy(model.encoder).eval())
        callback_end(run, pl_module)

    callback.on_train_epoch_end = at_end
    trainer(callback, max_epochs=3).fit(model, loader(**options))
    assert len(ends) == 15  # no epoch was cut short
    assert model.encoder.training
    for encoder in weights:
        with torch.no_grad():
            z = encoder(rows())
        for _ in range(2):
            by_hand.em_step(z)
    assert_near_state(model.gmm, by_hand, 1e-5)


def test_training_goes_the_same_way_with_refreshed_rows():
    """No generator is advanced by the second pass: dropout and shuffling stay what they would be."""

    def weights(*callbacks):
        torch.manual_seed(3)
        model = Dropout()
        trainer(*callbacks, max_epochs=3).fit(model, loader(shuffle=True))
        return model.encoder[0].weight.detach(), torch.get_rng_state()

    for a, b in zip(weights(), weights(EMCallback(mode="full", refresh=True)), strict=True):
        assert torch.equal(a, b)


def test_a_refresh_that_reaches_no_embeddings_says_what_to_do():
    model = started()
    model.predict_step = lambda batch, batch_idx: None
    with pytest.raises(RuntimeError, match="Expected `predict_step` to pass a training batch by embeddings='encoder'"):
        trainer(EMCallback(mode="full", refresh=True)).fit(model, loader())
    model = started()
    model.training_step = lambda batch, batch_idx: model.encoder(batch["a"][0]).sum()
    with pytest.raises(TypeError, match="Expected one training loader with refresh=True, but got dict"):
        trainer(EMCallback(mode="full", refresh=True)).fit(model, {"a": loader(), "b": loader()})


def test_rows_that_are_encoded_anew_are_no_batch_of_other_callbacks(tmp_path):
    model = started()
    model.predict_step = lambda batch, batch_idx: model.encoder(batch[0])
    others = [
        ClusterMetricsCallback(targets=1, n_classes=3, stage="train"),
        LatentPlotCallback(every_n_epochs=1, folder=str(tmp_path)),
    ]
    data = TensorDataset(rows(), torch.arange(44) % 3)
    trainer(EMCallback(mode="full", refresh=True), *others).fit(model, DataLoader(data, batch_size=10))
    assert (tmp_path / "latent_epoch_0001.png").exists()


def test_a_refresh_takes_as_many_batches_as_training_does():
    model = started()
    model.predict_step = lambda batch, batch_idx: model.encoder(batch[0])
    trainer(EMCallback(mode="full", refresh=True), limit_train_batches=3, max_epochs=1).fit(model, loader())
    assert float(model.gmm.running_count.sum()) == pytest.approx(30)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_a_refresh_converts_batches_as_training_does(precision):
    model = started()
    model.training_step = lambda batch, batch_idx: model.encoder(batch[0]).float().square().mean()
    model.predict_step = lambda batch, batch_idx: model.encoder(batch[0])
    trainer(EMCallback(mode="full", refresh=True), precision=precision, max_epochs=1).fit(model, loader())
    assert float(model.gmm.running_count.sum()) == pytest.approx(44)


def test_a_refresh_without_a_predict_step_is_refused_before_training():
    model = lightning.pytorch.demos.boring_classes.BoringModel()
    with pytest.raises(TypeError, match="Expected BoringModel to have a `predict_step` that encodes a training batch"):
        trainer(EMCallback(GaussianMixture(3, 2), "layer", mode="full", refresh=True)).fit(model)


# ------------------------------------------------------------------------------------- what must not be left or leak


def step_beside(model):
    """A training step whose loss is not of the rows: their gradient would be nan where they are not finite."""

    def training_step(batch, batch_idx):
        model.encoder(batch[0])
        return sum(p.square().sum() for p in model.encoder.parameters())

    return training_step


def test_rows_that_are_left_out_are_counted_once_however_many_iterations_look_at_them():
    x = rows()
    x[:4] = torch.nan
    model = started()
    model.training_step = step_beside(model)
    trainer(EMCallback(mode="full", n_iterations=5), max_epochs=1).fit(model, loader(x))
    assert int(model.gmm.n_skipped) == 4
    model = started()
    model.training_step = step_beside(model)
    trainer(EMCallback(mode="full", n_iterations=5, bank_size=40), max_epochs=1).fit(model, loader(x))
    assert int(model.gmm.n_skipped) == 4


@pytest.mark.parametrize(
    "options", [{"mode": "full", "refit": True}, {"mode": "full"}, {"mode": "accumulate"}, {}], ids=str
)
def test_a_row_that_is_not_finite_raises_before_anything_is_changed(options):
    x = rows()
    x[3] = torch.nan
    for model in (started(), Toy()):
        before = state(model.gmm)
        model.training_step = step_beside(model)
        with pytest.raises(ValueError, match="Expected finite rows, with on_nonfinite='raise', but got 1 over all"):
            trainer(EMCallback(on_nonfinite="raise", **options)).fit(model, loader(x))
        assert_same_state(before, state(model.gmm))


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_nothing_of_an_epoch_that_was_cut_short_is_used_later(mode):
    """An exception in mid-epoch; then the same callback and module train again."""
    model, callback = started(), EMCallback(mode=mode, **({"step_size": 0.2} if mode == "minibatch" else {}))
    step = model.training_step

    def fail_at_the_third(batch, batch_idx):
        if batch_idx == 2:
            raise RuntimeError("stop")
        return step(batch, batch_idx)

    model.training_step = fail_at_the_third
    with pytest.raises(RuntimeError, match="stop"):
        trainer(callback).fit(model, loader())
    model.training_step, model.seen = step, []
    by_hand = copy.deepcopy(model.gmm)
    trainer(callback, max_epochs=1).fit(model, loader())
    for z in model.seen if mode == "minibatch" else [torch.cat(model.seen)]:
        by_hand.em_step(z, **({"step_size": 0.2} if mode == "minibatch" else {}))
    assert_near_state(model.gmm, by_hand)


def test_a_callback_that_trains_twice_takes_nothing_from_the_first_time():
    callback = EMCallback(mode="full", bank_size=20, min_weight=0.3, patience=1000)
    trainer(callback, max_epochs=4).fit(started(), loader())
    model = started()
    trainer(callback, max_epochs=1).fit(model, loader())
    torch.testing.assert_close(callback.bank.batch().rows, torch.cat(model.seen)[-20:])
    assert max(callback.health.state_dict()) <= 1


def test_a_window_that_training_leaves_open_is_used_at_its_end():
    class Stop(lightning.Callback):
        def on_train_batch_end(self, run, *args):
            run.should_stop = run.global_step == 3

    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="accumulate"), Stop(), max_epochs=1, min_epochs=0).fit(model, loader())
    assert len(model.seen) == 3
    by_hand.em_step(torch.cat(model.seen))
    assert_near_state(model.gmm, by_hand)


def test_two_callbacks_with_one_prefix_are_refused():
    model = started()
    model.other = GaussianMixture(3, 2)
    with pytest.raises(ValueError, match="Expected a `prefix` of its own for each EMCallback, but two log under 'em'"):
        trainer(EMCallback(), EMCallback("other")).fit(model, loader())


def test_rows_that_overflow_neither_stop_a_start_nor_a_refit():
    x = rows()
    x[5] = 1e25
    model = Toy()
    model.training_step = step_beside(model)
    trainer(EMCallback(mode="full", refit=True)).fit(model, loader(x))
    assert model.gmm.fitted_
    assert all(bool(torch.isfinite(value).all()) for value in model.gmm.mixture())


def test_rows_of_a_step_are_drawn_anew_in_each():
    model = started()
    places = []
    model.gmm.statistics = lambda z, *options: (
        places.append(tuple(int((model.seen[-1] == row).all(-1).nonzero()) for row in z))
        or GaussianMixture.statistics(model.gmm, z, *options)
    )
    trainer(EMCallback(max_rows_per_step=3)).fit(model, loader())
    assert len(set(places)) > 3


# ------------------------------------------------------------------------------------------------- assignments


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
@pytest.mark.parametrize("kind", ["soft", "hard", "sinkhorn"])
def test_rows_are_shared_as_the_option_says(mode, kind):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    step = {"step_size": 0.2} if mode == "minibatch" else {}
    trainer(EMCallback(mode=mode, assignment=kind, **step), max_epochs=1).fit(model, loader())
    how = {"soft": lambda z: Assignment(), "hard": lambda z: HARD, "sinkhorn": by_hand.sinkhorn}[kind]
    if mode == "minibatch":
        for z in model.seen:
            by_hand.em_step(z, step_size=0.2, assignment=how(z))
    elif mode == "accumulate":
        parts = [by_hand.statistics(z, assignment=how(z)) for z in model.seen]
        for part in parts[1:]:
            parts[0] = parts[0].merge(part)
        by_hand.update(parts[0])
    else:
        z = torch.cat(model.seen)
        by_hand.em_step(z, assignment=how(z))
    assert_near_state(model.gmm, by_hand)


def test_without_the_option_the_mixture_decides():
    model = started(cem=True)
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(step_size=0.1), max_epochs=1).fit(model, loader())
    for z in model.seen:
        by_hand.em_step(z, step_size=0.1, assignment=HARD)
    assert_near_state(model.gmm, by_hand)


def test_options_of_sinkhorn_arrive():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    options = {"epsilon": 0.3, "sinkhorn_iterations": 4, "marginals": "weights"}
    trainer(EMCallback(assignment="sinkhorn", step_size=0.1, **options), max_epochs=1).fit(model, loader())
    for z in model.seen:
        assignment = by_hand.sinkhorn(z, epsilon=0.3, n_iterations=4, marginals="weights")
        by_hand.em_step(z, step_size=0.1, assignment=assignment)
    assert_near_state(model.gmm, by_hand)


def test_the_temperature_falls_with_the_epochs_of_em():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    options = {"temperature": 9.0, "temperature_epochs": 2, "start_epoch": 1}
    trainer(EMCallback(mode="full", assignment="soft", **options), max_epochs=4).fit(model, loader())
    for epoch, temperature in ((1, 9.0), (2, 3.0), (3, 1.0)):
        z = torch.cat(model.seen[5 * epoch : 5 * epoch + 5])
        by_hand.em_step(z, assignment=Assignment(temperature=temperature))
    assert_near_state(model.gmm, by_hand)
    assert Assigning("sinkhorn", epsilon=0.5, temperature=4.0).of(Learner(by_hand), Batch.of(z), 7).temperature == 2.0


# ------------------------------------------------------------------------------------------ what is learned, start


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
@pytest.mark.parametrize("options", [{"update": ["means"]}, {"frozen_components": [0, 2]}], ids=str)
def test_what_is_frozen_stays_and_the_rest_moves(mode, options):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    step = {"step_size": 0.2} if mode == "minibatch" else {}
    trainer(EMCallback(mode=mode, **options, **step), max_epochs=1).fit(model, loader())
    learned = Learned.from_options(3, **options)
    for z in model.seen if mode == "minibatch" else [torch.cat(model.seen)]:
        by_hand.em_step(z, learned=learned, **step)
    assert_near_state(model.gmm, by_hand)


def test_a_start_by_fit_is_em_to_convergence_from_several_starts():
    """VaDE's start: a mixture fitted to the codes, and no update after it."""
    model = Toy(n_init=3, max_iter=50, tol=1e-3)
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(init="fit", start_epoch=1, stop_epoch=2), max_epochs=3).fit(model, loader())
    by_hand.fit(torch.cat(model.seen[5:10]))
    assert_same_state(state(model.gmm), state(by_hand))


PAGE = (Path(__file__).parents[1] / ".github" / "EMCALLBACK.md").read_text()
SCHEMES = re.findall(r"^\| ([^|]+) \| `(\w+=[^`]+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("scheme", "options"), SCHEMES, ids=[scheme for scheme, _ in SCHEMES])
def test_schemes_of_the_literature_are_options(scheme, options):
    """As the page on the callback writes them, on fewer rows; what each does is tested piece by piece above."""
    model = Toy()
    chosen = eval(f"dict({options})") | {"init_samples": 20}
    trainer(EMCallback(**chosen), max_epochs=3).fit(model, loader())
    assert model.gmm.fitted_
    assert all(bool(torch.isfinite(value).all()) for value in model.gmm.mixture())
    assert int(model.gmm.n_updates) > 0


def test_the_page_has_schemes_for_networks_with_mixtures_inside():
    assert len(SCHEMES) == 5
    assert all(any(name in scheme for scheme, _ in SCHEMES) for name in ("GMMSeg", "DeepDPM", "VaDE"))


# ------------------------------------------------------------------------------------------------------- resume


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "accumulate"},
        {"mode": "accumulate", "every_n_steps": 3},
        {"mode": "minibatch", "every_n_steps": 3, "assignment": "sinkhorn"},
        {"mode": "minibatch", "min_weight": 0.2, "patience": 7},
        {"mode": "minibatch", "assignment": "soft", "temperature": 5.0, "temperature_epochs": 3},
        {"mode": "full", "bank_size": 70, "save_bank": True},
        {"mode": "full", "bank_size": 70, "save_bank": True, "bank_policy": "reservoir", "every_n_steps": 2},
        {"mode": "full", "refit": True, "n_iterations": 4},
        {"mode": "full", "refresh": True},
    ],
    ids=str,
)
def test_a_resume_at_an_epochs_end_is_bit_equal(options, tmp_path):
    def run(model, max_epochs, folder, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, filename=folder, enable_version_counter=False)
        train = trainer(checkpoint, EMCallback(**options), max_epochs=max_epochs, enable_checkpointing=True)
        train.fit(model, loader(), ckpt_path=ckpt_path, weights_only=True)
        return state(model.gmm)

    class Whole(Toy):
        def predict_step(self, batch, batch_idx):
            return self.encoder(batch[0])

    whole = run(Whole(), 4, "whole")
    run(Whole(), 2, "half")
    assert_same_state(whole, run(Whole(), 4, "resumed", tmp_path / "half.ckpt"))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_bank_is_off_the_checkpoint_unless_asked_for(tmp_path):
    sizes = {}
    for save in (False, True):
        checkpoint = ModelCheckpoint(tmp_path, filename=str(save), enable_version_counter=False)
        callback = EMCallback(mode="full", bank_size=5000, save_bank=save)
        trainer(checkpoint, callback, enable_checkpointing=True, max_epochs=1).fit(started(), loader(rows(4000)))
        saved = torch.load(tmp_path / f"{save}.ckpt", weights_only=True)
        sizes[save] = sum(t.numel() for t in saved["callbacks"][callback.state_key]["bank"].values())
    assert sizes == {False: 0, True: 4000 * 5}  # two features, label, key and bank of each


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_a_resume_in_mid_epoch_has_the_counters_right_and_starts_nothing_anew(mode, tmp_path):
    """Lightning starts the loader over; what matters is that steps are counted on and no second start is made."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    trainer(checkpoint, EMCallback(mode=mode, step_size=0.2), enable_checkpointing=True, max_epochs=2).fit(
        started(), loader()
    )
    model, values = Toy(), []
    start = model.gmm.initialize
    model.gmm.initialize = lambda *args, **options: values.append("started") or start(*args, **options)
    trainer(checkpoint, EMCallback(mode=mode, step_size=0.2), enable_checkpointing=True, max_epochs=3).fit(
        model, loader(), ckpt_path=tmp_path / "step=7.ckpt", weights_only=True
    )
    assert values == []
    updates = int(model.gmm.n_updates)
    # By then 7 steps, in the other modes one epoch; 3 steps of the second and 5 of the third epoch follow.
    assert updates == {"minibatch": 15, "accumulate": 3, "full": 3}[mode]


# ----------------------------------------------------------------------------------------------------- bad options


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"name": "mine"},
            ValueError,
            "`name` only with a mixture given as `module`, but got 'mine'; leave",
        ),
        ({"mode": "full", "decay": 0.9}, ValueError, "`decay` only with mode='minibatch' and without a `step_size`"),
        ({"tol": 1e-3}, ValueError, "`tol` only with mode='full', but got 0.001; leave it at None"),
        ({"mode": "full", "tol": 0.0}, ValueError, "`tol` to be above 0"),
        ({"mode": "accumulate", "refit": True}, ValueError, "`refit` only with mode='full'"),
        ({"mode": "full", "refit": 1}, TypeError, "`refit` to be True or False"),
        ({"mode": "accumulate", "bank_size": 5}, ValueError, "`bank_size` only with mode='full'"),
        ({"mode": "full", "bank_policy": "reservoir"}, ValueError, "`bank_policy` only with a `bank_size`"),
        ({"mode": "full", "save_bank": True}, ValueError, "`save_bank` only with a `bank_size`"),
        ({"mode": "full", "bank_size": 9, "refresh": True}, ValueError, "`refresh` only with a bank without a size"),
        ({"mode": "full", "min_fill": 0}, ValueError, "`min_fill` to be at least 1"),
        ({"init": "random"}, ValueError, "`init` to be one of 'initialize', 'fit'"),
        ({"assignment": "sink"}, ValueError, "`assignment` to be one of 'soft', 'hard', 'sinkhorn', but got 'sink'"),
        ({"epsilon": 0.1}, ValueError, "`epsilon` only with assignment='sinkhorn'"),
        ({"assignment": "sinkhorn", "epsilon": 0}, ValueError, "`epsilon` to be above 0"),
        ({"assignment": "sinkhorn", "sinkhorn_iterations": 0}, ValueError, "`sinkhorn_iterations` to be at least 1"),
        ({"assignment": "sinkhorn", "marginals": "even"}, ValueError, "`marginals` to be one of 'uniform', 'weights'"),
        ({"assignment": "hard", "temperature": 2.0}, ValueError, "`temperature` only with assignment='soft' or 'sink"),
        ({"assignment": "soft", "temperature": 0.0}, ValueError, "`temperature` to be above 0"),
        ({"assignment": "soft", "temperature_epochs": 3}, ValueError, "`temperature_epochs` only with a `temperature`"),
        ({"update": "means"}, TypeError, "`update` to be a list of names"),
        ({"update": ["mean"]}, ValueError, "`update` to be one of 'weights', 'means', 'covariances', but got 'mean'"),
        ({"update": []}, ValueError, "`update` to name at least one"),
        ({"frozen_components": 1}, TypeError, "`frozen_components` to be a list of integers"),
        ({"frozen_components": [-1]}, ValueError, "`frozen_components` to be at least 0"),
        ({"min_weight": 1.5}, ValueError, "`min_weight` to be above 0 and at most 1"),
        ({"patience": 3}, ValueError, "`patience` only with a `min_weight`"),
        ({"min_weight": 0.1, "patience": 0}, ValueError, "`patience` to be at least 1"),
        (
            {"min_weight": 0.1, "update": ["means"]},
            ValueError,
            "`min_weight` only where weights, means and covariances",
        ),
        ({"on_nonfinite": "warn"}, ValueError, "`on_nonfinite` to be one of 'skip', 'raise'"),
        ({"refresh": 1, "mode": "full"}, TypeError, "`refresh` to be True or False"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` to be at least 1"),
    ],
)
def test_a_bad_option_raises_at_construction_and_names_itself(options, error, match):
    with pytest.raises(error, match=match):
        EMCallback(**options)


def test_options_that_do_not_fit_the_mixture_raise_at_the_start():
    with pytest.raises(ValueError, match="`frozen_components` to leave one of 3 free"):
        trainer(EMCallback(frozen_components=[0, 1, 2])).fit(started(), loader())
    with pytest.raises(ValueError, match="`stop_epoch` above the first epoch of EM, 4, but got 2"):
        trainer(EMCallback(start_epoch=0.5, stop_epoch=2), max_epochs=10).fit(started(), loader())
    with pytest.raises(ValueError, match="`frozen_components` to be at most 2, but got 3"):
        trainer(EMCallback(frozen_components=[3])).fit(started(), loader())
    with pytest.raises(ValueError, match=r"`min_weight` below 1/K = 0.3333, but got 0.4"):
        trainer(EMCallback(min_weight=0.4)).fit(started(), loader())
    with pytest.raises(ValueError, match="`bank_size` of at least 3"):
        trainer(EMCallback(mode="full", bank_size=2, bank_per_component=True)).fit(started(), loader())


def test_a_schedule_catches_up_where_several_optimizers_step_at_once():
    assert Schedule(start_epoch=np.int64(3)).first_epoch(10) == 3
    schedule = Schedule(every_n_steps=3)
    assert [schedule.is_due(step, step - 2, default=False) for step in (2, 4, 6, 8, 10)] == [
        False, True, True, False, True,
    ]  # fmt: skip
