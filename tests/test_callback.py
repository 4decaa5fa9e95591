"""EMCallback: when it updates, what it sees, and that nothing else changes. Oracle: the same EM steps made by hand."""

import copy

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import QUIET, Toy, loader, rows, state, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import EMCallback
from tgmm_nn.schedules import PolynomialDecay

pytestmark = QUIET


LOGGED = {
    "log_likelihood", "entropy", "effective_components", "smallest_weight", "condition_number", "moved", "births",
    "deaths", "reseeded", "started",
}  # fmt: skip


def started(**options):
    """A module whose mixture is set, so that updates begin with the first batch."""
    model = Toy(**options)
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    return model


def assert_same_state(a, b):
    for name, buffer in a.items():
        torch.testing.assert_close(buffer, b[name], rtol=0, atol=0, equal_nan=True, msg=name)


# ------------------------------------------------------------------------------------------------- updates


@pytest.mark.parametrize("step_size", [None, 0.05])
@pytest.mark.parametrize("source", ["encoder", "outputs:z"])
def test_minibatch_mode_makes_one_stepwise_update_per_batch(step_size, source):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    schedule = {"decay": 0.7, "offset": 2.0} if step_size is None else {"step_size": step_size}
    trainer(EMCallback("gmm", source, **schedule)).fit(model, loader())
    assert len(model.seen) == 10
    for t, z in enumerate(model.seen):
        by_hand.em_step(z, step_size=step_size or PolynomialDecay(0.7, 2.0)(t))
    for name, buffer in by_hand.named_buffers():
        torch.testing.assert_close(getattr(model.gmm, name), buffer, equal_nan=True)


@pytest.mark.parametrize("n_iterations", [1, 3])
def test_full_mode_makes_exact_em_steps_on_the_rows_of_each_epoch(n_iterations):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="full", n_iterations=n_iterations)).fit(model, loader())
    for epoch in (0, 1):
        for _ in range(n_iterations):
            by_hand.em_step(torch.cat(model.seen[5 * epoch : 5 * epoch + 5]))
    assert_same_state(state(model.gmm), state(by_hand))


@pytest.mark.parametrize("mode", ["minibatch", "full"])
def test_a_fresh_mixture_starts_on_the_rows_of_the_chosen_epoch(mode):
    model = Toy()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode=mode, start_epoch=1), max_epochs=2).fit(model, loader())
    by_hand.initialize(torch.cat(model.seen[5:]))
    if mode == "full":
        by_hand.em_step(torch.cat(model.seen[5:]))
    assert_same_state(state(model.gmm), state(by_hand))


def test_a_fresh_mixture_starts_as_soon_as_enough_rows_were_seen():
    model = Toy()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(init_samples=25, step_size=0.1), max_epochs=1).fit(model, loader())
    by_hand.initialize(torch.cat(model.seen[:3]))
    for z in model.seen[3:]:
        by_hand.em_step(z, step_size=0.1)
    assert_same_state(state(model.gmm), state(by_hand))


def test_nothing_is_updated_before_the_start_epoch():
    model = started()
    before = state(model.gmm)
    with pytest.warns(UserWarning, match="EM does not run: start_epoch=2 is not reached with max_epochs=2"):
        trainer(EMCallback(start_epoch=2), max_epochs=2).fit(model, loader())
    assert_same_state(state(model.gmm), before)


@pytest.mark.parametrize(("share", "max_epochs", "first"), [(0.4, 5, 1), (0.4, 10, 3), (0.01, 3, 0), (0.99, 3, 2)])
def test_a_float_start_epoch_is_a_share_of_max_epochs(share, max_epochs, first):
    model = started()
    trainer(EMCallback(start_epoch=share), max_epochs=max_epochs).fit(model, loader())
    assert int(model.gmm.n_updates) == 5 * (max_epochs - first)


