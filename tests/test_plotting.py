"""Pictures in the plane: what is drawn is where the mathematics says."""

import math
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from PIL import Image

from tgmm_nn import GaussianMixture, MixtureClassifier, OutlierScore
from tgmm_nn.outliers import SCORES
from tgmm_nn.plotting import (
    Plane,
    animate,
    density_levels,
    limits_of,
    new_axes,
    plot_density,
    plot_latent,
    plot_samples,
    principal_plane,
    save,
)
from tgmm_nn.plotting.density import NAMES
from tgmm_nn.plotting.figures import COLORS, LINES, MARKERS, mark
from tgmm_nn.plotting.latent import spread
from tgmm_nn.plotting.marks import component_marks, match_labels, spread_marks
from tgmm_nn.plotting.places import MOST_NAMES, label


def ellipses(ax):
    return [patch for patch in ax.patches if isinstance(patch, Ellipse)]


def numbers(ax):
    return {text.get_text(): text for text in ax.texts}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def blobs(k, d, generator, n=300):
    centres = 5 * torch.randn(k, d, generator=generator)
    return centres[torch.arange(n) % k] + torch.randn(n, d, generator=generator)


@pytest.fixture
def gmm(family, generator):
    """A fitted mixture of five features."""
    return GaussianMixture(3, 5, family, random_state=0, max_iter=500).fit(blobs(3, 5, generator))


# ------------------------------------------------------------------------------------------------------------- planes


def test_the_principal_plane_holds_the_two_largest_variances(generator):
    x = torch.randn(500, 4, generator=generator).double() * torch.tensor([1.0, 5.0, 0.1, 3.0])
    plane = principal_plane(x)
    torch.testing.assert_close(plane.directions.mT @ plane.directions, torch.eye(2).double())
    torch.testing.assert_close(plane.mean, x.mean(0))
    variances = torch.linalg.eigvalsh(x.mT.cov()).flip(0)
    torch.testing.assert_close(plane.project(x).var(0), variances[:2])
    share = 100 * variances[0] / variances.sum()
    assert plane.names[0] == f"first principal direction ({share:.0f} % of the variance)"


def test_the_principal_plane_keeps_its_signs(generator):
    x = torch.randn(200, 3, generator=generator) * torch.tensor([3.0, 2.0, 1.0])
    torch.testing.assert_close(principal_plane(x).directions, principal_plane(x.flip(0)).directions)


@pytest.mark.parametrize("n_features", [1, 2])
def test_one_or_two_features_are_drawn_as_they_are(n_features, generator):
    x = torch.randn(50, n_features, generator=generator) + 7
    plane = principal_plane(x)
    assert plane.names == ("feature 0", "feature 1")
    torch.testing.assert_close(plane.project(x)[:, :n_features], x.double())


@pytest.mark.parametrize("n", [1, 2])
def test_a_plane_of_few_rows_has_two_directions(n, generator):
    directions = principal_plane(torch.randn(n, 6, generator=generator)).directions
    torch.testing.assert_close(directions.mT @ directions, torch.eye(2).double())


def test_a_projected_mixture_is_the_distribution_of_projected_rows(gmm):
    """Against the characteristic function of the mixture itself, taken along directions of the plane."""
    plane = Plane(torch.randn(5), torch.linalg.qr(torch.randn(5, 2))[0])
    flat = plane.project_mixture(gmm)

    def characteristic(mixture, t, shift=0.0):
        phase = torch.exp(1j * ((mixture.means_.double() - shift) @ t))
        decay = torch.exp(-0.5 * (t @ mixture.covariance_matrices().double() @ t))
        return (mixture.weights_.double() * decay * phase).sum()

    for _ in range(20):
        t = 0.3 * torch.randn(2).double()
        expected = characteristic(gmm, plane.directions.double() @ t, plane.mean.double())
        torch.testing.assert_close(characteristic(flat, t), expected, rtol=1e-4, atol=1e-5)


