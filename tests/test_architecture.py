"""The house: imports run downwards, heavy libraries are imported where they are used, one class per idea."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tgmm_nn"
ORDER = (
    "checks",
    "distributed",
    "statistics",
    "structure",
    "monomials",
    "products",
    "triangular",
    "covariance",
    "schedules",
    "priors",
    "maximization",
    "assignment",
    "forms",
    "functional",
    "few",
    "expectation",
    "transport",
    "marginals",
    "data",
    "survey",
    "initialization",
    "sampling",
    "exchange",
    "fitting",
    "racing",
    "persistence",
    "density",
    "state",
    "steps",
    "learning",
    "trainable",
    "mixture",
    "class_starts",
    "classifier",
    "outliers",
    "plotting",
    "metrics",
    "lightning",
    "experiments",
)
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path):
    return str(path.relative_to(PACKAGE))


def layer_of(path):
    """Return the first name below the package: a module, or the folder that holds it."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_types_only(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes_of(tree):
    """Walk a syntax tree, but for what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not for_types_only(child):
            yield child
            yield from nodes_of(child)


def imported(path):
    """Return the layers that a file imports; what the package itself exports is the layer's that defines it."""
    for node in nodes_of(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: import from the package by its full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "tgmm_nn":
                module = rest.split(".")[0]
                yield module if module in ORDER else "mixture"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_every_file_has_a_place_in_the_order_and_imports_only_from_below(path):
    layer = layer_of(path)
    assert layer in ORDER
    above = {name for name in imported(path) if ORDER.index(name) > ORDER.index(layer)}
    assert not above
    if path.parent == PACKAGE:
        assert layer not in set(imported(path))


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, tgmm_nn; tgmm_nn.GaussianMixture(2, 2); "
        "print(*{'lightning', 'hydra', 'sklearn', 'matplotlib', 'torchmetrics'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == []


def test_the_workflow_tries_every_python_and_the_oldest_torch_that_the_project_admits():
    project, workflow = (ROOT / "pyproject.toml").read_text(), (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    first, end = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', project).groups()
    tried = yaml.safe_load(workflow)["jobs"]["test"]["strategy"]["matrix"]
    assert tried["python"] == [f"3.{minor}" for minor in range(int(first), int(end))]
    oldest = re.search(r'"torch>=([\d.]+)"', project)[1]
    assert tried["torch"] == [f"torch=={oldest}.0", "torch"]


def test_the_top_level_holds_these_entries_and_no_other():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    expected = {"pyproject.toml", "README.md", "tgmm_nn", "configs", "tests", "examples", "train.py"}
    assert top == expected


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "covariance.py"], ids=name_of)
def test_only_the_covariance_module_knows_families_by_name(path):
    """A new structure is one class: nothing else may branch on the name."""
    for node in nodes_of(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            compared = {ast.unparse(part).split(".")[-1] for part in (node.left, *node.comparators)}
            assert "covariance_type" not in compared, f"line {node.lineno} branches on the covariance type"
        if isinstance(node, ast.Match):
            assert "covariance_type" not in ast.unparse(node.subject), (
                f"line {node.lineno} branches on the covariance type"
            )
