"""The configs: every option of our classes with its default; every file composes and builds; one word is enough."""

import copy
import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

import tgmm_nn.experiments
import tgmm_nn.lightning
from tgmm_nn import GaussianMixture, covariance
from tgmm_nn.experiments.errors import explain
from tgmm_nn.experiments.options import KEYS, KEYS_OF, build, check_keys, printable

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
OPTIONS = sorted(
    (file.parent.name, file.stem)
    for file in CONFIGS.glob("*/*.yaml")
    if file.parent.name not in ("experiment", "hparams_search", "debug", "hydra")
)
EXPERIMENTS = sorted(file.stem for file in CONFIGS.glob("experiment/*.yaml"))
PRESETS = sorted(file.stem for file in CONFIGS.glob("em/*.yaml"))
# What some options need beside them.
NEEDS = {
    ("model", "generative_classifier"): ["gmm=classifier"],
    ("model", "outliers"): ["gmm=classifier"],
}

# Values that a run decides, and that therefore differ from the constructor's defaults.
DECIDED = {
    *("n_components", "n_features", "random_state", "embeddings", "folder", "max_rows", "stage", "prefix"),
    "every_n_epochs",  # of pictures
}
# Public classes that no config builds, and why.
NOT_BUILT = {
    "TrainableGaussianMixture": "is made from a mixture that EM has started, by `to_parameters`",
    "OutlierScore": "is calibrated on a model after training",
    "Statistics": "is made by an E-step",
    "Embeddings": "is made by the callbacks, from their options",
    "Rescale": "has no options",
    "RandomAffine": "is what `augmentation_of` makes of images",
    "FeatureNoise": "is what `augmentation_of` makes of other rows",
    "RowsDataModule": "is what the data modules share",
    "ArraysDataModule": "is what the data modules of a user's arrays share",
    "Table": "is made by the data modules",
    "Scaling": "is made by the data modules",
    "Summary": "is made by a table",
    "Trial": "is made by a choice of components",
    "Rows": "is made by the data modules",
    "NeighbourPairs": "is made by the data modules",
    "SweepTable": "is Hydra's: configs/hydra",
}


@pytest.fixture(autouse=True)
def _hydra(tmp_path):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def composed(*overrides):
    """Compose the main config, once for the same overrides."""
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides):
    return compose("train", ["paths.output_dir=out", *overrides])


def composed_option(group, option):
    """Compose one option of a group, without an experiment."""
    return composed("~experiment", *NEEDS.get((group, option), []), f"{group}={option}")


def nodes(value, path=""):
    """Yield every mapping with a ``_target_`` of ours."""
    if isinstance(value, dict):
        if str(value.get("_target_")).startswith("tgmm_nn."):
            yield path, value
        for key, item in value.items():
            yield from nodes(item, f"{path}.{key}")


def target(node):
    module, name = node["_target_"].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def public_classes():
    """Return what the package, its callbacks and its experiments offer; the metrics are made by their callback."""
    names = [f"tgmm_nn.experiments.{info.name}" for info in pkgutil.iter_modules(tgmm_nn.experiments.__path__)]
    modules = [tgmm_nn, tgmm_nn.lightning, *map(importlib.import_module, names)]
    offered = [getattr(module, name) for module in modules for name in module.__all__]
    return {item.__name__ for item in offered if inspect.isclass(item)}


# -------------------------------------------------------------------------------------------------------- signatures


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_a_node_of_ours_names_exactly_the_options_of_its_class_with_their_defaults(group, option):
    """What a preset changes is what its own file says; all else is the constructor's."""
    cfg = OmegaConf.to_container(composed_option(group, option)[group], resolve=False)
    said = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text()) or {}
    changed = set() if "_target_" in said or "defaults" not in said else set(said)
    for path, node in nodes(cfg):
        parameters = inspect.signature(target(node)).parameters
        assert set(node) - {"_target_"} == set(parameters), path
        for key, parameter in parameters.items():
            fixed = isinstance(node[key], (int, float, str, type(None))) and "${" not in str(node[key])
            if parameter.default is not inspect.Parameter.empty and fixed and key not in DECIDED | changed:
                assert node[key] == parameter.default, f"{path}.{key}"


def test_every_public_class_is_built_by_a_config_or_says_why_not():
    built = set()
    for group, option in OPTIONS:
        cfg = OmegaConf.to_container(composed_option(group, option)[group], resolve=False)
        built |= {target(node).__name__ for _, node in nodes(cfg)}
    public = public_classes()
    assert public - set(NOT_BUILT) == built & public
    assert set(NOT_BUILT) <= public
    assert all(NOT_BUILT.values())


