"""Step sizes of minibatch EM."""

from itertools import pairwise

import pytest
import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.schedules import PolynomialDecay


@pytest.mark.parametrize("decay", [0.51, 0.6, 1.0])
@pytest.mark.parametrize("offset", [1.0, 2.5, 100.0])
def test_steps_are_the_power_law_and_fall_within_reach_of_em_step(decay, offset):
    schedule = PolynomialDecay(decay, offset)
    steps = [schedule(t) for t in range(50)]
    assert steps == [(t + offset) ** -decay for t in range(50)]
    assert all(0 < later < earlier <= 1 for earlier, later in pairwise(steps))


def test_a_counter_that_is_a_tensor_gives_the_step_as_one():
    schedule = PolynomialDecay()
    counter = torch.tensor([7])
    assert schedule(counter).shape == (1,)
    assert schedule(counter).item() == pytest.approx(schedule(7), rel=1e-6)


def test_decay_one_is_the_running_average(generator):
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    schedule, gmm = PolynomialDecay(decay=1.0, offset=1.0), GaussianMixture(1, 2, dtype=torch.float64)
    for t, batch in enumerate(x.split(20)):
        gmm.em_step(batch, step_size=schedule(t))
    torch.testing.assert_close(gmm.means_[0], x.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 0.5}, ValueError, "`decay` to be above 0.5 and at most 1, but got 0.5"),
        ({"decay": 1.1}, ValueError, "`decay` to be above 0.5 and at most 1, but got 1.1"),
        ({"decay": "fast"}, TypeError, "`decay` to be a number, but got 'fast'"),
        ({"offset": 0.5}, ValueError, "`offset` to be at least 1 and finite, but got 0.5"),
        ({"offset": None}, TypeError, "`offset` to be a number, but got None"),
    ],
)
def test_steps_that_would_not_converge_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        PolynomialDecay(**options)


def test_a_schedule_is_a_value():
    assert PolynomialDecay(0.7, 2.0) == PolynomialDecay(0.7, 2.0)
    with pytest.raises(AttributeError):
        PolynomialDecay().decay = 0.9
