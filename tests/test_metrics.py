"""Metrics of clusters and mixtures against brute force, scikit-learn and NumPy, in one piece and in batches."""

import copy
import math
import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics.cluster import contingency_matrix

from tgmm_nn import GaussianMixture
from tgmm_nn.metrics import (
    BIC,
    Contingency,
    EffectiveComponents,
    MatchedAccuracy,
    NegativeLogLikelihood,
    Purity,
    ResponsibilityCalibration,
)
from tgmm_nn.plotting import new_axes

LABELLED = [Contingency, MatchedAccuracy, Purity]
METRICS = [
    *(pytest.param(metric, ("clusters", "classes"), id=metric.__name__) for metric in LABELLED),
    pytest.param(NegativeLogLikelihood, ("log_density",), id="NegativeLogLikelihood"),
    pytest.param(BIC, ("log_density",), id="BIC"),
    pytest.param(EffectiveComponents, ("responsibilities",), id="EffectiveComponents"),
    pytest.param(ResponsibilityCalibration, ("responsibilities", "classes"), id="ResponsibilityCalibration"),
]
SIZES = {
    Contingency: (4, 3),
    MatchedAccuracy: (4, 3),
    Purity: (4, 3),
    NegativeLogLikelihood: (),
    BIC: (7,),
    EffectiveComponents: (4,),
    ResponsibilityCalibration: (4, 3),
}
NUMBERS = [metric for metric in METRICS if metric.values[0] is not Contingency]


@pytest.fixture
def inputs(generator):
    """Sixty rows of what the metrics read."""
    return {
        "clusters": torch.randint(4, (60,), generator=generator),
        "classes": torch.randint(3, (60,), generator=generator),
        "log_density": torch.randn(60, generator=generator),
        "responsibilities": (3 * torch.randn(60, 4, generator=generator)).softmax(-1),
    }


def make(metric):
    return metric(*SIZES[metric])


# ------------------------------------------------------------------------------------------------------- oracles


def brute_force(preds, target, n_clusters, n_classes):
    """Best accuracy over every one-to-one map of clusters to classes, padded with unmatched ones; and that map."""
    size = max(n_clusters, n_classes)
    maps = (torch.tensor(p) for p in permutations(range(size)))
    return max(((float((m[preds] == target).float().mean()), m) for m in maps), key=lambda pair: pair[0])


@pytest.mark.parametrize(("n_clusters", "n_classes"), [(3, 3), (5, 3), (2, 4), (1, 1)])
def test_matched_accuracy_is_the_best_over_all_matchings(n_clusters, n_classes, generator):
    preds = torch.randint(n_clusters, (60,), generator=generator)
    target = torch.randint(n_classes, (60,), generator=generator)
    got = MatchedAccuracy(n_clusters, n_classes)(preds, target)
    assert float(got) == pytest.approx(brute_force(preds, target, n_clusters, n_classes)[0])


def test_the_table_is_that_of_scikit_learn_and_purity_its_largest_entries(inputs):
    preds, target = inputs["clusters"], inputs["classes"]
    table = contingency_matrix(preds, target)
    assert Contingency(4, 3)(preds, target).tolist() == table.tolist()
    assert float(Purity(4, 3)(preds, target)) == pytest.approx(table.max(1).sum() / 60)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1)])
def test_a_table_keeps_its_shape(shape):
    """Also of one cell, also from a copy: torchmetrics makes a number of it."""
    metric, labels = Contingency(*shape), torch.zeros(5, dtype=torch.int64)
    expected = torch.zeros(shape, dtype=torch.int64)
    expected[0, 0] = 5
    for table in (metric(labels, labels), metric.compute(), pickle.loads(pickle.dumps(metric)).compute()):
        assert torch.equal(table, expected)
    assert MatchedAccuracy(*shape)(labels, labels).shape == ()
    assert metric.plot()[1].texts[0].get_text() == "5"


def test_the_likelihood_is_the_mean_and_bic_the_mixtures_own(generator):
    x = torch.randn(200, 2, generator=generator)
    gmm = GaussianMixture(3, 2, random_state=0, max_iter=500).fit(x)
    assert float(NegativeLogLikelihood()(gmm(x))) == pytest.approx(-gmm.score(x), rel=1e-6)
    assert float(BIC(gmm.n_parameters)(gmm(x))) == pytest.approx(gmm.bic(x), rel=1e-6)


