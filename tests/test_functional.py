"""Laws of the density, the E-step and the M-step, each against `torch.distributions`, autograd or sums written out."""

from functools import partial

import pytest
import torch
from oracles import assert_near, dense, distribution, joint, random_mixture, restrict

from tgmm_nn import functional
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.expectation import blockwise_statistics, expectation, moment_statistics, whitened_statistics
from tgmm_nn.forms import rows_of_moments, rows_per_chunk
from tgmm_nn.functional import Parameters
from tgmm_nn.maximization import maximize
from tgmm_nn.statistics import Statistics, hard_statistics, statistics_of

DTYPES = (torch.float32, torch.float64)
FORMS = pytest.mark.parametrize("moments", ["by shapes", "moments", "blocks", "blocks of moments"], indirect=True)


@pytest.fixture
def moments(request, monkeypatch):
    """Whether an E-step takes moments; full matrices by blocks of a feature each, as only wide ones are, if asked."""
    if "blocks" in request.param:
        monkeypatch.setattr("tgmm_nn.forms.WIDE", 1)
        monkeypatch.setattr("tgmm_nn.triangular.BLOCK", 1)
    return "moments" in request.param


@pytest.fixture(params=["whole", "by blocks"])
def matrices(request, monkeypatch):
    """Densities by whole matrices, and by blocks of a feature each, as only those of wide ones are."""
    if request.param == "by blocks":
        monkeypatch.setattr("tgmm_nn.forms.WIDE", 1)
        monkeypatch.setattr("tgmm_nn.triangular.BLOCK", 1)


def rows_of(mixture, n_rows, generator, dtype=torch.float64):
    """Draw rows near the components of a mixture."""
    means = mixture.parameters.means.double()
    k = torch.randint(len(means), (n_rows,), generator=generator)
    return (means[k] + torch.randn(n_rows, means.shape[1], generator=generator, dtype=torch.float64)).to(dtype)


def covariances_of(parameters, covariance):
    return covariance.square(covariance.root(parameters.factor))


def brute_force(x, mixture, family, sample_weight=None, log_prior=None):
    """Sum what the E-step promises about zero, in float64, row by row and by `torch.distributions`."""
    log_joint = joint(x.double(), *(p.double() for p in (*mixture.parameters[:2], mixture.covariances)))
    if log_prior is not None:
        log_joint = log_joint + log_prior
    weight = torch.ones(len(x)).double() if sample_weight is None else sample_weight.double()
    r = log_joint.softmax(-1) * weight[:, None]
    count, first, second = (
        torch.zeros(len(mixture.parameters.means), *s).double() for s in ((), x.shape[1:], x.shape[1:] * 2)
    )
    for row, share in zip(x.double(), r, strict=True):
        count += share
        first += share[:, None] * row
        second += share[:, None, None] * torch.outer(row, row)
    log_likelihood = (weight * log_joint.logsumexp(-1)).sum()
    classification = (weight * log_joint.amax(-1)).sum()
    return count, first, restrict(second, family), log_likelihood, classification


# ---------------------------------------------------------------------------------------------------- the density


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.usefixtures("matrices")
def test_log_joint_and_log_density_are_those_of_torch_distributions(family, dtype, tolerance, generator):
    mixture = random_mixture(family, generator, n_features=3, dtype=dtype)
    x = rows_of(mixture, 50, generator, dtype)
    oracle = tuple(p.double() for p in (*mixture.parameters[:2], mixture.covariances))
    got = functional.log_joint(x, mixture.parameters, mixture.covariance)
    assert got.dtype == dtype
    assert_near(got.double(), joint(x.double(), *oracle), tolerance)
    got = functional.log_density(x, mixture.parameters, mixture.covariance)
    assert_near(got.double(), distribution(*oracle).log_prob(x.double()), tolerance)


@pytest.mark.usefixtures("matrices")
def test_squared_distances_are_those_of_the_inverse_covariances(family, generator):
    mixture = random_mixture(family, generator, n_features=3)
    x = rows_of(mixture, 50, generator)
    away = x[:, None] - mixture.parameters.means
    precisions = dense(mixture.covariances, 3).inverse().expand(3, 3, 3)
    got = functional.squared_distances(x, mixture.parameters, mixture.covariance)
    assert_near(got, torch.einsum("nki,kij,nkj->nk", away, precisions, away), 1e-12)