def test_along_two_axes_the_projected_mixture_is_the_marginal(gmm, generator):
    plane = Plane(torch.zeros(5), torch.eye(5)[:, [3, 1]])
    points = 3 * torch.randn(50, 2, generator=generator).double()
    torch.testing.assert_close(
        plane.project_mixture(gmm)(points), gmm.double().marginal([3, 1])(points), rtol=1e-4, atol=1e-4
    )


def test_narrow_components_of_float32_are_projected():
    covariances = torch.diag_embed(torch.tensor([[1e4, 1e-3, 1.0], [1.0, 1.0, 1e-3]]))
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    gmm = GaussianMixture(2, 3).set_parameters([0.5, 0.5], torch.zeros(2, 3), turn @ covariances @ turn.mT)
    flat = principal_plane(torch.randn(20, 3)).project_mixture(gmm)
    assert torch.isfinite(flat.covariances_).all()


def test_limits_hold_rows_and_ellipses_but_leave_rows_at_least_half_of_the_room(generator):
    points = torch.randn(100, 2, generator=generator).double()
    narrow = GaussianMixture(1, 2, dtype=torch.float64).set_parameters([1.0], [[0.0, 0.0]], torch.eye(2)[None] * 4)
    low, high = limits_of(points, narrow, 2.0)
    assert (low <= points.amin(0)).all()
    assert (high >= points.amax(0)).all()
    assert (low < -4).all()
    assert (high > 4).all()
    wide = GaussianMixture(1, 2, dtype=torch.float64).set_parameters([1.0], [[0.0, 0.0]], torch.eye(2)[None] * 1e6)
    low, high = limits_of(points, wide, 2.0)
    span = (points.amax(0) - points.amin(0)).amax()
    assert ((high - low) <= 2.2 * span).all()


# ------------------------------------------------------------------------------------------------------------- latent


@pytest.mark.parametrize("radius", [1.0, 2.0])
def test_each_component_is_drawn_as_the_curve_of_its_standard_deviations(family, radius, generator):
    gmm = GaussianMixture(3, 2, family, random_state=0, max_iter=500).fit(torch.randn(200, 2, generator=generator))
    drawn = ellipses(plot_latent(gmm, torch.randn(100, 2, generator=generator), n_std=[radius]))
    assert len(drawn) == 3
    for k, ellipse in enumerate(drawn):
        points = torch.from_numpy(ellipse.get_patch_transform().transform(ellipse.get_path().vertices)).float()
        centred = points - gmm.means_[k]
        distance = ((centred @ torch.linalg.inv(gmm.covariance_matrices()[k])) * centred).sum(-1).sqrt()
        on_curve = distance[:-1:3]  # the end points of each Bezier segment; its control points lie outside
        torch.testing.assert_close(on_curve, torch.full_like(on_curve, radius), rtol=1e-3, atol=1e-3)


