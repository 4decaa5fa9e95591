"""Files of mixtures: all comes back, and a file that is anything else raises and executes nothing."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import assert_same_buffers, copy_of_buffers, unchanged
from torch import nn

from tgmm_nn import GaussianMixture

OPTIONS = {
    "weight_concentration_prior": 2.0,
    "mean_prior": [0.0, 1.0],
    "mean_precision_prior": 0.1,
    "covariance_prior": 2.0,
    "degrees_of_freedom_prior": 4.0,
    "init_means": [[0, 0], [5, 5], [0, 5]],
    "init_covariances": "global",
    "random_state": np.int64(3),
    "tol": np.float32(1e-3),
    "max_iter": 500,
    "verbose_interval": 7,
}


@pytest.fixture
def x(generator):
    return 2 * torch.randn(60, 2, generator=generator)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "mixture.pth"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_file_brings_back_options_parameters_counters_history_and_sums(family, dtype, file, x):
    gmm = GaussianMixture(3, 2, family, dtype=dtype, **OPTIONS).fit(x)
    gmm.em_step(x[:20], step_size=0.3)
    gmm.save(file)
    loaded = GaussianMixture.load(file)
    assert_same_buffers(loaded, copy_of_buffers(gmm))
    assert {b.dtype for b in loaded.buffers()} == {b.dtype for b in gmm.buffers()}
    assert repr(loaded) == repr(gmm)
    assert loaded.history_ == gmm.history_
    for attribute in ("fitted_", "converged_", "n_iter_", "lower_bound_", "objective_"):
        assert getattr(loaded, attribute) == getattr(gmm, attribute)
    for ours, theirs in zip(loaded.priors, gmm.priors, strict=True):
        assert torch.equal(ours, theirs)
    gmm.em_step(x, step_size=0.2)
    loaded.em_step(x, step_size=0.2)
    assert_same_buffers(loaded, copy_of_buffers(gmm))
    gmm.fit(x)
    assert_same_buffers(loaded.fit(x), copy_of_buffers(gmm))


def test_a_fresh_layer_can_be_saved_and_the_device_chosen(family, file):
    gmm = GaussianMixture(2, 3, family)
    gmm.save(str(file))
    assert not GaussianMixture.load(str(file), device="cpu").fitted_
    assert GaussianMixture.load(file, device="meta").means_.device.type == "meta"


def test_a_subclass_is_loaded_as_itself(file):
    class Mine(GaussianMixture):
        pass

    GaussianMixture(2, 3).save(file)
    assert type(Mine.load(file)) is Mine


def test_save_state_dict_is_the_state_of_the_module(file, x):
    gmm, fresh = GaussianMixture(3, 2).fit(x), GaussianMixture(3, 2)
    torch.save(gmm.save_state_dict(), file)
    keys = fresh.load_state_dict(torch.load(file))
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert_same_buffers(fresh, copy_of_buffers(gmm))
    assert gmm.save_state_dict().keys() == gmm.state_dict().keys()


# ---------------------------------------------------------------------------------------------- what is no mixture


class Trap:
    """What a hostile pickle runs."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_hostile_file_runs_nothing(file, tmp_path):
    for write in (torch.save, lambda trap, path: path.write_bytes(pickle.dumps(trap))):
        for content in (
            Trap(tmp_path / "ran"),
            {"format": "tgmm_nn.GaussianMixture", "options": Trap(tmp_path / "ran")},
        ):
            write(content, file)
            with pytest.raises(
                ValueError, match=r"`path` to be a file that GaussianMixture.save has written, but .* nothing was run"
            ):
                GaussianMixture.load(file)
    assert not (tmp_path / "ran").exists()


