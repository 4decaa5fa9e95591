"""The laws that the docstring of `Covariance` states, for every structure, against dense matrices."""

import pytest
import torch
from oracles import assert_near, dense, random_covariances, restrict

from tgmm_nn.covariance import COVARIANCES, Full
from tgmm_nn.monomials import Monomials
from tgmm_nn.structure import LIFT

K, D = 3, 4


@pytest.fixture
def covariance(family):
    return COVARIANCES[family]


@pytest.fixture
def elements(family, generator):
    """Positive definite elements, one per component or one for all."""
    return random_covariances(family, K, D, generator)


@pytest.fixture
def factor(covariance, elements):
    factor, exists = covariance.factor(elements)
    assert exists.all()
    return factor


@pytest.fixture
def x(generator):
    return torch.randn(7, D, generator=generator, dtype=torch.float64)


def untied(family):
    return family.removeprefix("tied_")


@pytest.mark.parametrize(
    ("name", "internal", "public", "n_parameters"),
    [
        ("full", (3, 4, 4), (3, 4, 4), 30),
        ("diag", (3, 4), (3, 4), 12),
        ("spherical", (3,), (3,), 3),
        ("tied_full", (1, 4, 4), (4, 4), 10),
        ("tied_diag", (1, 4), (4,), 4),
        ("tied_spherical", (1,), (), 1),
    ],
)
def test_each_family_has_the_shapes_and_parameters_of_the_table(name, internal, public, n_parameters):
    covariance = COVARIANCES[name]
    identity = covariance.identity(K, D)
    assert (covariance.leading(K), *covariance.shape(D)) == identity.shape == internal
    assert covariance.public(identity).shape == covariance.public_shape(K, D) == public
    assert covariance.leading(K) * covariance.n_parameters(D) == n_parameters


def test_the_six_families_are_three_structures_tied_or_not(family, covariance):
    assert covariance.tied == family.startswith("tied_")
    assert type(covariance) is type(COVARIANCES[untied(family)])


def test_internal_undoes_public(covariance, elements):
    assert torch.equal(covariance.internal(covariance.public(elements)), elements)


def test_matrix_writes_each_element_as_a_dense_matrix(covariance, elements):
    assert torch.equal(covariance.matrix(elements, D), dense(elements, D))


def test_identity_is_the_unit_matrix_and_its_own_factor(covariance):
    identity = covariance.identity(K, D)
    assert torch.equal(dense(identity, D), torch.eye(D).expand(covariance.leading(K), D, D))
    assert torch.equal(covariance.factor(identity)[0], identity)


def test_outer_is_the_element_of_a_matrix_product_and_bilinear(family, covariance, x, generator):
    a, b, c = x, *torch.randn(2, 7, D, generator=generator, dtype=torch.float64)
    assert_near(covariance.outer(a, b), restrict(a[:, :, None] * b[:, None, :], untied(family)))
    assert_near(covariance.outer(a, 2 * b - c), 2 * covariance.outer(a, b) - covariance.outer(a, c))
    assert_near(covariance.outer(2 * a - c, b), 2 * covariance.outer(a, b) - covariance.outer(c, b))


def test_outer_of_a_row_with_itself_has_its_mean_square_as_mean_diagonal(covariance, x):
    assert_near(covariance.mean_diagonal(covariance.outer(x, x)), x.square().mean(-1))


def test_mean_diagonal_is_the_mean_variance(covariance, elements):
    assert_near(covariance.mean_diagonal(elements), dense(elements, D).diagonal(dim1=-2, dim2=-1).mean(-1))


@pytest.mark.parametrize("per_element", [False, True])
def test_add_to_diagonal_adds_multiples_of_the_identity(covariance, elements, per_element):
    value = torch.arange(1.0, 1.0 + len(elements)).double() if per_element else 0.5
    got = dense(covariance.add_to_diagonal_(elements.clone(), value), D) - dense(elements, D)
    assert_near(got, torch.as_tensor(value).reshape(-1, 1, 1).double() * torch.eye(D).double().expand_as(got))