def test_half_axes_are_roots_of_the_eigenvalues_of_the_projected_covariance(gmm, generator):
    x = blobs(3, 5, generator)
    directions = principal_plane(x).directions
    covariances = directions.mT @ gmm.covariance_matrices().double() @ directions
    axes = torch.tensor([(e.width / 2, e.height / 2) for e in ellipses(plot_latent(gmm, x, n_std=[1.0]))])
    torch.testing.assert_close(axes, torch.linalg.eigvalsh(covariances).sqrt().float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_features", [1, 2, 7])
@pytest.mark.parametrize("labelled", [True, False])
def test_any_number_of_features_is_drawn(n_features, labelled, generator, tmp_path):
    x = torch.randn(50, n_features, generator=generator)
    given = new_axes()[0]
    labels = np.arange(50) % 3 if labelled else None
    ax = plot_latent(GaussianMixture(2, n_features).initialize(x), x.numpy(), labels, title="a title", ax=given)
    assert ax is given
    assert ax.get_title() == "a title"
    save(ax, tmp_path / "new" / "latent.png")
    assert (tmp_path / "new" / "latent.png").stat().st_size > 1000


def test_a_mixture_that_is_not_fitted_shows_no_ellipses_and_says_so(generator):
    ax = plot_latent(GaussianMixture(3, 2), torch.randn(20, 2, generator=generator))
    assert not ellipses(ax)
    assert ax.get_title() == "Rows (mixture not started)"


def test_titles_say_what_is_drawn(generator):
    x, wide = torch.randn(40, 2, generator=generator), (30.0, 5.0)
    gmm = GaussianMixture(2, 2).initialize(x)
    assert plot_latent(gmm, x, ax=new_axes(size=wide)[0]).get_title() == ("Rows by component; ellipses at 1 and 2 sd")
    by_class = plot_latent(gmm, x, torch.arange(40) % 2, n_std=[2.0], ax=new_axes(size=wide)[0])
    assert by_class.get_title() == "Rows by class; ellipses of components at 2 sd"
    line = plot_latent(GaussianMixture(2, 1).initialize(x[:, :1]), x[:, :1], ax=new_axes(size=wide)[0])
    assert line.get_title() == "Rows, and the density of each component"
    assert line.get_ylabel() == "density"


@pytest.mark.parametrize("k", [3, 12, 25])
def test_numbers_of_components_do_not_overlap(k, generator, tmp_path):
    """Even where all means are alike."""
    means = 0.01 * torch.randn(k, 4, generator=generator)
    gmm = GaussianMixture(k, 4).set_parameters(torch.full((k,), 1 / k), means, torch.eye(4).expand(k, 4, 4))
    ax = plot_latent(gmm, gmm.sample(200)[0])
    save(ax, tmp_path / "latent.png")  # lays out the figure
    texts = [numbers(ax)[f"c{number}"] for number in range(k)]
    boxes = [text.get_window_extent() for text in texts]
    centres = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    for i, a in enumerate(centres):
        for b in centres[:i]:
            assert abs(a[0] - b[0]) > 12 or abs(a[1] - b[1]) > 10
    assert all(text.arrow_patch is not None for text in texts[:2])  # a thread leads to the mean


def test_numbers_with_room_stand_at_their_means(generator):
    gmm = GaussianMixture(2, 2).set_parameters([0.5, 0.5], [[0.0, 0.0], [9.0, 9.0]], torch.eye(2).expand(2, 2, 2))
    texts = numbers(plot_latent(gmm, gmm.sample(100)[0]))
    np.testing.assert_allclose([texts["c0"].get_position(), texts["c1"].get_position()], gmm.means_, atol=1e-6)
    assert texts["c0"].arrow_patch is None


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_spread_places_are_apart_and_near(n, generator):
    places = 0.1 * torch.randn(n, 2, generator=generator)
    moved = spread(places)
    distance = torch.cdist(moved, moved).fill_diagonal_(math.inf)
    assert n == 1 or float(distance.min()) > 0.9
    assert float((moved - places).norm(dim=-1).max()) < 1.2 * math.sqrt(n)
    torch.testing.assert_close(spread(moved), moved, atol=0.1, rtol=0)


POINTS = {
    "one row": torch.tensor([[0.3, -0.2, 5.0]]),
    "equal rows": torch.zeros(10, 3),
    "equal rows far from zero": torch.full((10, 3), 1e6),
}


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("points", POINTS.values(), ids=POINTS)
def test_rows_without_spread_leave_the_room_to_the_components(points, d, tmp_path):
    """A frame as wide as the rows would be a millionth of its ellipses, whose dashes Matplotlib draws without end."""
    x = points[:, :d]
    means = torch.stack([x[0] - 1, x[0] + 1])
    gmm = GaussianMixture(2, d).set_parameters([0.5, 0.5], means, torch.eye(d).expand(2, d, d))
    for ax in (plot_latent(gmm, x), plot_density(gmm, x)):
        low, high = ax.get_xlim()
        assert 2.0 < high - low < 20.0
        assert low < float(principal_plane(x).project(x)[0, 0]) < high
        save(ax, tmp_path / "picture.png")


def test_equal_rows_and_a_mixture_of_them_are_drawn(tmp_path):
    x = torch.full((5, 1), 3.3)
    gmm = GaussianMixture(1, 1).fit(x)
    for number, ax in enumerate((plot_latent(gmm, x), plot_density(gmm, x), *plot_samples(gmm, x))):
        save(ax, tmp_path / f"{number}.png")
        low, high = ax.get_xlim()
        assert low < 3.3 < high
    save(plot_latent(GaussianMixture(1, 1), x), tmp_path / "fresh.png")


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 0.0]], ids=["heavy", "empty"])
def test_a_component_wider_than_a_million_pictures_is_drawn_in_no_time(weights, tmp_path):
    covariances = torch.stack([torch.eye(2), torch.diag(torch.tensor([1e14, 1e-2]))])
    gmm = GaussianMixture(2, 2).set_parameters(weights, torch.zeros(2, 2), covariances)
    ax = plot_latent(gmm, torch.randn(50, 2), limits=torch.tensor([[-3.0, -3.0], [3.0, 3.0]]))
    assert [ellipse.get_linestyle() for ellipse in ellipses(ax)[2:]] == ["-", "-"]
    start = time.process_time()
    save(ax, tmp_path / "latent.png")
    assert time.process_time() - start < 10