def test_a_share_of_endless_training_raises():
    with pytest.raises(ValueError, match="`start_epoch` as an epoch where `max_epochs` is not set"):
        trainer(EMCallback(start_epoch=0.5), max_epochs=-1, max_steps=3).fit(Toy(), loader())


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_a_mixture_that_never_had_enough_rows_is_told_of(mode):
    model = Toy()
    model.gmm = GaussianMixture(100, 2)
    before = state(model.gmm)
    with pytest.warns(UserWarning, match="EM never started on 'gmm'"):
        trainer(EMCallback(mode=mode)).fit(model, loader())
    assert_same_state(state(model.gmm), before)


def test_rows_that_are_not_finite_neither_start_nor_move_a_mixture():
    x = rows()
    x[::7] = torch.nan
    model = Toy()

    def skip(batch, batch_idx):
        model.seen.append(model.encoder(batch[0]).detach())
        return {"loss": model.encoder.weight.square().sum()}

    model.training_step = skip
    trainer(EMCallback(), max_epochs=2).fit(model, loader(x))
    assert model.gmm.fitted_
    assert int(model.gmm.n_skipped) == 14  # of the start and of the second epoch's updates
    assert all(bool(torch.isfinite(b).all()) for name, b in state(model.gmm).items() if name.endswith("_"))


@pytest.mark.parametrize("mode", ["minibatch", "full"])
def test_accumulated_batches_make_one_update_per_optimizer_step(mode):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    callback = EMCallback(mode=mode, step_size=0.1 if mode == "minibatch" else None)
    trainer(callback, max_epochs=1, accumulate_grad_batches=2).fit(model, loader())
    if mode == "full":
        by_hand.em_step(torch.cat(model.seen))
    else:
        for first in (0, 2, 4):  # five batches: the optimizer steps after the second, the fourth and the last
            by_hand.em_step(torch.cat(model.seen[first : first + 2]), step_size=0.1)
    assert_same_state(state(model.gmm), state(by_hand))


# ------------------------------------------------------------------------------- the place in the training loop


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_density_may_be_in_the_loss(mode, accumulate):
    """An update between forward and backward would raise 'modified by an inplace operation'."""
    model = started(density_weight=0.1, learning_rate=0.01)
    before = model.encoder.weight.clone()
    trainer(EMCallback(mode=mode), accumulate_grad_batches=accumulate).fit(model, loader())
    assert not torch.equal(before, model.encoder.weight)
    assert int(model.gmm.n_updates) > 0


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_validation_and_the_checkpoint_see_the_same_mixture(mode, tmp_path):
    model = Toy()
    checkpoint = ModelCheckpoint(tmp_path, filename="last")
    run = trainer(checkpoint, EMCallback(mode=mode), max_epochs=2, enable_checkpointing=True)
    run.fit(model, loader(), loader(batch_size=44))
    saved = Toy()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert saved.gmm.fitted_
    with torch.no_grad():
        torch.testing.assert_close(saved.gmm(saved.encoder(rows())), model.validated[-1], rtol=0, atol=0)


def test_only_training_batches_reach_the_mixture():
    """Not the sanity check, nor validate, test or predict."""
    model = Toy()
    run = trainer(EMCallback(init_samples=10), max_epochs=1, num_sanity_val_steps=2)
    run.fit(model, loader(rows()), loader(rows(seed=5) + 100))
    assert float(model.gmm.means_.abs().max()) < 50
    before = state(model.gmm)
    for action in (run.validate, run.test, run.predict):
        action(model, dataloaders=loader(), **({} if action == run.predict else {"verbose": False}))
    assert_same_state(state(model.gmm), before)


