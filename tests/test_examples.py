"""Every example runs, and every Python block of the README does."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
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


def test_the_commands_of_the_readme_are_those_of_ci():
    readme = (ROOT / "README.md").read_text()
    command = 'pip install -e ".[test]" && pytest'
    assert command in readme
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pip install -e . && python train.py" in readme