def test_an_empty_component_is_dotted_grey_and_named():
    covariances = torch.stack([torch.eye(2), torch.eye(2), 1e6 * torch.eye(2)])
    gmm = GaussianMixture(3, 2).set_parameters([0.5, 0.5, 0.0], [[0.0, 0.0], [9.0, 0.0], [4.0, 4.0]], covariances)
    ax = plot_latent(gmm, gmm.sample(100)[0], n_std=[2.0])
    assert set(numbers(ax)) == {"c0", "c1", "c2 (empty)"}
    assert [ellipse.get_linestyle() for ellipse in ellipses(ax)] == ["-", mark(1).line, ":"]
    assert ax.get_xlim()[1] - ax.get_xlim()[0] < 30  # it does not widen the picture


def test_labels_have_marks_and_names_of_their_own(generator):
    x = torch.randn(60, 2, generator=generator)
    labels = torch.arange(60) % 3
    ax = plot_latent(GaussianMixture(2, 2), x, labels, names={2: "other digits"})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "other digits"]
    assert [len(group.get_offsets()) for group in ax.collections] == [20, 20, 20]
    outside = ax.get_legend().get_bbox_to_anchor().transformed(ax.transAxes.inverted())
    assert outside.x0 > 1


def test_a_line_shows_the_density_and_what_components_add_to_it(generator):
    gmm = GaussianMixture(2, 1).set_parameters([0.3, 0.7], [[0.0], [5.0]], [[[1.0]], [[4.0]]])
    x = gmm.sample(200, generator=generator)[0]
    ax = plot_latent(gmm, x, gmm.predict(x))
    *parts, mixture = ax.lines
    grid = torch.from_numpy(np.asarray(mixture.get_xdata())).float()[:, None]
    np.testing.assert_allclose(mixture.get_ydata(), gmm(grid).exp(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([line.get_ydata() for line in parts], gmm.log_joint(grid).exp().mT, rtol=1e-4, atol=1e-6)
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"mixture", "class 0 (c0)", "class 1 (c1)"}


def looks(ax):
    """Return colour and marker of each group of points, by how many points it has."""
    return {
        len(group.get_offsets()): (tuple(group.get_facecolor()[0]), group.get_paths()[0].vertices.tobytes())
        for group in ax.collections
    }


def test_a_class_has_the_marks_of_the_component_that_is_matched_to_it(generator):
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    gmm = GaussianMixture(3, 2).set_parameters([0.2, 0.3, 0.5], centres, torch.eye(2).expand(3, 2, 2))
    components = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([20, 30, 50]))
    x = centres[components] + torch.randn(100, 2, generator=generator)
    classes = torch.tensor([7, 5, 2])[components]
    by_class = plot_latent(gmm, x, classes)
    assert looks(by_class) == looks(plot_latent(gmm, x))
    assert [text.get_text() for text in by_class.get_legend().get_texts()] == ["2 (c2)", "5 (c1)", "7 (c0)"]
    assert looks(plot_latent(gmm, x, marks={0: 4, 1: 5, 2: 6})) == looks(
        plot_latent(gmm, x, classes, marks={7: 4, 5: 5, 2: 6})
    )


