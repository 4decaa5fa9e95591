"""Pictures in a caller's figure: what belongs to axes stays in the part of the figure that is theirs."""

import itertools

import matplotlib as mpl
import pytest
import torch

from tgmm_nn import GaussianMixture, OutlierScore
from tgmm_nn.plotting import (
    plot_contingency,
    plot_criterion,
    plot_curves,
    plot_density,
    plot_latent,
    plot_likelihood,
    plot_reliability,
    plot_samples,
    plot_scores,
    plot_weights,
)

mpl.use("Agg")

import matplotlib.pyplot as plt

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0, 1.0])
GMM = GaussianMixture(3, 4, random_state=0, max_iter=300).fit(X)
LINE = GaussianMixture(2, 1).initialize(X[:, :1])
SCORES = {"known classes, held out": X[:, 0], "other classes": X[:, 1] + 3}
PICTURES = {
    "weights": lambda ax: plot_weights(torch.rand(20, 6).softmax(-1), births=torch.eye(20, 6), ax=ax),
    "many weights": lambda ax: plot_weights(torch.rand(20, 60).softmax(-1), deaths=torch.eye(20, 60), ax=ax),
    "scores": lambda ax: plot_scores(SCORES, threshold=2.0, xlabel="−log p(x), nats", title="A long title", ax=ax),
    "density": lambda ax: plot_density(GMM, X, OutlierScore(GMM).calibrate(X), ax=ax),
    "density along a line": lambda ax: plot_density(LINE, X[:, :1], ax=ax),
    "components": lambda ax: plot_latent(GMM, X, ax=ax),
    "classes": lambda ax: plot_latent(GMM, X, torch.arange(200) % 4, ax=ax),
    "a line": lambda ax: plot_latent(LINE, X[:, :1], torch.arange(200) % 2, ax=ax),
    "table": lambda ax: plot_contingency(torch.rand(8, 9) * 1e4, title="A title that goes on and on", ax=ax),
    "criterion": lambda ax: plot_criterion([1, 2, 3], [3.0, 1.0, 2.0], ax=ax),
    "likelihood": lambda ax: plot_likelihood(GMM, ax=ax),
    "reliability": lambda ax: plot_reliability([0.2, 0.8], [0.3, 0.7], [0.5, 0.5], title="digits:", ax=ax),
    "curves": lambda ax: plot_curves({"loss": (range(9), range(9))}, [ax], start=3, title="Training"),
}


@pytest.fixture
def figures():
    yield plt
    plt.close("all")


def box_of(figure, axes):
    """Return where all is that is drawn of axes and of the bars that were made for them, with the legend."""
    parts = [axes, *(image.colorbar.ax for image in axes.images if image.colorbar)]
    boxes = [part.get_tightbbox() for part in parts]
    if axes.get_legend():
        boxes.append(axes.get_legend().get_window_extent())
    return mpl.transforms.Bbox.union(boxes)


def check(figure, axes):
    for _ in range(2):  # as `savefig` does where a figure has a layout
        figure.canvas.draw()
    boxes = [box_of(figure, ax) for ax in axes]
    for box in boxes:
        assert min(box.x0, box.y0) > -1
        assert box.x1 < figure.bbox.x1 + 1
        assert box.y1 < figure.bbox.y1 + 1
    for a, b in itertools.combinations(boxes, 2):
        assert a.x1 < b.x0 + 1 or b.x1 < a.x0 + 1 or a.y1 < b.y0 + 1 or b.y1 < a.y0 + 1


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("options", [{}, {"layout": "constrained"}], ids=["plain", "constrained"])
def test_nothing_of_a_picture_lies_over_its_neighbours(draw, options, figures):
    figure, axes = figures.subplots(2, 2, figsize=(9.0, 7.0), **options)
    for ax in axes.flat:
        draw(ax)
    check(figure, axes.flat)


@pytest.mark.filterwarnings("ignore:The legend of a picture does not fit")
@pytest.mark.parametrize("first", [0, 4, 8])
def test_different_pictures_are_neighbours_in_a_figure_of_the_usual_size(first, figures):
    figure, axes = figures.subplots(2, 2)
    for ax, name in zip(axes.flat, [*PICTURES][first : first + 4], strict=True):
        PICTURES[name](ax)
    check(figure, axes.flat)


def test_rows_and_samples_are_neighbours(figures):
    figure, axes = figures.subplots(1, 2)
    plot_samples(GMM, X, axes=axes)
    check(figure, axes)


def test_a_legend_without_room_is_left_out_and_a_warning_says_so(figures):
    _, axes = figures.subplots(4, 5)
    with pytest.warns(UserWarning, match="legend of a picture does not fit.*layout='constrained'"):
        PICTURES["classes"](axes[1, 1])
    assert axes[1, 1].get_legend() is None


def test_a_layout_that_the_caller_makes_later_places_axes_anew(figures):
    figure, axes = figures.subplots(2, 2)
    for ax in axes.flat:
        PICTURES["criterion"](ax)
    before = axes[0, 0].get_position().bounds
    figure.tight_layout()
    assert axes[0, 0].get_position().width > 1.02 * before[2]


def test_axes_that_stand_where_the_caller_put_them_stay_there(figures):
    figure = figures.figure()
    ax = figure.add_axes((0.3, 0.3, 0.4, 0.4))
    PICTURES["criterion"](ax)
    assert ax.get_position().bounds == pytest.approx((0.3, 0.3, 0.4, 0.4))


def test_a_single_picture_keeps_its_letters_and_a_panel_in_a_part_of_a_figure_has_small_ones(figures):
    _, ax = figures.subplots(layout="none")
    size = ax.title.get_fontsize()
    PICTURES["criterion"](ax)
    assert ax.title.get_fontsize() == size
    figure = figures.figure()
    parts = figure.subfigures(1, 2)
    panels = [PICTURES["classes"](part.subplots()) for part in parts]
    assert panels[0].title.get_fontsize() < size
    check(figure, panels)


@pytest.mark.parametrize("layout", [None, "constrained", "tight"])
def test_names_at_the_ends_of_lines_stand_within_narrow_axes(layout):
    weights = torch.tensor([[0.1] * 10, [0.55, *[0.05] * 9]])
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout=layout)
    for ax in axes:
        plot_weights(weights, ax=ax)
    figure.canvas.draw()
    for ax in axes:
        inside = ax.get_window_extent()
        assert all(inside.x0 < text.get_window_extent().x0 for text in ax.texts)
        assert all(text.get_window_extent().x1 < inside.x1 for text in ax.texts)
    plt.close(figure)
