"""ClusterMetricsCallback: what it logs and when. Oracle: the same numbers by hand, from the rows that were scored."""

import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch.utils.data import DataLoader, TensorDataset
from toy import Toy, rows, trainer

from tgmm_nn import GaussianMixture
from tgmm_nn.lightning import ClusterMetricsCallback, EMCallback
from tgmm_nn.metrics import EffectiveComponents, MatchedAccuracy, Purity, ResponsibilityCalibration

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

DENSITY = ("negative_log_likelihood", "bic", "effective_components")
CLUSTERING = ("accuracy", "purity", "calibration_error", "nmi", "ari")


def started(**options):
    """A module whose mixture is set."""
    model = Toy(**options)
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    return model


def labelled(n=44, seed=0):
    """Rows whose labels are their centres, some of them unlabelled."""
    y = torch.arange(n) % 3
    y[::5] = -1
    return rows(n, seed), y


def batches(x, y, batch_size=10):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def by_hand(gmm, z, y=None, prefix="val"):
    """Compute every value at once."""
    r = gmm.predict_proba(z)
    values = {
        "negative_log_likelihood": -gmm.score(z),
        "bic": gmm.bic(z),
        "effective_components": EffectiveComponents(gmm.n_components)(r),
    }
    if y is not None:
        r, y = r[y >= 0], y[y >= 0]
        k, clusters = gmm.n_components, r.argmax(-1)
        values |= {
            "accuracy": MatchedAccuracy(k, 3)(clusters, y),
            "purity": Purity(k, 3)(clusters, y),
            "calibration_error": ResponsibilityCalibration(k, 3)(r, y),
            "nmi": normalized_mutual_info_score(y, clusters),
            "ari": adjusted_rand_score(y, clusters),
        }
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


def logged(run, prefix="val"):
    return {name: float(v) for name, v in run.callback_metrics.items() if name.startswith(f"{prefix}/")}


def assert_logged(run, expected, prefix="val"):
    assert logged(run, prefix) == pytest.approx(expected, rel=1e-5, abs=1e-6)


def labels_in_outputs(model):
    """Let validation return its labels and embeddings."""
    model.validation_step = lambda batch, batch_idx: {"y": batch[1], "z": model.encoder(batch[0])}
    return model


class Record(lightning.Callback):
    """Keep what is logged after each validation."""

    def __init__(self):
        self.values = []

    def on_validation_end(self, run, pl_module):
        self.values.append(logged(run))


# -------------------------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize(
    ("embeddings", "targets"), [("encoder", 1), ("encoder", "outputs:y"), ("outputs:z", 1), ("outputs:z", "outputs:y")]
)
def test_what_is_logged_is_what_the_validation_rows_give_at_once(embeddings, targets):
    model, (x, y) = labels_in_outputs(started()), labelled()
    run = trainer(ClusterMetricsCallback("gmm", embeddings, targets=targets, n_classes=3))
    run.validate(model, batches(x, y), verbose=False)
    assert set(logged(run)) == {f"val/{name}" for name in (*DENSITY, *CLUSTERING)}
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), y))


def test_labels_are_read_by_key_from_a_batch_that_is_a_dictionary():
    model, (x, y) = started(), labelled()
    model.validation_step = lambda batch, batch_idx: model.encoder(batch["x"])
    data = [{"x": a, "y": b} for a, b in zip(x.split(10), y.split(10), strict=True)]
    run = trainer(ClusterMetricsCallback(targets="y", n_classes=3))
    run.validate(model, DataLoader(data, batch_size=None), verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), y))


def test_without_labels_the_density_alone_is_logged():
    model, x = started(), rows()
    run = trainer(ClusterMetricsCallback(prefix="held_out"))
    run.validate(model, batches(x, x), verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), prefix="held_out"), "held_out")


class AsMaps(torch.nn.Module):
    """Gives rows ``(..., 5, 1, d)`` as maps ``(..., d, 5, 1)`` in a dictionary."""

    def forward(self, z):
        return {"map": z.movedim(-1, 1)}