def test_a_class_without_a_component_has_a_mark_of_its_own():
    marks = {0: 0, 1: 1}
    assert spread_marks([3, 4, 9], match_labels(torch.tensor([0, 0, 1, 1]), torch.tensor([4, 4, 9, 3])), marks) == {
        3: 1,
        4: 0,
        9: 2,
    }
    assert match_labels(torch.tensor([0, 1]), torch.tensor([-1, -1])) == {}


@pytest.mark.parametrize("k", [1, 7, 10, 25, 90])
def test_components_that_are_neighbours_have_different_colours(k, generator):
    means = torch.rand(k, 2, generator=generator)
    marks = component_marks(means)
    assert sorted(marks) == list(range(k))
    assert len(set(marks.values())) == k
    assert len({number % len(MARKERS) for number in marks.values()}) == min(k, len(MARKERS))
    colors = torch.tensor([marks[i] % len(COLORS) for i in range(k)])
    assert len(colors.unique()) == min(k, len(COLORS))
    distance = torch.cdist(means, means)
    if k == 10:  # three colours come twice: at pairs that are farther apart than most
        twice = [distance[i, j] for i in range(k) for j in range(i) if colors[i] == colors[j]]
        assert min(twice) > distance[distance > 0].median()


def test_labels_may_be_lists_and_negative_ones_are_none():
    """Strings are named by `names=`."""
    ax = plot_latent(FITTED, [[0.0, 1.0], [1.0, 2.0], [3.0, 3.0], [3.0, 2.0]], [0, 1, 1, -3])
    assert legend(ax)[0] == "no label"
    assert [len(group.get_offsets()) for group in ax.collections] == [1, 1, 2]
    assert ax.collections[0].get_facecolor()[0, :3].tolist() == pytest.approx([0.5] * 3)
    with pytest.raises(TypeError, match=r"`labels` to hold integers, but got \['cat'\].*`names=`"):
        plot_latent(FITTED, [[0.0, 1.0]], ["cat"])


def test_more_classes_than_a_legend_has_room_for_are_counted(generator):
    x = torch.randn(80, 2, generator=generator)
    texts = plot_latent(GaussianMixture(2, 2), x, torch.arange(80) % 40).get_legend().get_texts()
    assert len(texts) == MOST_NAMES + 1
    assert texts[-1].get_text() == "and 8 more"
    few, many = (plot_latent(GaussianMixture(2, 2), x, torch.arange(80) % n).figure for n in (4, 40))
    assert many.get_size_inches()[0] > few.get_size_inches()[0] + 2