def test_effective_components_counts_components_of_equal_share(inputs):
    share = inputs["responsibilities"].double().mean(0).numpy()
    got = EffectiveComponents(4)(inputs["responsibilities"])
    assert float(got) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    for used in (1, 2, 4):
        assert float(EffectiveComponents(4)(torch.eye(4)[torch.arange(8) % used])) == pytest.approx(used)


@pytest.mark.parametrize("n_bins", [1, 4, 15])
def test_calibration_error_is_the_mean_distance_of_accuracy_from_confidence_by_bins(n_bins, inputs):
    r, target = inputs["responsibilities"].double().numpy(), inputs["classes"]
    _, best = brute_force(torch.from_numpy(r.argmax(1)), target, 4, 3)
    hit, confidence = (best[r.argmax(1)] == target).numpy(), r.max(1)
    bins = [(confidence > b / n_bins) & (confidence <= (b + 1) / n_bins) for b in range(n_bins)]
    expected = sum(b.mean() * abs(hit[b].mean() - confidence[b].mean()) for b in bins if b.any())
    assert float(ResponsibilityCalibration(4, 3, n_bins)(*map(torch.as_tensor, (r, target)))) == pytest.approx(expected)


def test_responsibilities_of_the_true_mixture_are_calibrated(generator):
    gmm = GaussianMixture(3, 2, random_state=0)
    gmm.set_parameters([0.5, 0.3, 0.2], [[0.0, 0.0], [1.5, 0.0], [0.0, 1.5]], torch.eye(2).expand(3, 2, 2))
    x, component = gmm.sample(20_000)
    right, sharp = ResponsibilityCalibration(3, 3), ResponsibilityCalibration(3, 3)
    r = gmm.predict_proba(x)
    assert float(right(r, component)) < 0.02
    assert float(sharp(r.pow(3) / r.pow(3).sum(-1, keepdim=True), component)) > 0.1


# ------------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(("metric", "names"), METRICS)
def test_batches_add_up_to_the_whole_whatever_their_shape(metric, names, inputs):
    whole, parts = make(metric), make(metric)
    rows = [inputs[name] for name in names]
    whole.update(*(x.reshape(3, 20, *x.shape[1:]) for x in rows))
    for part in zip(*(x.split(7) for x in rows), strict=True):
        parts.update(*part)
    parts.update(*(x[:0] for x in rows))
    torch.testing.assert_close(parts.compute(), whole.compute())
    assert metric is Contingency or whole.compute().shape == ()


@pytest.mark.parametrize(("metric", "names"), METRICS)
def test_reset_forgets_and_no_row_gives_nan(metric, names, inputs):
    fresh = make(metric)
    value = fresh(*(inputs[name] for name in names))
    fresh.reset()
    fresh.update(*(inputs[name][:0] for name in names))
    empty = fresh.compute()
    assert bool((empty == 0).all()) if metric is Contingency else math.isnan(empty)
    fresh.reset()
    torch.testing.assert_close(fresh(*(inputs[name] for name in names)), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("metric", "names"), METRICS[3:])
