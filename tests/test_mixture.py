"""The layer: how it is made, its density in every shape and dtype, and its parameters."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch
from oracles import (
    assert_near,
    assert_same_buffers,
    copy_of_buffers,
    dense,
    distribution,
    joint,
    random_layer,
    random_mixture,
    unchanged,
)

from tgmm_nn import GaussianMixture


@pytest.fixture
def layer(family, generator):
    """Make layers of one family, set to random mixtures of 3 components in 2 features."""
    return partial(random_layer, family, generator)


@pytest.fixture
def rows(generator):
    """Draw rows in the region of the random mixtures."""
    return lambda *shape: 2 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64)


def parameters_of(gmm):
    """Return weights, means and covariance elements in float64."""
    return gmm.weights_.double(), gmm.means_.double(), gmm.covariance.internal(gmm.covariances_).double()


# ------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_components": 0}, ValueError, "`n_components` to be at least 1, but got 0"),
        ({"n_components": 2.0}, TypeError, "`n_components` to be an integer, but got 2.0"),
        ({"n_components": True}, TypeError, "`n_components` to be an integer, but got True"),
        ({"n_features": -1}, ValueError, "`n_features` to be at least 1, but got -1"),
        ({"n_features": "3"}, TypeError, "`n_features` to be an integer, but got '3'"),
        ({"covariance_type": "fulll"}, ValueError, "`covariance_type` to be one of 'full', .*, but got 'fulll'"),
        ({"covariance_type": None}, TypeError, "`covariance_type` to be one of 'full', .*, but got None"),
        ({"init_means": "points"}, ValueError, "`init_means` to be one of 'kmeans', 'kpp', 'random', but got 'points'"),
        ({"init_means": [[0.0, 1.0]]}, ValueError, r"`init_means` of shape \(2, 2\), but got \(1, 2\)"),
        ({"init_means": None}, TypeError, "`init_means` to be a tensor, array, list or number .*, but got None"),
        ({"init_weights": "random"}, ValueError, "`init_weights` to be one of 'uniform', 'kmeans', but got 'random'"),
        ({"init_weights": [0.5, 0.6]}, ValueError, "`init_weights` to be non-negative and to sum to 1, but .* 1.1"),
        ({"init_weights": 0.5}, ValueError, r"`init_weights` of shape \(2,\), but got \(\)"),
        ({"init_covariances": "diag"}, ValueError, "`init_covariances` to be one of 'empirical', 'global', 'eye', but"),
        ({"init_covariances": -1.0}, ValueError, "`init_covariances` to be positive definite, but"),
        (
            {"init_covariances": [1.0, 2.0]},
            ValueError,
            r"`init_covariances` of shape \(2, 2, 2\) or shape \(2, 2\) or a n",
        ),
        ({"weight_concentration_prior": 0.0}, ValueError, "`weight_concentration_prior` to be above 0, but got 0"),
        (
            {"weight_concentration_prior": [1, 2, 3]},
            ValueError,
            r"`weight_concentration_prior` of a number or shape \(2,\)",
        ),
        ({"mean_prior": [0.0, 0.0]}, ValueError, "`mean_precision_prior` together with `mean_prior`, but got None"),
        ({"mean_precision_prior": 1.0}, ValueError, "`mean_prior` together with `mean_precision_prior`, but got None"),
        (
            {"mean_prior": [0.0], "mean_precision_prior": 1},
            ValueError,
            r"`mean_prior` of shape \(2, 2\) or shape \(2,\) or",
        ),
        (
            {"mean_prior": [torch.nan] * 2, "mean_precision_prior": 1},
            ValueError,
            "`mean_prior` to be finite, but it holds",
        ),
        (
            {"mean_prior": 0.0, "mean_precision_prior": -1},
            ValueError,
            "`mean_precision_prior` to be above 0, but got -1",
        ),
        (
            {"mean_prior": 0.0, "mean_precision_prior": "1"},
            TypeError,
            "`mean_precision_prior` to be a tensor, array, list",
        ),
        (
            {"covariance_prior": 1.0},
            ValueError,
            "`degrees_of_freedom_prior` together with `covariance_prior`, but got N",
        ),
        ({"degrees_of_freedom_prior": 3.0}, ValueError, "`covariance_prior` together with `degrees_of_freedom_prior`"),
        (
            {"covariance_prior": 1.0, "degrees_of_freedom_prior": 1.0},
            ValueError,
            r"`degrees_of_freedom_prior` to be above 1 \(the number of features minus 1\), but got 1",
        ),
        (
            {"covariance_prior": [[1.0, 2.0], [2.0, 1.0]], "degrees_of_freedom_prior": 4},
            ValueError,
            r"`covariance_prior` to be positive definite, but \[0, 1\] \(by component\) are not",
        ),
        (
            {"covariance_prior": [[1.0, 0.5], [0.0, 1.0]], "degrees_of_freedom_prior": 4},
            ValueError,
            "`covariance_prior` to be symmetric",
        ),
        ({"cem": "yes"}, TypeError, r"`cem` to be True or False, but got 'yes' \(str\)"),
        ({"warm_start": 1}, TypeError, r"`warm_start` to be True or False, but got 1 \(int\)"),
        ({"verbose": 2}, TypeError, r"`verbose` to be True, False or 'bar', but got 2 \(int\)"),
        ({"verbose_interval": 0}, ValueError, "`verbose_interval` to be at least 1, but got 0"),
        ({"n_init": 0}, ValueError, "`n_init` to be at least 1, but got 0"),
        ({"random_state": -1}, ValueError, "`random_state` to be at least 0, but got -1"),
        ({"random_state": 0.5}, TypeError, "`random_state` to be an integer or None, but got 0.5"),
        ({"max_iter": 0}, ValueError, "`max_iter` to be at least 1, but got 0"),
        ({"tol": -1e-3}, ValueError, "`tol` to be at least 0 and finite, but got -0.001"),
        ({"tol": float("nan")}, ValueError, "`tol` to be at least 0 and finite, but got nan"),
        ({"tol": "1e-3"}, TypeError, "`tol` to be a number, but got '1e-3'"),
        ({"reg_covar": -1.0}, ValueError, "`reg_covar` to be at least 0 and finite, but got -1"),
        ({"reg_covar": float("inf")}, ValueError, "`reg_covar` to be at least 0 and finite, but got inf"),
        ({"reg_covar_relative": 1}, TypeError, "`reg_covar_relative` to be True or False, but got 1"),
        ({"chunk_size": 0}, ValueError, "`chunk_size` to be at least 1, but got 0"),
        ({"chunk_size": 1.5}, TypeError, "`chunk_size` to be an integer or None, but got 1.5"),
        ({"dtype": torch.float16}, ValueError, "`dtype` to be torch.float32, torch.float64 or None, but got torch.fl"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        GaussianMixture(**{"n_components": 2, "n_features": 2, **options})


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="covar_type"):
        GaussianMixture(2, 2, covar_type="full")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_a_fresh_layer_is_a_standard_normal(family, dtype, tolerance, generator):
    gmm = GaussianMixture(3, 4, family, dtype=dtype)
    x = torch.randn(10, 4, generator=generator).to(dtype)
    assert_near(gmm(x), torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1), tolerance)
    assert (gmm.fitted_, gmm.converged_, gmm.n_iter_, gmm.history_) == (False, False, 0, [])
    assert np.isnan([gmm.lower_bound_, gmm.objective_]).all()


def test_a_layer_made_on_the_meta_device_is_fresh_after_reset(family):
    gmm = GaussianMixture(3, 2, family, device="meta").to_empty(device="cpu")
    gmm.reset_parameters()
    assert_same_buffers(gmm, copy_of_buffers(GaussianMixture(3, 2, family)))


def test_reset_parameters_makes_a_used_layer_fresh(family, layer, rows):
    gmm = layer()
    gmm.em_step(rows(20))
    gmm.reset_parameters()
    assert_same_buffers(gmm, copy_of_buffers(GaussianMixture(3, 2, family, dtype=torch.float64)))


def test_the_representation_shows_every_option():
    text = repr(
        GaussianMixture(3, 2, "diag", reg_covar=1e-3, n_init=4, mean_prior=[0.0, 1.0], mean_precision_prior=0.1)
    )
    assert text.startswith("GaussianMixture(3, 2, 'diag', ")
    for option in ("reg_covar=0.001", "n_init=4", "mean_prior=(3, 2)", "init_means='kmeans'", "cem=False"):
        assert option in text
    for name in inspect.signature(GaussianMixture).parameters:
        assert f"{name}=" in text or name in ("n_components", "n_features", "covariance_type", "device", "dtype")


def test_options_make_the_same_layer_again(family):
    """Priors are broadcast, so that they may be given as short as the shapes allow."""
    gmm = GaussianMixture(
        3,
        2,
        family,
        weight_concentration_prior=2,
        mean_prior=[0.0, 1.0],
        mean_precision_prior=0.1,
        covariance_prior=2.0,
        degrees_of_freedom_prior=np.float32(4),
        init_means=[[0, 0], [5, 5], [0, 5]],
        init_weights=[0.2, 0.3, 0.5],
        init_covariances=1.5,
        tol=np.float32(0.5),
        n_init=np.int64(3),
    )
    again = GaussianMixture(**gmm.options())
    assert repr(again) == repr(gmm)
    for name, value in gmm.options().items():
        assert torch.equal(torch.as_tensor(again.options()[name]), value) if isinstance(value, torch.Tensor) else True
    assert {type(value) for value in gmm.options().values()} <= {int, float, bool, str, type(None), torch.Tensor}


def test_priors_can_be_read_and_not_set():
    """Another value would not be looked at."""
    gmm = GaussianMixture(2, 1, covariance_prior=2.0, degrees_of_freedom_prior=3.0)
    assert gmm.covariance_prior.tolist() == [[[2.0]], [[2.0]]]
    assert gmm.mean_prior is None
    with pytest.raises(AttributeError):
        gmm.mean_prior = torch.zeros(1)


@pytest.mark.parametrize(
    ("name", "in_covariances"),
    [("full", 30), ("diag", 12), ("spherical", 3), ("tied_full", 10), ("tied_diag", 4), ("tied_spherical", 1)],
)
def test_n_parameters_counts_weights_means_and_covariances(name, in_covariances):
    assert GaussianMixture(3, 4, name).n_parameters == 2 + 12 + in_covariances


# ------------------------------------------------------------------------------------------------- the density


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0,), (2, 0)])
def test_results_have_the_leading_shape_of_x(layer, rows, shape):
    gmm, x = layer(), rows(*shape)
    log_prob = distribution(*parameters_of(gmm)).log_prob(x)
    log_joint = joint(x.reshape(-1, 2), *parameters_of(gmm)).reshape(*shape, 3)
    assert_near(gmm(x), log_prob)
    assert_near(gmm.score_samples(x), log_prob)
    assert_near(gmm.log_responsibilities(x), log_joint.log_softmax(-1))
    assert_near(gmm.predict_proba(x), log_joint.softmax(-1))
    assert torch.equal(gmm.predict(x), log_joint.argmax(-1))


def test_responsibilities_sum_to_one_and_the_largest_is_predicted(layer, rows):
    gmm, x = layer(), rows(100)
    assert_near(gmm.predict_proba(x).sum(-1), torch.ones(100).double())
    assert torch.equal(gmm.predict(x), gmm.predict_proba(x).argmax(-1))


def test_score_is_the_mean_log_density_as_a_number(layer, rows):
    gmm, x = layer(), rows(100)
    assert isinstance(gmm.score(x), float)
    assert gmm.score(x) == pytest.approx(distribution(*parameters_of(gmm)).log_prob(x).mean().item(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "given", [torch.int64, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_results_have_the_wider_dtype_and_never_less_than_float32(layer, rows, dtype, given):
    gmm, x = layer(dtype=dtype), rows(20).abs().to(given)
    wide = torch.promote_types(given, dtype)
    assert gmm(x).dtype == gmm.log_responsibilities(x).dtype == gmm.predict_proba(x).dtype == wide
    assert gmm.predict(x).dtype == torch.int64
    torch.testing.assert_close(gmm(x), gmm(x.to(wide)), rtol=0, atol=0)
    assert gmm.em_step(x).dtype == dtype


def test_autocast_changes_nothing(layer, rows):
    gmm, x = layer(dtype=torch.float32), rows(20).bfloat16()
    twin = layer(dtype=torch.float32).set_parameters(gmm.weights_, gmm.means_, gmm.covariances_)
    gmm.set_parameters(gmm.weights_, gmm.means_, gmm.covariances_)
    outside = gmm(x), gmm.log_responsibilities(x), gmm.em_step(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = twin(x), twin.log_responsibilities(x), twin.em_step(x)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)
    assert_same_buffers(twin, copy_of_buffers(gmm))


def test_the_layer_is_differentiable_in_its_input(layer, rows):
    gmm, x = layer(), rows(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(gmm, x)
    assert torch.autograd.gradcheck(gmm.log_responsibilities, x)


def test_the_gradient_of_each_row_is_that_of_vmap(layer, rows):
    gmm, x = layer(), rows(5).requires_grad_()
    (gradient,) = torch.autograd.grad(gmm(x).sum(), x)
    assert_near(torch.func.vmap(torch.func.grad(gmm))(x.detach()), gradient)


def test_the_density_does_not_depend_on_the_chunk_size(layer, rows):
    gmm, x = layer(chunk_size=7), rows(20)
    chunked = gmm.score(x), gmm.predict(x)
    gmm.chunk_size = None
    assert chunked[0] == pytest.approx(gmm.score(x), rel=1e-14)
    assert torch.equal(chunked[1], gmm.predict(x))


METHODS = (
    "__call__",
    "score_samples",
    "score",
    "log_responsibilities",
    "predict",
    "predict_proba",
    "statistics",
    "em_step",
    "initialize",
    "fit",
    "fit_predict",
)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(8, 3), (8, 1), (2, 8), (8,), ()])
def test_a_wrong_width_raises_everywhere(method, shape):
    gmm = GaussianMixture(2, 2)
    message = r"Expected `x` of shape \(\.\.\., 2\) for a mixture of 2 features, but got \(" + ", ".join(
        map(str, shape)
    )
    with unchanged(gmm), pytest.raises(ValueError, match=message):
        getattr(gmm, method)(torch.zeros(shape))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((8, 2), complex), r"`x` to be .* real numbers, but got .* \(ndarray of dtype complex128\)"),
        (np.array([["a", "b"]] * 8), "`x` to be a tensor, array, list or number that holds real numbers, but got"),
        ([[0.0, 1.0], [2.0]], "`x` to be a tensor, array, list or number that holds real numbers, but got"),
        ("rows", "`x` to be a tensor, array, list or number that holds real numbers, but got 'rows'"),
        (None, "`x` to be a tensor, array, list or number that holds real numbers, but got None"),
        (torch.zeros(8, 2, dtype=torch.complex64), "`x` to hold real numbers, but got torch.complex64"),
        (torch.zeros(8, 2, dtype=torch.bool), "`x` to hold real numbers, but got torch.bool"),
    ],
)
def test_what_holds_no_real_numbers_raises_everywhere(method, x, message):
    gmm = GaussianMixture(2, 2)
    with unchanged(gmm), pytest.raises(TypeError, match=message):
        getattr(gmm, method)(x)


# ----------------------------------------------------------------------------------------------- the parameters


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_set_parameters_and_the_attributes_are_a_round_trip(family, dtype, tolerance, generator):
    mixture = random_mixture(family, generator, n_features=4)
    gmm = GaussianMixture(3, 4, family, dtype=dtype).set_parameters(*mixture.public)
    assert gmm.covariances_.shape == gmm.covariance.public_shape(3, 4)
    for got, given in zip((gmm.weights_, gmm.means_, gmm.covariances_), mixture.public, strict=True):
        assert got.dtype == dtype
        assert_near(got, given.to(dtype), tolerance)
    assert gmm.fitted_


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.float], ids=str)
def test_set_parameters_takes_lists_arrays_and_tensors(family, convert, generator):
    mixture = random_mixture(family, generator)
    gmm = GaussianMixture(3, 2, family).set_parameters(*map(convert, mixture.public))
    for got, given in zip((gmm.weights_, gmm.means_, gmm.covariances_), mixture.public, strict=True):
        assert_near(got, given.float(), 1e-6)


def test_weights_that_were_rounded_are_normalised():
    gmm = GaussianMixture(3, 1, "tied_spherical", dtype=torch.float64)
    gmm.set_parameters([0.3333, 0.3333, 0.3333], [[0.0], [1.0], [2.0]], 1.0)
    assert_near(gmm.weights_, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_the_layer_does_not_share_memory_with_what_it_was_given(layer):
    gmm = layer()
    means = torch.ones(3, 2).double()
    gmm.set_parameters(gmm.weights_, means, gmm.covariances_)
    means.zero_()
    assert (gmm.means_ == 1).all()


def test_covariance_matrices_write_every_family_as_matrices_of_each_component(layer):
    gmm = layer()
    expected = dense(gmm.covariance.internal(gmm.covariances_), 2).expand(3, -1, -1)
    assert_near(gmm.covariance_matrices(), expected)


@pytest.mark.parametrize(
    ("position", "bad", "error", "message"),
    [
        (0, [0.5, 0.5, 0.0], ValueError, r"`weights` of shape \(2,\), but got \(3,\)"),
        (0, [1.5, -0.5], ValueError, "`weights` to be non-negative and to sum to 1, but the smallest is -0.5"),
        (0, [0.5, 0.4], ValueError, "`weights` to be non-negative and to sum to 1, but they sum to 0.9"),
        (0, [torch.nan, 0.4], ValueError, "`weights` to be finite, but it holds nan or infinity"),
        (
            0,
            "half",
            TypeError,
            "`weights` to be a tensor, array, list or number that holds real numbers, but got 'half'",
        ),
        (1, [[0.0], [1.0]], ValueError, r"`means` of shape \(2, 2\), but got \(2, 1\)"),
        (1, [[0.0, torch.inf], [1.0, 2.0]], ValueError, "`means` to be finite, but it holds nan or infinity"),
        (1, None, TypeError, "`means` to be a tensor, array, list or number that holds real numbers, but got None"),
        (2, torch.eye(2), ValueError, r"`covariances` of shape \(2, 2, 2\), but got \(2, 2\)"),
        (
            2,
            torch.eye(2) * torch.tensor([1.0, -1.0])[:, None, None],
            ValueError,
            r"positive definite, but \[1\] \(by comp",
        ),
        (
            2,
            [[[1.0, 2.0], [2.0, 1.0]]] * 2,
            ValueError,
            r"`covariances` to be positive definite, but \[0, 1\] \(by comp",
        ),
        (
            2,
            [[[1.0, 0.5], [0.4, 1.0]]] * 2,
            ValueError,
            r"`covariances` to be symmetric; symmetrise by \(c \+ c.mT\) / 2",
        ),
        (2, torch.full((2, 2, 2), torch.nan), ValueError, "`covariances` to be finite, but it holds nan or infinity"),
    ],
)
def test_bad_parameters_raise_and_change_nothing(position, bad, error, message, generator):
    gmm = random_layer("full", generator, n_components=2)
    given = [gmm.weights_.flip(0), gmm.means_ + 1, gmm.covariances_ * 2]
    given[position] = bad
    with unchanged(gmm), pytest.raises(error, match=message):
        gmm.set_parameters(*given)


def test_a_covariance_that_is_not_positive_raises_and_changes_nothing(family, layer):
    gmm = layer()
    covariances = gmm.covariances_.clone()
    covariances.view(-1)[0] = -1.0
    with unchanged(gmm), pytest.raises(ValueError, match="`covariances` to be positive definite"):
        gmm.set_parameters(gmm.weights_, gmm.means_, covariances)