def test_samples_share_plane_and_limits_with_rows_and_leave_the_stream(gmm, generator):
    x = blobs(3, 5, generator)
    before = gmm.get_extra_state()
    left, right = plot_samples(gmm, x, 77, seed=1)
    assert gmm.get_extra_state() == before
    assert (left.get_title(), right.get_title()) == ("300 rows of the data", "77 samples of the mixture")
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    drawn = np.concatenate([group.get_offsets() for group in right.collections])
    samples, _ = gmm.sample(77, generator=torch.Generator().manual_seed(1))
    expected = principal_plane(x).project(samples).numpy()
    np.testing.assert_allclose(np.sort(drawn, 0), np.sort(expected, 0), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------ density


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
def test_a_level_holds_its_share_of_fresh_samples(gmm, mass):
    (level,) = density_levels(gmm, [mass])
    samples, _ = gmm.sample(50_000, generator=torch.Generator().manual_seed(99))
    share = float((gmm(samples) >= level).double().mean())
    assert share == pytest.approx(mass, abs=4 * math.sqrt(mass * (1 - mass) * 3 / 100_000))


def test_levels_of_a_gaussian_are_those_of_the_chi_square_law():
    gmm = GaussianMixture(1, 2).set_parameters([1.0], [[1.0, 2.0]], [[[2.0, 0.5], [0.5, 1.0]]])
    peak = float(gmm(gmm.means_))
    expected = [peak + math.log(1 - mass) for mass in (0.5, 0.9)]  # of 2 features: exp(-r² / 2) = 1 - mass
    np.testing.assert_allclose(density_levels(gmm, [0.5, 0.9]), expected, atol=0.03)


def test_contours_lie_where_the_density_has_its_levels(generator):
    gmm = GaussianMixture(2, 2, random_state=0).fit(blobs(2, 2, generator))
    ax = plot_density(gmm, blobs(2, 2, generator), mass=[0.5, 0.9])
    contours = [c for c in ax.collections if hasattr(c, "levels")]
    for contour, level in zip(contours, density_levels(gmm.double(), [0.5, 0.9]), strict=True):
        points = torch.from_numpy(np.concatenate([path.vertices for path in contour.get_paths()]))
        torch.testing.assert_close(gmm(points), level.expand(len(points)), atol=0.1, rtol=0)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "holds 50 % of the mass",
        "holds 90 % of the mass",
        "300 rows",
    ]


def test_outliers_are_crosses_by_the_score_in_all_features(generator):
    """A row that is far along a direction that is not drawn is an outlier in the middle of the plane."""
    x = torch.randn(400, 3, generator=generator) * torch.tensor([9.0, 5.0, 0.1])
    gmm = GaussianMixture(1, 3).fit(x)
    score = OutlierScore(gmm).calibrate(x, 0.999)
    far = torch.tensor([[0.0, 0.0, 5.0]])
    ax = plot_density(gmm, torch.cat([x, far]), score, plane=Plane(torch.zeros(3), torch.eye(3, 2)))
    crosses = ax.collections[-1].get_offsets()
    np.testing.assert_allclose(crosses[-1], [0.0, 0.0], atol=1e-6)
    assert len(crosses) == 1 + int(score.is_outlier(x).sum())
    assert (
        ax.get_legend()
        .get_texts()[-1]
        .get_text()
        .endswith("\n(those amid rows are far out in the\n1 direction not drawn)")
    )


def test_the_limits_of_a_density_hold_its_contours(gmm, generator):
    ax = plot_density(gmm, blobs(3, 5, generator), mass=[0.99])
    (contour,) = [c for c in ax.collections if hasattr(c, "levels")]
    points = np.concatenate([path.vertices for path in contour.get_paths()])
    for (low, high), values in zip((ax.get_xlim(), ax.get_ylim()), points.T, strict=True):
        assert low < values.min() - 0.01 * (high - low)
        assert high > values.max() + 0.01 * (high - low)


def test_a_note_on_outliers_amid_rows_only_where_directions_are_hidden(generator):
    x = torch.randn(50, 2, generator=generator)
    gmm = GaussianMixture(1, 2).fit(x)
    ax = plot_density(gmm, x[:1], OutlierScore(gmm).calibrate(x))
    assert legend(ax)[-2] == "1 row, no outliers"
    assert legend(ax)[-1].startswith("0 outliers: −log p(x) > ")
    assert "\n" not in legend(ax)[-1]


@pytest.mark.parametrize(("d", "title"), [(1, "Density of the mixture"), (2, "Density of the mixture")])
def test_the_density_of_few_features_is_the_density_itself(d, title, generator, tmp_path):
    x = torch.randn(100, d, generator=generator)
    gmm = GaussianMixture(2, d).initialize(x)
    given = new_axes()[0]
    ax = plot_density(gmm, x, OutlierScore(gmm).calibrate(x), ax=given)
    assert ax is given
    assert ax.get_title() == title
    save(ax, tmp_path / "density.png")


