# ruff: noqa: F811  # a fixture that is imported
"""Runs of ``train.py`` on a user's arrays, and of ``train=false``: against the checkpoint's own mixture."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from test_train import ROOT, _cheap_pictures, _clean_state, pytestmark, run_train, train  # noqa: F401  # fixtures

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments.arrays import NpzDataModule
from tgmm_nn.experiments.identity import EmbeddingClustering
from tgmm_nn.lightning import EMCallback

QUIET = "trainer.enable_progress_bar=false"
SMALL = "callbacks.latent_plot=null"
SHORT = [QUIET, "trainer.max_epochs=2", "em.start_epoch=0", "gmm.n_init=1", "callbacks=none"]


def blobs(n_rows, seed=0):
    """Rows of four components far apart in five features of differing units, and which each is of."""
    generator = np.random.default_rng(seed)
    y = generator.integers(0, 4, n_rows)
    return (10 * np.eye(4, 5)[y] + generator.normal(size=(n_rows, 5))) * [1, 1, 100, 1, 0.01] + 3, y


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Labelled and unlabelled rows, new rows, and rows of another width, by name; tests write nothing here."""
    tmp_path = tmp_path_factory.mktemp("rows")
    x, y = blobs(200)
    new, of_new = blobs(90, seed=1)
    np.savez(tmp_path / "labelled.npz", x=x, y=y)
    np.savez(tmp_path / "bare.npz", x=x)
    np.savez(tmp_path / "new.npz", x=new, y=of_new)
    np.savez(tmp_path / "wide.npz", x=np.ones((9, 6)))
    (tmp_path / "shards").mkdir()
    for name, part in (("a", slice(0, 70)), ("b", slice(70, 90))):
        np.save(tmp_path / "shards" / f"{name}.npy", new[part].astype("float32"))
        np.save(tmp_path / "shards" / f"{name}.labels.npy", of_new[part])
    return tmp_path


@pytest.fixture
def files(rows, tmp_path):
    """The files of `rows`, in a folder of the test."""
    return Path(shutil.copytree(rows, tmp_path / "rows"))


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """The folder of a run that clusters the labelled rows as embeddings."""
    path = f"data.path={rows / 'labelled.npz'}"
    folder = tmp_path_factory.mktemp("trained") / "run"
    return run_train(folder, "experiment=embeddings", "data=npz", path, "gmm.n_components=4", QUIET, SMALL)


