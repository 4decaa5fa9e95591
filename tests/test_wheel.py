"""The wheel: what it ships, and that an app of a user's own composes our configs from it."""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = """
defaults:
  - prior: niw
  - gmm: default
  - em: accumulate
  - metrics: default
  - _self_

hydra:
  searchpath: [pkg://tgmm_nn.configs]
seed: 5
gmm:
  n_features: 3
em:
  embeddings: encoder
"""
APP = """
import hydra
import lightning
import torch
import tgmm_nn


class Mine(lightning.LightningModule):
    def __init__(self, gmm):
        super().__init__()
        self.encoder, self.gmm = torch.nn.Linear(5, 3), gmm

    def training_step(self, x, batch_idx):
        return self.encoder(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@hydra.main(version_base="1.3", config_path="conf", config_name="mine")
def main(cfg):
    gmm, *callbacks = (hydra.utils.instantiate(node, _convert_="all") for node in (cfg.gmm, cfg.em, cfg.metrics))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, callbacks=callbacks, **quiet)
    trainer.fit(Mine(gmm), torch.utils.data.DataLoader(torch.randn(64, 5), batch_size=16))
    print("from", tgmm_nn.__file__)
    print("mixture", gmm.n_components, gmm.n_features, gmm.fitted_, float(gmm.priors.mean_precision[0]))


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel as a user does; without a download where this environment has what builds it."""
    here = int(version("setuptools").split(".")[0]) >= 77
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("tgmm_nn", "configs"):
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".yaml", ".typed"):
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", *(["--no-build-isolation", "--no-index"] if here else [])]
    built = subprocess.run([*pip, "-w", folder, source], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_ships_every_module_every_config_and_its_types(wheel):
    shipped = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tgmm_nn").rglob("*.py")}
    configs = {f"tgmm_nn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert modules <= shipped
    assert configs <= shipped
    assert {"tgmm_nn/py.typed", "tgmm_nn/configs/__init__.py"} <= shipped
    assert not {name for name in shipped if name.startswith(("tests/", "examples/", "configs/"))}


@pytest.mark.slow
def test_an_app_elsewhere_composes_and_runs_our_configs_from_the_installed_wheel(wheel, tmp_path):
    """A fresh environment that sees the libraries of this one, but no project of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    into = ["--python", python, "install", "--no-deps", "--no-index", wheel]
    installed = subprocess.run([sys.executable, "-m", "pip", *into], capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    app = tmp_path / "app"
    (app / "conf").mkdir(parents=True)
    (app / "conf" / "mine.yaml").write_text(CONFIG)
    (app / "mine.py").write_text(APP)
    run = [python, "mine.py", "gmm.n_components=4", "prior.mean_precision=0.5"]
    done = subprocess.run(run, cwd=app, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"from {site / 'tgmm_nn' / '__init__.py'}" in done.stdout
    assert "mixture 4 3 True 0.5" in done.stdout
