"""The callbacks that draw: which files, of which epochs, and what a resume finds again."""

import csv

import pytest
import torch
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image
from toy import QUIET, Toy, loader, rows, trainer

from tgmm_nn.lightning import EMCallback, LatentPlotCallback, WeightHistoryCallback
from tgmm_nn.lightning.pictures import _of_the_last, read_frame
from tgmm_nn.lightning.weights import read_weights
from tgmm_nn.plotting import principal_plane, save

pytestmark = QUIET


def names(folder, pattern="latent_epoch_*.png"):
    return sorted(path.name for path in folder.glob(pattern))


def n_frames(folder):
    with Image.open(folder / "latent.gif") as gif:
        return gif.n_frames


def test_pictures_are_drawn_every_so_often_and_at_the_end_and_joined(tmp_path):
    plot = LatentPlotCallback(every_n_epochs=2, folder=str(tmp_path))
    trainer(EMCallback(start_epoch=1), plot, max_epochs=6).fit(Toy(), loader())
    assert names(tmp_path) == [f"latent_epoch_{epoch:04d}.png" for epoch in (0, 2, 4, 5)]
    assert n_frames(tmp_path) == 4


def test_a_frame_is_the_epochs_rows_and_mixture(tmp_path):
    model = Toy()
    plot = LatentPlotCallback(every_n_epochs=1, max_rows=40, folder=str(tmp_path))
    trainer(EMCallback(start_epoch=1), plot, max_epochs=2).fit(model, loader())
    fresh, seen, epoch = read_frame(tmp_path / "latent_frames" / "epoch_0000.pt")
    assert (fresh.fitted_, epoch) == (False, 0)
    torch.testing.assert_close(seen, torch.cat(model.seen[:5])[:40])
    gmm, seen, epoch = read_frame(tmp_path / "latent_frames" / "epoch_0001.pt")
    assert (gmm.fitted_, epoch) == (True, 1)
    torch.testing.assert_close(gmm(seen), model.gmm(seen))


def test_all_pictures_of_an_animation_have_one_plane_and_one_frame(tmp_path, monkeypatch):
    drawn = []
    plot = LatentPlotCallback(every_n_epochs=1, folder=str(tmp_path))
    monkeypatch.setattr("tgmm_nn.lightning.pictures.save", lambda ax, file: drawn.append(ax))
    monkeypatch.setattr("tgmm_nn.lightning.pictures.animate", lambda files, file, seconds: drawn.append(len(files)))
    trainer(EMCallback(), plot, max_epochs=3).fit(Toy(learning_rate=0.5), loader())
    *pictures, number = drawn
    during, again = pictures[:2], [*pictures[3:], pictures[2]]
    assert number == len(again) == 3
    assert len({(ax.get_xlim(), ax.get_ylim(), ax.get_xlabel()) for ax in again}) == 1
    assert len({tuple(ellipse.get_edgecolor() for ellipse in ax.patches) for ax in again}) == 1
    assert len({ax.get_xlim() for ax in during}) == 2  # each in limits of its own while training goes on
    assert [ax.get_title().split("\n")[0] for ax in during] == ["Epoch 0", "Epoch 1"]  # the last is drawn at the end
    assert [ax.get_title().split("\n")[0] for ax in again] == ["Epoch 0", "Epoch 1", "Epoch 2"]


def test_names_of_a_common_plane_are_true_of_every_epoch(generator):
    wide = _of_the_last(principal_plane(torch.randn(9, 4, generator=generator)))
    assert wide.names == ("first principal direction of the last epoch", "second principal direction of the last epoch")
    assert _of_the_last(principal_plane(torch.randn(9, 2, generator=generator))).names == ("feature 0", "feature 1")


