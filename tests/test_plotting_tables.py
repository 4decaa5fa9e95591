"""Pictures of tables, scores, images and of what changes."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from tgmm_nn import GaussianMixture
from tgmm_nn.plotting import (
    new_axes,
    plot_contingency,
    plot_criterion,
    plot_curves,
    plot_images,
    plot_likelihood,
    plot_reliability,
    plot_scores,
    plot_weights,
    save,
)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(("shape", "written"), [((3, 5), True), ((15, 15), True), ((16, 2), False), ((40, 30), False)])
def test_a_table_holds_its_numbers_where_there_is_room_and_its_ticks_are_integers(shape, written, generator, tmp_path):
    table = torch.randint(100, shape, generator=generator)
    given = new_axes()[0]
    ax = plot_contingency(table, title="a title", ax=given)
    assert ax is given
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("a title", "class", "cluster")
    assert [int(text.get_text()) for text in ax.texts] == (table.flatten().tolist() if written else [])
    save(ax, tmp_path / "table.png")
    assert all(float(tick).is_integer() for tick in (*ax.get_xticks(), *ax.get_yticks()))


def test_a_wide_image_has_wide_axes():
    square, wide = (plot_images(torch.rand(3, 8, n), ["a", "b", "c"], columns=1)[0].figure for n in (8, 64))
    assert square.get_size_inches().tolist() == pytest.approx([1.7, 3 * 1.9])
    assert wide.get_size_inches()[0] > 6.5


def test_numbers_of_a_table_stand_out_from_their_cells():
    ax = plot_contingency([[0, 40], [60, 100]])
    grey = ax.images[0].cmap(ax.images[0].norm([0, 40, 60, 100]))[:, 0]
    assert [text.get_color() for text in ax.texts] == ["black", "black", "white", "white"]
    assert (grey[:2] > 0.5).all()
    assert (grey[2:] < 0.5).all()


def test_a_table_can_name_its_rows_and_columns():
    ax = plot_contingency(np.eye(2), clusters=["4", "0"], classes=["cat", "dog"], ylabel="component")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["4", "0"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["cat", "dog"]
    assert ax.get_ylabel() == "component"


def test_a_reliability_diagram_shows_accuracy_over_confidence_and_the_share_of_rows(tmp_path):
    nan, given = torch.nan, new_axes()[0]
    confidence, accuracy = torch.tensor([nan, 0.4, 0.7, 1.0]), torch.tensor([nan, 0.5, 0.5, 1.0])
    ax = plot_reliability(confidence, accuracy, torch.tensor([0.0, 0.5, 0.25, 0.25]), title="digits:", ax=given)
    assert ax is given
    assert ax.get_title() == "digits: calibration error 0.100"
    np.testing.assert_allclose(ax.lines[-1].get_xdata(), confidence)
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), accuracy)
    np.testing.assert_allclose(ax.patches[0].get_data().values, [0.0, 0.5, 0.25, 0.25])
    save(ax, tmp_path / "reliability.png")


def test_a_reliability_diagram_of_no_row_says_nan():
    nothing = torch.full((3,), torch.nan)
    assert plot_reliability(nothing, nothing, nothing).get_title() == "calibration error nan"


def test_scores_are_histograms_in_per_cent_with_a_threshold(generator):
    scores = {"in": torch.randn(100, generator=generator), "out": torch.randn(50, generator=generator) + 3}
    ax = plot_scores(scores, threshold=1.5, xlabel="nats")
    share = 100 * (scores["out"] > 1.5).double().mean()
    assert legend(ax)[1] == f"out: {share:.0f} % above"
    assert legend(ax)[2] == "threshold 1.5"
    bars = [patch for patch in ax.patches if not patch.get_fill()]
    np.testing.assert_allclose([bar.get_data().values.sum() for bar in bars], [100, 100])
    assert bars[0].get_linestyle() != bars[1].get_linestyle()
    assert len({patch.get_hatch() for patch in ax.patches if patch.get_fill()}) == 2
    assert plot_scores(scores, ax=ax) is ax
    assert legend(plot_scores({"rows": -scores["out"]}, threshold=-1.5))[1] == "threshold −1.5"


def test_the_far_tail_is_in_the_last_bar_and_the_legend_says_so():
    near = torch.linspace(0, 1, 198)
    ax = plot_scores({"rows": torch.cat([near, torch.tensor([1e6, 1e7])])}, xlabel="score")
    assert ax.get_xlim()[1] < 2
    heights, edges, _ = ax.patches[-1].get_data()
    assert ax.get_xlabel() == "score"
    assert legend(ax) == ["rows", f"the last bar holds\nall above {edges[-2]:.4g}"]
    assert heights[-1] == pytest.approx(100 * (2 + int((near >= edges[-2]).sum())) / 200, abs=0.51)
    assert legend(plot_scores({"rows": torch.zeros(5)})) == ["rows"]


def test_images_stand_on_one_scale_with_their_titles():
    images = torch.stack([torch.full((8, 8), value) for value in (0.2, 0.4, 0.8)])
    axes = plot_images(images, ["a", "b", "c"], title="above")
    assert [ax.get_title() for ax in axes] == ["a", "b", "c"]
    assert [ax.images[0].get_clim() for ax in axes] == [pytest.approx((0.0, 0.8))] * 3
    assert axes[0].figure.get_suptitle() == "above"
    seven = plot_images(torch.rand(7, 4, 4), [str(k) for k in range(7)])
    assert [bool(ax.images) for ax in seven] == [True] * 7 + [False] * 3
    given = new_axes(1, 3)
    assert plot_images(images, ["a", "b", "c"], given) == given


# ------------------------------------------------------------------------------------------------------------- curves


def test_curves_share_their_epochs_and_begin_where_em_does(tmp_path):
    given = new_axes(2, 1)
    loss = ([0, 1, 2, 3, 4], [2.0, 1.0, 0.5, 0.4, 0.3])
    axes = plot_curves({"loss": loss, "nats": ([1, 2], [-3.0, -2.0])}, given, start=1)
    assert axes == given
    assert axes[0].lines[0].get_ydata().tolist() == loss[1]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert [ax.lines[1].get_xdata()[0] for ax in axes] == [1, 1]
    assert axes[0].get_title().endswith("dashed: first epoch of EM")
    save(axes[0], tmp_path / "curves.png")


@pytest.mark.parametrize("make", [list, np.asarray, torch.tensor, lambda values: [torch.tensor(v) for v in values]])
def test_epochs_and_values_may_be_tensors_that_learn(make):
    values = make([2.0, 1.0])
    if isinstance(values, torch.Tensor):
        values.requires_grad_()
    (ax,) = plot_curves({"loss": (make([3, 4]), values)}, start=make([3, 4])[1])
    assert ax.lines[0].get_xdata().tolist() == [3, 4]
    assert ax.lines[0].get_ydata().tolist() == [2.0, 1.0]
    assert plot_weights([[0.5, 0.5], [0.9, 0.1]], make([3, 4])).lines[0].get_xdata().tolist() == [3, 4]


def test_a_curve_that_begins_late_fills_its_axes_and_says_from_when_on():
    loss, nats = plot_curves({"loss": (range(100), range(100)), "nats": (range(60, 100), range(40))}, start=60)
    assert loss.get_xlim()[0] < 0
    assert 55 < nats.get_xlim()[0] < 60
    assert nats.get_xlabel() == "epoch, from 60 on"
    assert nats.lines[1].get_xdata()[0] == 60


def test_of_a_single_value_the_picture_says_what_it_is():
    loss, accuracy = plot_curves({"loss": (range(5), range(5)), "accuracy": ([4], [0.9375])})
    assert [text.get_text() for text in accuracy.texts] == ["0.9375"]
    assert accuracy.get_xlim() == loss.get_xlim()
    assert not loss.texts


def test_no_line_marks_a_start_before_which_nothing_was():
    (ax,) = plot_curves({"loss": ([0, 1], [2.0, 1.0])}, start=0, title="a title")
    assert len(ax.lines) == 1
    assert ax.get_title() == "a title"


def test_a_curve_that_hardly_changes_is_flat_on_an_axis_without_an_offset(tmp_path):
    (ax,) = plot_curves({"effective components": (range(5), [10 - 1e-7 * k for k in range(5)])})
    save(ax, tmp_path / "curve.png")
    low, high = ax.get_ylim()
    assert high - low == pytest.approx(0.1, rel=0.01)
    assert ax.yaxis.get_major_formatter().get_offset() == ""


def test_a_curve_with_gaps_has_a_scale():
    (ax,) = plot_curves({"loss": ([0, 1, 2], [1.0, float("nan"), 3.0])})
    assert ax.get_ylim() == pytest.approx((0.92, 3.08))


@pytest.mark.parametrize("k", [1, 3, 12, 16])
def test_weights_are_lines_with_names_at_their_ends(k, generator, tmp_path):
    weights = torch.rand(7, k, generator=generator).softmax(-1)
    given = new_axes()[0]
    ax = plot_weights(weights.tolist(), range(10, 17), ax=given)
    assert ax is given
    np.testing.assert_allclose([line.get_ydata() for line in ax.lines[:k]], 100 * weights.T, rtol=1e-5)
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in ax.lines[:k]}) == k
    assert [text.get_text() for text in ax.texts] == [f"c{c}  {100 * w:.1f} %" for c, w in enumerate(weights[-1])]
    save(ax, tmp_path / "weights.png")
    boxes = sorted((Text.get_window_extent(text) for text in ax.texts), key=lambda box: box.y0)
    assert all(upper.y0 > lower.y0 + 0.6 * lower.height for lower, upper in itertools.pairwise(boxes))
    assert all(10 <= tick <= 16 for tick in ax.get_xticks())


@pytest.mark.parametrize("k", [17, 25, 60])
def test_weights_of_many_components_are_rows_of_shades(k, generator, tmp_path):
    weights = torch.rand(7, k, generator=generator).softmax(-1)
    ax = plot_weights(weights, range(10, 17))
    np.testing.assert_allclose(ax.images[0].get_array(), 100 * weights.T, rtol=1e-5)
    assert tuple(ax.images[0].get_extent()) == (9.5, 16.5, k - 0.5, -0.5)
    assert len(ax.texts) == (k if k <= 40 else 0)
    assert ax.get_yticklabels()[0].get_text() == "c0"
    save(ax, tmp_path / "weights.png")


def test_equal_weights_are_of_a_middle_grey():
    weights = torch.full((3, 20), 0.05)
    weights[1, :2] = torch.tensor([0.06, 0.04])
    image = plot_weights(weights).images[0]
    np.testing.assert_allclose(image.norm(np.array([4.0, 5.0, 6.0])), [0.0, 0.5, 1.0], atol=1e-5)


@pytest.mark.parametrize("k", [3, 20])
def test_births_and_deaths_stand_at_their_epochs_and_components(k):
    weights, births, deaths = torch.rand(5, k).softmax(-1), torch.zeros(5, k), torch.zeros(5, k)
    deaths[1, 2], births[3, 2], births[4, 0] = 1, 1, 2
    ax = plot_weights(weights, range(20, 25), births=births, deaths=deaths)
    died, born = (group.get_offsets() for group in ax.collections)
    assert legend(ax) == ["component died", "component was born"]
    heights = {(e, c): float(100 * weights[e, c]) if k == 3 else c for e, c in ((1, 2), (3, 2), (4, 0))}
    np.testing.assert_allclose(died, [[21.0, heights[1, 2]]], rtol=1e-5)
    np.testing.assert_allclose(born, [[23.0, heights[3, 2]], [24.0, heights[4, 0]]], rtol=1e-5)
    assert ax.get_title() == "Weight of each component over training"


def test_the_title_says_that_no_component_died_or_was_born():
    nothing = torch.zeros(2, 2)
    ax = plot_weights([[0.5, 0.5], [0.4, 0.6]], births=nothing, deaths=nothing)
    assert ax.get_title().replace("\n", " ").endswith("; none died or was born")
    assert "none" not in plot_weights([[0.5, 0.5]]).get_title()


def test_one_epoch_of_weights_is_drawn():
    ax = plot_weights([[0.5, 0.5]], [9])
    assert ax.get_xticks().tolist() == [9]


def test_the_likelihood_is_that_of_each_iteration(generator):
    x = torch.cat([torch.randn(100, 2, generator=generator), torch.randn(100, 2, generator=generator) + 6])
    gmm = GaussianMixture(2, 2, random_state=0).fit(x)
    ax = plot_likelihood(gmm)
    assert ax.lines[0].get_ydata().tolist() == gmm.history_
    assert ax.lines[0].get_xdata()[-1] == gmm.n_iter_
    assert ax.get_title().startswith(f"EM converged after {gmm.n_iter_} iteration")
    assert ax.get_ylabel() == "log-likelihood, nats per row"
    prior = GaussianMixture(2, 2, random_state=0, weight_concentration_prior=2.0).fit(x)
    assert plot_likelihood(prior).get_ylabel() == "log-posterior, nats per row"


@pytest.mark.parametrize(("best", "expected"), [("smallest", 3), ("largest", 1)])
def test_the_best_number_of_components_has_a_star(best, expected):
    values = torch.tensor([[9.0, 4.0, 2.0, 5.0], [11.0, 6.0, 4.0, 7.0]])
    ax = plot_criterion([1, 2, 3, 8], values, name="BIC, nats", best=best)
    assert ax.get_title() == f"BIC is {best} at {expected} component{'s'[: expected != 1]}"
    star = next(line for line in ax.lines if line.get_marker() == "*")
    assert list(star.get_xdata()) == [expected]
    np.testing.assert_allclose(np.asarray(ax.lines[0].get_ydata(), float), values.mean(0))
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 1], [10 - 2**0.5, 10 + 2**0.5])
    assert ax.get_ylabel() == "BIC, nats, mean ± sd of 2 runs"
    assert ax.get_xticks().tolist() == [1, 2, 3, 8]
    ax.figure.draw_without_rendering()
    low, high = ax.transData.inverted().transform([(0, 0), (0, 12)])[:, 1]  # a star is 18 points large, 9 on each side
    assert ax.get_ylim()[0] < float(star.get_ydata()[0]) - 0.6 * (high - low)
    without = plot_criterion([1, 2], [2.0, 1.0], star=False)
    assert not any(line.get_marker() == "*" for line in without.lines)
    assert plot_criterion([1, 2], [2.0, 1.0], ax=ax) is ax


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: plot_contingency([1, 2]), ValueError, r"`table` of numbers of rows, shape \(K, C\), but got \(2,\)"),
        (lambda: plot_contingency([[1, -2]]), ValueError, "`table` of numbers of rows, but it holds a negative"),
        (lambda: plot_contingency([[float("nan")]]), ValueError, "`table` of numbers of rows, but it holds.*nan"),
        (lambda: plot_contingency([[float("inf")]]), ValueError, "`table` of numbers of rows, but it holds.*infinity"),
        (lambda: plot_contingency("ab"), TypeError, "`table` to be a tensor"),
        (lambda: plot_contingency([[1]], clusters=["a", "b"]), ValueError, "`clusters` to name all 1, but got 2"),
        (lambda: plot_contingency([[1]], classes=[]), ValueError, "`classes` to name all 1, but got 0"),
        (lambda: plot_reliability([0.5], [0.5], [0.5, 0.5]), ValueError, r"of one shape \(B,\), but got"),
        (lambda: plot_scores(torch.zeros(3)), TypeError, "`scores` by the name of their group"),
        (lambda: plot_scores({}), ValueError, "`scores` of at least one group"),
        (lambda: plot_scores({"a": [float("inf")]}), ValueError, "`scores` of 'a' with at least one score, all finite"),
        (lambda: plot_images(torch.zeros(8, 8), []), ValueError, r"`images` of shape \(K, height, width\), but got"),
        (lambda: plot_images(torch.zeros(2, 8, 8), ["a"]), ValueError, "`titles` for all 2 images, but got 1"),
        (lambda: plot_images(torch.zeros(2, 8, 8), ["a"] * 2, new_axes()), ValueError, "`axes` for all 2 images"),
        (lambda: plot_images(torch.zeros(1, 2, 2), ["a"], columns=-1), ValueError, "`columns` to be at least 1"),
        (lambda: plot_images(torch.zeros(1, 2, 2), ["a"], columns=0), ValueError, "`columns` to be at least 1"),
        (lambda: plot_curves({"a": ([0], ["b"])}), TypeError, "`a` to be a tensor"),
        (lambda: plot_curves({}), ValueError, "`curves` with at least one curve"),
        (lambda: plot_curves({"a": ([0], [1.0, 2.0])}), ValueError, "a value for each epoch, but 'a' has 1 and 2"),
        (lambda: plot_curves({"a": ([0], [1.0])}, new_axes(2)), ValueError, "`axes` for each of the 1 curves"),
        (lambda: plot_weights([0.5, 0.5]), ValueError, r"`weights` of shape \(E, K\).*but got \(2,\)"),
        (lambda: plot_weights([[1.0]], [0, 1]), ValueError, "`epochs` for each of the 1 rows of `weights`, but got 2"),
        (lambda: plot_weights([[1.0]], births=[[0, 0]]), ValueError, r"`births` of shape \(1, 1\) as `weights`"),
        (lambda: plot_weights([[1.0]], deaths=[[0], [0]]), ValueError, r"`deaths` of shape \(1, 1\) as `weights`"),
        (lambda: plot_likelihood(GaussianMixture(1, 1)), RuntimeError, "`gmm` to be fitted"),
        (
            lambda: plot_likelihood(GaussianMixture(1, 1).initialize([[0.0], [1.0]])),
            ValueError,
            "`gmm` with the history of a fit",
        ),
        (lambda: plot_criterion([1, 2], [1.0]), ValueError, r"`values` of shape \(2,\) or \(R, 2\).*but got"),
        (lambda: plot_criterion([1], [float("nan")]), ValueError, "`values` to be finite"),
        (lambda: plot_criterion([1], [1.0], best="low"), ValueError, "`best` to be one of 'smallest', 'largest'"),
    ],
)
def test_what_cannot_be_drawn_is_one_error_that_names_it(call, error, match):
    with pytest.raises(error, match=match):
        call()
