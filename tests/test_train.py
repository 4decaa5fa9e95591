"""``python train.py``: what it writes, prints, resumes and refuses."""

import csv
import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[1]
QUICK = [
    "trainer.max_epochs=3",
    "callbacks.em.start_epoch=1",
    "callbacks.latent_plot.every_n_epochs=2",
    "callbacks.checkpoint.every_n_epochs=1",
    "trainer.enable_progress_bar=false",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture(autouse=True)
def _clean_state():
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


@pytest.fixture
def train(monkeypatch, tmp_path):
    """Run ``train.py`` in this process with overrides, in a folder of its own; return that folder."""

    def run(*overrides, folder="run"):
        monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / folder}", *overrides])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return tmp_path / folder

    return run


def table(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_what_the_readme_lists_and_resumes(train, capsys):
    folder = train(*QUICK, "gmm.covariance_type=tied_full", "gmm.n_components=8", "seed=3")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {
        *(f"{name}.png" for name in ("latent", "density", "contingency", "components", "samples", "weights", "curves")),
        *("latent_epoch_0000.png", "latent_epoch_0002.png", "latent.gif", "weights.csv"),
    }
    assert {"config.yaml", "metrics.csv", "results.csv", "checkpoints/last.ckpt", *pictures} <= names

    printed = capsys.readouterr().out
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["seed"], config["gmm"]["random_state"], config["gmm"]["n_components"]) == (3, 3, 8)
    assert config["model"]["gmm"] == config["gmm"]
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


def test_another_mixture_than_the_checkpoints_is_one_message(train, capsys):
    folder = train(
        *QUICK, "trainer.max_epochs=1", "callbacks.em.start_epoch=0", "logger=none", "callbacks.latent_plot=null"
    )
    assert not (folder / "metrics.csv").exists()
    checkpoint = folder / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit, match=r"'covariance_type': 'diag'.*, but got one with .*'covariance_type': 'full'"):
        train(*QUICK, f"ckpt_path={checkpoint}", "gmm.covariance_type=diag", folder="other")


def test_an_interrupted_run_says_how_to_resume(train, capsys, monkeypatch):
    from tgmm_nn.experiments.contrastive import ContrastiveClustering

    def interrupt(self, *args):
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ContrastiveClustering, "on_train_batch_start", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stop:
        train(*QUICK)
    error = capsys.readouterr().err
    checkpoint = re.search(r"Interrupted in epoch 1; resume with ckpt_path=(\S+)", error).group(1)
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 0
    assert getattr(stop.value, "code", 1) not in (0, None)


@pytest.mark.slow
def test_the_command_runs_in_another_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *QUICK], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "outputs" / "digits_contrastive").glob("*/results.csv"))) == 1
    assert "k-means on pixels" in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gmm.n_componets=3", "Could not override 'gmm.n_componets'"),
        ("sed=3", "Could not override 'sed'"),
        ("trainer.max_epoch=3", "Could not override 'trainer.max_epoch'"),
        ("experiment=digit", "Could not find 'experiment/digit'"),
        ("gmm.covariance_type=fulll", "Expected `covariance_type` to be one of 'full', .* but got 'fulll'"),
        ("gmm.n_components=many", "Expected `n_components` to be an integer, but got 'many'"),
        ("gmm.reg_covar=-1", "Expected `reg_covar` to be at least 0"),
        ("callbacks.em.mode=stepwise", "Expected `mode` to be one of"),
        ("callbacks.em.embeddings=nowhere", "Expected `embeddings` to name a submodule"),
        ("data.batch_size=0", "Expected `batch_size` to be at least 1"),
        ("seed=one", "Expected `seed` to be an integer, but got 'one'"),
        ("trainer.max_epochs=ten", "Expected `trainer.max_epochs` to be an integer, but got 'ten'"),
        ("ckpt_path=nowhere.ckpt", "Expected `ckpt_path` to be a file, but got 'nowhere.ckpt'"),
        ("gmm.n_components=2000", "Expected `n_components` of at most the 1797 rows, but got 2000"),
        ("ckpt_path=train.py", "Expected `ckpt_path` to be a checkpoint of a run, but got 'train.py'"),
        ("gmm.n_features=0", "Expected `n_features` to be at least 1"),
    ],
)
def test_a_wrong_option_ends_with_exit_code_1_and_one_message_that_names_it(
    train, capsys, monkeypatch, override, message
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        train(*QUICK, override)
    error = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code == 1 or isinstance(stop.value.code, str)  # a string is printed, and the code is 1
    assert len(re.findall(message, error)) == 1
    assert "Traceback" not in error


def test_a_top_level_typo_inside_an_experiment_file_is_refused(train, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ngmmm:\n  n_components: 3\n")
    with pytest.raises(SystemExit, match="but got 'gmmm'; did you mean 'gmm'"):
        train("experiment=typo", f"hydra.searchpath=[{tmp_path}]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks:\n  emm:\n    mode: full\n", "Expected `callbacks.emm` to build a callback"),
        ("paths:\n  output_dri: x\n", "Expected the config's `paths` to hold output_dir alone, but got 'output_dri'"),
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
    with pytest.raises(SystemExit, match=r"`hydra.run.dir` to be new, but .* holds the metrics of an earlier run"):
        train(*QUICK)
    assert (tmp_path / "run" / "metrics.csv").read_text() == "epoch\n"


def test_an_option_that_nothing_reads_inside_an_experiment_file_is_refused(train, tmp_path, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "typo.yaml").write_text("# @package _global_\ngmm:\n  n_componets: 3\n")
    with pytest.raises(SystemExit):
        train("experiment=typo", f"hydra.searchpath=[{tmp_path}]")
    assert "n_componets" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("experiment", "overrides", "pictures", "first"),
    [
        ("digits_ood", [], ["outliers.png"], "log-density, a Gaussian for each class"),
        ("digits_generative_classifier", [], ["classes.png"], "mixture for each class"),
        (
            "digits_vade",
            ["model.pretrain_epochs=1", "callbacks.em.start_epoch=0", "gmm.n_init=1", "callbacks.latent_plot=null"],
            ["latent.png", "components.png"],
            "mixture at its end",
        ),
    ],
)
def test_an_experiment_prints_its_table_with_baselines_and_draws(experiment, overrides, pictures, first, train, capsys):
    quick = ["trainer.max_epochs=2", "trainer.enable_progress_bar=false", f"experiment={experiment}"]
    folder = train(*quick, *overrides)
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["method"] == first
    assert len(rows) > 1
    assert first in capsys.readouterr().out
    assert all((folder / name).exists() for name in [*pictures, "curves.png", "checkpoints/last.ckpt"])
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert int(next(value for name, value in saved.items() if name.endswith("fitted"))) == 1  # the mixture travels
