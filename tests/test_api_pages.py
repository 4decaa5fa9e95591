"""The API pages build without a warning, show formulas, and have an entry for whatever is public."""

import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / ".ci" / "docs"
MODULES = re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in sorted(SOURCES.glob("*.rst"))))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Build the pages as the README says, a warning being an error."""
    pytest.importorskip("sphinx", reason="pip install -e .[docs]")
    folder = tmp_path_factory.mktemp("api")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(SOURCES), str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def entries(pages):
    """Return the dotted names that the pages describe."""
    _, packed = (pages / "objects.inv").read_bytes().split(b"using zlib.\n", maxsplit=1)
    lines = zlib.decompress(packed).decode().splitlines()
    return {line.split()[0] for line in lines if line.split()[1].startswith("py:")}


def test_every_public_class_and_function_has_an_entry(entries):
    for module in map(importlib.import_module, MODULES):
        public = [name for name in getattr(module, "__all__", ()) if callable(getattr(module, name))]
        assert {f"{module.__name__}.{name}" for name in public} <= entries


def test_every_class_that_a_config_builds_has_an_entry(entries):
    targets = {
        target
        for file in ROOT.glob("configs/**/*.yaml")
        for target in re.findall(r"_target_: (tgmm_nn\.\S+)", file.read_text())
    }
    assert targets
    assert targets <= entries


def test_a_class_shows_what_it_inherits_and_names_keep_their_underscore(entries):
    inherited = {"fit", "em_step", "forward", "sample", "weights_", "covariances_", "history_"}
    assert {f"tgmm_nn.GaussianMixture.{name}" for name in inherited} <= entries
    assert "tgmm_nn.GaussianMixture.state_dict" not in entries  # what every module has is torch's to tell


def test_formulas_are_mathematics_and_no_markup_is_left(pages):
    html = (pages / "mixtures.html").read_text()
    assert r"\[p(x) = \sum_{k=1}^K \pi_k N(x; \mu_k, \Sigma_k)\]" in html
    assert "mathjax" in html
    for page in pages.glob("*.html"):
        left = re.findall(r":math:|\.\. math::|``", re.sub(r"<[^>]+>", "", page.read_text()))
        assert not left, page.name
