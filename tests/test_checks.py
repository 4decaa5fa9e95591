"""Each check lets what is right pass and names in its error the argument, what was expected and what came."""

import math
import re

import numpy as np
import pytest
import torch

from tgmm_nn import checks

X = torch.zeros(4, 2)
LIKE = torch.zeros(1, dtype=torch.float64)


def refuses(error, message):
    return pytest.raises(error, match="^" + re.escape(message))


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_integers_pass(value):
    checks.check_integer("k", value)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "Expected `k` to be at least 1, but got 0."),
        (1.0, TypeError, "Expected `k` to be an integer, but got 1.0 (float)."),
        (True, TypeError, "Expected `k` to be an integer, but got True (bool)."),
        ("1", TypeError, "Expected `k` to be an integer, but got '1' (str)."),
        (None, TypeError, "Expected `k` to be an integer, but got None (NoneType)."),
    ],
)
def test_what_is_no_integer_in_range_is_refused(value, error, message):
    with refuses(error, message):
        checks.check_integer("k", value)


def test_an_optional_integer_may_be_none():
    checks.check_integer("k", None, optional=True)
    with refuses(TypeError, "Expected `k` to be an integer or None, but got 'a' (str)."):
        checks.check_integer("k", "a", optional=True)


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25)])
def test_numbers_in_range_pass(value):
    checks.check_number("a", value, 0.0, 1.0)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, "Expected `a` to be at least 0 and at most 1, but got -0.1."),
        (1.1, ValueError, "Expected `a` to be at least 0 and at most 1, but got 1.1."),
        (math.nan, ValueError, "Expected `a` to be at least 0 and at most 1, but got nan."),
        ("0.1", TypeError, "Expected `a` to be a number, but got '0.1' (str)."),
        (False, TypeError, "Expected `a` to be a number, but got False (bool)."),
        (1j, TypeError, "Expected `a` to be a number, but got 1j (complex)."),
    ],
)
def test_what_is_no_number_in_range_is_refused(value, error, message):
    with refuses(error, message):
        checks.check_number("a", value, 0.0, 1.0)


def test_a_strict_minimum_is_excluded_and_no_maximum_still_means_finite():
    checks.check_number("a", 1e300)
    with refuses(ValueError, "Expected `a` to be above 0 and finite, but got 0"):
        checks.check_number("a", 0, strict=True)
    with refuses(ValueError, "Expected `a` to be at least 0 and finite, but got inf."):
        checks.check_number("a", math.inf)


def test_only_booleans_are_booleans():
    checks.check_bool("b", True)
    with refuses(TypeError, "Expected `b` to be True or False, but got 'yes' (str)."):
        checks.check_bool("b", "yes")
    with refuses(TypeError, "Expected `b` to be True, False or 'bar', but got 'yes' (str)."):
        checks.check_bool("b", "yes", alternative="'bar'")


def test_only_strings_with_something_in_them_are_strings():
    checks.check_string("s", "encoder")
    for value, kind in [("", "str"), (None, "NoneType"), (3, "int")]:
        with refuses(TypeError, f"Expected `s` to be a non-empty string, but got {value!r} ({kind})."):
            checks.check_string("s", value)


def test_choices_are_listed():
    checks.check_choice("c", "a", ("a", "b"))
    with refuses(ValueError, "Expected `c` to be one of 'a', 'b', but got 'd'."):
        checks.check_choice("c", "d", ("a", "b"))
    with refuses(TypeError, "Expected `c` to be one of 'a', 'b', but got 3."):
        checks.check_choice("c", 3, ("a", "b"))


