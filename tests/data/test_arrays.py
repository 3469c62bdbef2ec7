import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, TensorDataset

from coterie.core.errors import ConfigError, DataError
from coterie.data import from_npz, from_torch

DRAW = np.random.default_rng(0)


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_npz_features_are_standardised(tmp_path):
    x = DRAW.standard_normal((50, 3)) * [1, 5, 0] + [0, 2, 7]
    path = save(tmp_path / "a.npz", x=x, y=np.tile([3, 8], 25), site=np.array(["a", "b"] * 25))
    data = from_npz(path, keys=["site"], test_fraction=0.2)
    assert data.classes == ("3", "8")
    assert (len(data.train), len(data.test)) == (40, 10)
    ready = data.prepare(data.train.x).double()
    assert ready.mean(dim=0).abs().max() < 1e-5
    assert ready.std(dim=0, correction=0).tolist() == pytest.approx([1, 1, 0], abs=1e-5)
    assert np.array_equal(data.train.keys["site"] == "b", data.train.y.numpy() == 1)


@pytest.mark.parametrize("shape", [(6, 8, 8), (6, 1, 8, 8), (6, 8, 8, 1), (6, 8, 8, 3), (6, 3, 8, 8)])
def test_npz_images_stay_bytes_with_channels_first(tmp_path, shape):
    x = DRAW.integers(0, 256, shape, dtype=np.uint8)
    data = from_npz(save(tmp_path / "a.npz", x=x, y=np.arange(6.0)), test_fraction=0)
    channels = 3 if 3 in shape else 1
    assert data.train.x.dtype == torch.uint8
    assert data.input_shape == (channels, 8, 8)
    assert data.task == "regression"
    first = np.moveaxis(x, -1, 1) if shape[-1] in (1, 3) else x
    assert torch.allclose(
        data.prepare(data.train.x).reshape(6, -1) * 255, torch.tensor(first.reshape(6, -1)).float()
    )


def test_npz_test_sets_by_name_or_by_file(tmp_path):
    x, y = DRAW.standard_normal((10, 2)), np.array(["no", "yes"] * 5)
    one = save(tmp_path / "one.npz", x=x, y=y, a=x[:4], b=y[:4].reshape(4, 1))
    data = from_npz(one, x_test="a", y_test="b")
    assert (len(data.train), len(data.test)) == (10, 4)
    assert data.test.y.tolist() == [0, 1, 0, 1]
    two = save(tmp_path / "two.npz", x=x[:3], y=np.array(["maybe"] * 3))
    assert from_npz(one, test_path=two).classes == ("maybe", "no", "yes")
    with pytest.raises(ConfigError, match="go together"):
        from_npz(one, x_test="a")


def test_pickles_are_refused_and_never_run(tmp_path):
    marker = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    trap = np.empty(2, dtype=object)
    trap[:] = [Trap(), Trap()]
    path = save(tmp_path / "a.npz", x=trap, y=np.arange(2))
    with pytest.raises(DataError, match=r"a\.npz: array 'x' cannot be read.*[Oo]bject") as caught:
        from_npz(path)
    assert "refused" in caught.value.hint
    raw = tmp_path / "b.npz"
    raw.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"b\.npz"):
        from_npz(raw)
    assert not marker.exists()


def test_broken_npz_files_are_named_with_the_array(tmp_path):
    path = save(tmp_path / "a.npz", x=DRAW.standard_normal((500, 4)), y=np.arange(500) % 2)
    raw = bytearray(path.read_bytes())
    for broken, message in (
        (raw[:2000], "not a whole archive"),
        (raw[:3000] + bytes([raw[3000] ^ 255]) + raw[3001:], "array 'x' cannot be read"),
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message) as caught:
            from_npz(path)
        assert str(path) in str(caught.value)
    np.save(tmp_path / "c.npy", np.zeros(3))
    with pytest.raises(DataError, match="not a whole archive"):
        from_npz(tmp_path / "c.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2))}, "no array 'y'"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(4)}, "array 'y' has 4 rows, 'x' has 3"),
        ({"x": np.array([[1.0], [np.nan], [2.0]]), "y": np.zeros(3)}, "array 'x': row 2 has a NaN"),
        ({"x": np.zeros((3, 2)), "y": np.zeros((3, 2))}, "expected one target a row"),
        ({"x": np.array(["a", "b", "c"]), "y": np.zeros(3)}, "expected numbers"),
        ({"x": np.zeros((3, 2), dtype=complex), "y": np.zeros(3)}, "complex"),
    ],
)
def test_npz_arrays_that_do_not_fit_are_refused(tmp_path, arrays, message):
    with pytest.raises(DataError, match=message):
        from_npz(save(tmp_path / "a.npz", **arrays))


def test_torch_datasets_are_stacked():
    x, y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
    data = from_torch(TensorDataset(x, y), TensorDataset(x[:5], y[:5]), name="mine", classes=["a", "b", "c"])
    assert torch.equal(data.train.x, x)
    assert torch.equal(data.prepare(data.train.x), x)
    assert torch.equal(data.test.y, y[:5])
    assert data.classes == ("a", "b", "c")
    numbers = from_torch([(np.ones(2), 0.5), (np.zeros(2), 1.0)], name="pairs")
    assert numbers.task == "regression"
    assert numbers.train.x.dtype == torch.float32
    assert from_torch([(np.ones(2), 4)], name="pairs").classes == ("0", "1", "2", "3", "4")


def test_torch_pictures_are_stacked_as_bytes():
    array = DRAW.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = from_torch([(Image.fromarray(array), 0), (Image.fromarray(array // 2), 1)], name="pictures")
    assert data.train.x.shape == (2, 3, 5, 7)
    assert np.array_equal(data.train.x[0].permute(1, 2, 0).numpy(), array)
    assert data.prepare(data.train.x).max() <= 1
    grey = from_torch([(Image.fromarray(array[:, :, 0]), 0)], name="grey")
    assert grey.input_shape == (1, 5, 7)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [(torch.zeros(2), 0), (torch.zeros(3), 1)],
            r"item 1 is torch.float32 \[3\], item 0 is torch.float32 \[2\]",
        ),
        ([(torch.zeros(2), 0), (torch.zeros(2).int(), 1)], r"item 1 is torch.int32"),
        ([(torch.zeros(2), "cat")], "item 0 is not an"),
        ([torch.zeros(3)], "item 0 is not an"),
        ([5], "item 0 is not an"),
        ([({"a": 1}, 0)], "item 0 is not an"),
        ([(torch.zeros(2), torch.zeros(2))], "item 0 has the target"),
        ([(torch.zeros(2), 1), (torch.zeros(2), 0.5)], "item 1 has the target"),
        ([(torch.zeros(2), -1)], "class indices"),
        ([], "is empty"),
        (Stream(), "not a map-style Dataset"),
    ],
)
def test_items_that_cannot_be_stacked_are_named(items, message):
    with pytest.raises(DataError, match=message):
        from_torch(items, name="mine")
