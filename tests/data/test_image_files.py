import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from coterie.core.errors import DataError
from coterie.data import cifar10, mnist
from coterie.data.datasets import CIFAR10
from coterie.data.idx import read_idx
from coterie.data.images import read_cifar_binary, read_jpegs

DRAW = np.random.default_rng(0)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def jpeg(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=95)
    return file.getvalue()


def tar(path, members, mode="w:xz"):
    with tarfile.open(path, mode) as archive:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return path


def small_mnist(folder, packed=True):
    (folder / "mnist").mkdir()
    arrays = {
        "train-images-idx3-ubyte": DRAW.integers(0, 256, (7, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(7, dtype=np.uint8),
        "t10k-images-idx3-ubyte": DRAW.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(3, dtype=np.uint8),
    }
    for name, array in arrays.items():
        if packed:
            (folder / "mnist" / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / "mnist" / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(tmp_path, packed):
    arrays = small_mnist(tmp_path, packed)
    data = mnist(folders=[tmp_path])
    assert np.array_equal(data.train.x[:, 0].numpy(), arrays["train-images-idx3-ubyte"])
    assert data.test.y.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"byte 0: magic number \(none\)"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "byte 0: magic number 00 00 0d 01"),
        (b"\x89PNG\r\n", "byte 0: magic number 89 50 4e 47"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x01", "byte 8: the header ends early; it takes 16 bytes"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"byte 12: 5 bytes follow, .* \[2, 3\] takes 6"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "byte 12: 7 bytes follow"),
    ],
)
def test_a_broken_idx_file_is_named_with_the_byte(tmp_path, raw, message):
    path = tmp_path / "broken"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)


def test_a_truncated_or_corrupt_gz_is_named_with_the_byte(tmp_path):
    raw = gzip.compress(idx(DRAW.integers(0, 256, (50, 28, 28), dtype=np.uint8)))
    path = tmp_path / "cut.gz"
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"cut\.gz: cannot be read after byte \d{4,}"):
        read_idx(path)
    flipped = bytearray(raw)
    flipped[-6] ^= 1  # in the checksum of the content
    path.write_bytes(flipped)
    with pytest.raises(DataError, match=r"cut\.gz.*CRC"):
        read_idx(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match="cannot be read after byte 0"):
        read_idx(path)


def test_images_and_labels_that_do_not_belong_together_are_refused(tmp_path):
    small_mnist(tmp_path)
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(4, np.uint8))))
    with pytest.raises(DataError, match=r"t10k-labels.*\[4\] for images of shape \[3, 28, 28\]"):
        mnist(folders=[tmp_path])
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(idx(np.full(3, 10, np.uint8)))
    )
    with pytest.raises(DataError, match="class indices 0 to 9"):
        mnist(folders=[tmp_path])