@pytest.mark.parametrize("value", [torch.bfloat16, torch.int64, "float16", float])
def test_dtypes_other_than_the_two_wide_ones_are_refused(value):
    for right in (torch.float32, torch.float64):
        for written in (right, str(right), str(right).removeprefix("torch.")):
            assert checks.check_dtype("dtype", written) is right
    assert checks.check_dtype("dtype", None) is None
    with refuses(ValueError, f"Expected `dtype` to be torch.float32, torch.float64 or None, but got {value!r}."):
        checks.check_dtype("dtype", value)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_symmetry_is_judged_relative_to_the_matrices(scale):
    matrix = scale * torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    checks.check_symmetric("c", matrix * torch.tensor([[1.0, 1.00001], [1.0, 1.0]]), matrix=True)
    skewed = matrix * torch.tensor([[1.0, 1.1], [1.0, 1.0]])
    checks.check_symmetric("c", skewed, matrix=False)
    with refuses(ValueError, "Expected `c` to be symmetric; symmetrise by (c + c.mT) / 2."):
        checks.check_symmetric("c", skewed, matrix=True)


@pytest.mark.parametrize("shape", [(2,), (0, 2), (3, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_of_real_numbers_and_the_right_width_pass(shape, dtype):
    checks.check_rows("x", torch.zeros(shape, dtype=dtype), 2)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (X.cfloat(), TypeError, "Expected `x` to hold real numbers, but got torch.complex64."),
        (X.bool(), TypeError, "Expected `x` to hold real numbers, but got torch.bool."),
        (X.to_sparse(), TypeError, "Expected `x` to be dense, but got torch.sparse_coo; convert it by x.to_dense()."),
        (X.mT, ValueError, "Expected `x` of shape (..., 2) for a mixture of 2 features, but got (2, 4)."),
        (X[:, :1], ValueError, "Expected `x` of shape (..., 2) for a mixture of 2 features, but got (4, 1)."),
        (X[0, 0], ValueError, "Expected `x` of shape (..., 2) for a mixture of 2 features, but got ()."),
    ],
)
def test_other_rows_are_refused(x, error, message):
    with refuses(error, message):
        checks.check_rows("x", x, 2)


def test_sample_weights_are_one_real_number_per_row():
    for weight in (torch.ones(4), torch.ones(2, 2), torch.ones(4, dtype=torch.int64)):
        checks.check_sample_weight(weight, tuple(weight.shape))
    with refuses(ValueError, "Expected `sample_weight` of shape (4,), one number for each row of `x`, but got (3,)."):
        checks.check_sample_weight(torch.ones(3), (4,))
    with refuses(TypeError, "Expected `sample_weight` to hold real numbers, but got torch.complex64."):
        checks.check_sample_weight(torch.ones(4).cfloat(), (4,))


def test_log_priors_are_one_floating_number_per_row_and_component():
    checks.check_log_prior(torch.zeros(4, 3), (4, 3))
    with refuses(
        ValueError, "Expected `log_prior` of shape (4, 3), one number for each row and component, but got (4,)."
    ):
        checks.check_log_prior(torch.zeros(4), (4, 3))
    with refuses(TypeError, "Expected `log_prior` to hold floating numbers, but got torch.bool."):
        checks.check_log_prior(torch.ones(4, 3).bool(), (4, 3))


def test_squares_that_overflow_their_dtype_are_refused():
    checks.check_squares("x", torch.full((2, 2), 1e18))
    checks.check_squares("x", torch.full((2, 2), 1e30).double())
    with refuses(
        ValueError, "Expected `x` small enough that its squares add up in torch.float32, but its largest value"
    ):
        checks.check_squares("x", torch.full((2, 2), -1e30))


READ_ONLY = np.arange(4.0).reshape(2, 2)
READ_ONLY.setflags(write=False)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([[1, 2], [3, 4]], torch.float32),
        (((1.0, 2.0), (3.0, 4.0)), torch.float32),
        (np.ones((2, 2)), torch.float64),
        (np.ones((2, 2), np.float16), torch.float16),
        (np.ones((2, 2), np.uint16), torch.uint16),
        (np.ones((2, 2), ">f4"), torch.float32),
        (np.ones((2, 2), np.longdouble), torch.float64),
        (np.arange(8.0).reshape(2, 4)[:, ::-2], torch.float64),
        (READ_ONLY, torch.float64),
        (np.float32(3.0), torch.float32),
        (3, torch.float32),
    ],
)
def test_what_numpy_can_read_becomes_a_tensor_with_its_dtype(value, dtype):
    tensor = checks.to_tensor("x", value, torch.float32)
    assert tensor.dtype == dtype
    assert tensor.shape == np.asarray(value).shape
    np.testing.assert_array_equal(tensor.double().numpy(), np.asarray(value, np.float64))


