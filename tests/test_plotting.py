"""Pictures: what is drawn is where the mathematics says."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Ellipse

from tgmm_nn import GaussianMixture
from tgmm_nn.plotting import (
    new_axes,
    plot_contingency,
    plot_curves,
    plot_images,
    plot_latent,
    plot_reliability,
    plot_scores,
    principal_plane,
    save,
)


def ellipses(ax):
    return [patch for patch in ax.patches if isinstance(patch, Ellipse)]


def test_the_principal_plane_holds_the_two_largest_variances(generator):
    x = torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 3.0])
    mean, plane = principal_plane(x)
    torch.testing.assert_close(plane.mT @ plane, torch.eye(2))
    torch.testing.assert_close(mean, x.mean(0))
    largest = torch.linalg.eigvalsh(x.mT.cov()).flip(0)[:2]
    torch.testing.assert_close(((x - mean) @ plane).var(0), largest)


def test_the_principal_plane_keeps_its_signs(generator):
    x = torch.randn(200, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    _, plane = principal_plane(x)
    _, again = principal_plane(x.flip(0))
    torch.testing.assert_close(plane, again)


def test_each_component_is_drawn_as_the_curve_of_two_standard_deviations(family, generator):
    """In two features the projection is a rotation, so points of the ellipse have Mahalanobis distance 2."""
    gmm = GaussianMixture(3, 2, family, random_state=0).fit(torch.randn(200, 2, generator=generator))
    x = torch.randn(100, 2, generator=generator)
    drawn = ellipses(plot_latent(gmm, x))
    assert len(drawn) == 3
    mean, plane = principal_plane(x)
    for k, ellipse in enumerate(drawn):
        points = torch.from_numpy(ellipse.get_patch_transform().transform(ellipse.get_path().vertices)).float()
        centred = points @ torch.linalg.inv(plane) + mean - gmm.means_[k]
        precision = torch.linalg.inv(gmm.covariance_matrices()[k])
        distance = ((centred @ precision) * centred).sum(-1).sqrt()
        on_curve = distance[:-1:3]  # the end points of each Bezier segment; its control points lie outside
        torch.testing.assert_close(on_curve, torch.full_like(on_curve, 2.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_features", [1, 2, 7])
def test_any_number_of_features_is_drawn(n_features, generator, tmp_path):
    x = torch.randn(50, n_features, generator=generator)
    ax = plot_latent(GaussianMixture(2, n_features).initialize(x), x, torch.arange(50) % 3, title="a title")
    assert ax.get_title() == "a title"
    save(ax, tmp_path / "new" / "latent.png")
    assert (tmp_path / "new" / "latent.png").stat().st_size > 1000


def test_a_mixture_that_is_not_fitted_shows_no_ellipses(generator):
    assert not ellipses(plot_latent(GaussianMixture(3, 2), torch.randn(20, 2, generator=generator)))


def test_functions_draw_into_the_axes_they_are_given(generator):
    axes = new_axes(1, 2)
    x = torch.randn(20, 2, generator=generator)
    assert plot_latent(GaussianMixture(1, 2), x, ax=axes[1]) is axes[1]
    assert plot_curves({"loss": ([0, 1], [2.0, 1.0])}, [axes[0]])[0].lines[0].get_ydata().tolist() == [2.0, 1.0]
    images = plot_images(torch.rand(7, 8, 8), [str(k) for k in range(7)])
    assert [ax.get_title() for ax in images[:7]] == [str(k) for k in range(7)]
    assert not any(ax.axison for ax in images)


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


def test_numbers_of_a_table_stand_out_from_their_cells():
    ax = plot_contingency(torch.tensor([[0, 40], [60, 100]]))
    grey = ax.images[0].cmap(ax.images[0].norm([0, 40, 60, 100]))[:, 0]
    assert [text.get_color() for text in ax.texts] == ["black", "black", "white", "white"]
    assert (grey[:2] > 0.5).all()
    assert (grey[2:] < 0.5).all()


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


def test_scores_are_drawn_as_histograms_with_a_threshold(generator):
    scores = {"in": torch.randn(100, generator=generator), "out": torch.randn(50, generator=generator) + 3}
    ax = plot_scores(scores, threshold=1.5, xlabel="nats")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["in", "out", "threshold"]
    assert ax.get_xlabel() == "nats"
    assert plot_scores(scores, ax=ax) is ax