def test_half_precision_is_read_as_the_numbers_it_holds(metric, names, dtype, inputs):
    rounded, *rest = (inputs[name].to(dtype) if inputs[name].is_floating_point() else inputs[name] for name in names)
    wide = rounded.double()
    if names[0] == "responsibilities":
        wide /= wide.sum(-1, keepdim=True)  # rounded ones sum to 1 only as well as the dtype can
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(make(metric)(rounded, *rest), make(metric)(wide, *rest), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
@pytest.mark.parametrize("metric", LABELLED)
def test_narrow_labels_do_not_overflow(metric, dtype, generator):
    preds, target = torch.randint(100, (2, 500), generator=generator)
    narrow, wide = metric(100, 100), metric(100, 100)
    assert torch.equal(narrow(preds.to(dtype), target.to(dtype)), wide(preds, target))


def test_a_hundred_thousand_values_far_from_zero_keep_their_accuracy(generator):
    """Summed in float32 the mean would be off in the fourth digit behind the offset."""
    x = torch.randn(100_000, generator=generator) + 1e4
    nll, bic = NegativeLogLikelihood(), BIC(5)
    for batch in x.split(1000):
        nll.update(batch)
        bic.update(batch)
    total = x.numpy().astype(np.float64).sum()
    assert float(nll.compute()) == pytest.approx(-total / 100_000, rel=1e-13)
    assert float(bic.compute()) == pytest.approx(-2 * total + 5 * math.log(100_000), rel=1e-13)


@pytest.mark.parametrize(("metric", "names"), METRICS)
def test_a_module_cast_to_half_keeps_what_its_metric_has_counted(metric, names, inputs):
    rows = [inputs[name] for name in names]
    inside = torch.nn.ModuleList([make(metric)])
    inside[0].update(*rows)
    expected = copy.deepcopy(inside[0]).compute()
    inside.half().to(torch.bfloat16)
    assert torch.equal(inside[0].compute(), expected)
    inside[0].reset()
    inside[0].update(*rows)
    assert torch.equal(inside[0].compute(), expected)


@pytest.mark.parametrize(("metric", "names"), METRICS[3:])
def test_on_a_device_without_float64_sums_are_kept_in_float32(metric, names, inputs, monkeypatch):
    monkeypatch.setattr("tgmm_nn.metrics.base.accumulator_dtype", lambda device: torch.float32)
    narrow, wide = make(metric).to("cpu"), make(metric)
    value = narrow(*(inputs[name] for name in names))
    assert {state.dtype for state in narrow.metric_state.values()} <= {torch.float32, torch.int64}
    torch.testing.assert_close(value, wide(*(inputs[name] for name in names)), check_dtype=False)


@pytest.mark.parametrize(("metric", "names"), METRICS[3:6])
def test_gradients_are_those_of_the_formula(metric, names, inputs):
    leaf = inputs[names[0]].double().requires_grad_()
    value = make(metric)(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    share = leaf.mean(0)
    formula = {
        NegativeLogLikelihood: -share,
        BIC: -2 * 60 * share,
        EffectiveComponents: torch.special.entr(share / share.sum()).sum().exp(),
    }[metric]
    torch.testing.assert_close(gradient, torch.autograd.grad(formula, leaf)[0])


def test_a_row_of_density_zero_makes_the_likelihood_infinite():
    log_density = torch.tensor([0.0, -math.inf])
    assert float(NegativeLogLikelihood()(log_density)) == math.inf
    assert float(BIC(1)(log_density)) == math.inf


def test_a_relabelled_clustering_is_perfect():
    preds, target = torch.tensor([2, 0, 1, 2]), torch.tensor([0, 1, 2, 0])
    assert MatchedAccuracy(3, 3)(preds, target) == 1
    assert Purity(3, 3)(preds, target) == 1
    assert ResponsibilityCalibration(3, 3)(torch.eye(3)[preds], target) == 0


def test_a_matching_names_clusters_and_their_classes():
    metric = MatchedAccuracy(3, 2)
    metric.update(torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 1, 0]))
    assert dict(zip(*map(torch.Tensor.tolist, metric.matching()), strict=True)) == {0: 1, 2: 0}


# ---------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("metric", "names"), NUMBERS)
def test_numbers_are_drawn_as_a_point_or_a_curve(metric, names, inputs):
    drawn = make(metric)
    values = [drawn(*(inputs[name][rows] for name in names)) for rows in (slice(9), slice(9, 60))]
    _, ax = drawn.plot(values)
    assert ax.lines[0].get_ydata().tolist() == [float(v) for v in values]
    given = new_axes()[0]
    figure, ax = drawn.plot(drawn.compute(), given)
    assert ax is given
    assert figure is given.figure


def test_a_table_is_drawn_as_its_numbers(inputs):
    metric, given = Contingency(4, 3), new_axes()[0]
    metric.update(inputs["clusters"], inputs["classes"])
    _, ax = metric.plot(ax=given)
    assert ax is given
    assert ax.images[0].get_array().tolist() == metric.compute().tolist()
    assert metric.plot(torch.tensor([[1, 2]]))[1].images[0].get_array().tolist() == [[1, 2]]