def test_jpegs_are_read_from_the_archive(tmp_path):
    flat = np.zeros((32, 32, 3), dtype=np.uint8)
    flat[:] = [200, 100, 50]
    path = tar(tmp_path / "a.tar.xz", [("train/cat/0.jpg", jpeg(flat)), ("train/dog/0.jpg", jpeg(flat // 2))])
    x, y = read_jpegs(path, ["cat", "dog"])
    assert x.shape == (2, 3, 32, 32)
    assert y.tolist() == [0, 1]
    assert abs(x[0, :, 5, 5].astype(int) - [200, 100, 50]).max() <= 3


def test_jpegs_stay_upright(tmp_path):
    rows = np.repeat(np.arange(32, dtype=np.uint8)[:, None] * 8, 32, axis=1)
    path = tar(tmp_path / "a.tar.xz", [("cat/0.jpg", jpeg(np.stack([rows] * 3, axis=2)))])
    x, _ = read_jpegs(path, ["cat"])
    assert abs(x[0].astype(int) - rows).max() <= 6


@pytest.mark.parametrize("fault", ["broken", "cut", "png", "size", "grey", "folder"])
def test_a_broken_member_is_named(tmp_path, fault):
    good = jpeg(DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    name, raw, message = "train/cat/7.jpg", good, "not a readable JPEG"
    if fault == "broken":
        raw = b"\xff\xd8" + bytes(100)
    elif fault == "cut":
        raw = good[: len(good) // 2]
    elif fault == "png":
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "PNG")
        raw = file.getvalue()
    elif fault == "size":
        raw, message = jpeg(np.zeros((16, 32, 3), np.uint8)), "expected RGB, 32 x 32"
    elif fault == "grey":
        raw, message = jpeg(np.zeros((32, 32), np.uint8)), "expected RGB, 32 x 32"
    else:
        name, message = "train/owl/7.jpg", "its folder names none of cat"
    path = tar(tmp_path / "a.tar.xz", [("train/cat/1.jpg", good), (name, raw)])
    with pytest.raises(DataError, match=message) as caught:
        read_jpegs(path, ["cat"])
    assert f"{path}: member {name!r}" in str(caught.value)


@pytest.mark.parametrize(("suffix", "mode"), [("xz", "w:xz"), ("gz", "w:gz")])
def test_a_cut_or_changed_archive_is_never_taken_for_a_whole_one(tmp_path, suffix, mode):
    members = [
        (f"t/cat/{i}.jpg", jpeg(DRAW.integers(0, 256, (32, 32, 3), dtype=np.uint8))) for i in range(12)
    ]
    path = tar(tmp_path / f"a.tar.{suffix}", members, mode)
    raw = path.read_bytes()
    assert len(read_jpegs(path, ["cat"])[1]) == 12
    for cut in [*range(100, len(raw), 97), len(raw) - 1]:
        path.write_bytes(raw[:cut])
        with pytest.raises(DataError, match=r"cannot be read after (the start|member)"):
            read_jpegs(path, ["cat"])
    path.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    with pytest.raises(DataError, match=r"cannot be read after member 't/cat/11\.jpg'"):
        read_jpegs(path, ["cat"])


def test_an_archive_without_images_is_refused(tmp_path):
    with pytest.raises(DataError, match="no images"):
        read_jpegs(tar(tmp_path / "empty.tar.xz", []), ["cat"])


def test_cifar10_is_joined_from_its_jpeg_archives(tmp_path):
    (tmp_path / "cifar10-jpg").mkdir()
    flat = [jpeg(np.full((32, 32, 3), 20 * i, dtype=np.uint8)) for i in range(10)]
    for name, raw in zip(CIFAR10, flat, strict=True):
        member = f"train/{name}/0000.jpg"
        tar(
            tmp_path / "cifar10-jpg" / f"train_{name}.tar.xz",
            [(member, raw), (member.replace("0.", "1."), raw)],
        )
    tests = [(f"test/{name}/0000.jpg", raw) for name, raw in zip(CIFAR10, flat, strict=True)]
    tar(tmp_path / "cifar10-jpg" / "test.tar.xz", tests)
    data = cifar10(folders=[tmp_path / "none", tmp_path])
    assert data.train.y.tolist() == [i for i in range(10) for _ in range(2)]
    assert data.test.y.tolist() == list(range(10))
    assert (data.train.x.float().mean(dim=(1, 2, 3)) - 20 * data.train.y).abs().max() < 3
    (tmp_path / "cifar10-jpg" / "train_frog.tar.xz").unlink()
    with pytest.raises(DataError, match=r"has no train_frog\.tar\.xz"):
        cifar10(folders=[tmp_path])


def binary(folder, change=None):
    (folder / "cifar10").mkdir(exist_ok=True)
    batches = {}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        records = DRAW.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        batches[name] = records
    raw = {f"cifar-10-batches-bin/{name}": records.tobytes() for name, records in batches.items()}
    raw["cifar-10-batches-bin/readme.html"] = b"<html>"
    (change or dict)(raw)
    tar(folder / "cifar10" / "cifar-10-binary.tar.gz", raw.items(), "w:gz")
    return batches


def test_the_binary_form_of_cifar10_is_read_first(tmp_path):
    batches = binary(tmp_path)
    data = cifar10(folders=[tmp_path])
    assert len(data.train) == 20
    second = batches["data_batch_2.bin"]
    assert data.train.y[4:8].tolist() == second[:, 0].tolist()
    assert np.array_equal(data.train.x[5].numpy().ravel(), second[1, 1:])
    assert np.array_equal(data.test.x[0, 2].numpy().ravel(), batches["test_batch.bin"][0, 1 + 2048 :])


def test_a_broken_binary_archive_is_named(tmp_path):
    path = tmp_path / "cifar10" / "cifar-10-binary.tar.gz"
    batch = "cifar-10-batches-bin/data_batch_3.bin"
    binary(tmp_path, lambda raw: raw.update({batch: raw[batch][:-1]}))
    with pytest.raises(DataError, match=r"data_batch_3\.bin': 12291 bytes are not whole records"):
        read_cifar_binary(path)
    binary(tmp_path, lambda raw: raw.update({batch: raw[batch][:6146] + b"\x0b" + raw[batch][6147:]}))
    with pytest.raises(DataError, match=r"data_batch_3\.bin': byte 6146: label 11"):
        read_cifar_binary(path)
    binary(tmp_path, lambda raw: raw.pop(batch))
    with pytest.raises(DataError, match=r"no data_batch_3\.bin"):
        read_cifar_binary(path)