def test_maps_of_embeddings_and_labels_are_flattened_alike():
    model, (x, y) = started(), labelled(40)
    model.idle = AsMaps()
    model.validation_step = lambda batch, batch_idx: model.idle(model.encoder(batch[0]))
    callback = ClusterMetricsCallback("gmm", "idle", targets=1, n_classes=3, output_key="map", channel_dim=1)
    run = trainer(callback)
    run.validate(model, batches(x.reshape(8, 5, 1, 3), y.reshape(8, 5, 1), 2), verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), y))


def test_rows_are_scaled_to_unit_length_where_asked():
    model, (x, y) = started(), labelled()
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3, normalize=True))
    run.validate(model, batches(x, y), verbose=False)
    assert_logged(run, by_hand(model.gmm, torch.nn.functional.normalize(model.encoder(x).detach()), y))


def test_several_dataloaders_are_pooled():
    model, (x, y) = started(), labelled()
    model.validation_step = lambda batch, batch_idx, dataloader_idx: model.encoder(batch[0])
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3))
    run.validate(model, [batches(x[:13], y[:13]), batches(x[13:], y[13:])], verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), y))


def test_rows_that_are_not_finite_are_left_out():
    model, (x, y) = started(), labelled()
    broken = x.clone()
    broken[3], broken[8], broken[11] = torch.nan, torch.inf, 1e30
    keep = torch.tensor([n not in (3, 8, 11) for n in range(44)])
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3))
    run.validate(model, batches(broken, y), verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x[keep]).detach(), y[keep]))


def test_half_precision_embeddings_are_scored():
    model, (x, y) = started(), labelled()
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3), precision="bf16-mixed")
    run.validate(model, batches(x, y), verbose=False)
    z = model.encoder(x).detach().bfloat16()
    assert logged(run) == pytest.approx(by_hand(model.gmm, z, y), rel=0.02, abs=0.02)


def test_rows_without_any_label_give_nan_for_what_needs_labels():
    model, (x, y) = started(), labelled()
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3))
    run.validate(model, batches(x, y.fill_(-1)), verbose=False)
    assert all(math.isnan(logged(run)[f"val/{name}"]) for name in CLUSTERING)
    assert all(math.isfinite(logged(run)[f"val/{name}"]) for name in DENSITY)


def test_one_used_cluster_does_not_raise():
    """As happens early in training, and to a fresh mixture always."""
    model, (x, y) = Toy(), labelled()
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3))
    run.validate(model, batches(x, y), verbose=False)
    known = y[y >= 0]
    assert logged(run)["val/accuracy"] == pytest.approx(float(known.bincount().max() / len(known)))
    assert (logged(run)["val/nmi"], logged(run)["val/ari"]) == (0, 0)


# -------------------------------------------------------------------------------------------------------- when


def test_each_validation_has_its_own_values_and_the_sanity_check_has_none():
    """A changing encoder and mixture; the oracle scores them where Lightning has just validated."""
    x, y = labelled()

    expected = []

    class Expect(lightning.Callback):
        def on_validation_end(self, run, pl_module):
            expected.append(by_hand(pl_module.gmm, pl_module.encoder(x).detach(), y))

    model, record = Toy(learning_rate=0.01), Record()
    run = trainer(
        EMCallback(),
        ClusterMetricsCallback(targets=1, n_classes=3),
        record,
        Expect(),
        max_epochs=3,
        num_sanity_val_steps=2,
    )
    run.fit(model, batches(x, y), batches(x, y))
    assert record.values[0] == {}  # the sanity check
    assert len(record.values) == 4
    for got, at_once in zip(record.values[1:], expected[1:], strict=True):
        assert got == pytest.approx(at_once, rel=1e-5, abs=1e-6)
    assert len({values["val/bic"] for values in record.values[1:]}) == 3


def test_training_batches_are_scored_by_the_mixture_of_their_moment():
    model, (x, y) = started(learning_rate=0.1), labelled()
    densities = []

    class Expect(lightning.Callback):
        def on_train_batch_end(self, run, pl_module, outputs, batch, batch_idx):
            densities.append(pl_module.gmm(pl_module.seen[-1]))

    callback = ClusterMetricsCallback(targets=1, n_classes=3, stage="train", prefix="train")
    run = trainer(EMCallback(), callback, Expect(), val_check_interval=2)
    run.fit(model, batches(x, y), batches(x + 100, y))
    assert logged(run) == {}
    last = torch.cat(densities[5:])
    assert logged(run, "train")["train/negative_log_likelihood"] == pytest.approx(-float(last.mean()), rel=1e-5)