def test_an_animation_is_laid_out_once_and_its_axes_stay_where_they_are(tmp_path, monkeypatch):
    drawn, layouts, execute = [], [], ConstrainedLayoutEngine.execute

    def keep(ax, file):
        save(ax, file)
        drawn.append(ax)

    def count(engine, figure):
        layouts.append(figure)
        execute(engine, figure)

    monkeypatch.setattr("tgmm_nn.lightning.pictures.save", keep)
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", count)
    trainer(EMCallback(), LatentPlotCallback(every_n_epochs=1, folder=str(tmp_path)), max_epochs=4).fit(Toy(), loader())
    assert len(drawn) == 7
    assert layouts == [ax.figure for ax in drawn[:4]]  # three of the training, and the last
    assert len({ax.get_window_extent().bounds for ax in drawn[3:]}) == 1
    for ax in drawn[3:]:
        box = ax.figure.get_tightbbox()
        assert min(box.x0, box.y0) > -0.02
        assert box.y1 < ax.figure.get_size_inches()[1] + 0.02


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_resumed_training_joins_the_pictures_before_it(elsewhere, tmp_path):
    def fit(folder, epochs, checkpoint=None):
        plot = LatentPlotCallback(every_n_epochs=1, folder=str(folder))
        run = trainer(EMCallback(), plot, max_epochs=epochs)
        run.fit(Toy(), loader(), ckpt_path=checkpoint)
        run.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)

    fit(tmp_path / "a", 3)
    (tmp_path / "a" / "latent_frames" / "epoch_0001.pt").unlink()  # as far as they are there
    second = tmp_path / ("b" if elsewhere else "a")
    fit(second, 5, tmp_path / "last.ckpt")
    assert n_frames(second) == 4
    assert n_frames(tmp_path / "a") == (3 if elsewhere else 4)


def test_a_fresh_training_in_a_folder_does_not_join_what_an_earlier_one_left(tmp_path):
    for epochs in (4, 2):
        plot = LatentPlotCallback(every_n_epochs=1, folder=str(tmp_path))
        trainer(EMCallback(), plot, max_epochs=epochs).fit(Toy(), loader())
    assert n_frames(tmp_path) == 2


def test_without_an_animation_nothing_is_kept(tmp_path):
    plot = LatentPlotCallback(every_n_epochs=1, gif=False, folder=str(tmp_path))
    trainer(EMCallback(), plot, max_epochs=1).fit(Toy(), loader())
    assert names(tmp_path, "*") == ["latent_epoch_0000.png"]


