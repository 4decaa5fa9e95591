"""Clustering metrics against brute force, in one piece, in batches and over ranks."""

from itertools import permutations

import pytest
import torch

from tgmm_nn.metrics import MatchedAccuracy


def brute_force(preds, target, n_clusters, n_classes):
    """Best accuracy over every one-to-one assignment of clusters to classes, padded with unmatched ones."""
    size = max(n_clusters, n_classes)
    maps = (torch.tensor(p) for p in permutations(range(size)))
    return max(float((m[preds] == target).float().mean()) for m in maps)


@pytest.mark.parametrize(("n_clusters", "n_classes"), [(3, 3), (5, 3), (2, 4), (1, 1)])
def test_matched_accuracy_is_the_best_over_all_matchings(n_clusters, n_classes, generator):
    preds = torch.randint(n_clusters, (60,), generator=generator)
    target = torch.randint(n_classes, (60,), generator=generator)
    got = MatchedAccuracy(n_clusters, n_classes)(preds, target)
    assert float(got) == pytest.approx(brute_force(preds, target, n_clusters, n_classes))


def test_batches_add_up_to_the_whole(generator):
    preds, target = torch.randint(4, (2, 50), generator=generator)
    whole, parts = MatchedAccuracy(4, 4), MatchedAccuracy(4, 4)
    whole.update(preds, target)
    for p, t in zip(preds.split(7), target.split(7), strict=True):
        parts.update(p, t)
    assert torch.equal(whole.contingency, parts.contingency)
    assert whole.compute() == parts.compute()


def test_a_relabelled_clustering_is_perfect_and_reset_forgets():
    metric = MatchedAccuracy(3, 3)
    assert metric(torch.tensor([2, 0, 1, 2]), torch.tensor([0, 1, 2, 0])) == 1
    metric.reset()
    assert torch.isnan(metric.contingency.sum() / metric.contingency.sum())


@pytest.mark.parametrize(
    ("preds", "target", "match"),
    [
        ([0, 1], [0], "`preds` and `target` of one shape"),
        ([0, 3], [0, 1], r"`preds` to hold integers in \[0, 3\), but got \[0, 3\]"),
        ([0, 1], [0, -1], r"`target` to hold integers in \[0, 2\)"),
        ([0.0, 1.0], [0, 1], "`preds` to hold integers"),
    ],
)
def test_bad_labels_raise_and_leave_the_table(preds, target, match):
    metric = MatchedAccuracy(3, 2)
    with pytest.raises(ValueError, match=match):
        metric.update(torch.tensor(preds), torch.tensor(target))
    assert int(metric.contingency.sum()) == 0


@pytest.mark.parametrize("options", [{"n_clusters": 0, "n_classes": 2}, {"n_clusters": 2, "n_classes": 0}])
def test_sizes_are_checked(options):
    with pytest.raises(ValueError, match="to be at least 1, but got 0"):
        MatchedAccuracy(**options)