@pytest.mark.usefixtures("matrices")
def test_log_density_has_the_first_and_second_derivatives_of_finite_differences(family, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 3, generator).requires_grad_()
    density = lambda x: functional.log_density(x, mixture.parameters, mixture.covariance)  # noqa: E731
    assert torch.autograd.gradcheck(density, x)
    assert torch.autograd.gradgradcheck(density, x)


@pytest.mark.usefixtures("matrices")
def test_log_density_of_far_points_is_finite(family, generator):
    """Densities that are exponentiated before their logarithm is taken are zero at 40 standard deviations."""
    mixture = random_mixture(family, generator, dtype=torch.float32)
    x = torch.tensor([[1e3, 0.0], [0.0, -1e6], [1e12, 1e12]]).requires_grad_()
    value = functional.log_density(x, mixture.parameters, mixture.covariance)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(x.grad).all()
    oracle = distribution(*(p.double() for p in (*mixture.parameters[:2], mixture.covariances))).log_prob(x.double())
    torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("matrices")
def test_log_density_is_minus_infinity_at_infinity_without_gradient_and_nan_at_nan(family, dtype, generator):
    mixture = random_mixture(family, generator, dtype=dtype)
    too_far = 1e30 if dtype == torch.float32 else 1e200  # its square is infinite
    x = [[0.5, 1.0], [torch.inf, 0.0], [-torch.inf, torch.inf], [too_far, 0.0], [torch.nan, torch.inf]]
    x = torch.tensor(x, dtype=dtype, requires_grad=True)
    value = functional.log_density(x, mixture.parameters, mixture.covariance)
    alone = functional.log_density(x[:1], mixture.parameters, mixture.covariance)
    assert value[1] == value[2] == value[3] == -torch.inf
    assert torch.isnan(value[4])
    (gradient,) = torch.autograd.grad(value[:4].sum(), x)
    assert_near(gradient[:1], torch.autograd.grad(alone.sum(), x)[0][:1])
    assert (gradient[1:4] == 0).all()


def test_the_reference_point_is_a_number_of_the_mixtures_dtype(family, generator):
    """So that float32 rows less this point are exact."""
    mixture = random_mixture(family, generator, dtype=torch.float32)
    x = rows_of(mixture, 20, generator, torch.float32)
    for form in (moment_statistics, partial(moment_statistics, dtype=torch.float64)):
        origin = form(x, mixture.parameters, mixture.covariance).origin
        assert torch.equal(origin.float().double(), origin.double())
        assert_near(origin.double(), mixture.parameters.weights.double() @ mixture.parameters.means.double(), 1e-6)