def table(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def column(rows, name):
    return np.array([float(row[name]) for row in rows])


def scoring(trained, files):
    """The overrides that score new rows by the checkpoint of `trained`."""
    ckpt = f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    return ["train=false", ckpt, "data=npz", f"data.path={files / 'new.npz'}"]


def mixture_of(folder, prefix="gmm", **size):
    """Return the mixture in a run's checkpoint."""
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    gmm = GaussianMixture(**size)
    gmm.load_state_dict(
        {name.removeprefix(f"{prefix}."): v for name, v in state.items() if name.startswith(f"{prefix}.")}
    )
    return gmm


# ----------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("mode", ["accumulate", "full"])
def test_given_embeddings_get_one_exact_step_of_em_in_each_epoch(mode, files):
    """With no optimizer that learns: the oracle is the mixture's own `em_step` on all rows."""
    data = NpzDataModule(str(files / "bare.npz"), batch_size=64, scale=None)
    model = EmbeddingClustering(GaussianMixture(4, 5, random_state=0))
    trainer = lightning.Trainer(
        max_epochs=3, callbacks=[EMCallback(embeddings="latent", mode=mode)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 3 * 4
    alone = GaussianMixture(4, 5, random_state=0).initialize(data.x)
    for _ in range(3):
        alone.em_step(data.x)
    torch.testing.assert_close(model.gmm.means_, alone.means_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.gmm.weights_, alone.weights_, rtol=1e-4, atol=1e-5)


def test_embeddings_are_clustered_by_one_short_command_and_new_ones_scored(train, trained, files, capsys):
    folder = trained
    assert float(table(folder / "results.csv")[0]["accuracy"]) == 1.0

    ckpt = f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    scored = train(
        "train=false", ckpt, "data=npz", f"data.path={files / 'new.npz'}", "data.batch_size=32", folder="scored"
    )
    assert {"assignments.csv", "log_density.csv", "results.csv", "config.yaml"} <= {p.name for p in scored.iterdir()}

    gmm = mixture_of(folder, n_components=4, n_features=5)
    x, y = blobs(90, seed=1)
    x = NpzDataModule(str(files / "labelled.npz")).rows.scaling(x)  # as the rows of the training
    assignments, densities = table(scored / "assignments.csv"), table(scored / "log_density.csv")
    assert list(assignments[0]) == ["row", "component", "probability", "label"]
    assert column(assignments, "row").tolist() == column(densities, "row").tolist() == list(range(90))
    assert column(assignments, "component").tolist() == gmm.predict(x).tolist()
    np.testing.assert_allclose(column(assignments, "probability"), gmm.predict_proba(x).amax(-1), atol=1e-5)
    assert column(assignments, "label").tolist() == y.tolist()
    np.testing.assert_allclose(column(densities, "log_density"), gmm(x), rtol=1e-4)
    assert set(column(densities, "outlier")) <= {0.0, 1.0}

    [row] = table(scored / "results.csv")
    assert float(row["log-density"]) == pytest.approx(float(gmm(x).mean()), rel=1e-4)
    assert (row["rows"], float(row["accuracy"])) == ("90", 1.0)
    assert float(row["nmi"]) == pytest.approx(normalized_mutual_info_score(y, gmm.predict(x)), abs=1e-5)
    assert float(row["ari"]) == pytest.approx(adjusted_rand_score(y, gmm.predict(x)), abs=1e-5)
    share = np.bincount(gmm.predict(x), minlength=4) / 90
    assert float(row["effective components"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-3)
    printed = capsys.readouterr().out
    assert str(scored) in printed
    assert "mixture of the checkpoint" in printed

    again = train(
        "train=false", ckpt, "data=npy_folder", f"data.path={files / 'shards'}", "data.batch_size=50", folder="again"
    )
    assert (again / "assignments.csv").read_text() == (scored / "assignments.csv").read_text()


def test_rows_far_from_the_mixture_are_outliers_and_five_percent_of_its_own(train, trained, files):
    gmm, scaling = mixture_of(trained, n_components=4, n_features=5), NpzDataModule(files / "labelled.npz").rows.scaling
    own, _ = gmm.sample(3000, generator=torch.Generator().manual_seed(3))
    far = torch.cat([own, own[:100] + 1e4]).double() / scaling.factor + scaling.offset  # in the units of the file
    np.savez(files / "both.npz", x=far.numpy())
    ckpt = f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    scored = train("train=false", ckpt, "data=npz", f"data.path={files / 'both.npz'}", folder="scored")
    outlier = column(table(scored / "log_density.csv"), "outlier")
    assert outlier[3000:].all()
    assert outlier[:3000].mean() == pytest.approx(0.05, abs=0.02)
    [row] = table(scored / "results.csv")
    assert float(row["outliers"]) == pytest.approx(outlier.mean())
    assert "accuracy" not in row


def test_a_row_without_a_log_density_is_named_with_its_file(train, trained, files):
    np.save(files / "shards" / "b.npy", 1e30 * np.ones((20, 5), "float32"))
    rows = ["data=npy_folder", f"data.path={files / 'shards'}"]
    with pytest.raises(SystemExit, match=r"`x` of .*shards with rows like those of .* row 0 of b.npy is -?(inf|nan)"):
        train("train=false", f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", *rows)
    assert not (files.parent / "run").exists()  # nor half a table


def test_the_config_of_an_evaluation_is_of_the_model_that_was_scored_and_of_what_counted(train, trained, files):
    scored = train(*scoring(trained, files))
    said, was = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (scored, trained))
    for group in ("model", "gmm", "prior", "inputs"):
        assert said[group] == was[group]
    assert (said["gmm"]["n_components"], said["data"]["path"]) == (4, str(files / "new.npz"))
    assert not {"em", "metrics", "callbacks", "logger"} & set(said)


def test_rows_are_scored_in_the_precision_that_is_asked_for(train, trained, files):
    """The oracle is the mixture in float64; in float32 the scores differ from it."""
    gmm = mixture_of(trained, n_components=4, n_features=5, dtype=torch.float64)
    x = NpzDataModule(str(files / "labelled.npz")).rows.scaling(blobs(90, seed=1)[0])
    away = {}
    for precision in ("32-true", "64-true"):
        scored = train(*scoring(trained, files), f"trainer.precision={precision}", folder=precision)
        found = column(table(scored / "log_density.csv"), "log_density")
        away[precision] = np.abs(found / gmm(x.double()).numpy() - 1).max()
    assert away["64-true"] < 1e-6 < 2 * away["32-true"], away  # seven digits are written


def test_a_folder_that_cannot_be_written_is_one_sentence(train, trained, files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"Expected to read and write '.*file/run', but got 'Not a directory'"):
        train(*scoring(trained, files), folder="file/run")


def test_the_identity_runs_beside_another_experiment_and_takes_the_width_of_the_rows(train, files):
    """Of rows that stay on the disk."""
    folder = train("model=identity", "data=npy_folder", f"data.path={files / 'shards'}", *SHORT)
    assert float(table(folder / "results.csv")[0]["nmi"]) > 0.5
    assert [row["method"] for row in table(folder / "results.csv")][1:] == ["k-means on the embeddings"]


@pytest.mark.slow
def test_embeddings_are_clustered_on_two_processes_as_on_one(train, files):
    """A process of its own, without a limit on threads, with which a fork could hang."""
    options = ["experiment=embeddings", "data=npz", f"data.path={files / 'bare.npz'}", "gmm.n_components=4", QUIET]
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *options, "trainer=ddp_sim", "hydra.run.dir=two"],
        cwd=files, capture_output=True, text=True, timeout=300, check=False,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    size = {"n_components": 4, "n_features": 5}
    two, one = mixture_of(files / "two", **size), mixture_of(train(*options), **size)
    order = [int((one.means_ - mean).square().sum(-1).argmin()) for mean in two.means_]
    torch.testing.assert_close(two.means_, one.means_[order], rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------- networks on own rows


@pytest.mark.parametrize(
    ("experiment", "overrides", "methods"),
    [
        ("digits_contrastive", [], 4),
        ("digits_vade", ["model.pretrain_epochs=1"], 5),
    ],
)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_an_experiment_runs_on_rows_of_another_width_with_and_without_labels(
    experiment,
    overrides,
    methods,
    labelled,
    train,
    files,
):
    path = files / ("labelled.npz" if labelled else "bare.npz")
    folder = train(
        f"experiment={experiment}", "data=npz", f"data.path={path}", *SHORT, "gmm.n_components=4", *overrides
    )
    rows = table(folder / "results.csv")
    assert len(rows) == methods
    assert ("accuracy" in rows[0]) is labelled
    assert ("effective clusters" in rows[0]) is not labelled
    assert not (folder / "components.png").exists()  # the rows are no images
    logged = (folder / "metrics.csv").read_text().splitlines()[0]
    assert ("train/accuracy" in logged) is labelled
    assert "train/negative_log_likelihood" in logged


def test_images_of_another_size_are_augmented_as_images_and_drawn(train, files):
    images = np.random.default_rng(0).integers(0, 256, size=(60, 5, 4)).astype("uint8")
    np.savez(files / "images.npz", x=images, image_shape=(5, 4))
    folder = train("data=npz", f"data.path={files / 'images.npz'}", *SHORT, "gmm.n_components=3")
    assert (folder / "components.png").exists()
    assert "k-means on pixels" in (folder / "results.csv").read_text()


def test_a_checkpoint_scales_new_rows_as_those_that_it_was_trained_on(train, trained, files):
    """The oracle: the first rows of the training, given alone, get the embeddings that they had among all."""
    x, _ = blobs(200)
    np.savez(files / "few.npz", x=x[:6])
    ckpt = f"ckpt_path={trained / 'checkpoints' / 'last.ckpt'}"
    rows = ["train=false", ckpt, "data=npz"]
    scored = [train(*rows, f"data.path={files / name}.npz", folder=f"of_{name}") for name in ("few", "bare")]
    few, many = (column(table(run / "log_density.csv"), "log_density") for run in scored)
    np.testing.assert_allclose(few, many[:6], rtol=1e-5)


def test_a_generative_classifier_holds_rows_out_and_scores_new_ones_by_class(train, files):
    classifier = "experiment=digits_generative_classifier"
    path = f"data.path={files / 'labelled.npz'}"
    folder = train(classifier, "data=npz", path, QUIET, SMALL, "trainer.max_epochs=4", "callbacks.interrupt=null")
    assert float(table(folder / "results.csv")[0]["accuracy"]) > 0.9
    ckpt = f"ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    scored = train("train=false", ckpt, "data=npz", f"data.path={files / 'new.npz'}", folder="scored")
    rows, [result] = table(scored / "assignments.csv"), table(scored / "results.csv")
    assert list(rows[0]) == ["row", "component", "probability", "class", "label"]
    right = column(rows, "class") == column(rows, "label")
    assert float(result["accuracy"]) == pytest.approx(right.mean())
    assert right.mean() > 0.9
    with pytest.raises(SystemExit, match=r"Expected `y` of .*bare.npz, the class of each row"):
        train(classifier, "data=npz", f"data.path={files / 'bare.npz'}", *SHORT, folder="unlabelled")


def test_outliers_need_classes_that_are_not_known_and_rows_that_are_held_out(train, files):
    ood = ["experiment=digits_ood", "data=npz", f"data.path={files / 'labelled.npz'}", QUIET, "trainer.max_epochs=2"]
    with pytest.raises(SystemExit, match=r"`n_classes` below the classes of .*labelled.npz"):
        train(*ood, "data.n_classes=4")
    with pytest.raises(SystemExit, match=r"`test_size`, the share of .*labelled.npz to hold out"):
        train(*ood, "data.n_classes=3", "data.test_size=null")
    folder = train(*ood, "data.n_classes=3")
    assert len(table(folder / "results.csv")) == 8


def test_the_number_of_components_is_chosen_for_own_rows(train, files, capsys):
    folder = train(
        "experiment=choose_components", "data=npz", f"data.path={files / 'bare.npz'}", "model.candidates=[3,4,5]",
        "model.n_seeds=1",
    )  # fmt: skip
    assert [row["n_components"] for row in table(folder / "results.csv") if row["chosen"]] == ["4"]
    assert {"criterion.csv", "criterion.png"} <= {path.name for path in folder.iterdir()}
    assert "4 components, full." in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["train=false"], "Expected `ckpt_path` with train=false, the checkpoint to score rows by, but got None"),
        (["train=maybe"], "Expected `train` to be True or False, but got 'maybe'"),
        (["data=npz"], "Expected `path` to name your data; give data.path=FILE.npz, but got None"),
        (["data=npy_folder", "data.path=nowhere"], "Expected `path` to be a folder that exists, but got 'nowhere'"),
        (["data=npz", "data.path=nowhere.npz"], "Expected `path` to be a file that exists, but got 'nowhere.npz'"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(overrides, match, train):
    with pytest.raises(SystemExit, match=match):
        train(*overrides)


def test_fewer_rows_than_components_end_before_training(train, files):
    for experiment in ("digits_contrastive", "digits_vade", "embeddings"):
        with pytest.raises(SystemExit, match=r"`n_components` of at most the 9 rows of .*wide.npz, but got 10"):
            train(f"experiment={experiment}", "data=npz", f"data.path={files / 'wide.npz'}", QUIET, folder=experiment)


def test_a_checkpoint_of_another_model_is_one_message(train, trained, files):
    checkpoint = trained / "checkpoints" / "last.ckpt"
    evaluate = ["train=false", f"ckpt_path={checkpoint}", "data=npz", f"data.path={files / 'new.npz'}"]

    def refuse(match, *overrides):
        with pytest.raises(SystemExit, match=match):
            train(*overrides, folder="refused")

    refuse(r"with 5 features, those that .* was trained on, but got 6", *evaluate, f"data.path={files / 'wide.npz'}")
    refuse(
        r"`gmm.n_components` as the checkpoint was trained with, 4, but got 7 by gmm", *evaluate, "gmm.n_components=7"
    )
    refuse(
        r"`model._target_` as the checkpoint was .*EmbeddingClustering', but got", *evaluate, "experiment=digits_vade"
    )
    refuse(r"`prior.mean` as the checkpoint was trained with, None, but got 0.0 by prior=niw", *evaluate, "prior=niw")
    refuse(r"no `data.scale` with train=false, .* but got 'data.scale=3'", *evaluate, "data.scale=3")
    for without_effect in (
        "debug=fast",
        "em=minibatch",
        "em.mode=full",
        "metrics.prefix=x",
        "callbacks=none",
        "logger=none",
    ):
        name = without_effect.split("=")[0]
        refuse(rf"no `{name}` with train=false, which trains and logs nothing, but got", *evaluate, without_effect)
    refuse(r"no `trainer.max_epochs` with train=false, .* a device and a precision", *evaluate, "trainer.max_epochs=3")
    same = train(*evaluate, "gmm.n_components=4", "prior=none", folder="same")  # said again, and right

    alone = files / "alone.ckpt"  # away from the config of its run: the command line has to say what it is
    shutil.copy(checkpoint, alone)
    evaluate[1] = f"ckpt_path={alone}"
    refuse(r"a checkpoint of a ContrastiveClustering as the config has it, but .*alone.ckpt is not", *evaluate)
    refuse(r"the config.yaml of its run is not beside it in .*rows: put it there, or give experiment=NAME", *evaluate)
    known = [*evaluate, "experiment=embeddings", "gmm.n_components=4"]
    refuse(r"`model` with train=false to be one that is trained, but got C", *evaluate, "experiment=choose_components")
    if not torch.cuda.is_available():
        refuse(r"No supported gpu backend found! \(in `trainer`\); take trainer=cpu", *known, "trainer=gpu")
    scored = train(*known, folder="known")
    assert (scored / "log_density.csv").read_text() == (same / "log_density.csv").read_text()

    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "NpzDataModule": {}}, alone)
    refuse(r"a checkpoint of a run, with the model and the scaling of its rows, but got", *known)
    state["state_dict"]["gmm.fitted"].zero_()
    torch.save(state, alone)
    refuse(r"one whose mixture has been started, but EM had not begun when .*alone.ckpt was saved", *known)
