"""The parts of the experiments, each against its formula."""

import math
from pathlib import Path

import lightning
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from tgmm_nn import GaussianMixture, MixtureClassifier
from tgmm_nn.experiments.contrastive import ContrastiveClustering, Encoder, FeatureNoise, RandomAffine, Rescale, nt_xent
from tgmm_nn.experiments.digits import DigitsDataModule, LabelledDigitsDataModule
from tgmm_nn.experiments.drawing import plot_metrics
from tgmm_nn.experiments.heads import GenerativeClassifier, OutlierDetection, energy, softmax_score
from tgmm_nn.experiments.identity import EmbeddingClustering
from tgmm_nn.experiments.networks import Perceptron
from tgmm_nn.experiments.reports import clustering_scores, format_table
from tgmm_nn.experiments.rows import NeighbourPairs, RowsDataModule
from tgmm_nn.experiments.running import fit
from tgmm_nn.experiments.tables import Table
from tgmm_nn.experiments.vade import VariationalClustering, evidence_lower_bound

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step"),
]


def test_a_positive_is_one_of_the_nearest_rows_drawn_anew_and_never_the_row_itself(generator):
    x = torch.randn(60, 4, generator=generator)
    pairs = NeighbourPairs(x, torch.arange(60), n_neighbors=3)
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    nearest = distance.topk(3, largest=False).indices
    drawn = [set() for _ in range(60)]
    for _ in range(60):
        batch = pairs.__getitems__(list(range(60)))
        assert torch.equal(batch["x"], x)
        assert torch.equal(batch["y"], torch.arange(60))
        for row, neighbour in enumerate(batch["neighbour"]):
            drawn[row].add(int((x == neighbour).all(-1).nonzero()))
    assert drawn == [set(row.tolist()) for row in nearest]


def test_digits_are_shuffled_batches_of_pixels_in_unit_range():
    data = DigitsDataModule(batch_size=256)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert [len(b["x"]) for b in batches] == [256] * 7 + [5]
    assert all(set(b) == {"x", "y"} for b in batches)  # no model that wants neighbours
    seen = torch.cat([b["x"] for b in batches])
    assert not torch.equal(seen, data.x)
    torch.testing.assert_close(seen.sum(0), data.x.sum(0))
    assert (float(data.x.min()), float(data.x.max())) == (0.0, 1.0)


@pytest.mark.parametrize("option", ["batch_size", "n_neighbors"])
def test_data_options_are_checked(option):
    with pytest.raises(ValueError, match=f"`{option}` to be at least 1"):
        DigitsDataModule(**{option: 0})


def test_the_encoder_gives_unit_vectors_and_rescaling_unit_mean_square(generator):
    z = Encoder([6, 8, 5])(torch.randn(10, 6, generator=generator))
    torch.testing.assert_close(z.norm(dim=-1), torch.ones(10))
    torch.testing.assert_close(Rescale()(z).square().mean(-1), torch.ones(10))


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ([3], "widths of input and output"),
        (None, "input and output at least, but got None"),
        ([3, 0], "`sizes` to be at"),
    ],
)
def test_bad_sizes_raise(sizes, match):
    with pytest.raises(ValueError, match=match):
        Encoder(sizes)


def test_an_affine_map_without_range_is_the_identity(generator):
    x = torch.rand(5, 64, generator=generator)
    still = RandomAffine([8, 8], shift=0, degrees=0, scale=0, shear=0)
    torch.testing.assert_close(still(x), x, rtol=1e-5, atol=1e-5)


def test_a_shift_moves_the_centre_of_mass_by_at_most_its_bound():
    """One bright pixel in the middle of an odd image; bilinear resampling keeps the first moment."""
    image = torch.zeros(9, 9)
    image[4, 4] = 1.0
    moved = RandomAffine([9, 9], shift=0.5, degrees=0, scale=0, shear=0)(image.reshape(1, 81).expand(500, -1))
    position = torch.arange(9.0)
    for axis in (1, 2):
        centre = (moved.reshape(-1, 9, 9).sum(axis) * position).sum(-1)
        assert float((centre - 4).abs().max()) <= 0.5 + 1e-5
        assert float((centre - 4).abs().max()) > 0.45


@pytest.mark.parametrize(
    ("options", "bound"), [({"scale": 0.1}, 0.1), ({"shear": 0.1}, 0.1), ({"degrees": 5.0}, 0.0872)]
)
def test_maps_stay_within_their_bounds(options, bound):
    still = {"shift": 0.0, "degrees": 0.0, "scale": 0.0, "shear": 0.0}
    maps = RandomAffine([8, 8], **{**still, **options})._maps(2000, torch.device("cpu"))
    off = maps - torch.eye(2, 3)
    assert 0.95 * bound < float(off.abs().max()) <= bound * (1 + 1e-4)


