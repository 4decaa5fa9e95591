"""``python train.py``: what it writes, prints, resumes and refuses."""

import csv
import importlib.util
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

ROOT = Path(__file__).parents[1]
QUICK = [
    "trainer.max_epochs=3",
    "em.start_epoch=1",
    "gmm.n_init=1",
    "callbacks.latent_plot.every_n_epochs=2",
    "callbacks.checkpoint.every_n_epochs=1",
    "trainer.enable_progress_bar=false",
]
QUIET = "trainer.enable_progress_bar=false"
DEBUG = ["debug=fast", QUIET, "callbacks.latent_plot=null"]
CHOICE = [
    "experiment=choose_components",
    "model.candidates=[1,2]",
    "model.n_seeds=1",
    "model.max_rows=60",
    "gmm.n_init=1",
]
VADE = ["experiment=digits_vade", "model.pretrain_epochs=1"]
EXPERIMENTS = sorted(file.stem for file in (ROOT / "configs" / "experiment").glob("*.yaml"))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


PRINT_PNG = FigureCanvasAgg.print_png


@pytest.fixture(scope="module", autouse=True)
def _cheap_pictures():
    """Figures are made, but not drawn: half of a short run is drawing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file, **options: Image.new("L", (1, 1)).save(file))
        yield


@pytest.fixture
def drawn_pictures(monkeypatch):
    """Of a test that looks at the pictures."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", PRINT_PNG)


@contextmanager
def clean_state():
    """Hydra keeps its state and replaces the handlers of the root logger; leave both as they were."""
    handlers, level = list(logging.root.handlers), logging.root.level
    threads = torch.get_num_threads()
    yield
    GlobalHydra.instance().clear()
    for handler in set(logging.root.handlers) - set(handlers):
        handler.close()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _clean_state():
    with clean_state():
        yield


def run_train(folder, *overrides):
    """Run ``train.py`` in this process with overrides, or a sweep with -m, in a folder of its own; return that."""
    where = [] if folder is None else [f"hydra.{'sweep' if '-m' in overrides else 'run'}.dir={folder}"]
    with pytest.MonkeyPatch.context() as patch, clean_state():
        patch.setattr(sys, "argv", ["train.py", *sorted([*where, *overrides], key=lambda text: text != "-m")])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return folder


