"""The bank of rows: the newest, or a uniform sample of all, by brute force and by counting."""

import pytest
import torch
from scipy.stats import chisquare

from tgmm_nn.lightning.bank import Bank
from tgmm_nn.lightning.batch import Batch


def stream(sizes):
    """Rows numbered in the order in which they come, in steps of several sizes."""
    return torch.arange(sum(sizes), dtype=torch.float32)[:, None].split(sizes)


def filled(bank, steps, labels=None, seed=0, n_components=1):
    bank.begin(n_components, seed)
    for number, rows in enumerate(steps, start=1):
        bank.add(Batch.of(rows), number, None if labels is None else labels(rows))
    return bank.batch().rows.flatten().tolist()


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_a_bank_without_a_size_keeps_all_until_it_is_emptied(policy):
    bank = Bank(None, policy)
    assert filled(bank, stream([3, 0, 5])) == list(range(8))
    bank.clear()
    bank.add(Batch.of(torch.ones(2, 1)), 9)
    assert len(bank.batch().rows) == 2


@pytest.mark.parametrize("size", [1, 7, 10, 100])
def test_the_newest_rows_stay_in_the_order_in_which_they_came(size):
    sizes = [4, 1, 0, 9, 3, 3, 12, 2]
    assert filled(Bank(size), stream(sizes)) == list(range(34))[-size:]


def test_a_step_with_more_rows_than_the_bank_leaves_its_last():
    assert filled(Bank(5), stream([20])) == list(range(15, 20))


def test_a_reservoir_is_a_uniform_sample_of_all_that_came():
    """Every row, old or new, is kept as often as any other; and every pair of rows is."""
    n, size, trials = 12, 4, 3000
    counts, pairs = torch.zeros(n), torch.zeros(n, n)
    for seed in range(trials):
        kept = torch.tensor(filled(Bank(size, "reservoir"), stream([1, 5, 2, 4]), seed=seed)).long()
        assert len(kept.unique()) == size
        counts[kept] += 1
        pairs[kept[:, None], kept] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3
    together = pairs[torch.triu(torch.ones(n, n), 1) > 0]
    assert float(together.sum()) == trials * size * (size - 1) / 2
    assert chisquare(together.numpy()).pvalue > 1e-3


def test_a_reservoir_depends_on_seed_and_step_alone_and_touches_no_generator():
    before = torch.get_rng_state()
    assert filled(Bank(4, "reservoir"), stream([5, 5]), seed=3) == filled(Bank(4, "reservoir"), stream([5, 5]), seed=3)
    assert any(
        filled(Bank(4, "reservoir"), stream([5, 5]), seed=3) != filled(Bank(4, "reservoir"), stream([5, 5]), seed=seed)
        for seed in range(4, 9)
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_each_component_has_a_bank_of_its_own():
    """Component 1 is rare: a bank for all would forget it."""
    bank = Bank(6, per_component=True)
    kept = filled(bank, stream([10] * 5), labels=lambda rows: (rows[:, 0] % 25 == 0).long(), n_components=2)
    assert kept == [0.0, 25.0, 47.0, 48.0, 49.0]


def test_rows_that_are_not_finite_are_counted_and_take_no_place():
    rows = torch.tensor([[1.0], [torch.nan], [2.0], [torch.inf]])
    bank = Bank(3)
    assert filled(bank, [rows, rows]) == [2.0, 1.0, 2.0]
    assert bank.n_dropped == 4


def test_memory_stays_near_the_size():
    bank = Bank(80)
    bank.begin(1, 0)
    for step in range(200):
        bank.add(Batch.of(torch.zeros(4, 2)), step)
        assert sum(len(part.rows) for part in bank._parts) <= 90 + 4


@pytest.mark.parametrize("policy", ["fifo", "reservoir"])
def test_a_bank_goes_on_from_a_saved_one(policy):
    steps = stream([5, 5, 5, 5])
    whole, half, rest = Bank(8, policy), Bank(8, policy), Bank(8, policy)
    filled(whole, steps)
    filled(half, steps[:2])
    rest.begin(1, 0)
    rest.load_state_dict(half.state_dict(), torch.device("cpu"))
    for number, rows in enumerate(steps[2:], start=3):
        rest.add(Batch.of(rows), number)
    assert torch.equal(rest.batch().rows, whole.batch().rows)
    assert Bank(8).state_dict() == {}


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"size": 0}, ValueError, "`bank_size` to be at least 1, but got 0"),
        ({"size": 2.5}, TypeError, "`bank_size` to be an integer or None"),
        ({"policy": "lifo"}, ValueError, "`bank_policy` to be one of 'fifo', 'reservoir', but got 'lifo'"),
        ({"per_component": 1}, TypeError, "`bank_per_component` to be True or False"),
    ],
)
def test_bad_options_name_themselves(options, error, match):
    with pytest.raises(error, match=match):
        Bank(**options)


def test_a_bank_with_less_than_a_row_for_each_component_raises():
    with pytest.raises(ValueError, match="`bank_size` of at least 4, one row for each component, but got 3"):
        Bank(3, per_component=True).begin(4, 0)


def on_rank(monkeypatch, rank, n_ranks):
    monkeypatch.setattr("tgmm_nn.lightning.bank.this_rank", lambda: (rank, n_ranks))


def test_ranks_draw_each_their_own_numbers_for_a_reservoir(monkeypatch):
    keys = []
    for rank in (0, 1):
        on_rank(monkeypatch, rank, 2)
        bank = Bank(100, "reservoir")
        filled_parts = stream([5])
        bank.begin(1, 0)
        bank.add(Batch.of(filled_parts[0]), 1)
        keys.append(bank._parts[0].keys)
    assert not torch.equal(*keys)


def test_a_saved_bank_is_dealt_out_to_any_number_of_ranks(monkeypatch):
    bank = Bank(9)
    filled(bank, stream([5, 5]))
    saved, found = bank.state_dict(), []
    for rank in range(3):
        on_rank(monkeypatch, rank, 3)
        other = Bank(9)
        other.begin(1, 0)
        other.load_state_dict(saved, torch.device("cpu"))
        found += other._parts[0].rows.flatten().tolist()
    assert sorted(found) == list(range(1, 10))


def test_a_bank_of_components_may_go_on_as_one(monkeypatch):
    bank = Bank(12, per_component=True)
    filled(bank, stream([10, 10]), labels=lambda rows: (rows[:, 0] % 2).long(), n_components=2)
    other = Bank(5)
    other.begin(1, 0)
    other.load_state_dict(bank.state_dict(), torch.device("cpu"))
    assert other.batch().rows.flatten().tolist() == [15.0, 16.0, 17.0, 18.0, 19.0]
