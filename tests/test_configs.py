"""Every YAML node that builds something of ours names each option of its constructor, with its default."""

import importlib
import inspect
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"

# Options whose config differs from the constructor on purpose: what a run decides.
DECIDED = {
    "n_components",
    "n_features",
    "random_state",
    "embeddings",
    "folder",
    "every_n_epochs",
    "start_epoch",
    "max_rows",
    "stage",
    "prefix",
    "components_per_class",
}


def nodes(value, path=""):
    """Yield every mapping with a ``_target_``."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, item in value.items():
            yield from nodes(item, f"{path}.{key}")


OURS = [
    pytest.param(node, id=f"{file.relative_to(CONFIGS)}{path}")
    for file in sorted(CONFIGS.rglob("*.yaml"))
    for path, node in nodes(yaml.safe_load(file.read_text()))
    if node["_target_"].startswith("tgmm_nn.")
]


@pytest.mark.parametrize("node", OURS)
def test_a_config_names_exactly_the_options_of_its_class_with_their_defaults(node):
    module, name = node["_target_"].rsplit(".", 1)
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    assert set(node) - {"_target_"} == set(parameters)
    for key, parameter in parameters.items():
        fixed = isinstance(node[key], (int, float, str, type(None))) and "${" not in str(node[key])
        if parameter.default is not inspect.Parameter.empty and fixed and key not in DECIDED:
            assert node[key] == parameter.default, key


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda f: str(f.relative_to(CONFIGS)))
def test_every_key_of_a_group_has_a_comment(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("#")
    if file.parent.name in ("experiment", "paths", "hydra"):
        return
    for number, line in enumerate(lines):
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", "-", "_target_")) and not stripped.endswith(":"):
            above = next(text.strip() for text in reversed(lines[:number]) if not text.strip().startswith("version"))
            assert "#" in line or above.startswith("#") or stripped.startswith("version"), f"{file.name}:{number + 1}"
