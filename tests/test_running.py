"""What surrounds a run: its checks, its folder, its interrupts, its table, and the table of a sweep."""

import math
import os
import shlex
import signal
import sys
from pathlib import Path

import lightning
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments.errors import explain
from tgmm_nn.experiments.interrupt import InterruptCheckpoint
from tgmm_nn.experiments.options import build, build_named, check_keys
from tgmm_nn.experiments.reports import format_table, if_started
from tgmm_nn.experiments.running import contents, discard, fit, open_folder, resume_command, words_of_run
from tgmm_nn.experiments.sweeps import SweepTable, combine, planned_runs, read_sweep

# ------------------------------------------------------------------------------------------------------------- options


def test_a_node_that_takes_any_key_or_cannot_be_imported_is_left_to_its_building():
    check_keys(OmegaConf.create({"model": {"_target_": "torchmetrics.MeanMetric", "whatever": 1}}))
    check_keys(OmegaConf.create({"model": {"_target_": "no_such_package.Thing", "whatever": 1}}))
    with pytest.raises(
        ValueError, match=r"Expected a key of the config's `model.encoder`, one of sizes, but got 'foo'"
    ):
        check_keys(
            OmegaConf.create({"model": {"encoder": {"_target_": "tgmm_nn.experiments.networks.Perceptron", "foo": 1}}})
        )


def test_a_node_that_is_switched_off_builds_nothing_and_one_without_a_target_is_refused():
    off = OmegaConf.create({"_target_": None, "module": "gmm"})
    on = OmegaConf.create({"_target_": "lightning.pytorch.callbacks.Timer"})
    assert build(off) is None
    assert build(None) is None
    assert [type(c).__name__ for c in build_named(lightning.Callback, {"em": off, "timer": on})] == ["Timer"]
    with pytest.raises(TypeError, match=r"Expected `callbacks.tmer` to build a Callback, .*; is the name missp"):
        build_named(lightning.Callback, {"callbacks.tmer": OmegaConf.create({"duration": None})})


def failing(config, key):
    """Return the error of building a part of a config."""
    with pytest.raises(InstantiationException) as caught:
        instantiate(OmegaConf.create(config)[key])
    return caught.value


def test_an_error_in_building_is_its_own_sentence_and_the_place_of_it():
    error = failing({"gmm": {"_target_": "tgmm_nn.GaussianMixture", "n_components": 0, "n_features": 2}}, "gmm")
    assert explain(error) == "Expected `n_components` to be at least 1, but got 0 (in `gmm`)."


def test_a_missing_package_of_a_logger_is_a_sentence_that_says_what_to_install():
    missing = InstantiationException("Error in call to target 'WandbLogger':\nNo\nfull_key: logger.wandb")
    missing.__cause__ = ModuleNotFoundError("No module named 'wandb'")
    assert explain(missing) == (
        "Expected the package `wandb` for logger=wandb, but it is missing: run `pip install wandb`."
    )


@pytest.mark.parametrize("error", [ValueError("boom"), KeyError("x"), OSError("no file")])
def test_an_error_that_no_option_caused_keeps_its_traceback(error):
    assert explain(error) is None


def test_errors_of_torch_keep_their_traceback_though_they_begin_as_ours_do():
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel") as of_torch:
        torch.nn.BatchNorm1d(2)(torch.zeros(1, 2))
    assert explain(of_torch.value) is None
    with pytest.raises(ValueError, match=r"^Expected `n_components` to be at least 1") as ours:
        GaussianMixture(0, 2)
    assert explain(ours.value) == str(ours.value)


def test_a_file_out_of_reach_is_a_sentence_that_says_where_a_run_writes():
    said = "Expected to read and write '/a', but got 'Permission denied'; a run writes where hydra.run.dir=FOLDER says."
    assert explain(PermissionError(13, "Permission denied", "/a")) == said


def test_a_reference_to_what_is_missing_is_a_sentence():
    cfg = OmegaConf.create({"gmm": {"n_classes": "${data.n_classes}"}, "data": {}})
    with pytest.raises(Exception, match="n_classes") as caught:
        str(cfg.gmm.n_classes)
    assert explain(caught.value) == "Interpolation key 'data.n_classes' not found"