def damaged(file, content):
    """Write a saved mixture after something was done to what it holds."""
    gmm = GaussianMixture(3, 2)
    gmm.save(file)
    whole = torch.load(file, weights_only=True)
    content(whole)
    torch.save(whole, file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda c: c.update(format="other"), "holds something else; a state_dict is loaded by load_state_dict"),
        (lambda c: c.update(version=2), "is of version 2, not 1; update tgmm_nn"),
        (lambda c: c.pop("options"), "has no options or no state"),
        (lambda c: c.update(state=[1]), "has no options or no state"),
        (lambda c: c["options"].update(surprise=1), r"has unknown options \['surprise'\]"),
        (
            lambda c: c["options"].update(n_components=10**12),
            r"has means that are not of the shape of its options, \(1000",
        ),
        (lambda c: c["state"].pop("means_"), "has means that are not of the shape of its options"),
        (lambda c: c["options"].update(tol="small"), "is not: Expected `tol` to be a number, but got 'small'"),
        (lambda c: c["options"].update(covariance_type="diag"), r"is not: .*but got one with .*'full'"),
        (lambda c: c["options"].update(dtype="complex64"), "is of dtype 'complex64', not one of float32, float64"),
        (lambda c: c["state"].pop("factor_"), r"is not: .*Missing key\(s\) in state_dict: \"factor_\""),
        (lambda c: c["state"].update(more=torch.zeros(1)), r"is not: .*Unexpected key\(s\) in state_dict: \"more\""),
        (lambda c: c["state"].update(factor_="no"), "is not: .*Expected `factor_` to be a real tensor, but got str"),
        (lambda c: c["state"]["factor_"].fill_(torch.nan), "is not: Expected `factor_` to be finite, but it holds nan"),
        (lambda c: c["state"]["running_first"].fill_(torch.inf), "is not: Expected `running_first` to be finite"),
        (lambda c: c["state"]["weights_"].fill_(2.0), "is not: Expected `weights_` to be non-negative and to sum to 1"),
        (lambda c: c.update(version=torch.zeros(2)), r"is of version tensor\(.*, not 1; update tgmm_nn"),
        (lambda c: c["options"].update(dtype=["float32"]), r"is of dtype \['float32'\], not one of float32, float64"),
        (
            lambda c: c["options"].update(n_components=torch.tensor([2, 2])),
            "has means that are not of the shape of its",
        ),
        (lambda c: c["state"].update({3: torch.zeros(2)}), "has no options or no state"),
        (
            lambda c: c["state"]["factor_"].fill_(0.0),
            "is not: Expected `factor_` to be the Cholesky factor of precisions",
        ),
        (lambda c: c["state"]["factor_"].neg_(), "is not: Expected `factor_` to be the Cholesky factor of precisions"),
        (
            lambda c: c["state"]["factor_"].tril_().add_(torch.ones(2, 2).tril(-1)),
            "is not: Expected `factor_` to be the Ch",
        ),
        (
            lambda c: c["state"]["factor_"][0].copy_(torch.tensor([[1e3, 0.0], [5.0, 1e3]])),
            "is not: Expected `factor_` to",
        ),
        (
            lambda c: c["state"]["factor_"][0, 0, 0].fill_(-1e-3),
            "is not: Expected `factor_` to be the Cholesky factor of p",
        ),
        (lambda c: c["state"]["_extra_state"].update(n_draws=-1), "is not: .*number of draws as an integer from 0 on"),
        (lambda c: c["state"]["_extra_state"].update(n_components=torch.ones(2)), "is not: .*but got one with"),
        (lambda c: c["state"]["running_count"].neg_(), "is not: Expected `running_count` to be at least 0"),
        (
            lambda c: c["state"]["running_step_size"].fill_(7.0),
            "is not: Expected `running_step_size` to be at least 0 and",
        ),
        (
            lambda c: c["state"]["fitted"].fill_(9),
            "is not: Expected `fitted` to be at least 0 and at most 1, but got 9",
        ),
        (lambda c: c["state"]["n_updates"].fill_(-1), "is not: Expected `n_updates` to be at least 0"),
        (
            lambda c: c["state"]["_extra_state"].update(n_draws="many"),
            "is not: .*hold the number of draws as an integer",
        ),
        (lambda c: c["state"]["_extra_state"].update(history="up"), "is not: .*hold the history as a list of floats"),
    ],
)
def test_a_file_of_anything_but_a_mixture_raises(content, message, file):
    damaged(file, content)
    with pytest.raises(ValueError, match=f"(?s)`path` to be a file .*{message}"):
        GaussianMixture.load(file)


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "zip", "bits", "state", "tensor", "module"])
def test_a_foreign_or_corrupt_file_raises(kind, file):
    gmm = GaussianMixture(3, 2)
    gmm.save(file)
    whole = file.read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind in ("state", "tensor", "module"):
        torch.save({"state": gmm.state_dict(), "tensor": torch.zeros(3), "module": nn.Linear(2, 2)}[kind], file)
    else:
        middle = len(whole) // 3
        contents = {"empty": b"", "text": b"hello", "cut": whole[:middle], "bits": whole[:200] + whole[260:]}
        file.write_bytes(contents[kind])
    with pytest.raises(ValueError, match=r"Expected `path` to be a file that GaussianMixture.save has written, but"):
        GaussianMixture.load(file)


