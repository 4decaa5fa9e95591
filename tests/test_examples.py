"""Every example runs and says what it did, and so does every benchmark."""

import argparse
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import assert_same_buffers, copy_of_buffers

from tgmm_nn import GaussianMixture

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


# Examples with a test of what they show.
HELD = {"priors.py", "stream.py", "sampling_gallery.py"}
SCRIPTS = [script for script in sorted(ROOT.glob("examples/*.py")) if script.name not in HELD]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_example_runs_and_says_what_it_did(script, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) > 1


def run(name, capsys, monkeypatch, folder):
    """Run an example and return the lines that it prints."""
    monkeypatch.chdir(folder)
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_example_of_priors_shows_that_they_save_few_rows(capsys, monkeypatch, tmp_path):
    lines = run("priors.py", capsys, monkeypatch, tmp_path)
    scores = {re.split(r" {2,}", line)[0]: [float(n) for n in line.split()[-3:]] for line in lines[3:7]}
    (_, lost, at_the_floor), (_, wishart, wide), (_, both, _), (_, best, _) = scores.values()
    assert at_the_floor == pytest.approx(1e-3, rel=0.01)  # the root of reg_covar
    assert lost < -1000 < min(wishart, both) <= max(wishart, both) < best
    assert wide > 0.1


def test_the_example_of_a_stream_shows_which_share_follows_and_which_averages(capsys, monkeypatch, tmp_path):
    table = [[float(n) for n in line.split()[-2:]] for line in run("stream.py", capsys, monkeypatch, tmp_path)[3:8]]
    resting, moving = zip(*table, strict=True)
    assert min(resting) == resting[4]  # all batches alike
    assert min(moving) == moving[1]  # a constant share
    assert moving[4] == max(moving)


def test_the_gallery_of_samples_is_a_picture_of_shells_within_their_radii(capsys, monkeypatch, tmp_path):
    lines = run("sampling_gallery.py", capsys, monkeypatch, tmp_path)
    largest = [float(line.split()[-1]) for line in lines[1:6]]
    assert largest[2] <= 1.18  # half of a Gaussian in two dimensions: the root of 2 log 2
    assert largest[3] <= 2.2
    assert largest[4] > 3.0
    assert (tmp_path / "sampling_gallery.png").read_bytes().startswith(b"\x89PNG")


FIT = [str(ROOT / "examples" / "fit_distributed.py"), "shards"]
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
HOW = {"text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}}


def fitted(folder, *options, launcher=(), name="mixture.pt"):
    """Run the example to its end, and return the mixture of its checkpoint."""
    command = [sys.executable, *launcher, *FIT, "--checkpoint", name, *options]
    run = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=True, **HOW)
    assert f"{2 if launcher else 1} processes, 5 shards" in run.stdout
    return GaussianMixture.load(folder / name)


