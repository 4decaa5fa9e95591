"""Every example runs, and every Python block of the README does."""

import re
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


@pytest.mark.parametrize("script", sorted(ROOT.glob("examples/*.py")), ids=lambda path: path.name)
def test_an_example_runs_and_says_what_it_did(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 1


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_of_the_readme_runs(number, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


def test_the_benchmark_of_the_main_experiment_runs_and_says_mean_and_spread(capsys, monkeypatch):
    quick = ["trainer.max_epochs=2", "callbacks.em.start_epoch=1"]
    monkeypatch.setattr(sys, "argv", ["digits_contrastive.py", "--seeds", "1", *quick])
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "digits_contrastive.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"seed 0: accuracy 0\.\d+  nmi 0\.\d+  ari 0\.\d+  \(\d+ s\)", lines[0])
    assert lines[1].split() == ["method", "accuracy", "nmi", "ari", "lowest", "accuracy"]
    assert re.match(r"mixture carried through training \(full\) +0\.\d+ ± 0\.\d+", lines[2])


@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_the_benchmark_of_the_callback_measures_a_share(capsys):
    """The default experiment for two epochs; of the large encoder only its shape, since a step takes seconds."""
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "callback_cost.py"))
    for bare in (False, True):
        row = script["digits_case"](2, ["callbacks.em.mode=full", "callbacks.em.step_size=null"], bare=bare)
        assert 0 < row["ms in the callback"] < row["ms per step"]
        assert "mode=full" in row["case"]
    encoder = script["resnet18"](128)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(11.2e6, rel=0.02)  # of the paper's ResNet-18


def test_the_commands_of_the_readme_are_those_of_ci():
    readme = (ROOT / "README.md").read_text()
    command = 'pip install -e ".[test]" && pytest'
    assert command in readme
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pip install -e . && python train.py" in readme


def test_the_benchmark_of_restarts_scores_both_sides_alike():
    """One data set, of clusters far apart, where both find the same mixture."""
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "restarts.py"))
    options = Namespace(threads=torch.get_num_threads(), starts=2, tol=1e-3, seed=0, covariance_type="diag")
    (*ours, reached), (*theirs, wanted) = (script["fit"](who, 0, options) for who in script["WHO"])
    assert min(*ours, *theirs) > 0
    assert reached == pytest.approx(wanted, abs=1e-6)
    for make in script["DATA"].values():
        assert make(np.random.default_rng(0)).shape == (20_000, 16)