def test_training_goes_the_same_way_with_and_without_the_callback():
    """Where the mixture is not in the loss; and the global generator ends where it would."""

    def weights(*callbacks):
        torch.manual_seed(3)
        model = Toy()
        trainer(*callbacks).fit(model, loader(shuffle=True))
        return model.encoder.weight.detach(), torch.get_rng_state()

    for a, b in zip(weights(), weights(EMCallback()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_two_callbacks_move_two_mixtures():
    model = started()
    model.other = GaussianMixture(2, 2, "diag", random_state=0)
    one, other = EMCallback("gmm"), EMCallback("other", mode="full", prefix="other")
    assert one.state_key != other.state_key
    run = trainer(one, other)
    run.fit(model, loader())
    assert int(model.gmm.n_updates) == 10
    assert int(model.other.n_updates) == 2
    assert {"em/log_likelihood", "other/log_likelihood"} <= set(run.callback_metrics)


# ------------------------------------------------------------------------------------------- resume and clean-up


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_resuming_at_an_epochs_end_is_bit_equal_and_starts_nothing_anew(mode, tmp_path):
    def run(model, max_epochs, folder, ckpt_path=None):
        checkpoint = ModelCheckpoint(tmp_path, filename=folder, enable_version_counter=False)
        train = trainer(checkpoint, EMCallback(mode=mode), max_epochs=max_epochs, enable_checkpointing=True)
        train.fit(model, loader(), ckpt_path=ckpt_path, weights_only=True)
        return state(model.gmm)

    whole = run(Toy(), 4, "whole")
    run(Toy(), 2, "half")
    resumed = run(Toy(), 4, "resumed", tmp_path / "half.ckpt")
    assert_same_state(whole, resumed)


def test_a_mixture_that_is_fitted_is_not_started_again():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(step_size=0.1), max_epochs=1).fit(model, loader())
    for z in model.seen:
        by_hand.em_step(z, step_size=0.1)
    assert_same_state(state(model.gmm), state(by_hand))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_hook_is_removed_however_training_ends(error):
    model = started()

    class Stop(lightning.Callback):
        def on_train_batch_start(self, *args):
            assert model.encoder._forward_hooks
            if error is not None:
                raise error("stop")

    run = trainer(EMCallback(), Stop())
    if error is None:
        run.fit(model, loader())
    else:
        with pytest.raises((error, SystemExit)):
            run.fit(model, loader())
    assert not model.encoder._forward_hooks


# ------------------------------------------------------------------------------------------------------ logging


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_a_batch_without_a_usable_row_does_not_make_the_logged_likelihood_nan(mode):
    x = rows(40)
    x[10:20] = torch.nan
    model = started()
    model.training_step = lambda batch, batch_idx: {
        "loss": model.encoder.weight.square().sum(),
        "z": model.encoder(batch[0]).detach(),
    }
    run = trainer(EMCallback(mode=mode))
    run.fit(model, loader(x))
    assert torch.isfinite(run.callback_metrics["em/log_likelihood"])
    assert int(model.gmm.n_skipped) == 20


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_a_finite_likelihood_is_logged_from_the_first_epoch(mode):
    """A monitored key that is missing, or nan, makes EarlyStopping raise or stop."""
    values = []

    class Record(lightning.Callback):
        def on_train_epoch_end(self, run, pl_module):
            values.append({k: float(v) for k, v in run.callback_metrics.items()})

    trainer(EMCallback(mode=mode, start_epoch=1), Record(), max_epochs=3).fit(Toy(), loader())
    assert len(values) == 3
    for logged in values:
        assert set(logged) == {f"em/{name}" for name in LOGGED}
        assert all(torch.isfinite(torch.tensor(v)) for v in logged.values())


def test_the_logged_likelihood_is_that_before_the_update():
    model = started(learning_rate=0.0)
    gmm = copy.deepcopy(model.gmm)
    run = trainer(EMCallback(step_size=0.1), max_epochs=1)
    run.fit(model, loader(batch_size=44))
    torch.testing.assert_close(run.callback_metrics["em/log_likelihood"], gmm(model.seen[0]).mean())


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"module": 3}, "`module`"),
        ({"embeddings": ""}, "`embeddings`"),
        ({"mode": "stepwise"}, "`mode` to be one of 'minibatch', 'accumulate', 'full', but got 'stepwise'"),
        ({"start_epoch": -1}, "`start_epoch`"),
        ({"start_epoch": 1.5}, "`start_epoch`"),
        ({"start_epoch": 0.0}, "`start_epoch`"),
        ({"step_size": 0.0}, "`step_size`"),
        ({"step_size": 1.5}, "`step_size`"),
        ({"decay": 0.5}, "`decay`"),
        ({"offset": 0.5}, "`offset`"),
        ({"n_iterations": 0, "mode": "full"}, "`n_iterations`"),
        ({"n_iterations": 2}, "`n_iterations` only with mode='full'"),
        ({"step_size": 0.1, "decay": 0.7}, "`decay` only with mode='minibatch' and without a `step_size`"),
        ({"init_samples": 0}, "`init_samples`"),
        ({"prefix": None}, "`prefix`"),
        ({"prog_bar": 1}, "`prog_bar`"),
    ],
)
def test_a_bad_option_raises_at_construction_and_names_itself(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        EMCallback(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"module": "mixture"}, r"`module` to name a submodule of Toy \('encoder', 'idle', 'gmm'\), but got 'mixture'"),
        ({"embeddings": "encoders"}, "`embeddings` to name a submodule of Toy"),
        ({"module": "encoder"}, "to be a GaussianMixture or a MixtureClassifier, but got Linear"),
        ({"embeddings": "outputs:"}, "outputs:<key>"),
        ({"embeddings": "outputs:h"}, r"a dictionary with 'h' .* got \['loss', 'z'\]"),
        ({"embeddings": "idle"}, "forward was not called"),
    ],
)
def test_a_name_that_does_not_exist_raises_and_lists_what_does(options, match):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=match):
        trainer(EMCallback(**options)).fit(Toy(), loader())