@pytest.fixture
def train(tmp_path):
    """`run_train` in a folder of the test."""
    return lambda *overrides, folder="run": run_train(tmp_path / folder, *overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that tests share."""
    return run_train(tmp_path_factory.mktemp("finished") / "run", *DEBUG)


def test_pictures_of_these_tests_are_not_drawn(finished):
    pictures = sorted(finished.glob("*.png"))
    assert len(pictures) > 5
    for picture in pictures:
        with Image.open(picture) as image:
            assert image.size == (1, 1), picture


def interrupted(*args, **options):
    raise KeyboardInterrupt


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("drawn_pictures")
def test_a_run_writes_what_the_readme_lists_and_resumes(train, capsys):
    folder = train(*QUICK, "gmm.covariance_type=tied_full", "gmm.n_components=8", "seed=3")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {
        *(f"{name}.png" for name in ("latent", "density", "contingency", "components", "samples", "weights", "curves")),
        *("latent_epoch_0000.png", "latent_epoch_0002.png", "latent.gif", "weights.csv"),
    }
    assert {"config.yaml", "metrics.csv", "results.csv", "checkpoints/last.ckpt", *pictures} <= names
    assert all((folder / name).stat().st_size > 10_000 for name in pictures - {"weights.csv"})

    printed = capsys.readouterr().out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seed"], config["gmm"]["random_state"], config["gmm"]["n_components"]) == (3, 3, 8)
    assert config["model"]["gmm"] == "${gmm}"  # once, and the file still loads
    assert printed.startswith(f"# python {ROOT / 'train.py'} hydra.run.dir=")
    assert printed.startswith((folder / "config.yaml").read_text())
    rows = table(folder)
    assert [row["method"] for row in rows] == [
        "mixture carried through training (tied_full)",
        "k-means on the embeddings",
        "k-means on pixels",
        "full mixture on pixels (reg_covar=0.01)",
    ]
    assert all(0 < float(row[score]) < 1 for row in rows for score in ("accuracy", "nmi", "ari"))
    assert float(rows[2]["accuracy"]) > 0.7
    assert all(row["method"] in printed for row in rows)
    assert str(folder) in printed

    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert int(checkpoint["state_dict"]["gmm.n_updates"]) == 8  # one epoch of eight batches after the start
    assert checkpoint["state_dict"]["gmm._extra_state"]["covariance_type"] == "tied_full"

    resumed = train(
        *QUICK, "gmm.covariance_type=tied_full", "gmm.n_components=8", "seed=3", "trainer.max_epochs=4",
        f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", folder="resumed",
    )  # fmt: skip
    again = torch.load(resumed / "checkpoints" / "last.ckpt", weights_only=True)
    assert again["epoch"] == 3
    assert int(again["state_dict"]["gmm.n_updates"]) == 16  # it went on, and nothing was started anew


def test_another_mixture_than_the_checkpoints_is_one_message(train, finished):
    checkpoint = finished / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match=r"`gmm.covariance_type` as the .* trained with, 'full', but got 'diag'"):
        train(*DEBUG, f"ckpt_path={checkpoint}", "gmm.covariance_type=diag")


def test_a_run_that_breaks_off_says_the_command_that_goes_on_from_its_last_checkpoint(train, capsys, monkeypatch):
    from tgmm_nn.experiments.contrastive import ContrastiveClustering

    def interrupt(self, *args):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ContrastiveClustering, "on_train_batch_start", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        train(*QUICK)
    error = capsys.readouterr().err
    command = re.search(r"Interrupted in epoch 1; resume by\n  (python \S+train.py .*)", error).group(1)
    *overrides, checkpoint = command.split()[2:]
    assert overrides == QUICK  # and not hydra.run.dir: it goes on in a folder of its own
    assert torch.load(checkpoint.removeprefix("ckpt_path="), weights_only=True)["epoch"] == 0
    assert getattr(stop.value, "code", 1) not in (0, None)


@pytest.mark.slow
def test_ctrl_c_in_the_first_epoch_leaves_a_checkpoint_and_the_printed_command_resumes(tmp_path):
    """Processes of their own, in another folder; to the first the signal is sent while it trains."""
    overrides = [*DEBUG, "data.batch_size=2", "trainer.limit_train_batches=1.0", "trainer.max_epochs=1"]
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides, "hydra.run.dir=first"],
            cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT,
        )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "first" / "config.yaml").exists() and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "said.txt").read_text()
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 1
    text = (tmp_path / "said.txt").read_text()
    assert "Finishing this step, to save a checkpoint" in text
    assert "Traceback" not in text
    assert "Warning" not in text
    checkpoint = tmp_path / "first" / "checkpoints" / "interrupted.ckpt"
    command = re.search(r"Interrupted in epoch 0; resume by\n  python (.*)", text).group(1)
    assert command.endswith(f" ckpt_path={checkpoint}")
    saved = torch.load(checkpoint, weights_only=True)
    assert 0 < saved["global_step"] < 899

    again = [sys.executable, *shlex.split(command)]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "k-means on pixels" in done.stdout
    [second] = (tmp_path / "outputs" / "digits_contrastive").glob("*")
    last = torch.load(second / "checkpoints" / "last.ckpt", weights_only=True)
    assert (last["epoch"], last["global_step"]) == (0, 899)  # each step of the epoch once: it went on where it was


def test_resuming_a_run_that_has_finished_says_so_and_reports_again(train, finished, capsys):
    before = table(finished)
    again = train(*DEBUG, f"ckpt_path={finished / 'checkpoints' / 'last.ckpt'}", "logger=none")
    assert not (again / "metrics.csv").exists()
    printed = capsys.readouterr().out
    assert "Nothing was trained: " in printed
    assert "had finished its 2 epochs; to go on, raise trainer.max_epochs above 2." in printed
    assert table(again)[0] == before[0]


# The first row of each experiment's table, and pictures of its own.
REPORTS = {
    "choose_components": ("1 components, full", ["criterion.png"]),
    "digits_contrastive": ("mixture carried through training (full)", ["latent.gif", "components.png"]),
    "digits_generative_classifier": ("mixture for each class", ["classes.png"]),
    "digits_ood": ("log-density, a Gaussian for each class", ["outliers.png"]),
    "digits_vade": ("mixture at its end", ["latent.png", "components.png"]),
    "embeddings": ("mixture (full)", ["latent.png"]),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_with_debug_fast_and_names_every_file_that_it_leaves(experiment, train, capsys):
    folder = train(f"experiment={experiment}", "debug=fast", QUIET)
    printed = capsys.readouterr().out
    rows, (first, pictures) = table(folder), REPORTS[experiment]
    assert rows[0]["method"] == first
    assert len(rows) > 1
    assert all(row["method"] in printed for row in rows)
    listed = printed.rpartition("Everything lies in ")[2].splitlines()
    assert listed[0] == str(folder)
    kinds = {line.split()[0]: line.split(maxsplit=1)[1] for line in listed[1:]}  # a word for each
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for file in files:
        assert file.parts[0] == ".hydra" or any(file.match(kind) for kind in kinds), file
    assert not list(folder.glob("*.log"))
    assert all((folder / name).exists() for name in pictures)
    if experiment != "choose_components":
        assert (folder / "curves.png").exists()
        saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert int(next(value for name, value in saved.items() if name.endswith("fitted"))) == 1  # the mixture travels


def test_a_resume_refuses_what_the_checkpoint_decides_and_takes_the_rest(train, finished, tmp_path):
    ckpt = f"ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"
    for option, name, was, by, how in (
        ("model.learning_rate=0.5", "", "0.001, but got 0.5", "optimizer", "set model.learning_rate=0.001, or start"),
        ("model.weight_decay=0", "", "1e-05, but got 0", "optimizer", "set model.weight_decay=1e-05, or start anew"),
        ("gmm.n_components=7", "", "10, but got 7", "mixture", "set gmm.n_components=10, or start anew without"),
        ("gmm.n_init=7", "", "1, but got 7", "mixture, as it was started,", "set gmm.n_init=1, or start anew without"),
        (
            "experiment=digits_vade",
            "model._target_",
            "'.*', but got '.*'",
            "model",
            "give the experiment that it is of",
        ),
    ):
        asked = f"Expected `{name or option.split('=')[0]}` as the checkpoint was trained with, {was}"
        match = f"{asked}; a resume goes on with the {by} of .*last.ckpt: {how}"
        with pytest.raises(SystemExit, match=match):
            train(*DEBUG, ckpt, option, folder="refused")
        assert not (tmp_path / "refused").exists()
    with pytest.raises(
        SystemExit, match=r"^Expected the model and data that `ckpt_path` .* size mismatch for .*; give"
    ):
        train(*DEBUG, ckpt, "model.encoder.sizes=[64,32,10]", folder="refused")
    with pytest.raises(SystemExit, match=r"^Expected `trainer.max_epochs` above the epochs that .*, but got 0"):
        train(*DEBUG, ckpt, "trainer.max_epochs=0", folder="refused")
    assert not (tmp_path / "refused").exists()
    np.savez(tmp_path / "wide.npz", x=np.eye(70))
    with pytest.raises(SystemExit, match=r"`x` of .*wide.npz with 64 features, .* but got 70; name rows .* data.path"):
        train(*DEBUG, ckpt, "data=npz", f"data.path={tmp_path / 'wide.npz'}")
    train(
        *DEBUG,
        ckpt,
        "trainer.max_epochs=3",
        "em.step_size=0.1",
        "callbacks.interrupt=null",
        "gmm.reg_covar=0.2",
        folder="on",
    )


def test_a_config_beside_a_checkpoint_that_is_no_yaml_is_one_sentence(train, finished, tmp_path):
    copied = tmp_path / "copied" / "checkpoints"
    copied.mkdir(parents=True)
    shutil.copy(finished / "checkpoints" / "last.ckpt", copied)
    (copied.parent / "config.yaml").write_text("a: [1")
    with pytest.raises(SystemExit, match=r"^Expected the config.yaml of the run that saved .* but it is no YAML"):
        train(*DEBUG, f"ckpt_path={copied / 'last.ckpt'}")
    assert not (tmp_path / "run").exists()


def test_a_sweep_without_a_result_removes_its_own_folders_alone(train, tmp_path):
    (tmp_path / "sweep" / "mine").mkdir(parents=True)
    with pytest.raises(SystemExit):
        train("-m", *DEBUG, "gmm.n_components=-1,-2", folder="sweep")
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"mine", "multirun.yaml"}


def test_a_resume_refuses_another_scaling_than_the_checkpoints(train, tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).normal(size=(60, 5)))
    rows = [*DEBUG, "data=npz", f"data.path={tmp_path / 'rows.npz'}", "gmm.n_components=2", "data.scale=3"]
    folder = train(*rows, "logger=none")
    with pytest.raises(SystemExit, match=r"Expected `data.scale` as .* 3, but got None; .* the scaling of the rows of"):
        train(*rows, "data.scale=null", f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", folder="refused")


def test_ctrl_c_in_the_report_says_that_training_is_finished_and_how_to_make_the_report(train, capsys, monkeypatch):
    monkeypatch.setattr("tgmm_nn.experiments.reports.draw_density", interrupted)
    with pytest.raises(SystemExit) as stop:
        train(*DEBUG)
    assert stop.value.code == 1
    said = re.search(r"training is finished. Make the report again by\n  (.*)", capsys.readouterr().err).group(1)
    monkeypatch.undo()
    words = shlex.split(said)[2:]
    assert words[:-1] == DEBUG
    train(*words, folder="again")
    assert "Nothing was trained" in capsys.readouterr().out


def test_ctrl_c_before_anything_was_saved_is_a_word_and_leaves_nothing(train, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("tgmm_nn.experiments.digits.load_digits", interrupted)
        with pytest.raises(SystemExit, match="Interrupted"):
            train(*DEBUG)
        with pytest.raises(SystemExit, match="Interrupted"):
            train(*DEBUG, "-m", "seed=0,1", folder="sweep")
    assert "The sweep was interrupted; 2 of 2 runs are left:\n  seed=0\n  seed=1\n" in capsys.readouterr().out
    monkeypatch.setattr("tgmm_nn.experiments.choice.ComponentChoice.trials", interrupted)
    with pytest.raises(SystemExit):
        train(*CHOICE)
    assert "Interrupted before there was a table." in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_sweep_that_is_interrupted_has_a_table_and_says_what_is_left(train, capsys, monkeypatch, tmp_path):
    from tgmm_nn.experiments.identity import EmbeddingClustering

    swept = ["experiment=embeddings", "debug=fast", "callbacks.latent_plot=null", "logger=none"]
    step = EmbeddingClustering.training_step
    monkeypatch.setattr(
        EmbeddingClustering,
        "training_step",
        lambda self, *batch: interrupted() if self.gmm.random_state == 1 and self.current_epoch else step(self, *batch),
    )
    with pytest.raises(SystemExit) as stop:
        train(*swept, "-m", "seed=0,1,2", folder="sweep")
    assert stop.value.code == 1
    printed = capsys.readouterr()
    words = shlex.split(re.search(r"resume by\n  python (.*)", printed.err).group(1))[1:]
    assert words == [*swept, "seed=1", f"ckpt_path={tmp_path / 'sweep' / '1' / 'checkpoints' / 'last.ckpt'}"]
    assert "The sweep was interrupted; 2 of 3 runs are left:\n  seed=1\n  seed=2\n" in printed.out
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        assert {row["runs"] for row in csv.DictReader(file)} == {"1"}


def test_one_checkpoint_for_all_runs_of_a_sweep_is_refused(train, finished, tmp_path):
    ckpt = f"ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(SystemExit, match=r"Expected no `ckpt_path` for all runs of a sweep, .* but got '.*last.ckpt'"):
        train(*DEBUG, "-m", "seed=0,1", ckpt, folder="sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_over_experiments_has_one_table_and_prints_no_config(train, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = ["experiment=embeddings,digits_generative_classifier", "debug=fast", "callbacks=none", "logger=none"]
    run_train(None, "-m", *swept)
    printed = capsys.readouterr().out
    assert "learning_rate" not in printed
    [folder] = (tmp_path / "multirun").iterdir()
    with (folder / "sweep.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert rows["mixture (full)"]["nmi"]
    assert not rows["mixture (full)"]["cross-entropy"]
    assert rows["softmax layer"]["cross-entropy"]
    assert not rows["softmax layer"]["nmi"]


def test_the_help_names_groups_options_and_commands_that_compose(train, capsys):
    with suppress(SystemExit):  # with code 0
        train("--help")
    printed = capsys.readouterr().out
    assert re.search(r"^em: accumulate, default, full, .*off$", printed, re.MULTILINE)
    assert "README.md" in printed
    assert "configs/" in printed
    commands = re.findall(r"^python train.py(.*?)(?:  |$)", printed, re.MULTILINE)
    assert len(commands) == 4
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for words in map(str.split, commands):
            values = [word.split(",")[0] for word in words if word != "-m"]  # of a sweep the first
            assert ("-m" in words) == any("," in word for word in words)
            cfg = compose("train", [*values, "paths.output_dir=out"])
            assert cfg.data.get("path") in (None, "FILE.npz", "NEW.npz")


def test_a_run_says_what_it_understood_and_what_its_accuracy_matches(train, capsys):
    train("experiment=embeddings", "debug=fast", "callbacks=none", "logger=none", "gmm.n_components=12")
    printed = capsys.readouterr()
    assert "Rows of scikit-learn's digits: 1797 rows of 64 features, images of 8 x 8; 10 classes" in printed.out
    assert "for rows of your own, set data=npz data.path=FILE.npz" in printed.out
    assert "one to one, 12 with 10: for as many, set gmm.n_components=10." in printed.out
    assert "it/s" not in printed.out + printed.err  # no terminal, no progress bar
    assert "enable_progress_bar: false" in printed.out


def test_how_a_mixture_did_at_its_start_is_told_after_a_resume(train):
    vade = [*DEBUG, *VADE]
    folder = train(*vade, "trainer.max_epochs=1")
    [start] = [row for row in table(folder) if row["method"] == "mixture at its start"]
    resumed = train(*vade, f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}", folder="resumed")
    rows = {row["method"]: row for row in table(resumed)}
    assert rows["mixture at its start"] == start
    assert rows["mixture at its end"]["elbo"] != start["elbo"]


@pytest.mark.parametrize("experiment", ["digits_ood", "digits_generative_classifier"])
def test_of_one_class_of_one_component_all_held_out_rows_are(experiment, train):
    folder = train(f"experiment={experiment}", *DEBUG[:2], "data.n_classes=1", "gmm.components_per_class=1")
    assert {row["accuracy"] for row in table(folder)} <= {"1.0", ""}
    assert table(folder)[0]["accuracy"] == "1.0"


# One for each kind of report.
@pytest.mark.parametrize("experiment", ["digits_contrastive", "digits_ood", "digits_generative_classifier"])
def test_without_em_a_run_works_and_its_table_says_that_the_mixture_was_not_started(experiment, train, capsys):
    folder = train(f"experiment={experiment}", *DEBUG[:2], "em=off")
    rows = table(folder)
    marked = [row for row in rows if row["method"].endswith(": not started, EM never ran")]
    assert rows[0] in marked
    assert all(value == "" for row in marked for name, value in row.items() if name != "method")
    others = [row for row in rows if row not in marked]
    assert others
    assert all(any(value for name, value in row.items() if name != "method") for row in others)


def test_a_sweep_ends_with_a_table_of_mean_and_deviation_over_seeds(train, tmp_path, capsys):
    swept = [*DEBUG, "-m", "seed=0,1", "gmm.n_components=3,4"]
    train(*swept, folder="sweep")
    printed = capsys.readouterr().out
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["gmm.n_components"] for row in rows] == ["3"] * 4 + ["4"] * 4
    runs = [table(tmp_path / "sweep" / str(number)) for number in range(4)]
    for row in rows:
        first = 0 if row["gmm.n_components"] == "3" else 1  # seeds change last: 0, 2 and 1, 3
        reached = [float(r["nmi"]) for n in (first, first + 2) for r in runs[n] if r["method"] == row["method"]]
        assert row["runs"] == "2"
        assert float(row["nmi"]) == pytest.approx(sum(reached) / 2)
        assert float(row["nmi_sd"]) == pytest.approx(abs(reached[0] - reached[1]) / 2**0.5)
        assert f"{float(row['nmi']):.3f} ± {float(row['nmi_sd']):.3f}" in printed
    assert printed.rstrip().endswith("sweep.csv  the table")


def test_a_table_that_cannot_be_made_fails_the_sweep(train, monkeypatch):
    """Hydra itself would only warn."""
    monkeypatch.setattr("tgmm_nn.experiments.sweeps.combine", lambda *_: 1 / 0)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(UserWarning, match=r"SweepTable.on_multirun_end raised ZeroDivisionError"):
            train(*CHOICE, "-m", "seed=0", folder="sweep")


def test_a_sweep_of_a_choice_counts_how_often_each_size_was_chosen(train, tmp_path, capsys):
    train(*CHOICE, "-m", "seed=0,1", folder="sweep")
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["chosen"]) for row in rows) == 2  # one in each run
    assert "chosen" in capsys.readouterr().out


def test_a_sweep_goes_on_past_a_run_that_fails_and_then_fails(train, tmp_path, capsys):
    swept = [*DEBUG, "-m", "gmm.covariance_type=fulll,diag"]
    with pytest.raises(SystemExit, match=r"Expected `covariance_type` to be one of .* but got 'fulll'"):
        train(*swept, folder="sweep")
    assert "1 of 2 runs failed, and are missing above." in capsys.readouterr().out
    assert (tmp_path / "sweep" / "sweep.csv").exists()


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        (["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp"], "Expected a sweep with trainer.str"),
        (["gmm.n_componets=3"], "Expected a key of `gmm`, but got 'n_componets'; did you mean 'gmm.n_components'"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused_and_leaves_nothing(swept, message, train, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train(*DEBUG, "-m", "seed=0,1", *swept, folder="sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_sweep_runs_in_parallel_by_joblib(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    swept = ["-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *swept, *DEBUG], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"mixture carried through training \(full\) +2 +0\.\d+ ± 0\.\d+", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["trainer=ddp_sim", *VADE], ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]]
)
def test_two_processes_are_one_word_away_forked_or_each_by_a_command_of_its_own(how, tmp_path):
    """Without a limit on threads, with which a fork could hang; the report is of one process while both still run."""
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *DEBUG, *how, "hydra.run.dir=run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MEMBER: 2/2" in done.stdout + done.stderr
    rows = {row["method"]: row for row in table(tmp_path / "run")}
    assert all(float(row["accuracy"]) > 0 for row in rows.values())
    assert ("mixture at its start" in rows) == (VADE[0] in how)  # remembered in a process that is gone
    assert int(torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]["gmm.fitted"]) == 1


def test_the_progress_bar_is_richs_where_it_is_installed(tmp_path):
    """Lightning chooses by itself; the trainer's config leaves it to it."""
    from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

    from tgmm_nn.experiments.options import build

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={tmp_path}", "trainer=cpu"])
    bar = build(cfg.trainer, logger=False).progress_bar_callback
    assert isinstance(bar, RichProgressBar if importlib.util.find_spec("rich") else TQDMProgressBar)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gmm.n_componets=3", "Expected a key of `gmm`, but got 'n_componets'; did you mean 'gmm.n_components'\\?"),
        ("sed=3", "Expected a key of the config's top, but got 'sed'; did you mean 'seed'\\?"),
        ("n_components=3", "but got 'n_components'; did you mean 'gmm.n_components'\\?"),
        ("callbacks.em.mode=full", "Expected a key of `callbacks`, but got 'em'; did you mean 'em'\\?"),
        ("epochs=3", "Expected a key of the config's top, but got 'epochs'; did you mean 'trainer.max_epochs'\\?"),
        ("seed=0,1", "Expected one value for `seed`, but got '0,1'; a sweep over them takes -m before it, and a list"),
        ("--gmm.n_components", "without dashes, but got '--gmm.n_components'; write gmm.n_components="),
        ("--seed=3", "Expected options as KEY=VALUE, without dashes, but got '--seed=3'; write seed=3"),
        ("trainer.devices=9999", "Expected `trainer.devices` of at most \\d+ on this machine's CPU, but got 9999"),
        ("unheard=3", "Expected a key of the config's top, one of name, seed, .*, but got 'unheard'"),
        ("trainer.max_epoch=3", "Expected a key of `trainer`, but got 'max_epoch'; did you mean 'trainer.max_epochs'"),
        ("trainer=gpuu", "Expected `trainer` to be one of cpu, .*, but got 'gpuu'; did you mean 'gpu'\\?"),
        ("experiment=digit_vade", "Expected `experiment` to be one of .*; did you mean 'digits_vade'\\?"),
        ("em=nothing_like_it", "Expected `em` to be one of accumulate, .*, but got 'nothing_like_it'\\."),
        ("trainer.precision=7", "Precision 7 is invalid.* \\(in `trainer`\\)"),
        ("gmm.covariance_type=fulll", "Expected `covariance_type` to be one of 'full', .* but got 'fulll'"),
        ("gmm.n_components=many", "Expected `n_components` to be an integer, but got 'many'"),
        ("gmm.reg_covar=-1", "Expected `reg_covar` to be at least 0"),
        ("em.mode=stepwise", "Expected `mode` to be one of"),
        ("em.embeddings=nowhere", "Expected `embeddings` to name a submodule"),
        ("data.batch_size=0", "Expected `batch_size` to be at least 1"),
        ("seed=one", "Expected `seed` to be an integer, but got 'one'"),
        ("trainer.max_epochs=ten", "Expected `trainer.max_epochs` to be an integer, but got 'ten'"),
        ("ckpt_path=nowhere.ckpt", "Expected `ckpt_path` to be a file, but got 'nowhere.ckpt'"),
        (
            "gmm.n_components=2000",
            "Expected `n_components` of at most the 1797 rows of scikit-learn's digits, but got 2000",
        ),
        ("ckpt_path=train.py", "Expected `ckpt_path` to be a checkpoint of a run, but got 'train.py'"),
        ("gmm.n_features=0", "Expected `n_features` to be at least 1"),
        ("gmm=null", "Expected `gmm` to name an option, but got null; name one, or leave it out"),
        ("experiment=null", "Expected `experiment` to name an option, but got null"),
        ("+callbacks.foo=3", "Expected `callbacks.foo` to build a Callback, but got 3"),
        ("name=[1]", "Expected `name` to be a non-empty string"),
        ("paths.output_dir=null", "Expected `paths.output_dir` to be a non-empty string, but got None"),
        ("trainer.accumulate_grad_batches=null", "Expected `trainer.accumulate_grad_batches` to be an integer"),
        ("inputs.n_features=3", "Expected no `inputs.n_features`, which a run takes from its data"),
        ("model=outliers", "Expected `density` to be a MixtureClassifier, but got GaussianMixture; set gmm=classifier"),
        ("model.encoder.sizes=null", "Expected `sizes` with the widths of input and output at least, but got None"),
        ("model.encoder.sizes=[32,10]", "Expected `encoder` to map 64 features to 10, but got mat1 and mat2 shapes"),
        ("model.augmentation.image_shape=[4,4]", "Expected `image_shape` to multiply to the 64 features of a row"),
        ("hydra.run.dir=/proc/foo", "Expected to read and write '/proc/foo', but got 'No such file or directory'"),
    ],
)
def test_a_wrong_option_ends_with_exit_code_1_and_one_message_that_names_it(
    train, capsys, monkeypatch, tmp_path, override, message
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    outputs = set(ROOT.glob("outputs/*"))
    with pytest.raises(SystemExit) as stop:
        train(*QUICK, override)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code == 1 or isinstance(stop.value.code, str)  # a string is printed, and the code is 1
    assert len(re.findall(message, error)) == 1
    assert "Traceback" not in error
    assert not any(tmp_path.iterdir())
    assert set(ROOT.glob("outputs/*")) == outputs


@pytest.mark.parametrize("held", [{}, torch.zeros(3)], ids=["{}", "tensor"])
def test_a_file_that_is_no_checkpoint_is_refused_before_training(held, train, tmp_path):
    torch.save(held, tmp_path / "held.ckpt")
    with pytest.raises(SystemExit, match=r"Expected `ckpt_path` to be a checkpoint of a run, but got .*held.ckpt"):
        train(*DEBUG, f"ckpt_path={tmp_path / 'held.ckpt'}")


def test_a_top_level_typo_inside_an_experiment_file_is_refused(train, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ngmmm:\n  n_components: 3\n")
    with pytest.raises(SystemExit, match="Expected a key of the config's top, but got 'gmmm'; did you mean 'gmm'"):
        train("experiment=typo", f"hydra.searchpath=[{tmp_path}]")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks:\n  emm:\n    mode: full\n", "Expected `callbacks.emm` to build a Callback"),
        ("paths:\n  output_dri: x\n", "Expected a key of the config's `paths`, but got 'output_dri'; did you mean"),
        ("prior:\n  meen: 0.0\n", "Expected a key of the config's `prior`, but got 'meen'; did you mean 'mean'"),
        ("gmm:\n  n_componets: 3\n", "Expected a key of the config's `gmm`, but got 'n_componets'; did you mean"),
        ("trainer:\n  max_epoch: 3\n", "Expected a key of the config's `trainer`, but got 'max_epoch'; did you mean"),
        ("em:\n  stepsize: 0.1\n", "Expected a key of the config's `em`, but got 'stepsize'; did you mean 'step_size'"),
    ],
)
def test_a_typo_one_level_down_inside_an_experiment_file_is_refused(train, tmp_path, override, message):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\n" + override)
    with pytest.raises(SystemExit, match=message):
        train("experiment=typo", f"hydra.searchpath=[{tmp_path}]")


def test_the_metrics_of_an_earlier_run_are_not_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("epoch\n")
    with pytest.raises(SystemExit, match=r"`hydra.run.dir` to be new, but .* holds the metrics.csv of an earlier run"):
        train(*QUICK)
    assert (tmp_path / "run" / "metrics.csv").read_text() == "epoch\n"