def test_the_test_stage_is_scored_and_no_other():
    model, (x, y) = started(), labelled()
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3, stage="test", prefix="test"), max_epochs=1)
    run.fit(model, batches(x, y), batches(x, y))
    assert logged(run, "test") == {}
    run.test(model, batches(x, y), verbose=False)
    assert_logged(run, by_hand(model.gmm, model.encoder(x).detach(), y, "test"), "test")


def test_a_value_may_be_monitored_from_the_first_epoch_also_of_a_mixture_that_has_not_started():
    stop = EarlyStopping("val/accuracy", mode="max", patience=0, check_finite=True)
    run = trainer(ClusterMetricsCallback(targets=1, n_classes=3), stop, max_epochs=6)
    run.fit(Toy(learning_rate=0.0), batches(*labelled()), batches(*labelled()))
    assert stop.stopped_epoch == 1


@pytest.mark.parametrize(("options", "shown"), [({"targets": 1, "n_classes": 3}, "accuracy"), ({}, DENSITY[0])])
def test_the_progress_bar_shows_one_value(options, shown):
    for prog_bar in (False, True):
        run = trainer(ClusterMetricsCallback(prog_bar=prog_bar, **options))
        run.validate(started(), batches(*labelled()), verbose=False)
        assert [key for key in run.progress_bar_metrics if key.startswith("val/")] == [f"val/{shown}"] * prog_bar


# ------------------------------------------------------------------------------------------------------ ranks