@pytest.mark.parametrize("n_features", [3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_whose_square_just_overflows_has_no_gradient_and_enters_no_sums(family, dtype, n_features, generator):
    """Its length is rounded, and so are sums of squares: whether these overflow can't be told from the length alone."""
    mixture = random_mixture(family, generator, n_features=n_features, dtype=dtype)
    parameters = mixture.parameters._replace(factor=mixture.covariance.identity(3, n_features).to(dtype))
    directions = torch.nn.functional.normalize(torch.randn(40, n_features, generator=generator, dtype=dtype))
    x = directions * torch.finfo(dtype).max ** 0.5 * torch.linspace(1 - 1e-6, 1 + 1e-6, 40, dtype=dtype)[:, None]
    x.requires_grad_()
    value = functional.log_density(x, parameters, mixture.covariance)
    value.sum().backward()
    assert (value == -torch.inf).all()
    assert (x.grad == 0).all()
    sums = moment_statistics(x.detach(), parameters, mixture.covariance)
    assert (sums.rows, sums.skipped) == (0, 40)
    assert all(torch.isfinite(values).all() for values in sums.sums())


def test_a_component_of_weight_zero_does_not_count(family, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 20, generator)
    without = mixture.parameters._replace(weights=torch.tensor([0.3, 0.7, 0.0]).double())
    elements = mixture.covariances if mixture.covariance.tied else mixture.covariances[:2]
    oracle = distribution(without.weights[:2], without.means[:2], elements).log_prob(x)
    assert_near(functional.log_density(x, without, mixture.covariance), oracle)
    for moments in (False, True):
        assert expectation(x, without, mixture.covariance, moments=moments).count[2] == 0


def test_densities_of_many_rows_are_formed_as_many_at_once_as_their_form_takes(family):
    """Those by moments hold K and F numbers a row, by blocks K times a block, and else K times d."""
    covariance = COVARIANCES[family]
    for d in (2, 127, 128, 512):
        means = torch.zeros(20, d)
        of = {dtype: functional.rows_of_densities(means.to(dtype), means, covariance) for dtype in DTYPES}
        whole = {dtype: rows_per_chunk(20 * d, dtype.itemsize) for dtype in DTYPES}
        blocks = {dtype: max(2 * d, rows_per_chunk(20 * 64, dtype.itemsize)) for dtype in DTYPES}
        moments = {**whole, torch.float32: rows_of_moments(means, covariance, torch.float64)}
        assert of == (moments if family != "full" else blocks if d >= 128 else whole)
        assert (
            functional.rows_of_densities(means, means, covariance, whitened=True)
            == (blocks if family == "full" and d >= 128 else whole)[torch.float32]
        )


def test_rows_mapped_in_chunks_equal_rows_mapped_at_once(family, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 20, generator)
    density = lambda rows: functional.log_density(rows, mixture.parameters, mixture.covariance)  # noqa: E731
    with torch.no_grad():
        chunks = functional.map_rows(density, x, mixture.parameters, 7)
    assert_near(chunks, density(x))


def test_with_a_gradient_each_chunk_is_formed_again_and_not_kept(family, generator):
    mixture = random_mixture(family, generator)
    x, formed = rows_of(mixture, 20, generator).requires_grad_(), []

    def density(rows):
        formed.append(len(rows))
        return functional.log_density(rows, mixture.parameters, mixture.covariance)

    value = functional.map_rows(density, x, mixture.parameters, 7)
    assert formed == [7, 7, 6]
    [gradient] = torch.autograd.grad(value.square().sum(), x, create_graph=True)
    assert sorted(formed) == sorted(2 * [7, 7, 6])
    at_once = functional.log_density(x, mixture.parameters, mixture.covariance)
    [oracle] = torch.autograd.grad(at_once.square().sum(), x, create_graph=True)
    assert_near(gradient, oracle)
    (second,), (expected,) = (torch.autograd.grad(g.square().sum(), x) for g in (gradient, oracle))
    assert_near(second, expected)


def test_chunks_have_a_gradient_under_function_transforms(family, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 20, generator)
    density = lambda rows: functional.log_density(rows, mixture.parameters, mixture.covariance)  # noqa: E731
    chunked = lambda rows: functional.map_rows(density, rows, mixture.parameters, 7).sum()  # noqa: E731
    assert_near(torch.func.grad(chunked)(x), torch.func.grad(lambda rows: density(rows).sum())(x))


# ----------------------------------------------------------------------------------------------------- the E-step


@pytest.mark.parametrize(
    "form", [whitened_statistics, moment_statistics, partial(moment_statistics, dtype=torch.float64)]
)
@pytest.mark.parametrize("extras", ["plain", "sample_weight", "log_prior", "both"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_all_forms_of_the_e_step_are_the_sums_written_out(family, form, extras, dtype, tolerance, generator):
    mixture = random_mixture(family, generator, n_features=3, dtype=dtype)
    x = rows_of(mixture, 60, generator, dtype)
    weight = torch.rand(60, generator=generator).to(dtype) if extras in ("sample_weight", "both") else None
    prior = torch.randn(60, 3, generator=generator).to(dtype) if extras in ("log_prior", "both") else None
    sums = form(x, mixture.parameters, mixture.covariance, weight, prior, chunk_size=23)
    assert sums.origin.shape == ((3, 3) if form is whitened_statistics else (3,))
    assert {s.dtype for s in sums.sums()} == {torch.float64}
    assert (sums.rows, sums.skipped) == (60, 0)
    sums = sums.about(torch.zeros(3))
    got = sums.sums()[:5]
    expected = brute_force(x, mixture, family, weight, prior)
    for value, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(value, oracle, rtol=tolerance, atol=tolerance * float(oracle.abs().max()))


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_blocks_of_features_have_the_sums_written_out(block, raw, dtype, tolerance, generator, monkeypatch):
    monkeypatch.setattr("tgmm_nn.triangular.BLOCK", block)
    mixture = random_mixture("full", generator, n_features=5, dtype=dtype)
    x = rows_of(mixture, 60, generator, dtype)
    weight, prior = torch.rand(60, generator=generator).to(dtype), torch.randn(60, 3, generator=generator).to(dtype)
    sums = blockwise_statistics(x, mixture.parameters, mixture.covariance, weight, prior, moments=raw, chunk_size=23)
    assert sums.origin.shape == ((5,) if raw else (3, 5))
    got = sums.about(torch.zeros(5)).sums()[:5]
    for value, oracle in zip(got, brute_force(x, mixture, "full", weight, prior), strict=True):
        torch.testing.assert_close(value, oracle, rtol=tolerance, atol=tolerance * float(oracle.abs().max()))


def test_few_rows_have_the_sums_of_many(family, generator, monkeypatch):
    """Few rows write their products whole, many write each product once."""
    mixture = random_mixture(family, generator, 4, 3)
    x = rows_of(mixture, 60, generator)
    few = expectation(x.float(), mixture.parameters, mixture.covariance)
    monkeypatch.setattr("tgmm_nn.expectation.SMALL", 0)
    assert_near(few.sums(), expectation(x.float(), mixture.parameters, mixture.covariance).sums())


def test_the_form_is_chosen_by_shapes_and_by_what_the_caller_says_of_conditioning(family, generator):
    """Whitened sums are about each component's own mean, moments about one point; float64 rows have no wider dtype."""
    full = family == "full"
    for n_components, n_features, whitened in (
        (3, 2, False),
        (3, 3, full),
        (33, 32, False),
        (34, 33, full),
        (3, 130, full),
    ):
        mixture = random_mixture(family, generator, n_components, n_features)
        x = rows_of(mixture, 10, generator)
        assert expectation(x.float(), mixture.parameters, mixture.covariance).origin.ndim == 1 + whitened
        assert expectation(x, mixture.parameters, mixture.covariance).origin.ndim == 2
        assert expectation(x, mixture.parameters, mixture.covariance, moments=True).origin.ndim == 1


@pytest.mark.parametrize(("spacing", "dtype"), [(30.0, torch.float32), (1000.0, torch.float32), (1e6, torch.float64)])
def test_the_density_of_components_far_apart_is_that_of_the_nearest(spacing, dtype, family, generator):
    """The difference to a far component's joint would carry the rounding of that joint, which is large."""
    mixture = random_mixture(family, generator, dtype=dtype)
    means = spacing * torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    parameters = mixture.parameters._replace(means=means)
    x = means.repeat(20, 1) + torch.randn(60, 2, generator=generator, dtype=torch.float64).to(dtype)
    oracle = distribution(parameters.weights.double(), means.double(), mixture.covariances.double())
    got = functional.log_density(x, parameters, mixture.covariance)
    rounding = spacing * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), oracle.log_prob(x.double()), rtol=0, atol=20 * rounding + 1e-5)


@pytest.mark.parametrize("n_features", [1, 2])
def test_joint_and_density_of_float32_rows_have_gradients(n_features, family, generator):
    mixture = random_mixture(family, generator, n_features=n_features)
    x, narrow = rows_of(mixture, 5, generator), mixture.parameters.to(torch.float32)
    for function in (functional.log_joint, functional.log_density):
        got = torch.func.jacrev(lambda rows: function(rows, narrow, mixture.covariance))(x.float())  # noqa: B023
        oracle = torch.func.jacrev(lambda rows: function(rows, mixture.parameters, mixture.covariance))(x)  # noqa: B023
        torch.testing.assert_close(got.double(), oracle, rtol=1e-4, atol=1e-4)


def test_a_component_narrower_than_float32_resolves_at_the_range_of_the_mixture_keeps_its_variance(family, generator):
    """At 0 with sd 3e-4, beside one at 1000: the reference point lies far from both, and rows are widened first."""
    if family.startswith("tied"):
        pytest.skip("one covariance has one width")
    mixture = random_mixture(family, generator)
    means = torch.tensor([[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0]])
    x = torch.cat([3e-4 * torch.randn(500, 2, generator=generator), means[1:].repeat(50, 1)])
    parameters = Parameters(torch.full((3,), 1 / 3), means, 1e4 * mixture.covariance.identity(3, 2))
    sums = expectation(x, parameters, mixture.covariance)
    new = maximize(sums, parameters.to(torch.float64), mixture.covariance)
    got = mixture.covariance.variances(covariances_of(new, mixture.covariance)[0])
    expected = x[:500].double().var(0, correction=0)
    torch.testing.assert_close(got, expected if len(got) == 2 else expected.mean()[None], rtol=3e-3, atol=0)


@FORMS
def test_an_integer_weight_is_as_many_equal_rows(family, moments, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 30, generator)
    times = torch.randint(0, 4, (30,), generator=generator)
    weighted = expectation(x, mixture.parameters, mixture.covariance, times.double(), moments=moments)
    repeated = expectation(x.repeat_interleave(times, 0), mixture.parameters, mixture.covariance, moments=moments)
    assert_near(weighted.sums()[:5], repeated.sums()[:5])


@FORMS
def test_a_log_prior_of_minus_infinity_forbids_a_component_and_forbidding_all_skips_the_row(family, moments, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 30, generator)
    prior = torch.zeros(30, 3).double()
    prior[:10, 1:] = -torch.inf
    prior[10:, 0] = -torch.inf
    prior[10] = -torch.inf
    sums = expectation(x, mixture.parameters, mixture.covariance, None, prior, moments=moments)
    rest = torch.cat([x[:10], x[11:]])
    oracle = expectation(
        rest, mixture.parameters, mixture.covariance, None, torch.cat([prior[:10], prior[11:]]), moments=moments
    )
    assert (sums.rows, sums.skipped) == (29, 1)
    assert_near(sums.count[0], torch.tensor(10.0).double())
    assert_near(sums.sums()[:5], oracle.sums()[:5])


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_not_finite_are_counted_and_contribute_nothing(family, moments, dtype, generator):
    mixture = random_mixture(family, generator, dtype=dtype)
    x = rows_of(mixture, 40, generator, dtype)
    too_far = 1e30 if dtype == torch.float32 else 1e200  # its square is infinite
    bad = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0], [-torch.inf, torch.inf], [0.0, too_far]], dtype=dtype)
    mixed = torch.cat([bad[:2], x[:15], bad[2:], x[15:]])
    sums = expectation(mixed, mixture.parameters, mixture.covariance, moments=moments)
    clean = expectation(x, mixture.parameters, mixture.covariance, moments=moments)
    assert (sums.rows, sums.skipped) == (40, 4)
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(sums.sums()[:5], clean.sums()[:5], rtol=tolerance, atol=10 * tolerance)