def test_embeddings_of_the_wrong_width_raise():
    model = Toy()
    model.gmm = GaussianMixture(3, 5)
    model.training_step = lambda batch, batch_idx: model.encoder(batch[0]).square().mean()
    message = "embeddings='encoder' of 5 features for the mixture 'gmm', but got 2 along channel_dim=-1"
    with pytest.raises(ValueError, match=message):
        trainer(EMCallback()).fit(model, loader())


# ------------------------------------------------------------------------------------------------ the schedule


def updates_by_epoch(model, callback, max_epochs=6):
    """Return how many updates each epoch made."""
    counts = []

    class Count(lightning.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            counts.append(int(pl_module.gmm.n_updates) - sum(counts))

    trainer(callback, Count(), max_epochs=max_epochs).fit(model, loader())
    return counts


def test_training_that_makes_no_update_says_so():
    with pytest.warns(UserWarning, match="EM made no update on 'gmm': look at `every_n_steps`, `min_fill`"):
        assert sum(updates_by_epoch(started(), EMCallback(every_n_steps=10, every_n_epochs=2))) == 0
    with pytest.warns(UserWarning, match="EM made no update"):
        assert sum(updates_by_epoch(started(), EMCallback(mode="full", min_fill=1000))) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"start_epoch": 1, "stop_epoch": 4}, [0, 5, 5, 5, 0, 0]),
        ({"every_n_epochs": 2}, [5, 0, 5, 0, 5, 0]),
        ({"start_epoch": 1, "every_n_epochs": 3}, [0, 5, 0, 0, 5, 0]),
        ({"every_n_steps": 3}, [1, 2, 2, 1, 2, 2]),  # of the steps 1 to 30 those that 3 divides
        ({"mode": "full", "every_n_epochs": 2, "stop_epoch": 4}, [1, 0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_em_runs_in_the_epochs_and_steps_that_were_asked_for(options, expected):
    assert updates_by_epoch(started(), EMCallback(**options)) == expected


def test_an_update_at_every_third_step_sees_the_rows_of_that_step():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(every_n_steps=3, step_size=0.2)).fit(model, loader())
    for z in model.seen[2::3]:
        by_hand.em_step(z, step_size=0.2)
    assert_same_state(state(model.gmm), state(by_hand))


def test_the_bank_holds_only_rows_of_epochs_in_which_em_runs():
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode="full", every_n_epochs=2), max_epochs=3).fit(model, loader())
    for epoch in (0, 2):
        by_hand.em_step(torch.cat(model.seen[5 * epoch : 5 * epoch + 5]))
    assert_same_state(state(model.gmm), state(by_hand))


