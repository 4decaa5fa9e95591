"""The algebra of sums: a vector space whose elements can be taken about any reference point."""

from functools import partial

import pytest
import torch
from oracles import assert_near, restrict

from tgmm_nn import GaussianMixture
from tgmm_nn.covariance import COVARIANCES
from tgmm_nn.statistics import Statistics

OFFSETS = pytest.mark.parametrize("offset", [0.0, 1e4], ids=["near zero", "far from zero"])
ORIGINS = pytest.mark.parametrize("per_component", [False, True], ids=["one origin", "an origin per component"])


def sums_of(x, r, family, origin):
    """Sum rows with given responsibilities, written out in float64."""
    centred = x.double()[:, None] - origin.double()
    r = r.double()
    return Statistics(
        count=r.sum(0),
        first=torch.einsum("nk,nkd->kd", r, centred.expand(-1, r.shape[1], -1)),
        second=restrict(torch.einsum("nk,nki,nkj->kij", r, *(centred.expand(-1, r.shape[1], -1),) * 2), family),
        log_likelihood=x.double().sum() * 0.1,
        classification=x.double().sum() * 0.3,
        rows=torch.tensor(float(len(x))).double(),
        skipped=torch.tensor(1.0).double(),
        origin=origin,
        covariance=COVARIANCES[family],
    )


@pytest.fixture
def data(generator):
    def draw(offset=0.0):
        x = torch.randn(200, 3, generator=generator) + offset
        return x, torch.rand(200, 4, generator=generator).softmax(-1)

    return draw


def origin_near(x, per_component, generator):
    """Draw a reference point as a mixture's mean would be one: near the data and in their dtype."""
    return x.mean(0) + torch.randn(*(4, 3) if per_component else (3,), generator=generator)


@pytest.mark.parametrize("cut", [1, 37, 199])
@OFFSETS
@ORIGINS
def test_statistics_of_the_parts_merge_into_those_of_the_whole(family, cut, offset, per_component, data, generator):
    """The law behind chunked, minibatch and distributed EM."""
    x, r = data(offset)
    sums = partial(sums_of, family=family, origin=origin_near(x, per_component, generator))
    whole, merged = sums(x, r), sums(x[:cut], r[:cut]).merge(sums(x[cut:], r[cut:]))
    assert_near(merged.sums()[:6], whole.sums()[:6])
    assert merged.skipped == 2


@OFFSETS
@pytest.mark.parametrize("theirs", [False, True], ids=["theirs one origin", "theirs per component"])
@pytest.mark.parametrize("ours", [False, True], ids=["ours one origin", "ours per component"])
def test_statistics_about_different_origins_merge_about_the_first(family, offset, ours, theirs, data, generator):
    x, r = data(offset)
    ours, theirs = origin_near(x, ours, generator), origin_near(x, theirs, generator)
    merged = sums_of(x[:37], r[:37], family, ours).merge(sums_of(x[37:], r[37:], family, theirs))
    assert merged.origin is ours
    assert_near(merged.sums()[:6], sums_of(x, r, family, ours).sums()[:6])


@ORIGINS
def test_about_is_the_sums_taken_there_and_back_again(family, per_component, data, generator):
    x, r = data()
    here, there = origin_near(x, False, generator), origin_near(x, per_component, generator)
    sums = sums_of(x, r, family, here)
    assert_near(sums.about(there).sums(), sums_of(x, r, family, there).sums())
    assert_near(sums.about(there).about(here).sums(), sums.sums())
    assert sums.about(here) is sums


@OFFSETS
def test_merge_is_commutative_and_associative(family, offset, data, generator):
    x, r = data(offset)
    a, b, c = (
        sums_of(x[part], r[part], family, origin_near(x, True, generator))
        for part in (slice(50), slice(50, 60), slice(60, None))
    )
    assert_near(a.merge(b).sums(), b.merge(a).about(a.origin).sums())
    assert_near(a.merge(b).merge(c).sums(), a.merge(b.merge(c)).sums())


def test_scale_is_linear(family, data, generator):
    x, r = data()
    a, b = (sums_of(x[part], r[part], family, origin_near(x, True, generator)) for part in (slice(50), slice(50, None)))
    assert_near(a.scale(2.0).sums(), a.merge(a).sums())
    assert_near(a.merge(b).scale(0.3).sums(), a.scale(0.3).merge(b.scale(0.3)).sums())
    assert_near(a.scale(torch.tensor(0.25)).sums(), a.scale(0.25).sums())
    assert all((s == 0).all() for s in a.scale(0.0).sums())


def test_scaling_does_not_depend_on_the_origin(family, data, generator):
    x, r = data()
    sums, there = sums_of(x, r, family, x[0]), origin_near(x, True, generator)
    assert_near(sums.about(there).scale(0.3).sums(), sums.scale(0.3).about(there).sums())


def test_unflatten_undoes_flatten(family, data):
    x, r = data()
    sums = sums_of(x, r, family, x[0])
    flat = sums.flatten()
    assert flat.ndim == 1
    assert flat.dtype == torch.float64
    again = sums.scale(0.0).unflatten(flat)
    for got, expected in zip(again.sums(), sums.sums(), strict=True):
        assert_near(got, expected)  # but for what rounding left unsymmetric
    assert torch.equal(again.flatten(), flat)
    assert (again.origin is sums.origin, again.covariance is sums.covariance) == (True, True)


def test_messages_of_two_ranks_add_up_to_the_sums_of_both(family, data):
    x, r = data()
    whole, a, b = (sums_of(x[p], r[p], family, x[0]) for p in (slice(None), slice(50), slice(50, None)))
    assert_near(a.unflatten(a.flatten() + b.flatten()).sums()[:6], whole.sums()[:6])


def test_weight_and_mean_log_likelihood_are_totals_per_row(family, data):
    x, r = data()
    sums = sums_of(x, r, family, x[0])
    assert_near(sums.weight(), r.double().sum())
    assert_near(sums.mean_log_likelihood(), sums.log_likelihood / r.double().sum())
    assert torch.isnan(sums.scale(0.0).mean_log_likelihood())


@pytest.mark.parametrize("other", ["diag", "spherical", "tied_full"])
def test_sums_of_another_structure_or_size_do_not_merge(other, generator):
    """Broadcasting would mix (K, d) into (K, d, d) in silence."""
    ours, theirs, more = (
        GaussianMixture(k, 2, name).statistics(torch.randn(5, 2, generator=generator))
        for k, name in ((3, "full"), (3, other), (4, "full"))
    )
    with pytest.raises(ValueError, match="take them from the same mixture"):
        ours.merge(theirs)
    with pytest.raises(ValueError, match=r"sums of shape \(3, 2\), but got .* with \(4, 2\)"):
        ours.merge(more)
    gmm = GaussianMixture(3, 2)
    for wrong in (theirs, more):
        with pytest.raises(ValueError, match="take them from the same mixture"):
            gmm.maximize(wrong)
    with pytest.raises(TypeError, match="`statistics` to be Statistics, but got Tensor"):
        gmm.maximize(torch.zeros(3, 2))
    assert not gmm.fitted_