def test_the_keys_that_are_known_are_those_of_the_main_config():
    cfg = composed()
    assert set(KEYS) == set(cfg)
    assert all(set(known) == set(cfg[group]) for group, known in KEYS_OF.items())


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_every_file_says_what_it_is_for_and_every_key_of_a_group_has_a_comment(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("#")
    assert lines[0] != "# @package _global_" or lines[1].startswith("#")
    if file.parent.name in ("experiment", "paths", "debug", "hparams_search"):
        return
    body = [line for line in lines if not line.strip().startswith("- ")]
    for number, line in enumerate(body):
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", "_target_", "version", "{}")) and not stripped.endswith(":"):
            above = [text.strip() for text in body[:number] if text.strip()][-1]
            preset = "defaults:" in lines  # its first lines say what its keys do
            assert "#" in line or above.startswith("#") or preset or "dir:" in line, f"{file.name}: {line}"


# ----------------------------------------------------------------------------------------------- composing and building


@pytest.mark.parametrize(("group", "option"), OPTIONS)
@pytest.mark.filterwarnings("ignore:.*GPU available but not used")
def test_every_option_of_every_group_composes_and_builds(group, option, tmp_path):
    np.save(tmp_path / "rows.npy", np.eye(3))
    np.savez(tmp_path / "rows.npz", x=np.eye(3))
    cfg = composed_option(group, option)
    cfg.paths.output_dir = str(tmp_path)
    if option in ("npz", "npy_folder"):
        cfg.data.path = str(tmp_path / "rows.npz" if option == "npz" else tmp_path)
    check_keys(cfg)
    nodes = cfg[group].values() if group in ("callbacks", "logger") else [cfg[group]]
    try:
        built = [build(node, **({"logger": False} if group == "trainer" else {})) for node in nodes]
    except InstantiationException as error:  # where the machine lacks what it takes
        said = explain(error)
        lacks_gpu = (group, option) == ("trainer", "gpu") and not torch.cuda.is_available()
        expected = "No supported gpu" if lacks_gpu else f"package `{option}` for logger={option}"
        assert expected in said
        assert lacks_gpu or option in ("wandb", "tensorboard")
    else:
        assert all(value is None for value in built) == (option in ("off", "none") and group != "prior")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_one_word_changes_how_em_runs_in_every_experiment(experiment, preset):
    """An experiment chooses a preset by name and sets nothing that another preset would refuse or misread."""
    said = yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())
    em = OmegaConf.merge(composed_option("em", preset).em, said.get("em", {}))  # an experiment comes behind its groups
    own = yaml.safe_load((CONFIGS / "em" / f"{preset}.yaml").read_text())
    kept = {key: value for key, value in own.items() if key not in ("defaults", "start_epoch", *(DECIDED | {"init"}))}
    if preset != "default":
        assert {key: em[key] for key in kept} == kept
    assert (build(em) is None) == (preset == "off")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_debug_and_words_that_switch_off_beat_the_experiment_and_every_experiment_builds(experiment):
    cfg = composed(f"experiment={experiment}", "debug=fast", "em=off", "metrics=none", "callbacks=none", "logger=none")
    check_keys(cfg)
    assert build(cfg.em) is build(cfg.metrics) is None
    assert not cfg.callbacks
    assert not cfg.logger
    assert (cfg.trainer.max_epochs, cfg.trainer.limit_train_batches, cfg.gmm.n_init) == (2, 3, 1)
    assert cfg.name == experiment
    model = build(cfg.model)
    parts = model.modules() if isinstance(model, torch.nn.Module) else [model.gmm]  # a choice trains no network
    mixtures = [m for m in parts if isinstance(m, GaussianMixture)]
    assert len(mixtures) == 1
    assert mixtures[0].n_features == cfg.gmm.n_features


def test_a_profile_is_of_a_few_epochs_in_which_em_runs():
    cfg = composed("debug=profile")
    assert (cfg.trainer.max_epochs, cfg.trainer.profiler, cfg.em.start_epoch) == (5, "simple", 0)


PRIORS = {
    "none": {},
    "dirichlet": {"weight_concentration_prior": 2.0},
    "sparse": {"weight_concentration_prior": 0.5},
    "niw": {
        "mean_prior": 0.0,
        "mean_precision_prior": 0.01,
        "covariance_prior": 0.1,
        "degrees_of_freedom_prior": 10.0,  # as many as features
    },
}


def test_every_prior_is_tested():
    assert {file.stem for file in CONFIGS.glob("prior/*.yaml")} == set(PRIORS)


@pytest.mark.parametrize("gmm", ["default", "classifier"])
@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_is_one_word_away_in_all_families_and_for_classifiers(prior, gmm):
    data = "digits" if gmm == "default" else "digits_labelled"
    cfg = composed("~experiment", f"data={data}", f"gmm={gmm}", f"prior={prior}")
    for family in covariance.COVARIANCES:
        cfg.gmm.covariance_type = family
        model = build(cfg.gmm)
        mixture = model.mixture if gmm == "classifier" else model
        by_hand = GaussianMixture(mixture.n_components, 10, family, **PRIORS[prior])
        for part, expected in zip(mixture.priors, by_hand.priors, strict=True):
            assert (part is None) == (expected is None)
            if part is not None:
                torch.testing.assert_close(part, expected)
        assert (prior == "none") == all(part is None for part in mixture.priors)


def test_companions_look_at_what_em_looks_at():
    cfg = composed("em.channel_dim=1", "em.normalize=true", "em.embeddings=encoder", "em.output_key=z")
    for node in (cfg.metrics, cfg.callbacks.latent_plot):
        assert (node.channel_dim, node.normalize, node.embeddings, node.output_key) == (1, True, "encoder", "z")
        assert node.module == cfg.em.module
    assert {node.module for node in (cfg.callbacks.latent_plot, cfg.callbacks.weight_history)} == {cfg.metrics.module}


@pytest.mark.parametrize("search", sorted(file.stem for file in CONFIGS.glob("hparams_search/*.yaml")))
def test_a_search_is_a_sweep_over_keys_and_options_that_exist(search):
    cfg = compose("train", [f"hparams_search={search}"], return_hydra_config=True)
    assert str(cfg.hydra.mode).endswith("MULTIRUN")
    for key, values in cfg.hydra.sweeper.params.items():
        for value in str(values).split(","):
            assert composed(f"{key}={value}") is not None


def test_the_printed_config_shows_each_group_once_and_loads_again():
    cfg = composed("seed=3", "prior=niw")
    text = printable(cfg)
    assert text.count("tgmm_nn.GaussianMixture") == 1
    assert text.count("${") == 1
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True) == OmegaConf.to_container(cfg, resolve=True)