@FORMS
@pytest.mark.parametrize("weight", [torch.nan, torch.inf, -1.0])
def test_rows_of_invalid_weight_are_counted_and_contribute_nothing(family, moments, weight, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 10, generator)
    weights = torch.ones(10).double()
    weights[3] = weight
    sums = expectation(x, mixture.parameters, mixture.covariance, weights, moments=moments)
    clean = expectation(torch.cat([x[:3], x[4:]]), mixture.parameters, mixture.covariance, moments=moments)
    assert (sums.rows, sums.skipped) == (9, 1)
    assert_near(sums.sums()[:5], clean.sums()[:5])


@FORMS
@pytest.mark.parametrize("chunk_size", [1, 7])
def test_the_sums_do_not_depend_on_the_chunk_size(family, moments, chunk_size, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 30, generator)
    weight, prior = torch.rand(30, generator=generator).double(), torch.randn(30, 3, generator=generator).double()
    e_step = lambda size: expectation(  # noqa: E731
        x, mixture.parameters, mixture.covariance, weight, prior, moments=moments, chunk_size=size
    )
    assert_near(e_step(chunk_size)[:-1], e_step(None)[:-1])


@pytest.mark.parametrize("moments", ["by shapes", "blocks"], indirect=True)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_a_component_so_narrow_that_rows_overflow_in_its_units_leaves_their_sums_finite(chunk_size, moments, generator):
    """Its share of them is 0, and 0 · inf would be nan."""
    x = 1e18 * torch.randn(8, 2, generator=generator)
    factor = torch.stack([1e30 * torch.eye(2), 1e-18 * torch.eye(2)])
    parameters = Parameters(torch.full((2,), 0.5), torch.tensor([[-1e18, 0.0], [0.0, 0.0]]), factor)
    sums = expectation(x, parameters, COVARIANCES["full"], moments=moments, chunk_size=chunk_size)
    sums = sums.about(torch.zeros(2).double())
    assert sums.count.tolist() == [0.0, 8.0]
    wide = x.double()
    torch.testing.assert_close(sums.second[1], wide.mT @ wide, rtol=1e-5, atol=1e30)
    assert_near(sums.second[0], torch.zeros(2, 2).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_e_step_can_be_mapped_over_batches(family, dtype, generator):
    mixture = random_mixture(family, generator, n_features=3, dtype=dtype)
    x = torch.stack([rows_of(mixture, 9, generator, dtype) for _ in range(2)])

    def sums(rows):
        return expectation(rows, mixture.parameters, mixture.covariance).sums()

    with torch.no_grad():
        for got, *expected in zip(torch.func.vmap(sums)(x), sums(x[0]), sums(x[1]), strict=True):
            assert_near(got, torch.stack(expected), 1e-6)


@FORMS
def test_sums_of_no_rows_are_zero(family, moments, generator):
    mixture = random_mixture(family, generator)
    sums = expectation(torch.empty(0, 2).double(), mixture.parameters, mixture.covariance, moments=moments)
    assert all((s == 0).all() for s in sums.sums())
    assert torch.isnan(sums.mean_log_likelihood())


@FORMS
def test_the_e_step_and_the_m_step_need_no_value_on_the_host(family, moments, generator):
    """On a device that holds no values every look at one raises."""
    mixture = random_mixture(family, generator)
    parameters, x = Parameters(*(p.to("meta") for p in mixture.parameters)), torch.empty(30, 2, device="meta").double()
    sums = expectation(x, parameters, mixture.covariance, moments=moments, chunk_size=7)
    new = maximize(sums, parameters, mixture.covariance, 1e-3, reg_covar_relative=True)
    assert [p.shape for p in new] == [p.shape for p in mixture.parameters]
    assert functional.log_density(x, new, mixture.covariance).shape == (30,)


def test_hard_statistics_are_the_sums_of_each_group(family, generator):
    covariance = random_mixture(family, generator).covariance
    x, labels = torch.randn(40, 2, generator=generator).double(), torch.randint(3, (40,), generator=generator)
    origin = torch.randn(4, 2, generator=generator).double()
    sums = hard_statistics(x, labels, origin, covariance)
    groups = [x[labels == k] - origin[k] for k in range(4)]
    assert_near(sums.count, torch.tensor([float(len(g)) for g in groups]).double())
    assert_near(sums.first, torch.stack([g.sum(0) for g in groups]))
    assert_near(sums.second, restrict(torch.stack([g.mT @ g for g in groups]), family))
    assert (sums.rows, sums.skipped, sums.log_likelihood) == (40, 0, 0)


# ----------------------------------------------------------------------------------------------------- the M-step


@FORMS
def test_the_gradient_of_the_expected_log_likelihood_is_zero_at_the_m_step(family, moments, generator):
    """The oracle is autograd; the covariance is a symmetric element, so that each family's restriction holds."""
    mixture = random_mixture(family, generator, n_features=3)
    x = rows_of(mixture, 200, generator)
    r = joint(x, *mixture.parameters[:2], mixture.covariances).softmax(-1)
    sums = expectation(x, mixture.parameters, mixture.covariance, moments=moments)
    new = maximize(sums, mixture.parameters, mixture.covariance)
    free = [p.clone().requires_grad_() for p in (new.weights.log(), new.means, covariances_of(new, mixture.covariance))]

    def expected_log_likelihood(logits, means, covariances):
        return (r * joint(x, logits.softmax(-1), means, covariances)).sum() / len(x)

    value = expected_log_likelihood(*free)
    for gradient in torch.autograd.grad(value, free):
        assert gradient.abs().max() < 1e-12
    for scale in (-1e-2, 1e-2):  # a maximum, not only a stationary point
        moved = [p * (1 + scale) for p in free]
        assert expected_log_likelihood(*moved) < value


def test_maximize_returns_the_parameters_whose_expected_sums_it_gets(family, generator):
    mixture = random_mixture(family, generator)
    sums = statistics_of(*mixture.parameters[:2], mixture.covariances, mixture.covariance)
    other = random_mixture(family, generator).parameters
    new = maximize(sums.scale(7.0), other, mixture.covariance)
    assert_near(new, mixture.parameters)


def test_expected_sums_are_those_of_many_drawn_rows(family, generator):
    mixture = random_mixture(family, generator)
    sums = statistics_of(*mixture.parameters[:2], mixture.covariances, mixture.covariance)
    draws = distribution(*mixture.parameters[:2], mixture.covariances).sample((40_000,))
    drawn = expectation(draws, mixture.parameters, mixture.covariance).about(sums.origin).scale(1 / 40_000)
    torch.testing.assert_close(drawn.count, sums.count, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn.second, sums.second, rtol=0, atol=0.05)
    assert sums.weight() == pytest.approx(1.0, abs=1e-15)


@FORMS
def test_a_component_without_rows_keeps_its_mean_and_covariance_and_gets_no_weight(family, moments, generator):
    mixture = random_mixture(family, generator)
    old = mixture.parameters._replace(means=mixture.parameters.means.clone())
    old.means[1] = 1e4
    x = rows_of(mixture, 50, generator) % 3
    sums = expectation(x, old, mixture.covariance, moments=moments)
    new = maximize(sums, old, mixture.covariance)
    assert new.weights[1] == 0
    assert new.weights.sum() == pytest.approx(1.0, abs=1e-15)
    assert torch.equal(new.means[1], old.means[1])
    assert not torch.equal(new.means[0], old.means[0])
    assert torch.isfinite(new.factor).all()
    if not mixture.covariance.tied:
        assert torch.equal(new.factor[1], old.factor[1])


def test_without_any_row_nothing_changes(family, generator):
    mixture = random_mixture(family, generator)
    sums = expectation(torch.full((5, 2), torch.nan).double(), mixture.parameters, mixture.covariance)
    new = maximize(sums, mixture.parameters, mixture.covariance, reg_covar=1.0)
    for after, before in zip(new, mixture.parameters, strict=True):
        assert torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("data", ["one point", "a line", "a constant feature", "as many rows as components"])
def test_singular_covariances_without_regularisation_leave_the_mixture_finite(family, data, dtype, generator):
    mixture = random_mixture(family, generator, n_features=3, dtype=dtype)
    t = torch.randn(40, 1, generator=generator).to(dtype)
    x = {
        "one point": torch.full((40, 3), 0.3, dtype=dtype),
        "a line": t * torch.tensor([1.0, 2.0, -1.0], dtype=dtype),
        "a constant feature": torch.cat([t, t.square(), torch.ones_like(t)], -1),
        "as many rows as components": rows_of(mixture, 3, generator, dtype),
    }[data]
    parameters = mixture.parameters
    for _ in range(10):
        sums = expectation(x, parameters, mixture.covariance)
        assert sums.skipped == 0
        parameters = maximize(sums, parameters, mixture.covariance)
        assert all(torch.isfinite(p).all() for p in parameters)
        assert parameters.weights.sum() == pytest.approx(1.0, abs=1e-6)
    assert torch.isfinite(functional.log_density(x, parameters, mixture.covariance)).all()


@pytest.mark.parametrize("family", ["full", "tied_full"])
def test_a_covariance_without_factor_is_lifted_on_its_diagonal(family, generator):
    mixture = random_mixture(family, generator)
    singular = torch.tensor([[1.0, 1.0], [1.0, 1.0]]).double().expand_as(mixture.covariances).clone()
    sums = statistics_of(*mixture.parameters[:2], singular, mixture.covariance)
    new = maximize(sums, mixture.parameters, mixture.covariance)
    error = covariances_of(new, mixture.covariance) - singular
    torch.testing.assert_close(error, 1e-6 * torch.eye(2).double().expand_as(error), rtol=0, atol=1e-15)


def test_regularisation_is_added_to_the_diagonal_of_each_covariance(family, generator):
    mixture = random_mixture(family, generator)
    sums = statistics_of(*mixture.parameters[:2], mixture.covariances, mixture.covariance)
    new = maximize(sums, mixture.parameters, mixture.covariance, reg_covar=0.25)
    got = dense(covariances_of(new, mixture.covariance), 2) - dense(mixture.covariances, 2)
    assert_near(got, 0.25 * torch.eye(2).double().expand_as(got))


def test_relative_regularisation_is_a_fraction_of_the_mean_variance_of_the_data(family, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 100, generator)
    sums = expectation(x, mixture.parameters, mixture.covariance)
    plain = maximize(sums, mixture.parameters, mixture.covariance)
    ridged = maximize(sums, mixture.parameters, mixture.covariance, 0.1, reg_covar_relative=True)
    got = dense(covariances_of(ridged, mixture.covariance), 2) - dense(covariances_of(plain, mixture.covariance), 2)
    ridge = 0.1 * x.var(0, correction=0).mean()
    assert_near(got, ridge * torch.eye(2).double().expand_as(got))


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_with_relative_regularisation_other_units_change_nothing_but_units(family, scale, generator):
    mixture = random_mixture(family, generator)
    x = rows_of(mixture, 100, generator)

    def step(x, parameters):
        sums = expectation(x, parameters, mixture.covariance)
        return maximize(sums, parameters, mixture.covariance, 1e-2, reg_covar_relative=True)

    def rescaled(p):
        return Parameters(p.weights, p.means * scale, p.factor / scale)

    scaled = step(x * scale, rescaled(mixture.parameters))
    torch.testing.assert_close(scaled, rescaled(step(x, mixture.parameters)), rtol=1e-13, atol=0)


# --------------------------------------------------------------------------------------------- precision in float32


@FORMS
@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_a_float32_step_far_from_zero_agrees_with_float64(family, moments, offset, generator):
    mixture = random_mixture(family, generator, n_features=3, offset=offset, dtype=torch.float32)
    x = rows_of(mixture, 500, generator, torch.float32)

    def step(x, parameters):
        sums = expectation(x, parameters, mixture.covariance, moments=moments)
        return maximize(sums, parameters, mixture.covariance)

    got, oracle = step(x, mixture.parameters), step(x.double(), mixture.parameters.to(torch.float64))
    torch.testing.assert_close(got.weights.double(), oracle.weights, rtol=1e-5, atol=0)
    rounding = offset * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.means.double(), oracle.means, rtol=0, atol=rounding)
    covariances = covariances_of(got.to(torch.float64), mixture.covariance)
    expected = covariances_of(oracle, mixture.covariance)
    torch.testing.assert_close(covariances, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", [expectation, whitened_statistics, partial(moment_statistics, dtype=torch.float64)])
def test_forms_but_moments_in_float32_are_accurate_for_narrow_components_far_apart(form, family, generator):
    """Components of sd 0.01, 200 sd apart: sums about one common point would keep three digits of a variance."""
    mixture = random_mixture(family, generator, n_features=3)
    means = 2.0 * torch.eye(3).double()
    parameters = Parameters(mixture.parameters.weights, means, 100 * mixture.parameters.factor).to(torch.float32)
    x = (means.repeat(200, 1) + 0.01 * torch.randn(600, 3, generator=generator).double()).float()

    def step(x, parameters):
        return maximize(form(x, parameters, mixture.covariance), parameters, mixture.covariance)

    got, oracle = step(x, parameters).to(torch.float64), step(x.double(), parameters.to(torch.float64))
    torch.testing.assert_close(got.means, oracle.means, rtol=0, atol=2e-7)
    expected = covariances_of(oracle, mixture.covariance)
    torch.testing.assert_close(
        covariances_of(got, mixture.covariance), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def test_the_mean_of_a_mixture_is_that_of_its_distribution(family, generator):
    mixture = random_mixture(family, generator)
    oracle = distribution(*mixture.parameters[:2], mixture.covariances).mean
    assert_near(functional.mixture_mean(mixture.parameters), oracle)


def test_statistics_carry_the_structure_that_shaped_them(family, generator):
    mixture = random_mixture(family, generator)
    sums = expectation(rows_of(mixture, 5, generator), mixture.parameters, mixture.covariance)
    assert isinstance(sums, Statistics)
    assert sums.covariance == mixture.covariance
    assert sums.second.shape == mixture.covariances.shape


def test_without_float64_all_families_are_whitened_in_float32(family, generator, monkeypatch):
    """As on devices that have no float64."""
    for module in ("functional", "expectation", "statistics"):
        monkeypatch.setattr(f"tgmm_nn.{module}.accumulator_dtype", lambda device: torch.float32)
    mixture = random_mixture(family, generator, dtype=torch.float32)
    x = rows_of(mixture, 40, generator, torch.float32)
    sums = expectation(x, mixture.parameters, mixture.covariance)
    assert sums.origin.ndim == 2
    assert {s.dtype for s in sums.sums()} == {torch.float32}
    oracle = brute_force(x, mixture, family)
    for value, expected in zip(sums.about(torch.zeros(2)).sums()[:5], oracle, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    density = functional.log_density(x, mixture.parameters, mixture.covariance)
    assert_near(density.double(), distribution(*mixture.parameters[:2], mixture.covariances).log_prob(x).double(), 1e-5)