def test_the_curve_of_one_feature_is_its_density():
    gmm = GaussianMixture(1, 1).set_parameters([1.0], [[0.0]], [[[4.0]]])
    ax = plot_density(gmm, torch.linspace(-3, 3, 20)[:, None], mass=[0.5])
    curve, level = ax.lines
    normal = torch.distributions.Normal(0.0, 2.0)
    grid = torch.tensor(curve.get_xdata())
    np.testing.assert_allclose(curve.get_ydata(), normal.log_prob(grid).exp(), rtol=1e-5)
    np.testing.assert_allclose(level.get_ydata()[0], normal.log_prob(normal.icdf(torch.tensor(0.75))).exp(), rtol=0.01)


# ------------------------------------------------------------------------------------------------------ marks and files


def test_marks_differ_in_grey_as_well():
    assert len({mark(number) for number in range(84)}) == 84
    assert len({mark(number).marker for number in range(12)}) == 12
    assert [math.gcd(len(COLORS), len(other)) for other in (MARKERS, LINES)] == [1, 1]


def test_a_long_title_is_broken_into_lines_that_fit(tmp_path):
    ax = new_axes()[0]
    label(ax, "a title that is far too long for axes of this width, and that would be cut off", "x", "y")
    save(ax, tmp_path / "title.png")
    box, figure = ax.title.get_window_extent(), ax.figure.bbox
    assert figure.x0 < box.x0
    assert box.x1 < figure.x1


@pytest.mark.parametrize(
    "far", [[[20.0, -8.0], [6.0, -15.0]], [[0.0, 60.0]], [[60.0, 0.0]]], ids=["near", "tall", "wide"]
)
def test_nothing_is_cut_off(far, generator, tmp_path):
    """Neither labels nor the legend, whatever the proportions of what is drawn."""
    x = torch.cat([3 * torch.randn(200, 2, generator=generator), torch.tensor(far)])
    gmm = GaussianMixture(2, 2, random_state=0, max_iter=500).fit(x)
    for ax in (plot_density(gmm, x, OutlierScore(gmm).calibrate(x)), plot_latent(gmm, x, torch.arange(len(x)) % 12)):
        save(ax, tmp_path / "picture.png")
        box = ax.figure.get_tightbbox()
        width, height = ax.figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.02
        assert box.x1 < width + 0.02
        assert box.y1 < height + 0.02


def test_a_picture_is_drawn_once_and_is_the_one_that_savefig_draws_twice(generator, tmp_path, monkeypatch):
    x, draws, draw = torch.randn(100, 2, generator=generator), [], Figure.draw
    gmm = GaussianMixture(2, 2).initialize(x)
    twice = plot_density(gmm, x, OutlierScore(gmm).calibrate(x))
    twice.figure.savefig(tmp_path / "twice.png")
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: draws.append(figure) or draw(figure, renderer))
    once = plot_density(gmm, x, OutlierScore(gmm).calibrate(x))
    save(once, tmp_path / "once.png")
    assert draws == [once.figure]
    with Image.open(tmp_path / "once.png") as a, Image.open(tmp_path / "twice.png") as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("suffix", ["png", "PNG", "jpg", "pdf"])
def test_a_file_has_the_format_of_its_suffix_and_a_figure_keeps_its_canvas(suffix, tmp_path):
    figure = Figure(figsize=(2.0, 1.0), dpi=50)
    ax, canvas = figure.subplots(), figure.canvas
    save(ax, tmp_path / f"picture.{suffix}")
    assert (figure.canvas, figure.dpi) == (canvas, 50)
    start = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "pdf": b"%PDF"}[suffix.lower()]
    assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(start)
    if suffix.lower() == "png":
        with Image.open(tmp_path / f"picture.{suffix}") as image:
            assert image.size == (240, 120)


def test_a_title_stands_above_ticks_at_the_top(tmp_path):
    ax = new_axes()[0]
    ax.xaxis.tick_top()
    label(ax, "a title", "x", "y")
    save(ax, tmp_path / "top.png")
    assert ax.title.get_window_extent().y0 >= ax.xaxis.get_tightbbox().y1 - 1


