"""The pictures of the end of a run."""

import math

import numpy as np
import pytest
import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments import drawing
from tgmm_nn.experiments.drawing import (
    draw_components,
    draw_contingency,
    draw_density,
    draw_latent,
    draw_samples,
    mean_images,
    plot_metrics,
)


@pytest.fixture
def drawn(monkeypatch):
    """Collect axes by the name of the file, in place of writing them."""
    axes = {}
    monkeypatch.setattr(drawing, "save", lambda ax, file: axes.__setitem__(file.name, ax.figure.axes))
    return axes


@pytest.fixture
def gmm(generator):
    return GaussianMixture(3, 4).initialize(torch.randn(50, 4, generator=generator))


def test_curves_of_the_mixture_begin_with_its_first_epoch(drawn, tmp_path):
    lines = ["em/log_likelihood,em/started,epoch,loss", "-14,0,0,3", "-14,0,1,2", "-3,1,2,1", "-2,1,3,0.5"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    plot_metrics(tmp_path / "metrics.csv", tmp_path / "curves.png")
    loss, likelihood = drawn["curves.png"]
    assert loss.lines[0].get_xdata().tolist() == [0, 1, 2, 3]
    assert likelihood.lines[0].get_xdata().tolist() == [2, 3]
    assert likelihood.get_ylim()[0] > -4
    assert likelihood.lines[1].get_xdata()[0] == 2
    assert "dashed: first epoch of EM" in loss.get_title()


def test_curves_of_a_run_without_a_start_say_so(drawn, tmp_path):
    (tmp_path / "metrics.csv").write_text("em/log_likelihood,em/started,epoch,loss\n-14,0,0,3\n-14,0,1,2")
    plot_metrics(tmp_path / "metrics.csv", tmp_path / "curves.png")
    (loss,) = drawn["curves.png"]
    assert loss.get_title() == "Training, epoch by epoch; EM never started"


def test_components_are_ordered_by_their_most_frequent_class(drawn, tmp_path):
    clusters = torch.tensor([0, 0, 0, 1, 1, 2])
    y = torch.tensor([1, 1, 0, 0, 0, 1])
    draw_contingency(clusters, y, 3, tmp_path)
    ax = drawn["contingency.png"][0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["c1", "c0", "c2"]
    assert ax.images[0].get_array().tolist() == [[2, 0], [1, 2], [0, 1]]
    assert " ".join(ax.get_title().split()) == "Of 6 rows 5 are of their component's most frequent class"


def test_only_classes_that_occur_have_a_column_and_each_component_has_a_row(drawn, tmp_path):
    draw_contingency(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 50, 100, 150, -1]), 3, tmp_path)
    ax = drawn["contingency.png"][0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "50", "100", "150"]
    assert ax.images[0].get_array().shape == (3, 4)
    draw_contingency(torch.tensor([0]), torch.tensor([4]), 1, tmp_path)
    title = drawn["contingency.png"][0].get_title()
    assert " ".join(title.split()) == "Of 1 row 1 is of their component's most frequent class"


@pytest.mark.parametrize("n", [0, 5])
def test_rows_without_a_class_are_in_no_table(n, drawn, tmp_path):
    draw_contingency(torch.zeros(n).long(), torch.full((n,), -1), 2, tmp_path)
    assert not drawn


def test_one_component_of_one_class_is_a_table(drawn, tmp_path):
    draw_contingency(torch.zeros(5).long(), torch.tensor([0, 0, 0, -1, -1]), 1, tmp_path)
    assert drawn["contingency.png"][0].images[0].get_array().tolist() == [[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_images_are_means_weighted_by_responsibility(dtype, generator):
    r = torch.rand(20, 3, generator=generator, dtype=torch.float64)
    r[:, 2] = 0.0
    x = torch.rand(20, 6, generator=generator).to(dtype)
    expected = [np.average(x.numpy(), axis=0, weights=r[:, k].numpy()) for k in (0, 1)]
    got = mean_images(r, x)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, [*expected, np.zeros(6)], rtol=1e-5)
    clusters = torch.arange(20) % 2  # of hard responsibilities these are the clusters' means
    hard = mean_images(torch.eye(2)[clusters], x)
    torch.testing.assert_close(hard, torch.stack([x[clusters == k].mean(0) for k in (0, 1)]))


@pytest.mark.parametrize("started", [True, False])
def test_components_of_a_mixture_that_never_started_are_marked(started, gmm, drawn, tmp_path):
    gmm = gmm if started else GaussianMixture(3, 4)
    draw_components(gmm, torch.rand(3, 64), (8, 8), tmp_path, "Mean image")
    axes = drawn["components.png"]
    assert axes[0].get_title() == f"c0\n{100 * gmm.weights_[0]:.1f} %"
    assert ("mixture not started" in axes[0].figure.get_suptitle()) != started


def _after(gmm, n):
    """Return the generator that has drawn the samples of n components."""
    generator = torch.Generator().manual_seed(0)
    for k in range(n):
        gmm.sample(8, component=k, generator=generator)
    return generator


def test_samples_are_decoded_a_row_for_each_component(gmm, drawn, tmp_path):
    z = torch.randn(20, 4)
    draw_samples(gmm, z, tmp_path, 0, (2, 2), torch.sigmoid)
    axes = drawn["samples.png"]
    assert [ax.get_title() for ax in axes if ax.get_title()] == ["c0", "c1", "c2"]
    samples = gmm.sample(8, component=2, generator=_after(gmm, 2))[0].sigmoid().reshape(8, 2, 2)
    row = np.asarray(axes[2].images[0].get_array().filled(np.nan))
    assert row.shape == (2, 8 * 3 - 1)  # eight of two columns, and a column of nothing between them
    np.testing.assert_allclose(np.delete(row, range(2, 23, 3), 1), torch.cat([*samples], 1), rtol=1e-6)
    assert np.isnan(row[:, 2::3]).all()
    assert [line.get_xdata()[0] for line in axes[2].lines] == list(range(2, 23, 3))
    draw_samples(gmm, z, tmp_path, 0)
    assert [ax.get_title() for ax in drawn["samples.png"]] == ["20 rows of the data", "20 samples of the mixture"]


def test_latent_and_density_are_drawn_in_one_plane(gmm, drawn, tmp_path):
    z, y = torch.randn(200, 4), torch.arange(200) % 2
    draw_latent(gmm, z, y, tmp_path)
    draw_density(gmm, z, tmp_path)
    left, right = drawn["latent.png"]
    assert left.get_xlabel() == right.get_xlabel() == drawn["density.png"][0].get_xlabel()
    assert (left.get_xlim(), left.get_ylim()) == (right.get_xlim(), right.get_ylim())
    crosses = drawn["density.png"][0].collections[-1]
    assert len(crosses.get_offsets()) == math.ceil(0.01 * 200)  # the rows of lowest density
    draw_latent(gmm, z, None, tmp_path)
    assert len(drawn["latent.png"]) == 1


def test_a_mixture_that_never_started_has_neither_density_nor_samples(drawn, tmp_path):
    draw_density(GaussianMixture(2, 3), torch.randn(9, 3), tmp_path)
    draw_samples(GaussianMixture(2, 3), torch.randn(9, 3), tmp_path, 0)
    assert not drawn