def test_a_likelihood_is_logged_also_where_no_update_is_due():
    run = trainer(EMCallback(every_n_epochs=5, prefix="em"), max_epochs=2)
    run.fit(started(), loader())
    assert torch.isfinite(run.logged_metrics["em/log_likelihood"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop_epoch": 0}, ValueError, "`stop_epoch` to be at least 1, but got 0"),
        ({"start_epoch": 3, "stop_epoch": 3}, ValueError, "`stop_epoch` above start_epoch=3, but got 3"),
        ({"stop_epoch": 2.5}, TypeError, "`stop_epoch` to be an integer or None, but got 2.5"),
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` to be at least 1, but got 0"),
        ({"every_n_steps": 0}, ValueError, "`every_n_steps` to be at least 1, but got 0"),
        ({"n_iterations": 2}, ValueError, "`n_iterations` only with mode='full', but got 2; leave it at 1"),
        ({"output_key": -1}, ValueError, "`output_key` to be at least 0, but got -1"),
        ({"output_key": 1.5}, TypeError, "`output_key` to be an integer, but got 1.5"),
        (
            {"output_key": "z", "embeddings": "outputs:z"},
            ValueError,
            "`output_key` only where `embeddings` names a submodule",
        ),
        ({"channel_dim": None}, TypeError, "`channel_dim` to be an integer, but got None"),
        ({"normalize": 1}, TypeError, "`normalize` to be True or False, but got 1"),
        ({"max_rows_per_step": 0}, ValueError, "`max_rows_per_step` to be at least 1, but got 0"),
        ({"embeddings": ""}, TypeError, "`embeddings` to be a non-empty string"),
    ],
)
def test_bad_options_of_schedule_and_source_raise_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        EMCallback(**options)


# -------------------------------------------------------------------------------------------------- the source


class Wrapped(torch.nn.Module):
    """Calls a module and gives its output in a container, or as a map."""

    def __init__(self, module, form):
        super().__init__()
        self.module, self.form = module, form

    def forward(self, x):
        return self.form(self.module(x))


def cut_into(z):
    """Make a map ``(1, d, 1, n)`` of rows ``(n, d)``."""
    return z.mT[None, :, None]


@pytest.mark.parametrize(
    ("form", "options"),
    [
        (lambda z: {"z": z, "other": None}, {"output_key": "z"}),
        (lambda z: (None, z), {"output_key": 1}),
        (lambda z: [z], {"output_key": 0}),
        (cut_into, {"channel_dim": 1}),
        (lambda z: z[:, None], {}),
        (lambda z: {"map": cut_into(z)}, {"output_key": "map", "channel_dim": -3}),
    ],
    ids=["dict", "tuple", "list", "map", "sequence", "map in a dict"],
)
def test_embeddings_are_found_in_containers_and_maps(form, options):
    model, plain = started(), started()
    plain.gmm.load_state_dict(model.gmm.state_dict())
    model.idle = Wrapped(torch.nn.Identity(), form)
    step = model.training_step

    def training_step(batch, batch_idx):
        outputs = step(batch, batch_idx)
        model.idle(outputs["z"])
        return outputs

    model.training_step = training_step
    trainer(EMCallback(embeddings="idle", **options)).fit(model, loader())
    trainer(EMCallback()).fit(plain, loader())
    assert_same_state(state(model.gmm), state(plain.gmm))


def test_a_layer_that_works_in_place_behind_the_embeddings_does_not_change_them():
    model = started()
    by_hand = copy.deepcopy(model.gmm)

    def training_step(batch, batch_idx):
        z = model.encoder(batch[0])
        model.seen.append(z.detach().clone())
        return torch.nn.functional.relu(z, inplace=True).square().mean()

    model.training_step = training_step
    trainer(EMCallback(step_size=0.1)).fit(model, loader())
    for z in model.seen:
        by_hand.em_step(z, step_size=0.1)
    assert_same_state(state(model.gmm), state(by_hand))


def test_several_calls_in_a_step_are_joined():
    model = started()
    by_hand = copy.deepcopy(model.gmm)

    def training_step(batch, batch_idx):
        views = [model.encoder(batch[0]), model.encoder(-batch[0])]
        model.seen.append(torch.cat(views).detach())
        return views[0].square().mean()

    model.training_step = training_step
    trainer(EMCallback(step_size=0.1)).fit(model, loader())
    for z in model.seen:
        by_hand.em_step(z, step_size=0.1)
    assert_same_state(state(model.gmm), state(by_hand))


@pytest.mark.parametrize("mode", ["minibatch", "accumulate", "full"])
def test_normalized_rows_have_unit_length(mode):
    model = started()
    by_hand = copy.deepcopy(model.gmm)
    trainer(EMCallback(mode=mode, normalize=True), max_epochs=1).fit(model, loader())
    unit = [z / z.norm(dim=-1, keepdim=True) for z in model.seen]
    for t, z in enumerate(unit if mode == "minibatch" else [torch.cat(unit)]):
        by_hand.em_step(z, step_size=PolynomialDecay()(t) if mode == "minibatch" else None)
    for name, buffer in by_hand.named_buffers():
        torch.testing.assert_close(getattr(model.gmm, name), buffer, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_at_most_so_many_rows_of_a_step_are_taken_by_its_number_alone():
    """A resumed run draws the rows that the run it goes on from would have drawn, and no generator is touched."""
    models = [started() for _ in range(2)]
    models[1].gmm.load_state_dict(models[0].gmm.state_dict())
    counts = []
    for model in models:
        expect = model.gmm.statistics
        model.gmm.statistics = lambda z, *options, expect=expect: counts.append(len(z)) or expect(z, *options)
        torch.rand(len(counts) + 1)
        trainer(EMCallback(max_rows_per_step=4)).fit(model, loader())
    assert counts == [4] * 20
    assert_same_state(*(state(model.gmm) for model in models))


@pytest.mark.parametrize(
    ("form", "options", "error", "message"),
    [
        (
            lambda z: {"z": z},
            {"output_key": "y"},
            ValueError,
            r"output of 'idle' to hold output_key='y', but got \['z'\]",
        ),
        (lambda z: (z,), {"output_key": 1}, ValueError, "output of 'idle' to hold output_key=1, but got 1 elements"),
        (lambda z: z, {"output_key": "z"}, ValueError, "output of 'idle' to hold output_key='z', but got Tensor"),
        (
            lambda z: {"z": z},
            {},
            TypeError,
            "'idle' to give a tensor with dimension channel_dim=-1, but got dict; .*`output",
        ),
        (lambda z: z, {"channel_dim": 2}, TypeError, r"dimension channel_dim=2, but got one of shape \(10, 2\)"),
    ],
)
def test_an_output_without_the_embeddings_says_what_there_is(form, options, error, message):
    model = started()
    model.idle = Wrapped(torch.nn.Identity(), form)

    def training_step(batch, batch_idx):
        model.idle(model.encoder(batch[0]))

    model.training_step = training_step
    with pytest.raises(error, match=message):
        trainer(EMCallback(embeddings="idle", **options)).fit(model, loader())
