"""Out-of-distribution scores against `torch.distributions`, NumPy and scikit-learn."""

import copy

import numpy as np
import pytest
import torch
from oracles import assert_near, dense, joint, random_layer
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from tgmm_nn import GaussianMixture, MixtureClassifier
from tgmm_nn.metrics import detection_scores
from tgmm_nn.outliers import SCORES, OutlierScore, whole_gaussian


@pytest.fixture
def x(generator):
    return 4 * torch.randn(50, 2, generator=generator, dtype=torch.float64)


def by_hand(gmm, x, score):
    elements = gmm.covariance.internal(gmm.covariances_)
    matrices = dense(elements, 2).expand(3, 2, 2)
    log_joint = joint(x, gmm.weights_, gmm.means_, elements)

    def squared(mean, matrix):
        away = x - mean
        return (away * torch.linalg.solve(matrix, away.mT).mT).sum(-1)

    nearest = torch.stack([squared(m, s) for m, s in zip(gmm.means_, matrices, strict=True)]).amin(0)
    mean = gmm.weights_ @ gmm.means_
    away = gmm.means_ - mean
    total = (gmm.weights_[:, None, None] * (matrices + away[:, :, None] * away[:, None])).sum(0)
    return {
        "log_density": -log_joint.logsumexp(-1),
        "max_component": -log_joint.amax(-1),
        "mahalanobis": nearest,
        "relative_mahalanobis": nearest - squared(mean, total),
    }[score]


@pytest.mark.parametrize("score", SCORES)
def test_scores_are_their_formulas(family, generator, x, score):
    gmm = random_layer(family, generator)
    detect = OutlierScore(gmm, score)
    assert_near(detect(x), by_hand(gmm, x, score), 1e-9)
    assert detect(x.reshape(5, 10, 2)).shape == (5, 10)
    row = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(detect, row)
    assert detect(x.float().numpy()).dtype == torch.float64  # that of the mixture


def test_the_gaussian_of_the_whole_has_the_moments_of_samples(generator):
    gmm = random_layer("full", generator)
    whole = whole_gaussian(gmm)
    samples, _ = gmm.sample(200_000, generator=generator)
    torch.testing.assert_close(whole.means[0], samples.mean(0), rtol=0, atol=0.03)
    covariance = torch.linalg.inv(whole.factor[0] @ whole.factor[0].mT)
    torch.testing.assert_close(covariance, samples.mT.cov(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.95])
def test_the_threshold_accepts_the_share_that_was_asked_for(quantile, generator):
    gmm = random_layer("full", generator)
    inside, _ = gmm.sample(1000, generator=generator)
    detect = OutlierScore(gmm).calibrate(inside, quantile)
    assert_near(detect.threshold[0], torch.tensor(np.quantile(detect(inside).numpy(), quantile)), 1e-12)
    assert float(detect.is_outlier(inside).double().mean()) == pytest.approx(1 - quantile, abs=0.002)
    assert detect.is_outlier(torch.tensor([[1e3, 1e3], [torch.nan, 0.0], [torch.inf, 0.0]])).all()


def test_the_threshold_is_a_buffer_that_keeps_its_precision(generator, tmp_path):
    detect = OutlierScore(random_layer("full", generator, dtype=torch.float32))
    detect.calibrate(torch.randn(100, 2, generator=generator))
    other = OutlierScore(random_layer("full", generator, dtype=torch.float32))
    torch.save(detect.state_dict(), tmp_path / "score.pt")
    other.load_state_dict(torch.load(tmp_path / "score.pt", weights_only=True))
    assert torch.equal(other.threshold, detect.threshold)
    half = copy.deepcopy(detect).half()
    assert torch.equal(half.threshold, detect.threshold)
    assert detect.double().threshold.dtype == torch.float64
    assert "threshold=" in repr(detect)


def test_a_classifier_is_scored_by_its_whole_density(generator):
    x = torch.randn(60, 2, generator=generator)
    y = torch.arange(60) % 3
    model = MixtureClassifier(3, 2).fit(x, y)
    assert torch.equal(OutlierScore(model)(x), -model.log_density(x))


def test_an_uncalibrated_score_and_bad_input_raise(generator):
    detect = OutlierScore(GaussianMixture(2, 2))
    with pytest.raises(RuntimeError, match=r"calibrated score, but `threshold` is nan; call calibrate\(x\)"):
        detect.is_outlier(torch.zeros(1, 2))
    for x in (torch.full((3, 2), torch.nan), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match="`x` with at least one row, all of finite score"):
            detect.calibrate(x)
    with pytest.raises(ValueError, match="`quantile`"):
        detect.calibrate(torch.zeros(3, 2), 1.0)
    with pytest.raises(TypeError, match="`quantile` to be a number"):
        detect.calibrate(torch.zeros(3, 2), "most")
    with pytest.raises(ValueError, match="`score` to be one of 'log_density'"):
        OutlierScore(GaussianMixture(2, 2), "energy")
    with pytest.raises(TypeError, match="`model` to be a GaussianMixture or a MixtureClassifier, but got Linear"):
        OutlierScore(torch.nn.Linear(2, 2))
    assert detect.threshold.isnan().all()


@pytest.mark.parametrize("ties", [False, True])
def test_detection_is_scored_as_scikit_learn_scores_it(generator, ties):
    inside, outside = torch.randn(300, generator=generator), torch.randn(200, generator=generator) + 1.5
    if ties:
        inside, outside = inside.round(), outside.round()
    found = detection_scores(100 * inside, 100 * outside)  # through a sigmoid all would be ties
    y = np.r_[np.zeros(300), np.ones(200)]
    scores = torch.cat([inside, outside]).numpy()
    assert found["auroc"] == pytest.approx(roc_auc_score(y, scores), abs=1e-6)
    assert found["average_precision"] == pytest.approx(average_precision_score(y, scores), abs=1e-6)
    fpr, tpr, _ = roc_curve(1 - y, -scores, drop_intermediate=False)
    assert found["fpr_at_95_tpr"] == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-6)
    with pytest.raises(ValueError, match="`outside` to hold at least one score and no nan"):
        detection_scores(inside, outside[:0])


def test_a_component_of_weight_zero_is_near_nothing(generator):
    gmm = GaussianMixture(2, 1, "diag").set_parameters([1.0, 0.0], [[0.0], [50.0]], [[1.0], [1.0]])
    assert float(OutlierScore(gmm, "mahalanobis")(torch.tensor([[50.0]]))) == pytest.approx(2500.0)


@pytest.mark.no_cover
@pytest.mark.parametrize("score", SCORES)
def test_a_network_with_a_score_is_exported_and_compiled(generator, score):
    detect = OutlierScore(random_layer("full", generator, dtype=torch.float32), score)
    x = torch.randn(7, 2, generator=generator)
    detect.calibrate(x)
    program = torch.export.export(detect, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:3]), detect(x[:3]))
    torch._dynamo.reset()
    compiled = torch.compile(detect.is_outlier, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), detect.is_outlier(x))


def test_a_threshold_of_another_score_is_refused_before_anything_is_written(generator):
    gmm = random_layer("full", generator)
    one, other = OutlierScore(gmm).calibrate(torch.randn(20, 2, generator=generator)), OutlierScore(gmm, "mahalanobis")
    with pytest.raises(ValueError, match=r"Expected the state of \{'score': 'mahalanobis'\}, but got that of"):
        other.load_state_dict(one.state_dict())
    assert other.threshold.isnan().all()
