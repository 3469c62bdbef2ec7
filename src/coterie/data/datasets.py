"""Ready-made data sets, by the name a config uses, read from files at hand or embedded in a library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from coterie.core.errors import DataError
from coterie.data import sources
from coterie.data.arrays import from_npz, read_npz
from coterie.data.idx import read_idx
from coterie.data.images import Labelled, read_cifar_binary, read_jpegs
from coterie.data.remote import at_sites
from coterie.data.sources import HOMES, default_folders, find_file, find_folder
from coterie.data.splits import normalise, split_rows
from coterie.data.tables import from_table
from coterie.data.text import next_character, read_speeches
from coterie.data.types import Dataset, Examples

DIGITS = tuple("0123456789")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist

Folders = Sequence[Path] | None


def digits(*, folders: Folders = None) -> Dataset:  # noqa: ARG001 every loader takes it
    """8x8 handwritten digits, 1,797 of them, from scikit-learn: needs no files (Alpaydin and Kaynak 1998).

    uint8 [n, 1, 8, 8] with values 0 to 16, prepared to [0, 1]. A fixed, stratified fifth is the test set.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 slow to import

    bunch = load_digits()
    images, labels = bunch.images.astype(np.uint8)[:, None], bunch.target.astype(np.int64)
    train, test = split_rows(labels, 0.2)
    return _images(
        "digits",
        (images[train], labels[train]),
        (images[test], labels[test]),
        classes=DIGITS,
        mean=[0.0],
        std=[16 / 255],
    )


def mnist(*, folders: Folders = None, download: bool = False) -> Dataset:
    """28x28 handwritten digits, 60,000 + 10,000 (LeCun et al. 1998), from the idx files in <folder>/mnist.

    uint8 [n, 1, 28, 28]. download: fetch the files into the first folder if no folder has them.
    Raises DataError when the files are missing or damaged.
    """
    return _idx("mnist", folders, download, classes=DIGITS, mean=0.1307, std=0.3081)


def fashion_mnist(*, folders: Folders = None, download: bool = False) -> Dataset:
    """28x28 pictures of clothes, 60,000 + 10,000 (Xiao et al. 2017, arXiv:1708.07747), from idx files.

    Looked for in <folder>/fashion-mnist and where Debian's package dataset-fashion-mnist puts them.
    uint8 [n, 1, 28, 28]. download: fetch the files into the first folder if no folder has them.
    Raises DataError when the files are missing or damaged.
    """
    return _idx("fashion-mnist", folders, download, classes=FASHION, mean=0.2860, std=0.3530)


def cifar10(*, folders: Folders = None, download: bool = False) -> Dataset:
    """32x32 colour pictures, 50,000 + 10,000 in 10 classes (Krizhevsky 2009).

    From <folder>/cifar10/cifar-10-binary.tar.gz, or else from <folder>/cifar10-jpg, one tar.xz of JPEGs for
    each training class and one for the test set (re-encoded, so not the same bits). uint8 [n, 3, 32, 32].
    download: fetch the binary archive into the first folder if no folder has either.
    Raises DataError when the files are missing or damaged.
    """
    jpegs = [f"train_{name}.tar.xz" for name in CIFAR10]
    layouts = [("cifar10", [*HOMES["cifar10"][1]]), ("cifar10-jpg", [*jpegs, "test.tar.xz"])]
    place = _place("cifar10", folders, download, layouts)
    if place.name == "cifar10":
        file = layouts[0][1][0]
        train, test = read_cifar_binary(find_file(place, file) or place / file)
    else:
        parts = [read_jpegs(place / name, CIFAR10) for name in jpegs]
        train = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
        test = read_jpegs(place / "test.tar.xz", CIFAR10)
    return _images(
        "cifar10", train, test, classes=CIFAR10, mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616]
    )


def pneumoniamnist(*, folders: Folders = None) -> Dataset:
    """28x28 chest X-rays of children, 4,708 + 624: normal or pneumonia (Yang et al. 2023, MedMNIST v2).

    From <folder>/pneumoniamnist/pneumoniamnist.npz, the official file; or from two files that hold it between
    them: label 0 of pneumoniamnist_balanced.npz and label 1 of pneumoniamnist_longtail.npz are the official
    training set, and the official test set is in the second. The 524 validation images are left out.
    uint8 [n, 1, 28, 28]. Raises DataError when the files are missing or damaged.
    """
    parts = ["pneumoniamnist_balanced.npz", "pneumoniamnist_longtail.npz"]
    layouts = [("pneumoniamnist", ["pneumoniamnist.npz"]), ("pneumoniamnist", parts)]
    place = _place("pneumoniamnist", folders, False, layouts)
    official = place / "pneumoniamnist.npz"
    if official.is_file():
        train, test = _medmnist(official, "train"), _medmnist(official, "test")
    else:
        (x0, y0), (x1, y1) = (_medmnist(place / part, "train") for part in parts)
        train = np.concatenate([x0[y0 == 0], x1[y1 == 1]]), np.concatenate([y0[y0 == 0], y1[y1 == 1]])
        test = _medmnist(place / parts[1], "test")
    return _images("pneumoniamnist", train, test, classes=("normal", "pneumonia"), mean=[0.5], std=[0.5])