def killed(folder, iteration, *options, launcher=(), name="mixture.pt"):
    """Run the example until it has made an iteration, kill it, or one of its ranks, and return the exit status."""
    command = [sys.executable, *launcher, *FIT, "--checkpoint", name, *options]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **HOW) as run:
        for line in run.stdout:
            if line.startswith(f"iteration {iteration},"):
                ranks = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if launcher else [run.pid]
                os.kill(int(ranks[-1]), signal.SIGKILL)  # a launcher ends the others
                break
        run.stdout.read()
    return run.returncode


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the processes of a launcher")
def test_the_distributed_fit_is_one_mixture_on_any_number_of_processes_also_after_a_kill(tmp_path):
    """By hand on one process and on two, and in two trainers, of which one is killed."""
    options = ("--iterations", "30")
    one = fitted(tmp_path, *options, name="one.pt")
    assert int(one.n_updates) == 30
    assert killed(tmp_path, 2, *options) == -signal.SIGKILL
    assert 2 <= int(GaussianMixture.load(tmp_path / "mixture.pt").n_updates) < 30
    assert_same_buffers(fitted(tmp_path, *options), copy_of_buffers(one))
    assert killed(tmp_path, 2, *options, "--trainer", launcher=RANKS, name="trainers.pt") != 0
    assert 2 <= int(GaussianMixture.load(tmp_path / "trainers.pt").n_updates) < 30
    for name, way in {"two": (), "trainers": ("--trainer",)}.items():
        other = fitted(tmp_path, *options, *way, launcher=RANKS, name=f"{name}.pt")
        assert int(other.n_updates) == 30
        for buffer in ("weights_", "means_", "factor_", "running_count"):
            expected = getattr(one, buffer)
            torch.testing.assert_close(getattr(other, buffer), expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {buffer}")


def test_the_distributed_fit_does_not_go_on_from_another_mixture(tmp_path):
    np.save(tmp_path / "rows.npy", np.zeros((9, 4), np.float32))
    GaussianMixture(3, 4).save(tmp_path / "mixture.pt")
    command = [sys.executable, str(ROOT / "examples" / "fit_distributed.py"), ".", "--components", "5"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False, timeout=120, **HOW)
    assert run.returncode == 2
    assert "mixture.pt is a mixture of 3 components in 4 features" in run.stderr


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux tells of a process")
def test_the_benchmark_of_memory_says_what_a_fit_holds(tmp_path):
    script = str(ROOT / "examples" / "benchmarks" / "memory.py")
    small = ["--gigabytes", "0.01", "--features", "8", "--components", "2", "--folder", str(tmp_path)]
    run = subprocess.run([sys.executable, script, *small], capture_output=True, timeout=120, check=True, **HOW)
    held = re.findall(r"(fit, two iterations|score_samples|em_step): at most (\d+) MB more", run.stdout)
    assert len(held) == 3
    assert all(int(number) < 1024 for _, number in held)


def test_the_benchmark_of_the_main_experiment_runs_and_says_mean_and_spread(capsys, monkeypatch):
    quick = ["trainer.max_epochs=2", "em.start_epoch=1", "gmm.n_init=1"]
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
        row = script["digits_case"](2, ["em.mode=full", "em.step_size=null"], bare=bare)
        assert 0 < row["ms in the callback"] < row["ms per step"]
        assert "mode=full" in row["case"]
    encoder = script["resnet18"](128)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 128)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(11.2e6, rel=0.02)  # of the paper's ResNet-18


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples" / "benchmarks")
    yield importlib.import_module
    for name in ("em_speed", "em_libraries"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:EM did not converge")
def test_the_benchmark_of_speed_prints_its_tables_and_writes_its_files(benchmarks, monkeypatch, tmp_path, capsys):
    """With all measurements in this process; the next test starts one of its own."""
    script, libraries = benchmarks("em_speed"), benchmarks("em_libraries")
    started = []

    def measure(case, run, data, arguments):
        library, dtype = run.split()
        started.append(run)
        if library in ("tgmm", "product"):  # optional, and a product of 2048³
            raise RuntimeError("No module named 'tgmm'") if library == "tgmm" else RuntimeError("not here")
        with np.load(data) as arrays:
            return getattr(libraries.Bench(case, dtype, arrays, 1, 0.0, 1), library)()

    monkeypatch.setattr(script, "measure", measure)
    cases = ["full", "spherical", "diag, batch"]
    monkeypatch.setattr(
        sys, "argv", ["em_speed.py", "--quick", "--repeats", "1", "--out", str(tmp_path), "--cases", *cases]
    )
    script.main()
    out = capsys.readouterr().out
    assert started.count("tgmm float32") == 1  # what is absent once is not asked for again
    assert "full, tgmm float32: absent, No module named 'tgmm'" in out
    assert re.search(r"^full \(256, 16, 4\) +\d+\.\d .* [≥<] 7 .* [≥<] 1 ", out, re.MULTILINE)
    assert re.search(r"^diag, batch \(256, 16, 4\) +\d+ [≤>] 100 ", out, re.MULTILINE)
    assert "log-likelihood" not in out  # scikit-learn's and ours agree
    assert (tmp_path / "em_speed.png").stat().st_size > 0
    assert (tmp_path / "em_speed.csv").read_text().splitlines()[1].startswith("full,256,16,4,ours float32,")


def test_the_benchmark_of_speed_measures_in_a_process_without_openblas_variables(benchmarks, monkeypatch, tmp_path):
    script, libraries = benchmarks("em_speed"), benchmarks("em_libraries")
    environments, run = [], script.subprocess.run
    monkeypatch.setattr(script.subprocess, "run", lambda *a, **o: environments.append(o["env"]) or run(*a, **o))
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    case = libraries.Case(64, 2, 2, "diag")
    np.savez(tmp_path / "data.npz", **libraries.draw(case))
    arguments = argparse.Namespace(threads=1, quick=True)
    found = script.measure(case, "sklearn float64", tmp_path / "data.npz", arguments)
    assert found["iteration"] > 0
    with pytest.raises(RuntimeError, match="AttributeError"):
        script.measure(case, "nothing float64", tmp_path / "data.npz", arguments)
    assert [("OPENBLAS_NUM_THREADS" in e, e["OMP_NUM_THREADS"]) for e in environments] == [(False, "1")] * 2


def test_the_benchmark_of_scaling_prints_slopes_the_message_and_an_extrapolation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--quick", "--threads", "1"])
    runpy.run_path(str(ROOT / "examples" / "benchmarks" / "scaling.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert [len(re.findall(rf"-?\d\.\d\d in {size}", out)) for size in "NdK"] == [2, 2, 2]
    length = GaussianMixture(4, 8).running_statistics().flatten().numel()
    assert f" {length} " in out
    assert f"all-reduce of {8 * length:,} bytes" in out


def test_the_benchmark_of_restarts_scores_both_sides_alike():
    """One data set, of clusters far apart, where both find the same mixture."""
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "restarts.py"))
    options = Namespace(threads=torch.get_num_threads(), starts=2, tol=1e-3, seed=3, seeds=2, covariance_type="diag")
    found = {who: script["fit"](who, 0, 3, options) for who in script["WHO"]}
    (*ours, reached), (*theirs, wanted) = found.values()
    assert min(*ours, *theirs) > 0
    assert reached == pytest.approx(wanted, abs=1e-6)
    asked = []
    compare = script["compare"]
    compare.__globals__["apart"] = lambda _, who, *task: asked.append(task) or found[who]
    np.testing.assert_array_equal(compare(options, 7), [[*ours, *theirs, reached - wanted]] * 2)
    assert asked == [(7, 3), (7, 3), (7, 4), (7, 4)]
    for make in script["DATA"].values():
        assert make(np.random.default_rng(0)).shape == (20_000, 16)