def test_an_animation_has_a_frame_for_each_picture(tmp_path):
    files = []
    for number in range(4):
        ax = new_axes(size=(2.0, 2.0))[0]
        ax.set_title(str(number))
        files.append(tmp_path / f"{number}.png")
        save(ax, files[-1])
    animate(files, tmp_path / "all.gif", seconds=0.5)
    with Image.open(tmp_path / "all.gif") as gif:
        assert gif.n_frames == 4
        durations = []
        for number in range(4):
            gif.seek(number)
            durations.append(gif.info["duration"])
    assert durations == [500, 500, 500, 2000]


# ------------------------------------------------------------------------------------------------------------- errors

FITTED = GaussianMixture(2, 2).set_parameters([0.5, 0.5], [[0.0, 0.0], [3.0, 3.0]], torch.eye(2).expand(2, 2, 2))
ROWS = torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: plot_latent(None, ROWS), TypeError, "`gmm` to be a GaussianMixture, but got NoneType"),
        (lambda: plot_latent(MixtureClassifier(2, 2), ROWS), TypeError, "`gmm` to be a GaussianMixture"),
        (lambda: plot_latent(FITTED, torch.zeros(4, 3)), ValueError, r"`x` of shape \(n, 2\).*but got \(4, 3\)"),
        (lambda: plot_latent(FITTED, torch.zeros(0, 2)), ValueError, r"at least one row, but got \(0, 2\)"),
        (lambda: plot_latent(FITTED, torch.zeros(2, 2, 2)), ValueError, "flatten leading dimensions"),
        (lambda: plot_latent(FITTED, ROWS > 0), TypeError, "`x` to hold real numbers, but got torch.bool"),
        (lambda: plot_latent(FITTED, ROWS * torch.nan), ValueError, "`x` to be finite, but it holds nan"),
        (
            lambda: plot_latent(FITTED, ROWS, torch.zeros(3).long()),
            ValueError,
            r"`labels` of shape \(4,\)",
        ),
        (
            lambda: plot_latent(FITTED, ROWS, torch.zeros(4)),
            TypeError,
            "`labels` to hold integers",
        ),
        (lambda: plot_latent(FITTED, ROWS, n_std=[0.0]), ValueError, "`n_std` to be above 0"),
        (lambda: plot_latent(FITTED, ROWS, n_std=2.0), TypeError, "`n_std` to be a list of numbers, but got 2.0"),
        (lambda: plot_samples(GaussianMixture(2, 2), ROWS), RuntimeError, "`gmm` to be fitted.*call fit"),
        (lambda: plot_samples(FITTED, ROWS, axes=new_axes()), ValueError, "`axes` to be two.*but got 1"),
        (lambda: plot_samples(FITTED, ROWS, 0), ValueError, "`n_samples` to be at least 1"),
        (lambda: plot_density(GaussianMixture(2, 2), ROWS), RuntimeError, "`gmm` to be fitted"),
        (lambda: plot_density(FITTED, ROWS, FITTED), TypeError, "`score` to be an OutlierScore or None"),
        (lambda: plot_density(FITTED, ROWS, OutlierScore(FITTED)), RuntimeError, "a calibrated score"),
        (lambda: plot_density(FITTED, ROWS, mass=[1.0]), ValueError, "`mass`.*between 0 and 1"),
        (lambda: plot_density(FITTED, ROWS, mass=0.5), TypeError, "`mass` to be a list of numbers, but got 0.5"),
        (lambda: density_levels(FITTED, "half"), TypeError, "`mass` to be a list of numbers, but got 'half'"),
        (lambda: principal_plane(torch.zeros(3)), ValueError, r"`x` of shape \(n, d\)"),
        (lambda: animate([], "x.gif"), ValueError, "`pictures` with at least one picture"),
        (lambda: animate(["x.png"], "x.gif", 0.0), ValueError, "`seconds` to be above 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_error_that_names_it(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_every_outlier_score_has_words_for_a_legend():
    assert set(NAMES) == set(SCORES)