def test_rows_that_are_not_finite_are_not_drawn(tmp_path):
    x = rows()
    x[3] = torch.nan
    model = Toy()

    def training_step(batch, batch_idx):
        model.encoder(batch[0])
        return sum(p.square().sum() for p in model.parameters())  # a loss of the rows would be nan

    model.training_step = training_step
    plot = LatentPlotCallback(every_n_epochs=1, folder=str(tmp_path))
    trainer(EMCallback(), plot, max_epochs=1).fit(model, loader(x))
    assert len(read_frame(tmp_path / "latent_frames" / "epoch_0000.pt")[1]) == 43


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` to be at least 1"),
        ({"max_rows": 0}, ValueError, "`max_rows` to be at least 1"),
        ({"n_std": 2.0}, TypeError, "`n_std` to be a list of numbers"),
        ({"n_std": [-1.0]}, ValueError, "`n_std` to be above 0"),
        ({"gif": 1}, TypeError, "`gif` to be True or False"),
        ({"seconds": 0}, ValueError, "`seconds` to be above 0"),
        ({"folder": ""}, TypeError, "`folder` to be a non-empty string"),
    ],
)
def test_options_of_pictures_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        LatentPlotCallback(**options)


# ------------------------------------------------------------------------------------------------------------ weights


class Weigh(WeightHistoryCallback):
    """Also keeps in memory what it should have written."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        if pl_module.gmm.fitted_:
            self.seen = [*getattr(self, "seen", []), pl_module.gmm.weights_.clone()]


def test_weights_of_each_epoch_are_written_from_the_start_on(tmp_path):
    history = Weigh(folder=str(tmp_path))
    trainer(EMCallback(start_epoch=2), history, max_epochs=5).fit(Toy(), loader())
    epochs, weights, births, deaths = read_weights(tmp_path / "weights.csv")
    assert epochs == [3, 4]  # the whole epoch 2 is rows to start from
    torch.testing.assert_close(weights, torch.stack(history.seen[1:]), rtol=1e-4, atol=1e-5)
    assert (births == 0).all()
    assert (deaths == 0).all()
    assert (tmp_path / "weights.png").stat().st_size > 1000


def test_births_and_deaths_stand_at_their_epochs_and_components(tmp_path):
    """A component far from all rows loses half of its weight of .2 in each step: it is dead after the second, in the
    first epoch of five steps, and born again after six starving updates, in the second step of the second epoch."""
    model = Toy(learning_rate=0.0)
    means = torch.tensor([[0.0, 0.0], [1.0, 1.0], [99.0, 99.0]])
    model.gmm.set_parameters([0.4, 0.4, 0.2], means, torch.eye(2).expand(3, 2, 2))
    em = EMCallback(step_size=0.5, min_weight=0.06, patience=6)
    trainer(em, WeightHistoryCallback(folder=str(tmp_path)), max_epochs=2).fit(model, loader())
    epochs, weights, births, deaths = read_weights(tmp_path / "weights.csv")
    assert epochs == [0, 1]
    assert deaths[:, 2].tolist() == [1, 0]
    assert births[:, 2].tolist() == [0, 1]
    assert weights[0, 2] < 0.06 < weights[1, 2]


def test_what_is_written_adds_up_to_what_is_logged(tmp_path):
    model = Toy()
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    run = trainer(
        EMCallback(step_size=0.3, min_weight=0.32, patience=50),
        WeightHistoryCallback(folder=str(tmp_path)),
        max_epochs=1,
    )
    run.fit(model, loader())
    _, _, births, deaths = read_weights(tmp_path / "weights.csv")
    assert births.sum() + deaths.sum() > 0
    assert float(births.sum()) == run.callback_metrics["em/births"]
    assert float(deaths.sum()) == run.callback_metrics["em/deaths"]


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_resumed_training_goes_on_from_the_weights_before_it(elsewhere, tmp_path):
    def fit(folder, epochs, checkpoint=None, save_at=None):
        history = WeightHistoryCallback(folder=str(folder))
        run = trainer(EMCallback(), history, max_epochs=epochs)
        run.fit(Toy(), loader(), ckpt_path=checkpoint)
        if save_at:
            run.save_checkpoint(save_at, weights_only=False)
        return read_weights(folder / "weights.csv")

    first = fit(tmp_path / "a", 3, save_at=tmp_path / "last.ckpt")
    if not elsewhere:
        with (tmp_path / "a" / "weights.csv").open("a") as file:  # an epoch after the checkpoint, then a crash
            file.write("3,0,1.0,0,0\n")
    epochs, weights, _, _ = fit(tmp_path / ("b" if elsewhere else "a"), 5, tmp_path / "last.ckpt")
    assert epochs == [1, 2, 3, 4]
    torch.testing.assert_close(weights[:2], first[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(4), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:EM does not run")
def test_a_mixture_that_never_starts_has_no_weights(tmp_path):
    with pytest.warns(UserWarning, match="EM never started"):
        trainer(EMCallback(start_epoch=9), WeightHistoryCallback(folder=str(tmp_path)), max_epochs=2).fit(
            Toy(), loader()
        )
    with (tmp_path / "weights.csv").open() as file:
        assert len(list(csv.reader(file))) == 1
    assert not (tmp_path / "weights.png").exists()


def test_weights_are_written_without_em_as_well(tmp_path):
    model = Toy()
    model.gmm.set_parameters([0.5, 0.3, 0.2], torch.randn(3, 2), torch.eye(2).expand(3, 2, 2))
    trainer(WeightHistoryCallback(folder=str(tmp_path)), max_epochs=1).fit(model, loader())
    _, weights, births, _ = read_weights(tmp_path / "weights.csv")
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.3, 0.2]]))
    assert births.sum() == 0


@pytest.mark.parametrize("option", ["module", "folder"])
def test_options_of_weights_are_checked(option):
    with pytest.raises(TypeError, match=f"`{option}` to be a non-empty string"):
        WeightHistoryCallback(**{option: 3})


@pytest.mark.parametrize("make", [LatentPlotCallback, WeightHistoryCallback])
def test_a_module_that_is_no_mixture_is_refused(make):
    name = {"embeddings": "encoder"} if make is LatentPlotCallback else {}
    with pytest.raises(TypeError, match="module='encoder' to be a GaussianMixture, but got Linear"):
        trainer(make("encoder", **name), max_epochs=1).fit(Toy(), loader())


# ------------------------------------------------------------------------------------------------------------- curves


def test_weights_begin_in_the_epoch_that_the_curves_mark(tmp_path):
    started = []

    class Watch(WeightHistoryCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            started.append(int(trainer.callback_metrics["em/started"]))

    trainer(EMCallback(start_epoch=1), Watch(folder=str(tmp_path)), max_epochs=4, logger=False).fit(Toy(), loader())
    assert read_weights(tmp_path / "weights.csv")[0] == [epoch for epoch, value in enumerate(started) if value]


def test_it_is_logged_from_when_on_the_likelihood_is_of_a_started_mixture():
    logged = []

    class Watch(WeightHistoryCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            logged.append(int(trainer.callback_metrics["em/started"]))

        def on_train_start(self, trainer, pl_module):
            pass

        def on_train_end(self, trainer, pl_module):
            pass

    # The start takes the whole epoch 1, so that its likelihood is still of the fresh layer.
    trainer(EMCallback(start_epoch=1), Watch(), max_epochs=4, logger=False).fit(Toy(), loader())
    assert logged == [0, 0, 1, 1]