def adult(*, folders: Folders = None) -> Dataset:
    """48,842 rows of the 1994 US census; is the income above 50,000 dollars? (Becker and Kohavi 1996, UCI).

    From <folder>/adult/adult.parquet.brotli; a stratified fifth is the test set. All 14 attributes are
    features, text one-hot encoded. Keys: workclass (9 values, "?" among them), education, native-country.
    Raises DataError when the file is missing or damaged.
    """
    file = "adult.parquet.brotli"
    place = _place("adult", folders, False, [("adult", [file])])
    attributes = (
        "age workclass fnlwgt education educational-num marital-status occupation relationship race gender "
        "capital-gain capital-loss hours-per-week native-country"
    )
    return from_table(
        place / file,
        target="income",
        features=attributes.split(),
        keys=("workclass", "education", "native-country"),
        name="adult",
    )


def credit_default(*, folders: Folders = None) -> Dataset:
    """30,000 credit card holders in Taiwan, 6,636 of whom default the next month (Yeh and Lien 2009, UCI).

    From <folder>/credit-default/UCI_Credit_Card.csv.gz; a stratified fifth is the test set. All 23 attributes
    are features; sex, education and marriage are one-hot encoded. Keys: EDUCATION, MARRIAGE, SEX, AGE.
    Raises DataError when the file is missing or damaged.
    """
    file = "UCI_Credit_Card.csv.gz"
    place = _place("credit-default", folders, False, [("credit-default", [file])])
    months = range(1, 7)
    return from_table(
        find_file(place, file) or place / file,
        target="default.payment.next.month",
        features=[
            *("LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE"),
            *("PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6"),
            *(f"BILL_AMT{month}" for month in months),
            *(f"PAY_AMT{month}" for month in months),
        ],
        categorical=("SEX", "EDUCATION", "MARRIAGE"),
        keys=("EDUCATION", "MARRIAGE", "SEX", "AGE"),
        name="credit-default",
    )


def shakespeare(
    *, folders: Folders = None, length: int = 80, test_fraction: float = 0.2, download: bool = False
) -> Dataset:
    """The next character in Shakespeare's plays, by role: 1.1 MB, 65 characters (Karpathy 2015, char-rnn).

    From <folder>/tiny-shakespeare/input.txt.gz or input.txt, or the same in <folder>/shakespeare. int64
    [n, length]; the last test_fraction of each role's windows are the test set, as in McMahan et al. 2017
    (arXiv:1602.05629, section 3). Key: role (309 spellings; 256 have at least one window of 80). Roles of
    one name in several plays, "First Citizen", are one. Not LEAF's Shakespeare, which is ten times larger.
    download: fetch the file into the first folder if no folder has it.
    Raises DataError when the file is missing or damaged, ConfigError for a bad length or test_fraction.
    """
    file = "input.txt.gz"
    layouts = [("tiny-shakespeare", [file]), ("shakespeare", [file])]
    place = _place("shakespeare", folders, download, layouts)
    roles = read_speeches(find_file(place, file) or place / file)
    return next_character("shakespeare", roles, column="role", length=length, test_fraction=test_fraction)


DATASETS: dict[str, Callable[..., Dataset]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": cifar10,
    "pneumoniamnist": pneumoniamnist,
    "adult": adult,
    "credit-default": credit_default,
    "shakespeare": shakespeare,
    "csv": from_table,
    "parquet": from_table,
    "npz": from_npz,
    "sites": at_sites,
}


def _place(name: str, folders: Folders, fetch: bool, layouts: Sequence[tuple[str, Sequence[str]]]) -> Path:
    """Return the first folder that has a layout (subfolder, files), after a download if asked for."""
    roots = default_folders() if folders is None else tuple(folders)
    places = [(root / subfolder, files) for root in roots for subfolder, files in layouts]
    if name == "fashion-mnist":
        places.append((DEBIAN_FASHION, layouts[0][1]))
    hint = f"set COTERIE_DATA (or --data-dir) to the folder that has {layouts[0][0]}/"
    if name in HOMES:
        hint = f"set data.download = true to fetch it from its public home, or {hint}"
    try:
        return find_folder(name, places, hint)
    except DataError:
        if not (fetch and roots):
            raise
        return sources.download(name, roots[0])


def _idx(
    name: str, folders: Folders, fetch: bool, *, classes: Sequence[str], mean: float, std: float
) -> Dataset:
    files = [*HOMES[name][1]]
    place = _place(name, folders, fetch, [(name, files)])
    paths = [find_file(place, file) or place / file for file in files]
    arrays = [read_idx(path) for path in paths]
    for (images, labels), path in zip((arrays[:2], arrays[2:]), paths[1::2], strict=True):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{path}: labels of shape {list(labels.shape)} for images of shape {list(images.shape)}",
                "the files do not belong together, or are mixed up; get them again",
            )
    train, test = ((x[:, None], y.astype(np.int64)) for x, y in (arrays[:2], arrays[2:]))
    return _images(name, train, test, classes=classes, mean=[mean], std=[std])


def _medmnist(path: Path, part: str) -> Labelled:
    images, labels = f"{part}_images", f"{part}_labels"
    arrays = read_npz(path, [images, labels])
    return arrays[images][:, None], arrays[labels].reshape(-1).astype(np.int64)


def _images(
    name: str,
    train: Labelled,
    test: Labelled,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
) -> Dataset:
    """mean and std: of each channel, for values scaled to [0, 1]."""
    shift, scale = (torch.tensor(values).mul(255).reshape(-1, 1, 1) for values in (mean, std))
    parts = [Examples(torch.from_numpy(x), torch.from_numpy(y)) for x, y in (train, test)]
    return Dataset(name, parts[0], parts[1], tuple(classes), partial(normalise, mean=shift, std=scale))
