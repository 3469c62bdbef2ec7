import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.core.errors import DataError
from coterie.data import (
    DATASETS,
    Dataset,
    Examples,
    adult,
    cifar10,
    credit_default,
    datasets,
    digits,
    fashion_mnist,
    mnist,
    pneumoniamnist,
)
from coterie.data.images import read_jpegs
from coterie.data.splits import as_float


def counts(examples):
    return torch.bincount(examples.y).tolist()


def test_digits_are_scikit_learns_and_the_split_is_stratified():
    from sklearn.datasets import load_digits

    data = digits()
    bunch = load_digits()
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.input_shape == (1, 8, 8)
    assert data.task == "classification"
    total = np.array(counts(data.train)) + counts(data.test)
    assert total.tolist() == np.bincount(bunch.target).tolist()
    assert max(abs(np.array(counts(data.test)) - 0.2 * total)) <= 0.5
    assert data.prepare(data.train.x).max() == 1.0
    here = sorted(image.numpy().tobytes() for part in (data.train, data.test) for image in part.x)
    assert here == sorted(image.astype(np.uint8).tobytes() for image in bunch.images)
    assert torch.equal(data.train.x, digits().train.x)


def test_mnist_has_its_published_counts(shared):
    data = mnist(folders=[shared])
    assert data.train.x.shape == (60_000, 1, 28, 28)
    assert data.test.x.shape == (10_000, 1, 28, 28)
    assert data.train.x.dtype == torch.uint8
    assert counts(data.train) == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert counts(data.test) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert data.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    x = data.prepare(data.train.x)
    assert abs(x.mean().item()) < 1e-3
    assert abs(x.std().item() - 1) < 1e-3


def test_fashion_mnist_has_6000_of_each():
    if not datasets.DEBIAN_FASHION.is_dir():
        pytest.skip("install the package dataset-fashion-mnist")
    data = fashion_mnist(folders=[])
    assert counts(data.train) == [6000] * 10
    assert counts(data.test) == [1000] * 10
    assert data.classes[data.train.y[0]] == "Ankle boot"
    x = data.prepare(data.train.x[:20_000])
    assert abs(x.mean().item()) < 0.02
    assert abs(x.std().item() - 1) < 0.02


def test_cifar10_archives_have_1000_and_5000_of_each(shared):
    """One training archive and the test archive: all of them take too long for a test."""
    x, y = read_jpegs(shared / "cifar10-jpg" / "train_cat.tar.xz", datasets.CIFAR10)
    assert x.shape == (5000, 3, 32, 32)
    assert set(y.tolist()) == {3}
    x, y = read_jpegs(shared / "cifar10-jpg" / "test.tar.xz", datasets.CIFAR10)
    assert np.bincount(y).tolist() == [1000] * 10
    assert (x / 255).mean(axis=(0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.01)


def test_pneumoniamnist_is_the_official_split(shared):
    """MedMNIST v2: 4,708 training images, 1,214 of them normal; 624 test images, 234 of them normal."""
    data = pneumoniamnist(folders=[shared])
    assert counts(data.train) == [1214, 3494]
    assert counts(data.test) == [234, 390]
    assert data.input_shape == (1, 28, 28)


def test_pneumoniamnist_reads_the_official_file_too(tmp_path):
    (tmp_path / "pneumoniamnist").mkdir()
    parts = {
        f"{part}_{what}": np.zeros((n, *shape), dtype=np.uint8)
        for part, n in (("train", 5), ("val", 2), ("test", 3))
        for what, shape in (("images", (28, 28)), ("labels", (1,)))
    }
    np.savez(tmp_path / "pneumoniamnist" / "pneumoniamnist.npz", **parts)
    data = pneumoniamnist(folders=[tmp_path])
    assert (len(data.train), len(data.test)) == (5, 3)


def test_adult_has_its_published_counts(shared):
    data = adult(folders=[shared])
    assert len(data.train) + len(data.test) == 48_842
    assert data.classes == ("<=50K", ">50K")
    assert (np.array(counts(data.train)) + counts(data.test)).tolist() == [37_155, 11_687]
    assert len(np.unique(data.train.keys["workclass"])) == 9
    # 6 numbers, and one column for each value of the 8 text attributes; one country may have one row
    texts = sum(len(np.unique(column)) for column in _adult_texts(shared))
    only_in_test = {*data.test.keys["native-country"]} - {*data.train.keys["native-country"]}
    assert data.input_shape[0] == 6 + texts - len(only_in_test)
    numbers = data.train.x[:, 0]
    assert numbers.mean().abs() < 1e-5
    assert numbers.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def _adult_texts(shared):
    import pyarrow.parquet as pq

    table = pq.read_table(shared / "adult" / "adult.parquet.brotli")
    return [
        table[name].to_pylist()
        for name in table.column_names
        if name != "income" and isinstance(table[name][0].as_py(), str)
    ]


def test_credit_default_has_its_published_counts(shared):
    data = credit_default(folders=[shared])
    assert len(data.train) + len(data.test) == 30_000
    assert counts(data.train)[1] + counts(data.test)[1] == 6636
    assert set(data.train.keys) == {"EDUCATION", "MARRIAGE", "SEX", "AGE"}


def test_missing_data_names_every_place_and_the_way_to_get_it(tmp_path):
    (tmp_path / "a" / "mnist").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        mnist(folders=[tmp_path / "a", tmp_path / "b"])
    message = str(caught.value)
    assert f"{tmp_path / 'a' / 'mnist'} (has no train-images-idx3-ubyte.gz)" in message
    assert f"{tmp_path / 'b' / 'mnist'} (no such folder)" in message
    assert "data.download = true" in caught.value.hint
    with pytest.raises(DataError, match="adult: not found") as caught:
        adult(folders=[tmp_path])
    assert "download" not in caught.value.hint


def test_the_data_folder_of_the_environment_is_searched(tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=str(tmp_path / "mnist")):
        mnist()


def test_every_loader_takes_folders():
    for name, loader in DATASETS.items():
        assert "folders" in inspect.signature(loader).parameters, name


def test_a_download_is_asked_for_only_when_wanted(tmp_path, monkeypatch):
    asked = []

    def fetch(name: str, folder: Path) -> Path:
        asked.append((name, folder))
        raise DataError("offline")

    monkeypatch.setattr(datasets.sources, "download", fetch)
    with pytest.raises(DataError, match="not found"):
        cifar10(folders=[tmp_path])
    assert asked == []
    with pytest.raises(DataError, match="offline"):
        cifar10(folders=[tmp_path, tmp_path / "b"], download=True)
    assert asked == [("cifar10", tmp_path)]


def test_records_that_do_not_fit_are_refused():
    x, y = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    with pytest.raises(DataError, match="different lengths"):
        Examples(x, y[:2])
    with pytest.raises(DataError, match="different lengths"):
        Examples(x, y, {"site": np.arange(4)})
    with pytest.raises(DataError, match=r"torch\.float64"):
        Examples(x, y.double())
    with pytest.raises(DataError, match="not all class indices 0 to 1"):
        Dataset("d", Examples(x, y), None, ("a", "b"), as_float)
    with pytest.raises(DataError, match="not all float32"):
        Dataset("d", Examples(x, y), None, None, as_float)
    with pytest.raises(DataError, match=r"test inputs have the shape \[5\]"):
        Dataset("d", Examples(x, y), Examples(torch.zeros(3, 5), y), ("a", "b", "c"), as_float)
    assert Dataset("d", Examples(x, y.float()), None, None, as_float).task == "regression"
