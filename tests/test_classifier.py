"""MixtureClassifier against scikit-learn's discriminant analyses, mixtures fitted class by class, and EM by hand."""

import copy
import inspect

import pytest
import torch
from oracles import assert_compiled_steps_are_eager_ones, assert_near, assert_same_buffers, copy_of_buffers, unchanged
from sklearn.datasets import load_iris
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis

from tgmm_nn import GaussianMixture, MixtureClassifier
from tgmm_nn.assignment import Assignment

C, D = 3, 2


@pytest.fixture
def data(generator):
    """Three classes of unequal size, each of two clusters."""
    y = torch.tensor([0, 1, 2, 2, 1, 2, 0, 2]).repeat(20)
    centres = torch.tensor([[[0.0, 0.0], [6.0, 0.0]], [[0.0, 6.0], [6.0, 6.0]], [[3.0, 12.0], [9.0, 9.0]]])
    x = centres[y, torch.arange(len(y)) // 8 % 2] + torch.randn(len(y), D, generator=generator)
    return x.double(), y


def iris():
    x, y = load_iris(return_X_y=True)
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize(
    ("covariance_type", "oracle"),
    [
        ("tied_full", LinearDiscriminantAnalysis(solver="lsqr")),
        ("full", QuadraticDiscriminantAnalysis(solver="eigen")),  # the maximum-likelihood covariance
    ],
    ids=["linear", "quadratic"],
)
def test_one_component_per_class_is_discriminant_analysis(covariance_type, oracle):
    x, y = iris()
    model = MixtureClassifier(3, 4, covariance_type=covariance_type, reg_covar=0.0, dtype="float64").fit(x, y)
    expected = torch.from_numpy(oracle.fit(x.numpy(), y.numpy()).predict_log_proba(x.numpy()))
    assert_near(model(x).log_softmax(-1), expected, 1e-6)
    assert torch.equal(model.predict(x), torch.from_numpy(oracle.predict(x.numpy())))


def test_the_joint_density_is_the_prior_of_a_class_times_its_own_mixture(family, data):
    """Oracle: a mixture for each class, fitted to its rows alone; for tied families the classes share a covariance."""
    x, y = data
    model = MixtureClassifier(C, D, 2, family, random_state=0, dtype="float64", max_iter=500, tol=1e-9).fit(x, y)
    assert_near(model.log_density(x), model(x).logsumexp(-1), 1e-10)
    assert_near(model.predict_proba(x), model(x).softmax(-1), 1e-12)
    assert torch.equal(model.predict(x), model(x).argmax(-1))
    assert float((model.predict(x) == y).double().mean()) > 0.95
    if family.startswith("tied_"):
        return
    for c in range(C):
        own = x[y == c]
        alone = GaussianMixture(2, D, family, random_state=0, dtype="float64", max_iter=500, tol=1e-9).fit(own)
        share = torch.tensor(len(own) / len(x), dtype=torch.float64).log()
        assert_near(model(x)[:, c], share + alone(x), 1e-4)


@pytest.mark.parametrize("step_size", [None, 0.3])
def test_em_step_is_that_of_the_mixture_with_the_labels_as_log_prior(family, data, step_size):
    x, y = data
    y = torch.where(torch.arange(len(y)) % 3 == 0, -1, y)
    model = MixtureClassifier(C, D, 2, family, random_state=0, dtype="float64").initialize(x, y)
    by_hand = copy.deepcopy(model.mixture)
    component_class = torch.arange(6) // 2
    log_prior = torch.where((y[:, None] == component_class) | (y[:, None] == -1), 0.0, -torch.inf).double()
    value = model.em_step(x, y, step_size=step_size)
    assert_near(value, by_hand.em_step(x, step_size=step_size, log_prior=log_prior), 1e-10)
    for one, other in zip(model.mixture.mixture(), by_hand.mixture(), strict=True):
        assert_near(one, other, 1e-9)
    sums = model.statistics(x, y)
    assert_near(sums.count, by_hand.statistics(x, None, log_prior).count, 1e-9)


def test_fit_climbs_the_likelihood_of_labels_and_rows(family, data):
    x, y = data
    y = torch.where(torch.arange(len(y)) % 3 == 0, -1, y)
    model = MixtureClassifier(C, D, 2, family, random_state=0, dtype="float64", reg_covar=0.0, max_iter=500)
    model.fit(x, y)
    history = torch.tensor(model.mixture.history_)
    assert bool((history.diff() > -1e-9).all())
    joint, density = model(x), model.log_density(x)
    expected = torch.where(y >= 0, joint.gather(-1, y.clamp(min=0)[:, None])[:, 0], density).mean()
    assert model.mixture.objective_ == pytest.approx(float(expected), abs=1e-6)
    assert model.mixture.converged_


def test_rows_without_labels_help_where_labels_are_few(data):
    """Semi-supervised: few labelled rows of each class leave covariances that say little."""
    x, y = data
    few = torch.full_like(y, -1)
    for c in range(C):
        few[(y == c).nonzero()[:8, 0]] = c
    how = {"random_state": 0, "reg_covar": 0.1, "max_iter": 300}
    with_all = MixtureClassifier(C, D, 2, "diag", **how).fit(x, few)
    labelled = few >= 0
    with_few = MixtureClassifier(C, D, 2, "diag", **how).fit(x[labelled], few[labelled])
    assert float((with_all.predict(x) == y).double().mean()) > 0.95
    assert with_all.mixture.score(x) > with_few.mixture.score(x)


def test_a_label_settles_the_class_and_weights_count_as_repetitions(family, data, generator):
    x, y = data
    weight = torch.randint(1, 4, (len(y),), generator=generator)
    how = {"random_state": 0, "dtype": "float64", "init_means": "random", "max_iter": 1000}
    one = MixtureClassifier(C, D, 1, family, **how).fit(x, y, sample_weight=weight)
    other = MixtureClassifier(C, D, 1, family, **how).fit(x.repeat_interleave(weight, 0), y.repeat_interleave(weight))
    assert_near(one(x), other(x), 1e-8)
    assert_near(one.statistics(x, y).count, torch.bincount(y).double(), 1e-12)


# ------------------------------------------------------------------------------------------ classes and rows left out


PRIORS = {"mean_prior": 1.0, "mean_precision_prior": 3.0, "covariance_prior": 2.0, "degrees_of_freedom_prior": 4.0}


@pytest.mark.parametrize("priors", [{}, PRIORS], ids=["no priors", "priors"])
@pytest.mark.parametrize("learn", ["em_step", "fit", "initialize"])
def test_a_class_without_rows_keeps_its_parameters(family, data, learn, priors):
    x, y = data
    x, y = x[y != 1], y[y != 1]
    model = MixtureClassifier(C, D, 2, family, random_state=0, dtype="float64", max_iter=500, **priors)
    means = torch.randn(6, D, dtype=torch.float64)
    gmm = model.mixture
    gmm.set_parameters([0.1, 0.1, 0.25, 0.25, 0.1, 0.2], means, gmm.covariances_)
    covariances = gmm.covariances_.clone()
    if learn == "em_step":
        model.em_step(x, y)
    else:
        with pytest.warns(UserWarning, match=r"No row of `y` belongs to the classes \[1\]: they keep their parameters"):
            getattr(model, learn)(x, y)
    assert_near(gmm.weights_[2:4], torch.tensor([0.25, 0.25], dtype=torch.float64), 1e-12)
    assert_near(gmm.weights_.sum(), torch.tensor(1.0).double(), 1e-12)
    assert_near(gmm.means_[2:4], means[2:4], 1e-12)
    if not gmm.covariance.tied:
        assert_near(gmm.covariances_[2:4], covariances[2:4], 1e-6)
    assert not torch.equal(gmm.means_[0], means[0])


def test_minibatches_without_a_class_do_not_forget_it(data):
    x, y = data
    model = MixtureClassifier(C, D, 1, dtype="float64").initialize(x, y)
    only = y == 2
    for _ in range(3):
        model.em_step(x[only], y[only], step_size=0.1)
    weights = model.mixture.weights_.clone()
    assert bool((weights > 0.05).all())  # they fade by the decay of the running sums, and come back with their rows
    model.em_step(x, y, step_size=0.5)
    assert bool((model.mixture.weights_[:2] > weights[:2]).all())


@pytest.mark.parametrize("learn", ["em_step", "fit", "initialize"])
def test_ignored_rows_of_dense_maps_are_left_out(data, learn):
    x, y = data
    x, y = x.reshape(4, 8, 5, D), y.reshape(4, 8, 5).clone()
    y[:, 3] = 255
    kept = y != 255
    model = MixtureClassifier(C, D, 1, ignore_index=255, random_state=0, dtype="float64")
    flat = MixtureClassifier(C, D, 1, random_state=0, dtype="float64")
    x[:, 3, 0] = torch.nan  # an ignored row may hold anything
    getattr(model, learn)(x, y)
    getattr(flat, learn)(x[kept], y[kept])
    for one, other in zip(model.mixture.mixture(), flat.mixture.mixture(), strict=True):
        assert_near(one, other, 1e-10)


# ------------------------------------------------------------------------------------------------------- the layer


def test_options_are_those_of_the_mixture_with_the_same_defaults():
    ours, its = (inspect.signature(kind).parameters for kind in (MixtureClassifier, GaussianMixture))
    shared = [name for name in its if name != "n_components"]
    assert list(ours)[-len(shared) + 2 :] == shared[2:]
    assert all(ours[name].default == its[name].default for name in shared)
    model = MixtureClassifier(
        2, 3, 2, "diag", reg_covar=0.5, tol=0.1, random_state=7, mean_prior=0, mean_precision_prior=1
    )
    assert (model.mixture.reg_covar, model.mixture.tol, model.mixture.random_state) == (0.5, 0.1, 7)
    assert model.mixture.mean_precision_prior is not None
    assert "2, components_per_class=2" in repr(model)


def test_given_starts_are_those_of_the_components(family, data):
    x, y = data
    means = torch.randn(6, D, dtype=torch.float64)
    model = MixtureClassifier(C, D, 2, family, init_means=means, init_weights=[0.3, 0.1, 0.1, 0.1, 0.2, 0.2],
                              init_covariances=2.0, dtype="float64").initialize(x, y)  # fmt: skip
    assert_near(model.mixture.means_, means, 1e-12)
    within = model.mixture.weights_.reshape(C, 2)
    assert_near(within[0] / within[0].sum(), torch.tensor([0.75, 0.25], dtype=torch.float64), 1e-12)
    assert_near(within.sum(-1), torch.bincount(y).double() / len(y), 1e-12)  # the labels say what classes weigh


def test_it_is_a_layer_with_logits_whose_gradient_reaches_the_encoder(data):
    x, y = data
    model = MixtureClassifier(C, D, 2, random_state=0).fit(x.float(), y)
    encoder = torch.nn.Linear(D, D)
    loss = torch.nn.functional.cross_entropy(model(encoder(x.float())), y)
    loss.backward()
    assert encoder.weight.grad.abs().sum() > 0
    assert list(model.parameters()) == []
    twin = MixtureClassifier(C, D, 2)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    z = x.reshape(4, 40, D)
    assert model(z).shape == (4, 40, C)
    assert model.double()(x).dtype == torch.float64
    row = x[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(model, row)


@pytest.mark.no_cover
def test_it_compiles_and_is_balanced_within_classes(data):
    x, y = data
    model = MixtureClassifier(C, D, 2, random_state=0).fit(x.float(), y)
    torch._dynamo.reset()
    assert_near(torch.compile(model, fullgraph=True, backend="aot_eager")(x.float()), model(x.float()), 1e-5)
    balanced = model.mixture.sinkhorn(x, log_prior=model.log_prior(y), n_iterations=40)
    counts = model.statistics(x, y, assignment=balanced).count.reshape(C, 2)
    expected = (torch.bincount(y).double() / 2)[:, None].expand(C, 2)
    torch.testing.assert_close(counts, expected, rtol=1e-4, atol=1e-4)
    assert model.statistics(x, y, assignment=Assignment(hard=True)).count.sum() == len(x)
    assert_compiled_steps_are_eager_ones(model.mixture, [x.float()[:20]], 0.5)


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("y", "error", "match"),
    [
        (torch.tensor([0, 1, 3]), ValueError, r"`y` to hold classes from 0 to 2, -1 for .*, but got \[3\]"),
        (torch.tensor([0, 1, -2]), ValueError, r"but got \[-2\]"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, "`y` to hold integers, but got torch.float32"),
        (torch.tensor([True, False, True]), TypeError, "`y` to hold integers, but got torch.bool"),
        (torch.tensor([0, 1]), ValueError, r"`y` of shape \(3,\), one label for each row of `x`, but got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), ValueError, r"`y` of shape \(3,\)"),
        (["a", "b", "c"], TypeError, "Expected `y` to be a tensor"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("learn", ["em_step", "fit", "initialize", "statistics"])
def test_wrong_labels_raise_one_clear_error_and_change_nothing(y, error, match, learn):
    model = MixtureClassifier(3, 2)
    with unchanged(model), pytest.raises(error, match=match):
        getattr(model, learn)(torch.zeros(3, 2), y)


@pytest.mark.parametrize("learn", ["fit", "initialize"])
def test_a_start_needs_labelled_rows_enough_for_each_class(learn):
    model = MixtureClassifier(2, 2, components_per_class=3)
    x = torch.randn(8, 2)
    with unchanged(model):
        with pytest.raises(ValueError, match="`y` with labelled rows to start from, but got none among 8"):
            getattr(model, learn)(x, torch.full((8,), -1))
        with pytest.raises(ValueError, match="at least components_per_class=3 rows of class 1, but got 2"):
            getattr(model, learn)(x, torch.tensor([0, 0, 0, 0, 1, 1, -1, -1]))
        with pytest.raises(ValueError, match="Expected `x` to be finite"):
            getattr(model, learn)(torch.full((8, 2), torch.nan), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
        with pytest.raises(ValueError, match=r"Expected `x` of shape \(..., 2\)"):
            getattr(model, learn)(torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_classes": 0}, ValueError, "`n_classes` to be at least 1"),
        ({"components_per_class": 1.5}, TypeError, "`components_per_class` to be an integer"),
        ({"ignore_index": 1}, ValueError, "`ignore_index` to be no class"),
        ({"ignore_index": -1}, ValueError, "`ignore_index` to be no class"),
        ({"ignore_index": "void"}, TypeError, "`ignore_index` to be an integer"),
        ({"covariance_type": "round"}, ValueError, "`covariance_type`"),
        ({"tol": -1}, ValueError, "`tol`"),
    ],
)
def test_bad_options_name_themselves(options, error, match):
    with pytest.raises(error, match=match):
        MixtureClassifier(**{"n_classes": 2, "n_features": 2, **options})


def test_a_failed_fit_leaves_the_classifier_as_it_was(data):
    x, y = data
    model = MixtureClassifier(C, D).fit(x, y)
    before = copy_of_buffers(model)
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        model.fit(x, y)
    assert_same_buffers(model, before)


def test_a_fresh_classifier_does_not_learn_from_rows_without_labels():
    model = MixtureClassifier(3, 2)
    with unchanged(model), pytest.raises(ValueError, match="`y` with labelled rows to start from, but got none"):
        model.em_step(torch.randn(9, 2), torch.full((9,), -1))
    with unchanged(model), pytest.raises(ValueError, match=r"all classes but one at least, but got none of \[1, 2\]"):
        model.fit(torch.randn(9, 2), torch.tensor([0, 0, 0, 0, -1, -1, -1, -1, -1]))


def test_a_state_of_another_division_into_classes_is_refused_before_anything_is_written(data):
    model = MixtureClassifier(C, D, 2, random_state=0).fit(*data)
    other = MixtureClassifier(2, D, 3)
    with (
        unchanged(other),
        pytest.raises(ValueError, match=r"Expected a state of \{'n_classes': 2"),
    ):
        other.load_state_dict(model.state_dict())
    network = torch.nn.Sequential(other)
    with unchanged(network), pytest.raises(ValueError, match="Expected a state of"):
        network.load_state_dict(torch.nn.Sequential(model).state_dict())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_integer_dtype_are_labels(data, dtype):
    x, y = data
    one, other = (MixtureClassifier(C, D, random_state=0).fit(x, labels) for labels in (y, y.to(dtype)))
    assert torch.equal(one(x), other(x))


def test_a_class_of_weight_zero_counts_as_absent(data):
    x, y = data
    with pytest.warns(UserWarning, match=r"belongs to the classes \[1\]"):
        MixtureClassifier(C, D, random_state=0).fit(x, y, sample_weight=(y != 1).double())
