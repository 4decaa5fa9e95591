"""A user's own arrays: what is read, how it is scaled and split, and what is refused in which words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tgmm_nn import GaussianMixture
from tgmm_nn.experiments.arrays import NpyFolderDataModule, NpzDataModule
from tgmm_nn.experiments.contrastive import FeatureNoise, RandomAffine, augmentation_of
from tgmm_nn.experiments.rows import check_components
from tgmm_nn.experiments.tables import Table, scaling_of


@pytest.fixture
def rows():
    """40 rows of 6 features, and labels of three classes and of none."""
    generator = np.random.default_rng(0)
    return generator.normal(size=(40, 6)), np.arange(40) % 4 - 1


@pytest.fixture
def npz(tmp_path):
    """Write arrays into an .npz file, and return its path."""

    def write(**arrays):
        np.savez(tmp_path / "rows.npz", **arrays)
        return str(tmp_path / "rows.npz")

    return write


@pytest.fixture
def folder(tmp_path):
    """Write arrays into .npy files by name, and return their folder."""

    def write(**arrays):
        for name, array in arrays.items():
            np.save(tmp_path / f"{name.replace('__', '.')}.npy", array)
        return str(tmp_path)

    return write


# --------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "uint8", "int64", ">f4"])
@pytest.mark.parametrize("shape", [(40, 6), (40, 2, 3), (40, 1, 2, 3)])
def test_rows_of_any_shape_and_number_type_are_read_as_they_are(npz, rows, dtype, shape):
    x = np.abs(10 * rows[0]).astype(dtype).reshape(shape)
    data = NpzDataModule(npz(x=x), scale=None)
    torch.testing.assert_close(data.x, torch.from_numpy(x.reshape(40, 6).astype("float32")))
    assert (data.n_features, data.n_classes, data.y, data.image_shape) == (6, None, None, None)
    assert data.inputs() == {"n_features": 6, "image_shape": None, "n_classes": None, "targets": None}


def test_labels_and_the_shape_of_images_come_from_the_file_and_an_option_beats_it(npz, rows):
    path = npz(x=rows[0], y=rows[1], image_shape=(2, 3))
    data = NpzDataModule(path, scale=None)
    assert data.inputs() == {"n_features": 6, "image_shape": [2, 3], "n_classes": 3, "targets": "y"}
    assert data.y.tolist() == rows[1].tolist()
    assert NpzDataModule(path, image_shape=[3, 2]).image_shape == (3, 2)


def test_labels_that_are_all_missing_are_none(npz, rows):
    assert NpzDataModule(npz(x=rows[0], y=np.full(40, -7))).inputs()["targets"] is None


def test_a_folder_gives_the_rows_of_its_files_in_the_order_of_names_from_the_disk(folder, rows):
    x, y = rows
    path = folder(b=x[10:], a=x[:10], b__labels=y[10:], a__labels=y[:10])
    data = NpyFolderDataModule(path, scale=None)
    assert all(isinstance(part, np.memmap) for part in data.rows.parts)
    torch.testing.assert_close(data.x, torch.from_numpy(x).float())
    assert data.y.tolist() == y.tolist()
    order = torch.randperm(40)
    torch.testing.assert_close(data.rows[order], torch.from_numpy(x).float()[order])


def test_a_folder_and_a_file_of_the_same_rows_give_the_same_batches(folder, npz, rows):
    x, y = rows
    of_file = NpzDataModule(npz(x=x, y=y), batch_size=16)
    of_folder = NpyFolderDataModule(folder(a=x[:7], b=x[7:], a__labels=y[:7], b__labels=y[7:]), batch_size=16)
    batches = []
    for data in (of_file, of_folder):
        torch.manual_seed(1)
        data.setup("fit")
        batches.append(list(data.train_dataloader()))
    assert [len(batch["x"]) for batch in batches[0]] == [16, 16, 8]
    torch.testing.assert_close(batches[0], batches[1])


def test_chunks_are_all_rows_in_order(npz, rows):
    data = NpzDataModule(npz(x=rows[0]))
    chunks = list(data.rows.chunks(9))
    assert [len(chunk) for chunk in chunks] == [9, 9, 9, 9, 4]
    torch.testing.assert_close(torch.cat(chunks), data.x)


def test_what_was_understood_of_rows_and_labels_is_a_line(npz, rows):
    x, y = rows
    size = f"Rows of {npz(x=x)}: 40 rows of 6 features"
    said = {
        NpzDataModule(npz(x=x)).description(): f"{size}, no images; no labels",
        NpzDataModule(npz(x=x, image_shape=(2, 3), y=y)).description(): f"{size}, images of 2 x 3; 3 classes, labels "
        f"0 to 2, {int((y < 0).sum())} rows without a label",
        NpzDataModule(npz(x=x, y=np.arange(40) % 3 + 1)).description(): f"{size}, no images; 4 classes, labels 0 to 3, "
        "of which no row has 0: numpy.unique(y, return_inverse=True)[1] numbers them from 0",
        NpzDataModule(npz(x=x.reshape(40, 2, 3))).description(): f"{size}, no images; no labels; each of shape (2, 3) "
        "is taken as 6 features; image_shape=(2, 3) in an .npz file, or data.image_shape=[2,3], makes them images",
    }
    for found, expected in said.items():
        assert found == expected


# -------------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("size", [50, 2**22])
def test_standardized_rows_have_mean_0_and_variance_1_also_far_from_zero(size, monkeypatch):
    monkeypatch.setattr("tgmm_nn.experiments.tables.CHUNK", size)
    x = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 1e-3, 1e4] + [1e6, 0.0, -5.0]
    table = Table([x[:200], x[200:]], "blobs")
    z = scaling_of("standardize", table, are_images=False)(x).double()
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)


def test_by_default_rows_do_not_depend_on_the_units_of_their_features(npz, rows):
    metres = NpzDataModule(npz(x=rows[0])).x
    torch.testing.assert_close(NpzDataModule(npz(x=rows[0] * [1, 1000, 1e-3, 1, 60, 1] + 32)).x, metres)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_by_default_pixels_are_divided_by_the_largest(npz, dtype):
    x = np.random.default_rng(0).integers(0, 201, size=(30, 4)).astype(dtype)
    x[0, 0] = 200
    data = NpzDataModule(npz(x=x, image_shape=(2, 2)))
    torch.testing.assert_close(data.x, torch.from_numpy(x.astype("float32") / 200))


def test_a_number_divides_and_null_leaves(npz, rows):
    path = npz(x=rows[0], image_shape=(2, 3))
    torch.testing.assert_close(NpzDataModule(path, scale=4).x, torch.from_numpy(rows[0]).float() / 4)
    torch.testing.assert_close(NpzDataModule(path, scale=None).x, torch.from_numpy(rows[0]).float())


def test_a_constant_feature_is_zero_where_rows_are_standardized(npz):
    x = np.stack([np.full(9, 0.1), np.arange(9.0)], -1)
    assert NpzDataModule(npz(x=x)).x[:, 0].abs().max() == 0


def test_rows_that_a_checkpoint_was_trained_on_give_the_scaling(npz, rows):
    trained = NpzDataModule(npz(x=rows[0] * 7 + 3))
    state = trained.state_dict()
    new = NpzDataModule(npz(x=rows[0][:5] * 7 + 3))
    new.load_state_dict(state)
    torch.testing.assert_close(new.x, trained.x[:5])


# ------------------------------------------------------------------------------------------------- what is refused


class Bomb:
    """What would run if a file were unpickled."""

    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


def test_nothing_in_a_file_is_executed(npz, folder):
    bomb = np.array([Bomb(), Bomb()], dtype=object)
    with pytest.raises(ValueError, match=r"Expected `x` of .*rows.npz to hold numbers, but it can't be read"):
        NpzDataModule(npz(x=bomb))
    with pytest.raises(ValueError, match=r"bomb.npy can't be read as such"):
        NpyFolderDataModule(folder(bomb=bomb))
    assert not Bomb.exploded


X = np.arange(40.0).reshape(10, 4)


@pytest.mark.parametrize(
    ("arrays", "error", "match"),
    [
        ({"rows": X}, ValueError, r"rows under the key 'x', but .*rows.npz holds \['rows'\]"),
        ({"x": X.astype(str)}, TypeError, r"`x` of .*rows.npz to hold integers or floating numbers, but got <U"),
        ({"x": X * 1j}, TypeError, r"floating numbers, but got complex128"),
        ({"x": X > 3}, TypeError, r"floating numbers, but got bool; convert it by"),
        ({"x": X[0]}, ValueError, r"`x` of .* of shape \(N, ...\).* but got \(4,\); write one feature as x\[:, None\]"),
        ({"x": X[:0]}, ValueError, r"at least one row and feature, but got shape \(0, 4\)"),
        ({"x": np.where(X == 9, np.nan, X)}, ValueError, r"finite, but 1 of 10 rows hold nan or infinity.* is row 2"),
        ({"x": np.where(X > 30, np.inf, X)}, ValueError, r"finite, but 3 of 10 rows"),
        ({"x": X, "y": np.arange(9)}, ValueError, r"`y` of .*rows.npz of shape \(10,\), .* but got \(9,\)"),
        (
            {"x": X, "y": np.arange(10.0)},
            TypeError,
            r"`y` of .* to hold integers, .* but got float64; number the classes",
        ),
        ({"x": X, "y": np.array(list("abcdefghij"))}, TypeError, r"`y` of .* to hold integers"),
        (
            {"x": X, "y": np.arange(10) * 500},
            ValueError,
            r"number classes from 0, but the largest of 10 labels is 4500",
        ),
        ({"x": X, "image_shape": (3, 2)}, ValueError, r"`image_shape` of .* to multiply to its 4 features, .*\[3, 2\]"),
        ({"x": X, "image_shape": (2, 2, 1)}, ValueError, r"`image_shape` of .* height and width, two integers"),
        ({"x": X, "image_shape": (-2, -2)}, ValueError, r"`image_shape` to be at least 1, but got -2"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong_in_it(npz, arrays, error, match):
    with pytest.raises(error, match=match):
        NpzDataModule(npz(**arrays))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"scale": "minmax"}, ValueError, "`scale` to be one of 'auto', 'standardize', but got 'minmax'"),
        ({"scale": 0}, ValueError, "`scale` to be above 0"),
        ({"scale": True}, TypeError, "`scale` to be a number"),
        ({"n_classes": 3}, ValueError, "`y` of .*, the class of each row, .* but it has none"),
        ({"test_size": 0.5}, ValueError, "`y` of .*, the class of each row, .* but it has none"),
        ({"test_size": 2.0}, ValueError, "`test_size`"),
        ({"batch_size": 0}, ValueError, "`batch_size` to be at least 1"),
        ({"image_shape": "2x2"}, ValueError, "`image_shape` of .* height and width"),
    ],
)
def test_a_bad_option_of_the_data_names_itself(npz, options, error, match):
    with pytest.raises(error, match=match):
        NpzDataModule(npz(x=X), **options)


def test_what_is_no_npz_file_is_named(tmp_path):
    for path, match in [
        (None, r"give data.path=FILE.npz, but got None"),
        ("", r"give data.path=FILE.npz, but got ''"),
        (tmp_path / "nowhere.npz", r"a file that exists, but got '.*nowhere.npz'"),
        (tmp_path, r"a file that exists, but got"),
    ]:
        with pytest.raises(ValueError, match=match):
            NpzDataModule(path if path is None else str(path))
    (tmp_path / "text.npz").write_text("1,2\n3,4\n")
    with pytest.raises(ValueError, match=r"text.npz can't be read as such"):
        NpzDataModule(str(tmp_path / "text.npz"))
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ValueError, match=r"to be an .npz file, but .*one.npy holds one array"):
        NpzDataModule(str(tmp_path / "one.npy"))


def test_numbers_beyond_float32_ask_for_another_scale(npz):
    path = npz(x=X * 1e30)
    with pytest.raises(ValueError, match=r"in the range of float32, but its largest value is 3.9e\+31; .*standardize"):
        NpzDataModule(path, scale=None)
    assert bool(torch.isfinite(NpzDataModule(path).x).all())
    with pytest.raises(ValueError, match="in the range of float32"):
        NpzDataModule(npz(x=X * 1e200))


@pytest.mark.parametrize(
    ("arrays", "error", "match"),
    [
        ({}, ValueError, r"a folder of .npy files, but .* holds none"),
        ({"a__labels": np.arange(3)}, ValueError, r"a folder of .npy files, but .* holds none"),
        (
            {"a": X, "b": X[:, :3]},
            ValueError,
            r"`x` of .*b.npy with rows of shape \(4,\), those of a.npy, but got \(3,\)",
        ),
        ({"a": X, "b": X, "a__labels": np.zeros(10, int)}, ValueError, r"b.labels.npy is missing \(1 of 2 are there\)"),
        ({"a": X, "a__labels": np.zeros(9, int)}, ValueError, r"`y` of .*a.labels.npy of shape \(10,\)"),
        ({"a": X, "b": X.astype(str)}, TypeError, r"`x` of .*b.npy to hold integers"),
        (
            {"a": X, "b": X * np.nan},
            ValueError,
            r"finite, but 10 of 20 rows hold nan or infinity, the first is row 0 of b.npy",
        ),
    ],
)
def test_a_bad_file_in_a_folder_is_named_with_what_is_wrong_in_it(folder, arrays, error, match):
    with pytest.raises(error, match=match):
        NpyFolderDataModule(folder(**arrays))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a folder that exists, but got '.*shards'"):
        NpyFolderDataModule(str(tmp_path / "shards"))


# ---------------------------------------------------------------------------------------- splits, neighbours, noise


def test_known_classes_are_split_and_rows_without_label_belong_to_neither_side(npz, rows):
    x, y = rows
    data = NpzDataModule(npz(x=x, y=y), n_classes=2, test_size=0.5, scale=None)
    assert (data.n_classes, len(data.x), len(data.x_test), len(data.x_unknown)) == (2, 10, 10, 10)
    assert data.y.bincount().tolist() == data.y_test.bincount().tolist() == [5, 5]
    places = torch.cat([data.train, data.test, data.unknown])
    assert sorted(places.tolist()) == (y >= 0).nonzero()[0].tolist()
    assert all(y[data.unknown] == 2)
    again = NpzDataModule(npz(x=x, y=y), n_classes=2, test_size=0.5, seed=1)
    assert again.test.tolist() != data.test.tolist()


@pytest.mark.parametrize(
    ("y", "options", "match"),
    [
        ([0, 0, 0, 1, 1, 1], {"n_classes": 3}, r"`n_classes` to be at most 2, the classes of .*rows.npz, but got 3"),
        ([0, 0, 0, 0, 0, 1], {"test_size": 0.5}, r"`test_size` and rows of .*rows.npz of which each class has some"),
    ],
)
def test_a_split_that_the_labels_do_not_allow_raises(npz, y, options, match):
    with pytest.raises(ValueError, match=match):
        NpzDataModule(npz(x=X[:6], y=np.array(y)), **options)


def test_held_out_labels_need_labels(npz):
    with pytest.raises(ValueError, match=r"Expected `y` of .*rows.npz, the classes of its rows"):
        _ = NpzDataModule(npz(x=X)).y_test


def test_a_model_that_wants_neighbours_gets_those_among_the_training_rows(npz, rows):
    data = NpzDataModule(npz(x=rows[0], y=rows[1]), n_classes=2, n_neighbors=2, scale=None)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(wants_neighbours=True))
    data.setup("fit")
    x = data.x
    nearest = torch.cdist(x, x).fill_diagonal_(torch.inf).topk(2, largest=False).indices
    for batch in data.train_dataloader():
        for row, neighbour in zip(batch["x"], batch["neighbour"], strict=True):
            place = int((x == row).all(-1).nonzero())
            assert int((x == neighbour).all(-1).nonzero()) in nearest[place].tolist()


def test_more_neighbours_than_rows_raise(npz):
    data = NpzDataModule(npz(x=X), n_neighbors=10)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(wants_neighbours=True))
    with pytest.raises(ValueError, match="`n_neighbors` below the number of rows, 10, but got 10"):
        data.setup("fit")


def test_a_sample_is_of_training_rows_with_their_labels_and_the_same_each_time(npz, rows):
    data = NpzDataModule(npz(x=rows[0], y=rows[1]), scale=None)
    x, y = data.sample(max_rows=15)
    assert len(x) == len(y) == 15
    place = [int((data.x == row).all(-1).nonzero()) for row in x]
    assert place == sorted(set(place))
    assert y.tolist() == data.y[place].tolist()
    torch.testing.assert_close(data.sample(max_rows=15), (x, y))
    assert len(data.sample()[0]) == 40


def test_more_components_than_rows_raise_and_name_the_file(npz):
    with pytest.raises(ValueError, match=r"`n_components` of at most the 10 rows of .*rows.npz, but got 11"):
        check_components(GaussianMixture(11, 4), NpzDataModule(npz(x=X)))


def test_noise_is_in_proportion_to_each_feature(generator):
    x = torch.randn(4000, 3, generator=generator) * torch.tensor([1.0, 100.0, 0.0])
    away = (FeatureNoise(0.2)(x) - x).std(0) / torch.tensor([1.0, 100.0, 1.0])
    torch.testing.assert_close(away, torch.tensor([0.2, 0.2, 0.0]), rtol=0.05, atol=1e-6)
    assert torch.equal(FeatureNoise(0.0)(x), x)
    with pytest.raises(ValueError, match="`noise` to be at least 0"):
        FeatureNoise(-1.0)


def test_images_are_moved_and_other_rows_get_noise():
    moved, noisy = augmentation_of([4, 6], shift=2.0, noise=0.3), augmentation_of(None, shift=2.0, noise=0.3)
    assert isinstance(moved, RandomAffine)
    assert (moved.height, moved.width, moved.shift) == (4, 6, 2.0)
    assert isinstance(noisy, FeatureNoise)
    assert noisy.noise == 0.3