def test_images_of_another_size_than_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"`image_shape` to multiply to the 64 features of a row, but got \[4, 4\]"):
        RandomAffine([4, 4])(torch.zeros(2, 64))
    with pytest.raises(ValueError, match="`image_shape` to be height and width, but got 3"):
        RandomAffine(3)


@pytest.mark.parametrize("options", [{"shift": -1}, {"degrees": -1}, {"scale": -0.1}, {"shear": -0.1}])
def test_ranges_of_maps_are_checked(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` to be at least 0"):
        RandomAffine([8, 8], **options)


def test_nt_xent_is_its_formula(generator):
    a, b = torch.nn.functional.normalize(torch.randn(2, 7, 3, generator=generator, dtype=torch.float64), dim=-1)
    z = torch.cat([a, b])
    total = 0.0
    for i in range(14):
        positive = z[i] @ z[(i + 7) % 14] / 0.3
        others = torch.stack([z[i] @ z[k] / 0.3 for k in range(14) if k != i])
        total -= float(positive - others.logsumexp(0))
    assert float(nt_xent(a, b, 0.3)) == pytest.approx(total / 14, rel=1e-12)


def test_the_mixture_sees_the_clean_rows_and_has_no_part_in_the_gradient(generator):
    model = ContrastiveClustering(Encoder([64, 16, 4]), GaussianMixture(3, 4), RandomAffine([8, 8]))
    batch = {"x": torch.rand(9, 64, generator=generator), "neighbour": torch.rand(9, 64, generator=generator)}
    seen = []
    model.latent.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.log = lambda *args, **kwargs: None
    torch.manual_seed(0)
    loss = model.training_step(batch, 0)
    (clean,) = seen
    assert not clean.requires_grad
    torch.testing.assert_close(clean, 2 * model.encoder(batch["x"]).detach())  # sqrt of 4 features

    torch.manual_seed(0)
    views = [model.encoder(model.augmentation(batch[key])) for key in ("x", "neighbour")]
    torch.testing.assert_close(loss, nt_xent(*views, 0.5))


@pytest.mark.parametrize("option", ["temperature", "learning_rate"])
def test_model_options_are_checked(option):
    with pytest.raises(ValueError, match=f"`{option}` to be above 0"):
        ContrastiveClustering(Encoder([4, 2]), GaussianMixture(1, 2), RandomAffine([2, 2]), **{option: 0.0})


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_clustering_scores_agree_with_scikit_learn(generator):
    y = torch.arange(90) % 3
    clusters = torch.where(torch.rand(90, generator=generator) < 0.8, (y + 1) % 3, y)
    scores = clustering_scores(clusters, y)
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(y, clusters), abs=1e-5)
    assert scores["ari"] == pytest.approx(adjusted_rand_score(y, clusters), abs=1e-5)
    assert scores["accuracy"] == pytest.approx(float((clusters == (y + 1) % 3).float().mean()))


def test_rows_without_any_class_are_scored_as_without_classes():
    clusters = torch.tensor([0, 1, 1, 1])
    assert clustering_scores(clusters, torch.full((4,), -1)) == clustering_scores(clusters, None)


def test_of_one_class_only_the_accuracy_says_something():
    assert clustering_scores(torch.tensor([0, 1, 1, 1]), torch.tensor([2, 2, 2, -1])) == {
        "accuracy": pytest.approx(2 / 3)
    }


def started(n_components=2, n_features=2):
    return GaussianMixture(n_components, n_features, random_state=0).initialize(torch.randn(40, n_features))


def contrastive(widths=(6, 4, 2)):
    return ContrastiveClustering(Encoder(list(widths)), started(), FeatureNoise())


def variational(widths=(6, 4, 4)):
    return VariationalClustering(Perceptron(list(widths)), Perceptron([2, 6]), started(), pretrain_epochs=1)


def density():
    classifier = MixtureClassifier(2, 2, random_state=0)
    return classifier.initialize(torch.randn(40, 2), torch.arange(40) % 2)


MODELS = {
    "contrastive": contrastive,
    "vade": variational,
    "identity": lambda: EmbeddingClustering(started(2, 6)),
    "outliers": lambda: OutlierDetection(Perceptron([6, 2]), Perceptron([2, 6]), density()),
    "classifier": lambda: GenerativeClassifier(Perceptron([6, 2]), density()),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("name", MODELS)
def test_a_report_is_of_rows_in_the_precision_of_the_training(name, precision, tmp_path, monkeypatch):
    """With networks as the trainer leaves them."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, file, **_: Path(file).touch())
    x = torch.randn(60, 6).numpy()
    data = RowsDataModule(Table([x], "rows"), torch.arange(60) % 3, None, n_classes=2, test_size=0.3)
    model = MODELS[name]()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=1, precision=precision, enable_checkpointing=False, **quiet)
    fit(trainer, model, data, None)
    rows = model.report(data, tmp_path, seed=0)
    assert len(rows) > 1
    assert all(picture.stat().st_size == 0 for picture in tmp_path.glob("*.png"))  # none was drawn
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: contrastive((5, 4, 2)),
            "`encoder` to map 6 features to 2, but got mat1 and mat2 .*model.encoder.sizes",
        ),
        (
            lambda: contrastive((6, 4, 3)),
            "`encoder` to map 6 features to 2, but got 3 features; set model.encoder.sizes",
        ),
        (lambda: variational((6, 4, 2)), "`encoder` to map 6 features to 4, but got 2 features"),
    ],
)
def test_widths_that_do_not_fit_end_before_training(make, match):
    data = RowsDataModule(Table([torch.randn(60, 6).numpy()], "rows"), None, None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with pytest.raises(ValueError, match=match):
        lightning.Trainer(max_steps=1, enable_checkpointing=False, **quiet).fit(make(), datamodule=data)


def test_what_a_model_remembers_of_its_start_is_in_its_state():
    """So that a checkpoint carries it, and a process of a fork gives it back."""
    model, other = variational(), variational()
    model.start = {"nmi": 0.5, "elbo": -3.0}
    other.load_state_dict(model.state_dict())
    assert other.start == model.start


def test_a_table_is_aligned():
    table = format_table([{"method": "a", "nmi": 0.51234}, {"method": "longer", "nmi": 1.0}])
    assert table.splitlines() == ["method    nmi", "a       0.512", "longer  1.000"]


def test_curves_are_drawn_from_a_metrics_file(tmp_path):
    lines = ["em/log_likelihood,epoch,loss,step", "-3.5,0,2.0,7", ",1,1.5,15", "-3.0,2,,23"]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    plot_metrics(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_known_digits_are_split_and_others_are_kept_apart():
    data = LabelledDigitsDataModule(n_classes=5, test_size=0.3, seed=1)
    assert set(data.y.tolist()) == set(data.y_test.tolist()) == set(range(5))
    train, test = ({tuple(row) for row in rows.tolist()} for rows in (data.x, data.x_test))
    assert not train & test
    assert len(data.x) + len(data.x_test) + len(data.x_unknown) == 1797
    other = LabelledDigitsDataModule(n_classes=5, test_size=0.3, seed=2)
    assert not torch.equal(data.x_test, other.x_test)
    batches = list(data.train_dataloader())
    assert sum(len(batch["y"]) for batch in batches) == len(data.x)


def test_baselines_of_outliers_are_their_formulas(generator):
    logits = torch.randn(20, 5, generator=generator)
    probabilities = torch.distributions.Categorical(logits=logits).probs
    torch.testing.assert_close(softmax_score(logits), -probabilities.max(-1).values)
    torch.testing.assert_close(energy(logits), -logits.exp().sum(-1).log())


def test_the_evidence_lower_bound_is_that_of_the_distributions(generator):
    """And with the entropy in closed form its mean is below the log-likelihood of a model that can be integrated."""
    x, mean = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    log_variance = torch.randn(6, 2, generator=generator)
    gmm = GaussianMixture(3, 2, random_state=0).initialize(torch.randn(50, 2, generator=generator))
    q = torch.distributions.Independent(torch.distributions.Normal(mean, (0.5 * log_variance).exp()), 1)
    likelihood = torch.distributions.Independent(torch.distributions.Normal(x + 0.1, 0.3), 1)
    bound = evidence_lower_bound(x, x + 0.1, 0.3, gmm(mean), log_variance)
    torch.testing.assert_close(bound, likelihood.log_prob(x) + gmm(mean) + q.entropy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LabelledDigitsDataModule(n_classes=11), "`n_classes` to be at most 10"),
        (lambda: LabelledDigitsDataModule(test_size=1.0), "`test_size`"),
        (lambda: Perceptron([3]), "`sizes` with the widths of input and output"),
        (lambda: OutlierDetection(None, None, None, reconstruction=-1.0), "`reconstruction` to be at least 0"),
        (lambda: VariationalClustering(None, None, None, noise=0.0), "`noise` to be above 0"),
        (lambda: VariationalClustering(None, None, None, pretrain_epochs=0), "`pretrain_epochs` to be at least 1"),
        (lambda: GenerativeClassifier(None, None, learning_rate=0.0), "`learning_rate` to be above 0"),
        (
            lambda: GenerativeClassifier(None, GaussianMixture(1, 2)),
            "`density` to be a MixtureClassifier, .*gmm=classif",
        ),
        (
            lambda: EmbeddingClustering(MixtureClassifier(2, 2)),
            "`gmm` to be a GaussianMixture, but .*; set gmm=default",
        ),
    ],
)
def test_bad_options_of_the_experiments_name_themselves(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()
