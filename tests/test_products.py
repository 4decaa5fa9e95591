"""Products are the same by each library, and the choice between them is stated."""

import pytest
import torch
from oracles import random_mixture

from tgmm_nn import products
from tgmm_nn.expectation import moment_statistics
from tgmm_nn.functional import log_density


@pytest.fixture
def chosen(monkeypatch):
    """Return a function that chooses a library as a user does."""

    def choose(name):
        monkeypatch.setenv("TGMM_NN_PRODUCT", name)
        products.prefers_onednn.cache_clear()

    yield choose
    monkeypatch.undo()
    products.prefers_onednn.cache_clear()


@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize(
    ("m", "f", "n"), [(1, 1, 1), (3, 136, 64), (64, 200, 100), (16, 700, 100), (3, 4, 0), (3, 0, 4)]
)
def test_products_are_those_of_float64_also_of_transposed_views(library, m, f, n, chosen, generator):
    chosen(library)
    assert products.prefers_onednn() == (library == "onednn")
    a, b = (torch.randn(*s, generator=generator) for s in ((m, f), (f, n)))
    oracle = a.double() @ b.double()
    for right in (b, b.mT.contiguous().mT):
        torch.testing.assert_close(products.product(a, right).double(), oracle, rtol=0, atol=1e-4)
        torch.testing.assert_close(products.summed(a, right).double(), oracle, rtol=0, atol=1e-4)
    assert torch.equal(products.product(a.double(), b.double()), oracle)


@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("n", [1, 1023, 1024, 20_000])
@pytest.mark.parametrize(("m", "f"), [(3, 4), (64, 129)])
def test_sums_of_many_rows_keep_their_digits(library, n, m, f, chosen):
    """Of equal numbers, where rounding is always to the same side: row by row it was 3e-4."""
    chosen(library)
    a, b = torch.full((m, n), 0.7), torch.full((n, f), 0.7)
    for right in (b, b.mT.contiguous().mT):
        sums = products.summed(a, right)
        torch.testing.assert_close(sums.double(), a.double() @ b.double(), rtol=3e-5, atol=0)


@pytest.mark.parametrize(("m", "n", "f", "larger_first"), [(16, 700, 100, True), (64, 700, 100, False)])
def test_onednn_takes_the_larger_matrix_first_only_where_it_is_contiguous(m, n, f, larger_first, chosen, monkeypatch):
    """A factor that is no dense matrix would cost hundreds of times as much."""
    chosen("onednn")
    onednn, lengths = products._onednn, []

    def noted(a, b):
        assert a.is_contiguous()
        lengths.append(len(a))
        return onednn(a, b)

    monkeypatch.setattr(products, "_onednn", noted)
    a, b = torch.ones(m, n), torch.ones(n, f)
    for right in (b, b.mT.contiguous().mT):
        assert torch.equal(products.summed(a, right), torch.full((m, f), float(n)))
    assert lengths == [m, f if larger_first else m]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward derivatives
def test_a_product_that_is_derived_is_not_onednns_which_has_no_derivative(chosen, monkeypatch, generator):
    chosen("onednn")
    onednn, taken = products._onednn, []
    monkeypatch.setattr(products, "_onednn", lambda a, b: taken.append(len(a)) or onednn(a, b))
    a, b = (torch.randn(100, 100, generator=generator) for _ in range(2))
    products.product(a, b)
    assert taken == [100]
    direction = torch.ones(100, 100)
    for derived in (a, b):
        derived.requires_grad_()
        product = products.product(a, b)
        (gradient,) = torch.autograd.grad(product.sum(), derived)
        derived.requires_grad_(False)
        torch.testing.assert_close(
            gradient, direction @ b.mT if derived is a else a.mT @ direction, rtol=1e-4, atol=1e-4
        )
    _, along = torch.func.jvp(lambda a: products.product(a, b), (a,), (direction,))
    torch.testing.assert_close(along, direction @ b, rtol=1e-4, atol=1e-4)
    assert taken == [100]


def test_the_density_of_wide_rows_and_its_gradient_do_not_depend_on_the_library(chosen, generator):
    """Blocks of full matrices are products that oneDNN takes; for a gradient it is not asked."""
    mixture = random_mixture("full", generator, n_features=130)
    x, values = torch.randn(300, 130, generator=generator).float(), []
    oracle = log_density(x.double(), mixture.parameters, mixture.covariance)
    for library in ("mkl", "onednn"):
        chosen(library)
        value = log_density(x, mixture.parameters.to(torch.float32), mixture.covariance)
        torch.testing.assert_close(value.double(), oracle, rtol=1e-5, atol=0)
        rows = x.clone().requires_grad_()
        log_density(rows, mixture.parameters.to(torch.float32), mixture.covariance).sum().backward()
        values.append(rows.grad)
    assert torch.equal(*values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_covariance_keeps_its_digits_on_many_rows(dtype, generator):
    mixture = random_mixture("tied_full", generator)
    x = torch.randn(5_000, 2, generator=generator).to(dtype)
    weight = torch.rand(5_000, generator=generator).to(dtype)
    got, oracle = (
        moment_statistics(rows, mixture.parameters, mixture.covariance, weight.to(rows)) for rows in (x, x.double())
    )
    torch.testing.assert_close(got.second, oracle.second, rtol=1e-6, atol=1e-3)


def test_the_sums_of_an_e_step_do_not_depend_on_the_library(family, chosen, generator):
    mixture = random_mixture(family, generator, n_features=3, dtype=torch.float32)
    x, sums = torch.randn(100, 3, generator=generator), {}
    for library in ("mkl", "onednn"):
        chosen(library)
        sums[library] = moment_statistics(x, mixture.parameters, mixture.covariance, chunk_size=37).sums()
    for one, other in zip(*sums.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("capability", "amd", "onednn"), [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)]
)
def test_onednn_is_taken_on_amd_with_avx512_alone(capability, amd, onednn, chosen, monkeypatch):
    chosen("auto")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_is_amd", lambda: amd)
    assert products.prefers_onednn() == onednn


def test_an_unknown_library_raises(chosen):
    chosen("openblas")
    with pytest.raises(ValueError, match=r"TGMM_NN_PRODUCT to be one of 'auto', 'mkl', 'onednn', but got 'openblas'"):
        products.prefers_onednn()