def test_pool_sums_over_components_where_tied(covariance, x):
    assert torch.equal(covariance.pool(x), x.sum(0, keepdim=True) if covariance.tied else x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_the_square_of_the_root_is_the_covariance_and_of_the_factor_its_inverse(
    family, covariance, dtype, tolerance, generator
):
    elements = random_covariances(family, K, D, generator, dtype)
    factor, exists = covariance.factor(elements)
    assert exists.all()
    assert factor.dtype == dtype
    assert_near(covariance.square(covariance.root(factor)), elements, tolerance)
    product = dense(covariance.square(factor), D) @ dense(elements, D)
    assert_near(product, torch.eye(D, dtype=dtype).expand_as(product), 10 * tolerance)


def test_root_is_a_cholesky_factor_and_factor_its_inverse_transposed(covariance, elements, factor):
    root = dense(covariance.root(factor), D)
    assert_near(root, torch.linalg.cholesky(dense(elements, D)))
    assert_near(dense(factor, D).mT @ root, torch.eye(D).double().expand_as(root))


def test_apply_multiplies_each_element_with_its_row(covariance, elements, x):
    assert_near(covariance.apply(elements, x[:K]), (dense(elements, D) @ x[:K, :, None]).squeeze(-1))


def test_log_det_is_that_of_the_dense_factor(covariance, elements, factor):
    assert_near(covariance.log_det(factor, D), -0.5 * torch.logdet(dense(elements, D)))


def test_whitened_rows_have_the_mahalanobis_distance_as_squared_length(covariance, elements, factor, x):
    means = x[:K] + 1.0
    y = covariance.whiten(x, means, factor)
    centred = x - means[:, None]
    distance = (centred * torch.linalg.solve(dense(elements, D)[:, None], centred[..., None]).squeeze(-1)).sum(-1)
    assert y.shape == (K, 7, D)
    assert_near(y.square().sum(-1), distance)


def test_unwhitened_sums_are_those_of_the_rows(family, covariance, factor, x, generator):
    means, r = x[:K] + 1.0, torch.rand(K, 7, generator=generator, dtype=torch.float64)
    y = covariance.whiten(x, means, factor)
    whitened = torch.einsum("kn,knd->kd", r, y), covariance.whitened_second(y, r)
    first, second = covariance.unwhiten(factor, *whitened)
    centred = x[:, None] - means
    assert_near(first, torch.einsum("kn,nkd->kd", r, centred))
    assert_near(second, restrict(torch.einsum("kn,nki,nkj->kij", r, centred, centred), family))


@pytest.fixture(params=["independent", "whole"])
def form(request, covariance):
    """Features without repetition, and as they are written for few rows."""
    return covariance if request.param == "independent" else covariance.whole()


def test_features_times_the_dual_of_a_matrix_is_its_quadratic_form(form, elements, x):
    got = form.dual(elements, D) @ form.features(x.mT)
    assert_near(got, torch.einsum("ni,kij,nj->kn", x, dense(elements, D), x))


def test_features_unpack_into_the_outer_product(form, x):
    assert torch.equal(form.unpack(form.features(x.mT).mT, D), form.outer(x, x))
    assert_near(form.unpack(form.features(x.mT).sum(-1), D), form.outer(x, x).sum(0))
    assert torch.equal(form.pack(form.outer(x, x)), form.features(x.mT).mT)


def test_a_writer_writes_the_features_of_what_the_columns_hold_when_it_is_called(form, x):
    columns, out = torch.empty(D, 7, dtype=torch.float64), torch.empty(form.n_products(D), 7, dtype=torch.float64)
    with torch.no_grad():
        write = form.writer(columns, out)
        for rows in (x, x + 1.0):
            columns.copy_(rows.mT)
            write()
            assert torch.equal(out, form.features(rows.mT))


def test_monomials_are_those_of_each_chunk_whatever_its_size_also_where_parts_cannot_be_written(form, x):
    origin = torch.linspace(-1.0, 2.0, D, dtype=torch.float64)
    shared, at_once = Monomials(form, origin), Monomials(form, origin, once=True)
    far = x.clone()
    far[2, 1], far[3, 0], far[4] = torch.nan, -torch.inf, 1e160  # whose square is infinite
    for rows in (x, x + 1.0, x[:3], x[:0], far, -x, x.mT.contiguous().mT):
        usable = torch.tensor([rows is not far or i not in (2, 3, 4) for i in range(len(rows))], dtype=torch.bool)
        away = torch.where(usable[:, None], rows - origin, 0.0)
        features = [] if form.tied else [form.features(away.mT)]
        oracle = torch.cat([torch.ones(1, len(rows), dtype=torch.float64), away.mT, *features])
        assert len(oracle) == form.n_monomials(D)
        for monomials in (shared, at_once):
            with torch.no_grad():
                got, which = monomials(rows)
                assert torch.equal(got, oracle)
                assert torch.equal(which, usable)
            got, which = monomials(rows)  # with gradients on
            assert torch.equal(got, oracle)
            assert torch.equal(which, usable)


@pytest.mark.parametrize(("given", "dtype"), [("float32", "float32"), ("float32", "float64"), ("float64", "float64")])
@torch.no_grad()
def test_monomials_are_in_the_dtype_of_the_reference_point_and_usable_in_that_of_the_rows(form, given, dtype):
    rows = torch.tensor([[1e18, 0.0, 0.0], [1e20, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=getattr(torch, given))
    got, usable = Monomials(form, torch.zeros(3, dtype=getattr(torch, dtype)))(rows)
    assert got.dtype == getattr(torch, dtype)
    assert usable.tolist() == [True, given == "float64", True]
    assert torch.equal(got[1:4, 2], rows[2].to(got.dtype))


@torch.no_grad()
def test_chunks_of_one_size_share_the_memory_of_their_monomials(form, x):
    monomials = Monomials(form, x.new_zeros(D))
    first, _ = monomials(x)
    assert monomials(x + 1.0)[0].data_ptr() == first.data_ptr()
    assert torch.equal(first[1 : 1 + D], (x + 1.0).mT)
    # Products of features are rows in memory, rows of a chunk otherwise.
    assert first.is_contiguous() == (isinstance(form, Full) and not form.tied)


def test_lift_adds_a_small_fraction_of_the_mean_variance(covariance, elements):
    got = dense(covariance.lift_(elements.clone()) - elements, D)
    lift = LIFT * dense(elements, D).diagonal(dim1=-2, dim2=-1).mean(-1)
    assert_near(got.diagonal(dim1=-2, dim2=-1), lift[:, None].expand(-1, D), 1e-15)


@pytest.mark.parametrize("bad", [-1.0, 0.0, torch.nan])
def test_matrices_that_are_not_positive_definite_have_no_factor_and_the_others_keep_theirs(
    covariance, elements, factor, bad
):
    mixed = torch.cat([covariance.identity(1, D)[:1].double() * bad, elements])
    assert covariance.is_positive(mixed).tolist() == [False] + [True] * len(elements)
    got, exists = covariance.factor(mixed)
    assert exists.tolist() == [False] + [True] * len(elements)
    assert_near(got[1:], factor)


@pytest.mark.parametrize("name", ["full", "tied_full"])
def test_an_indefinite_matrix_with_a_positive_diagonal_has_no_factor(name):
    covariance = COVARIANCES[name]
    matrix = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    assert not covariance.is_positive(matrix).any()
    assert not covariance.factor(matrix)[1].any()


def test_a_factor_is_triangular_with_a_positive_diagonal(covariance, factor):
    assert covariance.is_factor(factor).all()
    for bad in (-factor, 0.0 * factor):
        assert not covariance.is_factor(bad).any()
    if factor.ndim == 3:
        assert not covariance.is_factor(factor.mT).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_constrained_undoes_unconstrained(covariance, factor, dtype, tolerance):
    factor = factor.to(dtype)
    free = covariance.unconstrained(factor)
    assert free.shape == factor.shape
    assert_near(covariance.constrained(free), factor, tolerance)
    assert_near(covariance.unconstrained(covariance.constrained(free)), free, tolerance)


def test_any_numbers_are_a_factor_and_as_many_of_them_matter_as_a_covariance_has(covariance, generator):
    free = torch.randn(3, *covariance.shape(D), generator=generator, dtype=torch.float64).requires_grad_()
    factor = covariance.constrained(10 * free)
    assert covariance.is_factor(factor).all()
    (gradient,) = torch.autograd.grad(covariance.square(factor).square().sum(), free)
    assert gradient.count_nonzero() == 3 * covariance.n_parameters(D)


def test_normals_have_the_means_and_covariances_that_they_are_made_from(covariance, elements, factor, x):
    normals = covariance.normals(x[:K], factor)
    oracle = torch.distributions.MultivariateNormal(x[:K], dense(elements, D).expand(K, -1, -1))
    assert (normals.batch_shape, normals.event_shape) == ((K,), (D,))
    assert torch.equal(normals.mean, x[:K])
    assert_near(normals.variance, oracle.variance)
    assert_near(normals.log_prob(x[:, None]), oracle.log_prob(x[:, None]))


def test_variances_are_the_diagonal(covariance, elements):
    assert_near(covariance.variances(elements).expand(-1, D), dense(elements, D).diagonal(dim1=-2, dim2=-1))


def test_block_and_condition_are_those_of_dense_matrices(family, covariance, elements):
    given, rest = torch.tensor([2, 0]), torch.tensor([1, 3])
    c = dense(elements, D)
    assert_near(dense(covariance.block(elements, given), 2), c[:, given[:, None], given])
    regression, element = covariance.condition(elements, given, rest)
    expected = c[:, rest[:, None], given] @ torch.linalg.inv(c[:, given[:, None], given])
    assert_near(regression, expected)
    assert_near(dense(element, 2), c[:, rest[:, None], rest] - expected @ c[:, given[:, None], rest])


def test_inner_is_the_trace_of_the_product(covariance, elements):
    other = elements.flip(0) + 0.1 * elements
    trace = (dense(elements, D) @ dense(other, D)).diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_near(covariance.inner(elements, other, D), trace)


@pytest.mark.parametrize("name", ["full", "tied_full"])
@pytest.mark.parametrize("d", [127, 128, 150])
def test_products_over_blocks_of_a_triangle_are_the_products_of_whole_matrices(name, d, generator):
    """Large matrices go by blocks; these are the dense sums."""
    covariance = COVARIANCES[name]
    elements = random_covariances(name, 2, d, generator)
    factor, exists = covariance.factor(elements)
    lower = torch.linalg.cholesky(elements)
    assert exists.all()
    assert (factor.tril(-1) == 0).all()
    assert_near(factor.mT @ lower, torch.eye(d).double().expand_as(lower), 1e-11)
    x, means = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (30, 2))
    r = torch.rand(2, 30, generator=generator, dtype=torch.float64)
    away = x - means[:, None]
    y = covariance.whiten(x, means, factor)
    assert_near(y, torch.linalg.solve_triangular(lower, away.mT, upper=False).mT, 1e-11)
    second = covariance.whitened_second(y, r)
    assert_near(second, covariance.pool((y * r[..., None]).mT @ y), 1e-12)
    _, back = covariance.unwhiten(factor, torch.einsum("kn,knd->kd", r, y), second)
    assert_near(back, covariance.pool((away * r[..., None]).mT @ away), 1e-10)


@pytest.mark.parametrize("d", [3, 130])
def test_the_gradient_of_a_root_is_that_of_the_inverse(d, generator):
    """The oracle is autograd through `torch.linalg.inv`; large matrices go by blocks where no gradient is asked for."""
    factor = torch.eye(d).double() + 0.01 * torch.randn(2, d, d, generator=generator).double()
    factor = factor.triu().requires_grad_()
    gradients = []
    for root in (COVARIANCES["full"].root(factor), torch.linalg.inv(factor.mT)):
        gradients += torch.autograd.grad(root.pow(3).sum(), factor)
    assert_near(gradients[0].triu(), gradients[1].triu(), 1e-10)
    with torch.no_grad():
        assert_near(COVARIANCES["full"].root(factor), torch.linalg.inv(factor.mT), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "tied_full"])
@pytest.mark.parametrize("cached", [1, 2**19])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_large_matrices_are_factorised_by_halves(name, cached, dtype, tolerance, generator, monkeypatch):
    """Also those of an odd size, and one at a time."""
    monkeypatch.setattr("tgmm_nn.triangular.CACHED", cached)
    elements = random_covariances(name, 3, 131, generator).to(dtype)
    factor, exists = COVARIANCES[name].factor(elements)
    assert exists.all()
    assert factor.dtype == dtype
    assert torch.equal(factor, factor.triu())
    assert_near(factor.mT @ torch.linalg.cholesky(elements), torch.eye(131).to(dtype).expand_as(elements), tolerance)


@torch.no_grad()
def test_factors_by_halves_are_as_accurate_as_lapacks_where_the_condition_is_high(generator):
    axes = torch.linalg.qr(torch.randn(256, 256, generator=generator).double())[0]
    matrix = (axes * torch.logspace(0, -10, 256).double()) @ axes.mT
    matrix = (matrix + matrix.mT) / 2
    factor, exists = COVARIANCES["full"].factor(matrix[None])
    assert exists.all()
    lower = torch.linalg.cholesky(matrix)
    oracle = torch.linalg.solve_triangular(lower, torch.eye(256).double(), upper=False)

    def error(inverse):
        return float(torch.linalg.matrix_norm(inverse @ matrix @ inverse.mT - torch.eye(256).double()))

    assert error(factor[0].mT) < 3 * error(oracle)


@torch.no_grad()
def test_a_large_matrix_alone_is_not_taken_apart(generator):
    covariance = COVARIANCES["full"]
    assert covariance.is_positive(torch.eye(800).double())
    assert not covariance.is_positive(-torch.eye(800).double())
    assert torch.equal(covariance.factor(torch.eye(800).double())[0], torch.eye(800).double())


@torch.no_grad()
@pytest.mark.parametrize("place", [0, 70, 139])
@pytest.mark.parametrize("bad", [-1.0, 0.0, torch.nan])
def test_a_large_matrix_that_is_not_positive_definite_has_no_factor_and_the_others_keep_theirs(place, bad, generator):
    elements = random_covariances("full", 3, 140, generator)
    expected, _ = COVARIANCES["full"].factor(elements)
    elements[1, place, place] = bad
    got, exists = COVARIANCES["full"].factor(elements)
    assert exists.tolist() == [True, False, True]
    assert torch.equal(got[::2], expected[::2])


def test_structures_are_frozen_and_equal_by_value(covariance):
    assert covariance == type(covariance)(tied=covariance.tied)
    with pytest.raises(AttributeError):
        covariance.tied = False