@pytest.mark.parametrize("seed", range(4))
def test_wherever_a_file_is_cut_or_changed_it_raises(seed, file):
    gmm, dice = GaussianMixture(3, 2), np.random.default_rng(seed)
    gmm.save(file)
    whole = file.read_bytes()
    for _ in range(15):
        place = int(dice.integers(len(whole)))
        file.write_bytes(whole[:place])
        with pytest.raises(
            ValueError, match=r"Expected `path` to be a file that GaussianMixture.save has written, but"
        ):
            GaussianMixture.load(file)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:  # a byte that pads the archive may change and nothing is lost
            loaded = GaussianMixture.load(file)
        except ValueError as error:
            message = str(error)
        else:
            message = "Expected `path` to be a file"
            assert_same_buffers(loaded, copy_of_buffers(gmm))
        assert message.startswith("Expected `path` to be a file")


def test_check_sums_are_written_whatever_torch_is_told(file):
    torch.serialization.set_crc32_options(False)
    try:
        GaussianMixture(3, 2).save(file)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert GaussianMixture.load(file).n_components == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_ill_conditioned_mixture_comes_back(family, dtype, file, generator):
    x = torch.randn(300, 40, generator=generator).to(dtype) * torch.logspace(-4, 4, 40).to(dtype)
    gmm = GaussianMixture(2, 40, family, dtype=dtype, reg_covar=1e-12, max_iter=500).fit(x)
    gmm.em_step(x)
    gmm.half().save(file)
    assert_same_buffers(GaussianMixture.load(file), copy_of_buffers(gmm))


def test_a_link_stays_one_and_its_file_is_replaced(file, tmp_path):
    link = tmp_path / "link.pth"
    GaussianMixture(3, 2).save(file)
    link.symlink_to(file)
    GaussianMixture(4, 2).save(link)
    assert link.is_symlink()
    assert GaussianMixture.load(file).n_components == 4


def test_a_file_that_is_not_there_or_a_folder_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        GaussianMixture.load(tmp_path / "none.pth")
    with pytest.raises(IsADirectoryError):
        GaussianMixture.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"Expected `path` in a folder that exists, but there is no .*no folder"
    ):
        GaussianMixture(2, 2).save(tmp_path / "no folder" / "mixture.pth")
    with pytest.raises(IsADirectoryError, match=r"Expected `path` to be a file, but .* is a folder"):
        GaussianMixture(2, 2).save(tmp_path)


def test_an_interrupted_save_leaves_the_older_file(file, monkeypatch, x):
    gmm = GaussianMixture(3, 2)
    gmm.save(file)
    before = file.read_bytes()

    def interrupted(content, target):
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gmm.fit(x).save(file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_has_the_permissions_of_any_new_file(file, tmp_path):
    GaussianMixture(2, 2).save(file)
    (tmp_path / "other").touch()
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode


# ------------------------------------------------------------------------------------------- states half as expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: s.pop("factor_"), r'Missing key\(s\) in state_dict: "factor_"'),
        (lambda s: s.pop("_extra_state"), r'Missing key\(s\) in state_dict: "_extra_state"'),
        (lambda s: s.update(more=torch.zeros(1)), r'Unexpected key\(s\) in state_dict: "more"'),
        (lambda s: s.update(factor_=[1.0]), "Expected `factor_` to be a real tensor, but got list"),
        (
            lambda s: s.update(factor_=s["factor_"].cfloat()),
            "Expected `factor_` to be a real tensor, but got torch.complex",
        ),
    ],
)
def test_a_state_that_does_not_fit_raises_before_any_buffer_is_written(content, message, x):
    gmm, state = GaussianMixture(3, 2), GaussianMixture(3, 2).fit(x).state_dict()
    content(state)
    with unchanged(gmm), pytest.raises(RuntimeError, match=message):
        gmm.load_state_dict(state)
    assert gmm.history_ == []


def test_a_state_that_lacks_a_buffer_loads_the_rest_where_that_is_asked_for(x):
    gmm, state = GaussianMixture(3, 2), GaussianMixture(3, 2).fit(x).state_dict()
    del state["n_updates"]
    assert gmm.load_state_dict(state, strict=False).missing_keys == ["n_updates"]
    assert torch.equal(gmm.means_, state["means_"])


def test_a_pickle_brings_back_what_a_file_does(family, x):
    gmm = GaussianMixture(3, 2, family, **OPTIONS).fit(x)
    file = io.BytesIO()
    torch.save(gmm, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(gmm)), torch.load(file, weights_only=False)):
        assert_same_buffers(twin, copy_of_buffers(gmm))
        assert repr(twin) == repr(gmm)
        assert torch.equal(twin.sample(3)[0], pickle.loads(pickle.dumps(gmm)).sample(3)[0])