def test_calibration_is_drawn_as_a_reliability_diagram(inputs):
    metric = ResponsibilityCalibration(4, 3, n_bins=5)
    metric.update(inputs["responsibilities"], inputs["classes"])
    _, ax = metric.plot()
    assert ax.get_title() == f"calibration error {float(metric.compute()):.3f}"
    confidence = ax.lines[-1].get_xdata()
    assert all(b / 5 < confidence[b] <= (b + 1) / 5 for b in range(5) if not math.isnan(confidence[b]))


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("metric", LABELLED)
@pytest.mark.parametrize(
    ("preds", "target", "match"),
    [
        ([0, 1], [0], "`preds` and `target` of one shape"),
        ([0, 3], [0, 1], r"`preds` to hold integers in \[0, 3\), but got \[0, 3\]"),
        ([0, 1], [0, -1], r"`target` to hold integers in \[0, 2\)"),
        ([0.0, 1.0], [0, 1], "`preds` to hold integers"),
    ],
)
def test_bad_labels_raise_and_leave_the_table(metric, preds, target, match):
    metric = metric(3, 2)
    with pytest.raises(ValueError, match=match):
        metric.update(torch.tensor(preds), torch.tensor(target))
    assert int(metric.contingency.sum()) == 0


@pytest.mark.parametrize("metric", [NegativeLogLikelihood, BIC])
@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([0.0, math.nan], ValueError, "`log_density` to hold numbers or -inf, but it holds nan"),
        ([0.0, math.inf], ValueError, r"nan or \+inf"),
        ([1, 2], TypeError, "`log_density` to hold floating numbers, but got torch.int64"),
    ],
)
def test_bad_densities_raise_and_leave_the_sums(metric, values, error, match):
    metric = make(metric)
    with pytest.raises(error, match=match):
        metric.update(torch.tensor(values))
    assert int(metric.count) == 0
    assert float(metric.total) == 0


@pytest.mark.parametrize("metric", [EffectiveComponents, ResponsibilityCalibration])
@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([[0.5, 0.5]], ValueError, r"`responsibilities` of shape \(..., 4\), but got \(1, 2\)"),
        ([[0.5, 0.5, 0.5, 0.5]], ValueError, "`responsibilities` to be non-negative and to sum to 1"),
        ([[1.5, -0.5, 0.0, 0.0]], ValueError, "non-negative"),
        ([[math.nan, 0.0, 0.0, 1.0]], ValueError, "sum to 1"),
        ([[1, 0, 0, 0]], TypeError, "`responsibilities` to hold floating numbers, but got torch.int64"),
    ],
)
def test_bad_responsibilities_raise_and_leave_the_sums(metric, values, error, match):
    metric = make(metric)
    rest = (torch.tensor([0]),) if isinstance(metric, ResponsibilityCalibration) else ()
    with pytest.raises(error, match=match):
        metric.update(torch.tensor(values), *rest)
    assert all(float(state.sum()) == 0 for state in metric.metric_state.values())


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ([0, 1], r"`target` of shape \(1,\), one class for each row of `responsibilities`, but got \(2,\)"),
        ([3], r"`target` to hold integers in \[0, 3\), but got \[3\]"),
        ([0.0], "`target` to hold integers"),
    ],
)
def test_bad_classes_of_responsibilities_raise_and_leave_the_sums(target, match):
    metric = ResponsibilityCalibration(4, 3)
    with pytest.raises(ValueError, match=match):
        metric.update(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor(target))
    assert all(float(state.sum()) == 0 for state in metric.metric_state.values())


@pytest.mark.parametrize(
    ("metric", "options", "name", "least"),
    [
        *((metric, {"n_clusters": 0, "n_classes": 2}, "n_clusters", 1) for metric in LABELLED),
        *((metric, {"n_clusters": 2, "n_classes": 0}, "n_classes", 1) for metric in LABELLED),
        (BIC, {"n_parameters": -1}, "n_parameters", 0),
        (EffectiveComponents, {"n_components": 0}, "n_components", 1),
        (ResponsibilityCalibration, {"n_components": 0, "n_classes": 2}, "n_components", 1),
        (ResponsibilityCalibration, {"n_components": 2, "n_classes": 0}, "n_classes", 1),
        (ResponsibilityCalibration, {"n_components": 2, "n_classes": 2, "n_bins": 0}, "n_bins", 1),
    ],
)
def test_sizes_are_checked(metric, options, name, least):
    with pytest.raises(ValueError, match=f"`{name}` to be at least {least}, but got {options[name]}"):
        metric(**options)
