"""Choosing the number of components: the criteria against data whose number is known."""

import csv
from types import SimpleNamespace

import pytest
import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments import choice as choosing
from tgmm_nn.experiments.choice import ComponentChoice, Trial
from tgmm_nn.plotting import save


@pytest.fixture
def blobs(generator):
    """400 rows of four components far apart in three dimensions."""
    centres = 8 * torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    return centres.repeat(100, 1) + torch.randn(400, 3, generator=generator)


HOW = {"n_init": 3, "max_iter": 300, "reg_covar": 1e-3, "reg_covar_relative": True}


def make(**options):
    return ComponentChoice(GaussianMixture(1, 2, **HOW), candidates=[3, 4, 5, 7], **options)


@pytest.mark.parametrize(
    ("criterion", "families"),
    [("bic", ["full"]), ("icl", ["full"]), ("heldout", ["full"]), ("bic", ["diag", "tied_full"])],
)
def test_each_criterion_finds_four_components_where_there_are_four(blobs, criterion, families):
    choice = make(criterion=criterion, families=families, n_seeds=3)
    trials = choice.trials(blobs, seed=0)
    assert len(trials) == len(families) * 4 * 3
    assert choice.best(trials).n_components == 4


@pytest.mark.parametrize("criterion", ["bic", "icl"])
def test_the_values_are_those_of_the_mixture_itself(blobs, criterion):
    trial = make(criterion=criterion, n_seeds=1).trials(blobs, seed=5)[1]
    gmm = GaussianMixture(4, 3, random_state=5, **HOW).fit(blobs)
    assert trial[:3] == ("full", 4, 5)
    assert trial.value == pytest.approx(getattr(gmm, criterion)(blobs), rel=1e-6)


def test_held_out_rows_are_not_fitted_and_differ_between_seeds(blobs):
    choice = make(criterion="heldout", test_size=0.25)
    parts = [choice._parts(blobs, seed) for seed in (0, 1)]
    for fitted, scored in parts:
        assert (len(fitted), len(scored)) == (300, 100)
        both = torch.cat([fitted, scored])
        assert torch.equal(both[both[:, 0].argsort()], blobs[blobs[:, 0].argsort()])
    assert not torch.equal(parts[0][1], parts[1][1])


def test_principal_axes_are_those_of_the_rows_that_are_fitted(blobs):
    """The oracle: axes do not move when only held-out rows do."""
    choice = make(criterion="heldout", n_principal=2)
    fitted, scored = choice._parts(blobs, 0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    moved = blobs.clone()
    moved[order[:80]] += torch.tensor([0.0, 0.0, 50.0])
    again, far = choice._parts(moved, 0)
    torch.testing.assert_close(again, fitted)
    assert (fitted.shape, scored.shape) == ((320, 2), (80, 2))
    assert not torch.allclose(far, scored)


@pytest.mark.parametrize(("criterion", "size", "value"), [("bic", 2, 1.0), ("icl", 2, 1.0), ("heldout", 3, 4.0)])
def test_of_several_seeds_the_smallest_counts_or_of_held_out_rows_the_mean(criterion, size, value):
    trials = [
        *(Trial("full", 2, seed, v, True) for seed, v in enumerate([1.0, 6.0])),  # mean 3.5
        *(Trial("full", 3, seed, v, True) for seed, v in enumerate([3.0, 5.0])),
    ]
    best = make(criterion=criterion).best(trials)
    assert (best.n_components, best.value) == (size, value)


def test_a_report_writes_every_fit_draws_a_panel_for_each_family_and_marks_the_best(
    blobs, tmp_path, capsys, monkeypatch
):
    drawn = []

    def keep(ax, file):
        for panel in ax.figure.axes:
            stars = sum(line.get_marker() == "*" for line in panel.lines)
            drawn.append((panel.get_title().split("\n")[0], stars))
        save(ax, file)

    monkeypatch.setattr(choosing, "save", keep)
    wide = torch.cat([blobs, 0.01 * torch.randn(400, 5)], -1)  # what principal components drop
    data = SimpleNamespace(sample=lambda max_rows: (wide, None))
    choice = make(families=["full", "spherical"], n_seeds=1, n_principal=3)
    rows = choice.report(data, tmp_path, seed=0)
    assert [row["method"] for row in rows] == [
        f"{k} components, {f}" for f in ("full", "spherical") for k in (3, 4, 5, 7)
    ]
    assert [row["n_components"] for row in rows] == [3, 4, 5, 7] * 2
    [chosen] = [row for row in rows if row["chosen"]]
    assert chosen["method"] == "4 components, spherical"  # the simpler family, of which the data are
    assert chosen["bic"] == min(row["bic"] for row in rows)
    with (tmp_path / "criterion.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 8
    assert min(table, key=lambda row: float(row["bic"]))["family"] == "spherical"
    assert {row["converged"] for row in table} == {"1"}
    assert (tmp_path / "criterion.png").stat().st_size > 5000
    assert drawn == [("full", 0), ("spherical, chosen", 1)]
    assert "Chosen by BIC on 400 rows of 3 features: 4 components, spherical." in capsys.readouterr().out


def test_a_choice_at_the_end_of_the_candidates_says_so(blobs, tmp_path, capsys):
    data = SimpleNamespace(sample=lambda max_rows: (blobs, None))
    ComponentChoice(GaussianMixture(1, 1), candidates=[1, 2], n_seeds=1).report(data, tmp_path, seed=0)
    assert "2 components, full; it is the largest that was tried." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"candidates": []}, TypeError, "`candidates` to be a list of at least one value"),
        ({"candidates": 5}, TypeError, "`candidates` to be a list of at least one value, but got 5"),
        ({"candidates": [0]}, ValueError, "`candidates` to be at least 1, but got 0"),
        ({"families": "full"}, TypeError, "`families` to be a list of at least one value, but got 'full'"),
        ({"families": ["ful"]}, ValueError, "`families` to be one of 'full', .* but got 'ful'"),
        ({"criterion": "aicc"}, ValueError, "`criterion` to be one of 'bic', 'icl', 'heldout', but got 'aicc'"),
        ({"n_seeds": 0}, ValueError, "`n_seeds` to be at least 1"),
        ({"test_size": 1.0}, ValueError, "`test_size`"),
        ({"n_principal": 0}, ValueError, "`n_principal` to be at least 1"),
        ({"max_rows": 0}, ValueError, "`max_rows` to be at least 1"),
    ],
)
def test_a_bad_option_of_the_choice_names_itself(options, error, match):
    with pytest.raises(error, match=match):
        ComponentChoice(GaussianMixture(1, 2), **options)


def test_more_components_than_rows_to_fit_raise():
    with pytest.raises(ValueError, match="`candidates` of at most 8, the rows to fit, but got 9"):
        ComponentChoice(GaussianMixture(1, 2), candidates=[9], criterion="heldout").trials(torch.randn(10, 2), seed=0)