# -------------------------------------------------------------------------------------------------------------- folder


def test_only_a_folder_without_a_trained_thing_is_discarded_and_none_above_the_current_one(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name in ("outputs/a/1", "outputs/a/2", "kept"):
        (here / name / ".hydra").mkdir(parents=True)
        (here / name / "config.yaml").write_text("# python train.py\nseed: 0\n")
    (here / "kept" / "metrics.csv").write_text("epoch\n")
    discard(here / "outputs" / "a" / "1")
    assert (here / "outputs" / "a" / "2").exists()
    discard(here / "outputs" / "a" / "2")
    assert not (here / "outputs").exists()
    discard(here / "kept")
    discard(here / "nowhere")
    assert sorted(path.name for path in (here / "kept").iterdir()) == [".hydra", "config.yaml", "metrics.csv"]
    (here / "mine").mkdir()
    (here / "mine" / "config.yaml").write_text("of: somebody else\n")
    discard(here / "mine")
    assert (here / "mine" / "config.yaml").read_text() == "of: somebody else\n"
    with pytest.raises(ValueError, match=r"`hydra.run.dir` to be new, but .*mine holds the config.yaml of an earlier"):
        open_folder(here / "mine", "seed: 3\n")
    (tmp_path / "elsewhere" / "run").mkdir(parents=True)
    discard(tmp_path / "elsewhere" / "run")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_list_of_files_joins_those_of_a_kind_and_leaves_out_none(tmp_path):
    for name in (".hydra/config.yaml", "config.yaml", "latent_epoch_0000.png", "latent_epoch_0001.png", "mine.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    lines = [line.split(maxsplit=1) for line in contents(tmp_path).splitlines()]
    assert [line[0] for line in lines] == ["config.yaml", "latent_epoch_*.png", "mine.txt"]
    assert lines[1][1].startswith("(2) ")


def test_the_config_of_a_run_begins_with_the_command_that_made_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=3", "name=a b"])
    text = open_folder(tmp_path / "run", "seed: 3\n")
    assert text == (tmp_path / "run" / "config.yaml").read_text()
    assert text.splitlines()[0] == "# python train.py seed=3 'name=a b'"
    assert OmegaConf.load(tmp_path / "run" / "config.yaml") == {"seed": 3}


def test_a_checkpoint_whose_path_is_no_plain_word_is_quoted_for_hydra_and_the_shell():
    command = resume_command(["train.py"], Path("a=1, b/last.ckpt"))
    assert command == """python train.py 'ckpt_path='"'"'a=1, b/last.ckpt'"'"''"""


@pytest.mark.parametrize(
    "path",
    [
        "run/last.ckpt",
        "it's/last.ckpt",
        "a b/'x'.ckpt",
        "back\\'s/l.ckpt",
        "end\\",
        "größe.ckpt",
        'a"b,c={}.ckpt',
        "$x",
    ],
)
def test_a_resume_command_is_read_by_the_shell_and_by_hydra_as_the_path_that_it_names(path):
    *words, last = shlex.split(resume_command(["train.py", "seed=1"], Path(path)))
    assert words == ["python", "train.py", "seed=1"]
    assert OverridesParser.create().parse_override(last).value() == path


def test_the_command_of_a_run_of_a_sweep_is_that_run_alone():
    argv = ["train.py", "--multirun", "hparams_search=components", "--config-dir", "mine", "~logger", "seed=0,1"]
    of_hydra = ["hydra.mode=MULTIRUN", "hydra.sweep.dir=x", "hydra/launcher=joblib", "hydra.searchpath=[mine]"]
    of_run = ["hparams_search=components", "~logger=", "seed=1"]
    words = ["train.py", "--config-dir", "mine", "hydra.searchpath=[mine]", *of_run, "hydra.mode=RUN"]
    assert words_of_run(argv, of_run, of_hydra) == words


# ------------------------------------------------------------------------------------------------------------ interrupt


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC(lightning.Callback):
    """Sends the signal in a step, before its end."""

    def __init__(self, step, times=1):
        self.step, self.times, self.ended = step, times, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ended.append(trainer.global_step)


class LateCtrlC(lightning.Callback):
    """Sends the signal behind the last step."""

    def __init__(self, hook):
        setattr(self, hook, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def trainer_with(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return lightning.Trainer(callbacks=list(callbacks), enable_checkpointing=False, **quiet, **options)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*You're resuming from a checkpoint that ended before"),
]


def test_ctrl_c_finishes_the_step_saves_and_gives_the_signal_back(tmp_path, capsys):
    ctrl_c, callback = CtrlC(step=3), InterruptCheckpoint(str(tmp_path))
    model = BoringModel()
    with pytest.raises(SystemExit):
        fit(trainer_with(ctrl_c, callback, max_epochs=1), model, None, None)
    assert ctrl_c.ended[-1] == 4  # the fourth step came to its end
    saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    torch.testing.assert_close(saved["state_dict"], dict(model.state_dict()))
    error = capsys.readouterr().err
    assert "Finishing this step" in error
    assert f"ckpt_path={tmp_path / 'interrupted.ckpt'}" in error
    with pytest.raises(KeyboardInterrupt):  # after training it is what it was
        os.kill(os.getpid(), signal.SIGINT)

    go_on = trainer_with(InterruptCheckpoint(str(tmp_path)), max_epochs=1)
    fit(go_on, BoringModel(), None, str(tmp_path / "interrupted.ckpt"))
    assert go_on.global_step == 64
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("hook", ["on_train_end", "on_validation_end", "on_train_epoch_end"])
def test_ctrl_c_behind_the_last_step_is_not_lost(hook, tmp_path, capsys):
    few = {"limit_train_batches": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 1}
    with pytest.raises(SystemExit):
        fit(trainer_with(LateCtrlC(hook), InterruptCheckpoint(str(tmp_path)), **few), BoringModel(), None, None)
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 2
    assert f"ckpt_path={tmp_path / 'interrupted.ckpt'}" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_stops_at_once(tmp_path, capsys):
    ctrl_c = CtrlC(step=3, times=2)
    with pytest.raises(SystemExit):
        fit(trainer_with(ctrl_c, InterruptCheckpoint(str(tmp_path)), max_epochs=1), BoringModel(), None, None)
    assert ctrl_c.ended[-1] == 3
    assert not list(tmp_path.iterdir())
    assert "Interrupted in epoch 0, before a checkpoint was saved." in capsys.readouterr().err


def test_a_ctrl_c_that_the_caller_ignores_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctrl_c, trainer = CtrlC(step=3), trainer_with(InterruptCheckpoint(str(tmp_path)), max_epochs=1)
    trainer.callbacks.append(ctrl_c)
    fit(trainer, BoringModel(), None, None)
    assert trainer.global_step == 64
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["dirpath", "filename"])
def test_options_of_the_interrupt_are_checked(option):
    with pytest.raises(TypeError, match=f"Expected `{option}` to be a non-empty string"):
        InterruptCheckpoint(**{"dirpath": "x", option: 3})


# --------------------------------------------------------------------------------------------------------------- tables


def test_a_mixture_that_em_never_started_has_no_numbers_in_a_table():
    row = {"method": "mixture", "nmi": 0.5}
    fresh = if_started(GaussianMixture(2, 2), row)
    assert fresh == {"method": "mixture: not started, EM never ran", "nmi": ""}
    assert if_started(GaussianMixture(2, 2, max_iter=500).fit(torch.randn(50, 2)), row) == row
    assert format_table([fresh, {"method": "k-means", "nmi": 0.25}]).splitlines()[1:] == [
        "mixture: not started, EM never ran",
        "k-means                             0.250",
    ]


def test_a_sweep_is_read_in_the_order_of_its_runs_and_combined_over_seeds_alone(tmp_path):
    values = {}
    for number in range(12):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        seed, prior = number % 3, ("none", "niw")[number // 3 % 2]
        OmegaConf.save([f"seed={seed}", f"+prior={prior}", "debug=fast"], folder / ".hydra" / "overrides.yaml")
        if number != 11:
            values.setdefault(prior, []).append(0.1 * number)
            (folder / "results.csv").write_text(f"method,nmi,note\nmixture,{0.1 * number},\n")
    runs = read_sweep(tmp_path)
    assert [overrides["seed"] for overrides, _ in runs] == [str(n % 3) for n in range(12)]
    assert runs[11][1] == []
    rows = combine(runs)
    assert [(row["prior"], row["runs"]) for row in rows] == [("none", 6), ("niw", 5)]
    for row in rows:
        assert "debug" not in row  # the same in all
        seen = torch.tensor(values[row["prior"]], dtype=torch.float64)
        assert math.isclose(row["nmi"], float(seen.mean()))
        assert math.isclose(row["nmi_sd"], float(seen.std()))
        assert row["note"] == ""


BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@pytest.mark.parametrize(
    ("task", "params", "runs"),
    [
        (["seed=0,1", "+a=x"], {"k": "3,4"}, [{"k": k, "seed": s, "a": "x"} for k in "34" for s in "01"]),
        (["seed=range(0,3)"], None, [{"seed": s} for s in "012"]),
        (["k=5"], {"k": "3,4"}, [{"k": "5"}]),
        (["experiment=glob(*)"], None, []),
    ],
)
def test_the_runs_that_a_sweep_plans_are_all_combinations_in_order(task, params, runs):
    sweeper = {"_target_": BASIC, "params": params}
    config = OmegaConf.create({"hydra": {"sweeper": sweeper, "overrides": {"task": task}}})
    assert planned_runs(config) == runs
    config.hydra.sweeper._target_ = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    assert planned_runs(config) == []


def test_a_single_run_has_no_deviation():
    (row,) = combine([({"seed": "0"}, [{"method": "a", "nmi": "0.5"}])])
    assert row == {"method": "a", "runs": 1, "nmi": 0.5, "nmi_sd": ""}


def test_marks_are_counted_where_numbers_are_averaged():
    """As `choose_components` marks the size that it chose: here 2 of three times, and 4 never."""
    runs = [
        ({"seed": seed}, [{"method": k, "bic": bic, "chosen": mark} for k, bic, mark in table])
        for seed, table in {
            "0": [("2", "1.0", "*"), ("3", "2.0", ""), ("4", "5.0", "")],
            "1": [("2", "3.0", "*"), ("3", "4.0", ""), ("4", "", "")],
            "2": [("2", "5.0", ""), ("3", "3.0", "*"), ("4", "5.0", "")],
        }.items()
    ]
    rows = combine(runs)
    assert [row["chosen"] for row in rows] == [2, 1, 0]
    assert [row["bic"] for row in rows] == [3.0, 3.0, 5.0]
    assert all("chosen_sd" not in row for row in rows)


def test_the_key_of_a_sweeps_means_is_checked():
    with pytest.raises(TypeError, match="Expected `over` to be a non-empty string"):
        SweepTable(over=3)


def test_tables_of_runs_that_differ_in_their_columns_are_joined_and_what_a_run_lacks_is_empty():
    runs = [
        ({"seed": "0", "model": "a"}, [{"method": "mixture", "accuracy": "0.5", "nmi": "0.25"}]),
        ({"seed": "1", "model": "a"}, [{"method": "mixture", "accuracy": "0.7", "nmi": "0.75", "ari": "1.0"}]),
        ({"seed": "0", "model": "b"}, [{"method": "mixture", "accuracy": "0.9", "log p(x)": "-3.0"}]),
    ]
    rows = combine(runs)
    assert (rows[0]["nmi"], rows[0]["ari"], "nmi" in rows[1]) == (0.5, 1.0, False)
    shown = format_table([{"method": "a", "nmi": 0.5}, {"method": "b", "log p(x)": -3.0}]).splitlines()
    assert shown == ["method    nmi  log p(x)", "a       0.500", "b                -3.000"]