class SaveValues(lightning.Callback):
    """Write what each rank has logged."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, run, pl_module):
        torch.save(dict(run.callback_metrics), self.folder / f"rank{run.global_rank}.pt")


class Share:
    """Batches of a rank: the first has so many of them, the second what is left."""

    def __init__(self, x, y, first):
        self.parts, self.first = list(zip(x.split(10), y.split(10), strict=True)), first

    def __iter__(self):
        yield from self.parts[: self.first] if torch.distributed.get_rank() == 0 else self.parts[self.first :]


@pytest.mark.parametrize("first", [2, 5, 0], ids=["uneven", "all on the first", "all on the second"])
def test_two_ranks_log_what_one_process_logs(first, tmp_path):
    model, (x, y) = started(), labelled()
    callbacks = ClusterMetricsCallback(targets=1, n_classes=3), SaveValues(tmp_path)
    run = trainer(*callbacks, devices=2, strategy="ddp_fork", use_distributed_sampler=False)
    run.validate(model, Share(x, y, first), verbose=False)
    expected = by_hand(model.gmm, model.encoder(x).detach(), y)
    for rank in (0, 1):
        values = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert {name: float(v) for name, v in values.items()} == pytest.approx(expected, rel=1e-5, abs=1e-6)


# --------------------------------------------------------------------------------------------------- clean-up


@pytest.mark.parametrize("stage", ["train", "validate"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_hook_lives_in_its_stage_and_is_removed_however_that_ends(stage, error):
    model, heard = started(), []

    class Stop(lightning.Callback):
        def on_train_batch_start(self, *args):
            self.listen("train")

        def on_validation_batch_start(self, *args):
            self.listen("validate")

        def listen(self, at):
            heard.append((at, bool(model.encoder._forward_hooks)))
            if error is not None and at == stage:
                raise error("stop")

    run = trainer(ClusterMetricsCallback(stage=stage), Stop(), num_sanity_val_steps=0)
    if error is None:
        run.fit(model, batches(*labelled()), batches(*labelled()))
    else:
        with pytest.raises((error, SystemExit)):
            run.fit(model, batches(*labelled()), batches(*labelled()))
    assert (stage, True) in heard
    assert (stage, False) not in heard
    assert ("train", True) not in heard or stage == "train"
    assert not model.encoder._forward_hooks


def test_training_goes_the_same_way_with_and_without_the_callback():
    def weights(*callbacks):
        torch.manual_seed(3)
        model = Toy()
        trainer(EMCallback(), *callbacks).fit(model, batches(*labelled()), batches(*labelled()))
        return model.encoder.weight.detach(), model.gmm.means_.clone(), torch.get_rng_state()

    stages = [ClusterMetricsCallback(targets=1, n_classes=3, stage=s, prefix=s) for s in ("train", "validate")]
    for a, b in zip(weights(), weights(*stages), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_callbacks_that_differ_in_what_they_log_have_different_state_keys():
    options = ({}, {"module": "other"}, {"embeddings": "z"}, {"stage": "test"}, {"prefix": "other"})
    assert len({ClusterMetricsCallback(**o).state_key for o in options}) == len(options)


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"module": 3}, TypeError, "`module`"),
        ({"embeddings": ""}, TypeError, "`embeddings`"),
        ({"prefix": None}, TypeError, "`prefix`"),
        ({"prog_bar": 1}, TypeError, "`prog_bar`"),
        ({"stage": "fit"}, ValueError, "`stage` to be one of 'train', 'validate', 'test', but got 'fit'"),
        ({"output_key": 1.5}, TypeError, "`output_key`"),
        ({"channel_dim": None}, TypeError, "`channel_dim`"),
        ({"normalize": 1}, TypeError, "`normalize`"),
        ({"targets": 1.5, "n_classes": 3}, TypeError, "`targets` to be an integer, but got 1.5"),
        ({"targets": -1, "n_classes": 3}, ValueError, "`targets` to be at least 0, but got -1"),
        ({"targets": "", "n_classes": 3}, ValueError, "`targets` to be a key, a place or 'outputs:<key>', but got ''"),
        ({"targets": "outputs:", "n_classes": 3}, ValueError, "`targets` to be a key"),
        ({"targets": 1, "n_classes": 0}, ValueError, "`n_classes` to be at least 1, but got 0"),
        ({"targets": 1}, ValueError, "`targets` and `n_classes` both or none, but got targets=1 and n_classes=None"),
        ({"n_classes": 3}, ValueError, "both or none, but got targets=None and n_classes=3"),
        (
            {"embeddings": "outputs:z", "output_key": 0},
            ValueError,
            "`output_key` only where .*; let validation_step return the tensor itself",
        ),
    ],
)
def test_a_bad_option_raises_at_construction_and_names_itself(options, error, match):
    with pytest.raises(error, match=match):
        ClusterMetricsCallback(**options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"module": "mixture"}, ValueError, r"`module` to name a submodule of Toy \('encoder', 'idle', 'gmm'\)"),
        ({"embeddings": "encoders"}, ValueError, "`embeddings` to name a submodule of Toy"),
        ({"embeddings": "outputs:h"}, ValueError, r"`validation_step` to return .* with 'h' .* got \['y', 'z'\]"),
        ({"embeddings": "idle"}, RuntimeError, "rows in every validation_step, but its forward was not called"),
        ({"targets": "outputs:t"}, ValueError, r"with 't' for targets='outputs:t', but got \['y', 'z'\]"),
        ({"targets": 2}, ValueError, "Expected the batch to hold targets=2, but got 2 elements"),
        ({"targets": "y"}, ValueError, "Expected the batch to hold targets='y', but got 2 elements"),
        ({"targets": 0}, TypeError, "targets=0 to give integers, but got torch.float32"),
    ],
)
def test_a_name_that_does_not_exist_raises_and_lists_what_does(options, error, match):
    callback = ClusterMetricsCallback(**options, **({"n_classes": 3} if "targets" in options else {}))
    with pytest.raises(error, match=match):
        trainer(callback).validate(labels_in_outputs(started()), batches(*labelled()), verbose=False)


def test_labels_beyond_the_classes_raise():
    with pytest.raises(ValueError, match=r"`target` to hold integers in \[0, 2\), but got \[0, 1, 2\]"):
        trainer(ClusterMetricsCallback(targets=1, n_classes=2)).validate(started(), batches(*labelled()), verbose=False)


def test_embeddings_of_the_wrong_width_raise():
    model = Toy()
    model.gmm = GaussianMixture(3, 5)
    model.validation_step = lambda batch, batch_idx: model.encoder(batch[0])
    with pytest.raises(ValueError, match=r"Expected `x` of shape \(..., 5\)"):
        trainer(ClusterMetricsCallback()).validate(model, batches(*labelled()), verbose=False)
