"""Every code block of the README, and of the pages beside it, runs, composes, or names what is there.

A block says by its language what it is, and a line of bash by its command; one that no test knows fails.
"""

import argparse
import ast
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hydra
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / ".github").glob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "text"}


class Block(NamedTuple):
    """A fenced block: where it stands, its language, and its lines."""

    place: str
    language: str
    code: str


def blocks_of(page):
    """Return the fenced blocks of a page."""
    text = page.read_text()
    fences = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(f"{page.name}:{text.count(chr(10), 0, f.start()) + 1}", f[1], f[2]) for f in fences]


BLOCKS = list(itertools.chain.from_iterable(map(blocks_of, PAGES)))


def blocks(language):
    """Return pytest's parameters for the blocks of one language."""
    return [pytest.param(block.code, id=block.place) for block in BLOCKS if block.language == language]


def commands_of(code):
    """Return the commands of a block of bash, each as a list of words; comments are left out."""
    for line in code.splitlines():
        for command in line.split("&&"):
            if words := shlex.split(command, comments=True):
                yield words


COMMANDS = [
    pytest.param(words, id=f"{block.place} {' '.join(words)}")
    for block in BLOCKS
    if block.language == "bash"
    for words in commands_of(block.code)
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec."),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {block.language for block in BLOCKS if block.place.startswith("README")} >= {"python", "bash"}
    for place, language, code in BLOCKS:
        assert language in LANGUAGES, f"{place}: no test knows blocks of {language or 'no language'!r}"
        assert code.strip(), place
    fences = sum(page.read_text().count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a fence that is not closed, or is indented"


@pytest.mark.parametrize("code", blocks("python"))
def test_a_python_block_runs_and_prints(code, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    prints = any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(ast.parse(code)))
    exec(compile(code, "README block", "exec"), {"__name__": "readme"})
    assert prints == bool(capsys.readouterr().out)


@pytest.mark.parametrize("code", blocks("yaml"))
def test_a_block_of_yaml_composes_as_the_config_of_an_app_and_builds(code, monkeypatch, tmp_path):
    """Beside nothing else: what it takes from the configs of the wheel it takes from there."""
    (tmp_path / "config.yaml").write_text(code)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose("config", return_hydra_config=True)
    OmegaConf.set_readonly(config.hydra, False)
    config.hydra.runtime.output_dir = str(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)  # what ${hydra:...} reads
    ours = [node for key, node in config.items() if key != "hydra" and OmegaConf.is_dict(node) and "_target_" in node]
    assert ours
    for node in ours:
        hydra.utils.instantiate(node, _convert_="all")


def check_train(words, monkeypatch, tmp_path):
    """Compose what the command composes; a sweep in each of its combinations."""
    overrides = [word for word in words if not word.startswith("-")]
    flags = [word for word in words if word.startswith("-")]
    assert set(flags) <= {"-m", "--cfg"}, f"no test knows the flags {flags}"
    if "--cfg" in flags:
        overrides.remove("job")
    choices = []
    for key, _, value in (override.partition("=") for override in overrides):
        assert value, f"expected KEY=VALUE, but got {key!r}"
        several = value.split(",") if "-m" in flags else [value]
        choices.append([f"{key}={one}" for one in several])
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for combination in itertools.product(*choices):
            config = compose("train", list(combination))
            for key, _, value in (override.partition("=") for override in combination):
                found = OmegaConf.select(config, key)
                assert OmegaConf.is_config(found) or found is None or found == yaml.safe_load(value)


class Parsed(Exception):
    """Stops a script where it has read its options; holds those that it passes on to Hydra."""


def check_example(words, monkeypatch, tmp_path):
    """Start the script with its options, stop it when they are parsed, and compose what it passes on."""
    script, *options = words
    parse_known = argparse.ArgumentParser.parse_known_args

    def parse(self, *args):
        raise Parsed(parse_known(self)[1])

    def parse_all(self, *args):
        rest = parse_known(self)[1]
        assert not rest, f"{script} does not know {rest}"
        raise Parsed([])

    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_all)
    monkeypatch.syspath_prepend((ROOT / script).parent)
    if "argparse" not in (ROOT / script).read_text():
        assert not options, f"{script} reads no options"
        return
    with pytest.raises(Parsed) as parsed:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    check_train(parsed.value.args[0], monkeypatch, tmp_path)


def check_python(words, monkeypatch, tmp_path):
    script, *rest = words
    if script == "train.py":
        check_train(rest, monkeypatch, tmp_path)
    else:
        check_example(words, monkeypatch, tmp_path)


def check_pip(words, monkeypatch, tmp_path):
    """Look the extras up in pyproject.toml."""
    *flags, what = words
    assert flags == ["install", "-e"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", what)
    assert extras, what
    table = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    known = set(re.findall(r"^(\w+) = ", table[1], re.MULTILINE))
    assert set(filter(None, (extras[1] or "").split(","))) <= known


def check_torchrun(words, monkeypatch, tmp_path):
    """Run it: in a folder of its own, each process on one thread."""
    processes, script, *options = words
    assert processes == "--nproc-per-node=2"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, str(ROOT / script), *options]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(r"^2 (ranks|processes)", run.stdout, re.MULTILINE)


def check_pytest(words, monkeypatch, tmp_path):
    """Paths, beside the number of workers."""
    if words[:1] == ["-n"]:
        assert words[1] == "auto"
        words = words[2:]
    assert all((ROOT / word).exists() for word in words)


def check_sphinx(words, monkeypatch, tmp_path):
    """Building is the business of test_api_pages.py, from the same folder."""
    warnings_are_errors, source, target = words
    assert warnings_are_errors == "-W"
    assert (ROOT / source / "conf.py").is_file()
    assert target.startswith("outputs/"), "not in .gitignore"


def check_ci(words, monkeypatch, tmp_path):
    assert all((ROOT / word).is_file() for word in words)


CHECKS = {
    "python": check_python,
    "pip": check_pip,
    "torchrun": check_torchrun,
    "pytest": check_pytest,
    "sphinx-build": check_sphinx,
    "bash": check_ci,
}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_a_bash_block_does_what_it_says(words, monkeypatch, tmp_path):
    program, *rest = words
    assert program in CHECKS, f"no test knows {program!r}"
    CHECKS[program](rest, monkeypatch, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_examples_that_a_page_names_exist(page):
    text, folder = page.read_text(), ROOT if page == PAGES[0] else page.parent
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or (folder / file).exists(), target
        assert file or anchor in anchors, target
    for script in re.findall(r"`(?:examples/)?(\w+\.py)`", text):
        assert any(ROOT.glob(script)) or any(ROOT.glob(f"examples/**/{script}")), script


def test_the_commands_of_the_readme_are_those_of_ci():
    readme = PAGES[0].read_text()
    command = 'pip install -e ".[test]" && pytest -n auto'
    assert command in readme
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "pip install -e . && python train.py" in readme