def test_a_tensor_stays_the_same_tensor():
    assert checks.to_tensor("x", X, torch.float64) is X


@pytest.mark.parametrize("value", [[1, 2], (1.0, 2.0), np.array([1.0, 2.0]), torch.tensor([1.0, 2.0])], ids=type)
def test_arrays_of_any_kind_become_new_tensors_like_another(value):
    tensor = checks.check_array("a", value, LIKE, (2,))
    assert tensor.dtype == torch.float64
    assert tensor.tolist() == [1.0, 2.0]
    tensor.zero_()
    assert list(value) == [1.0, 2.0]


def test_an_array_loses_its_graph_and_a_number_has_no_shape():
    assert not checks.check_array("a", torch.ones(2, dtype=torch.float64, requires_grad=True), LIKE, (2,)).requires_grad
    assert checks.check_array("a", 3, LIKE, (2,), ()).item() == 3.0


NO_ARRAY = "Expected `a` to be a tensor, array, list or number that holds real numbers, but got "


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("ab", TypeError, NO_ARRAY + "'ab' (str)."),
        (None, TypeError, NO_ARRAY + "None (NoneType)."),
        ({"a": 1}, TypeError, NO_ARRAY + "{'a': 1} (dict)."),
        ([[1.0], [1.0, 2.0]], TypeError, NO_ARRAY + "[[1.0], [1.0, 2.0]] (list); its rows differ in length."),
        (
            [torch.zeros(2, 1), torch.zeros(1, 1)],
            TypeError,
            NO_ARRAY + "[tensor([[0.], [0.]]), tensor([[0.]])] (list); batches that differ in length are a stream: "
            "DataLoader(batches, batch_size=None).",
        ),
        (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError, NO_ARRAY + "masked_array("),
        (["a"], TypeError, NO_ARRAY + "['a'] (list)."),
        (True, TypeError, NO_ARRAY + "True (bool)."),
        (np.array([1j]), TypeError, NO_ARRAY + "array([0.+1.j]) (ndarray of dtype complex128)."),
        (np.array([object()] * 9), TypeError, NO_ARRAY + "array([<object object at"),
        (torch.ones(2).bool(), TypeError, "Expected `a` to hold real numbers, but got torch.bool."),
        ([1.0, 2.0, 3.0], ValueError, "Expected `a` of shape (2,) or a number, but got (3,)."),
        ([1.0, math.nan], ValueError, "Expected `a` to be finite, but it holds nan or infinity."),
    ],
)
def test_other_arrays_are_refused(value, error, message):
    with refuses(error, message):
        checks.check_array("a", value, LIKE, (2,), ())


def test_weights_are_a_distribution_up_to_rounding_of_what_was_typed():
    for weights in ([0.5, 0.5], [1.0, 0.0], [0.333, 0.333, 0.333]):
        checks.check_weights("w", torch.tensor(weights))
    with refuses(ValueError, "Expected `w` to be non-negative and to sum to 1, but they sum to 0.9."):
        checks.check_weights("w", torch.tensor([0.5, 0.4]))
    with refuses(ValueError, "Expected `w` to be non-negative and to sum to 1, but the smallest is -0.5."):
        checks.check_weights("w", torch.tensor([1.5, -0.5]))


def test_step_sizes_are_none_a_number_up_to_one_or_a_tensor_that_is_not_read():
    for step_size in (None, 1, 0.1, torch.tensor(0.5), torch.tensor([0.5]), torch.empty((), device="meta")):
        checks.check_step_size(step_size)
    with refuses(ValueError, "Expected `step_size` to be above 0 and at most 1, but got 0.0."):
        checks.check_step_size(0.0)
    with refuses(ValueError, "Expected `step_size` to hold one real number, but got shape (2,) of torch.float32."):
        checks.check_step_size(torch.ones(2))
