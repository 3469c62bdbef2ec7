"""Data sets from arrays in memory or in an NPZ file: `from_torch` and `from_npz`."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from coterie.core.errors import ConfigError, DataError
from coterie.data.sources import find_path
from coterie.data.splits import as_float, moments, normalise, split_rows
from coterie.data.types import Column, Dataset, Examples

CHANNELS = (1, 3, 4)


def from_npz(
    path: str | Path,
    *,
    x: str = "x",
    y: str = "y",
    keys: Sequence[str] = (),
    weight: str | None = None,
    test_path: str | Path | None = None,
    x_test: str | None = None,
    y_test: str | None = None,
    test_fraction: float = 0.2,
    test_seed: int = 0,
    task: Literal["auto", "classification", "regression"] = "auto",
    name: str | None = None,
    folders: Sequence[Path] | None = None,
) -> Dataset:
    """Load arrays from a NumPy archive; nothing in it is unpickled.

    x, y: names of the arrays [n, ...] and [n] or [n, 1]. keys, weight: names of arrays [n] for partitions
    and row weights. The test set is x_test and y_test in this file, or x and y in test_path, or else
    test_fraction of the rows, drawn with test_seed and stratified by class. task "auto": floats are a
    regression, anything else is classes.
    uint8 arrays of rank 3 or 4 are images: kept as uint8 [n, C, H, W] (channels last is recognised) and
    prepared to [0, 1]. Other inputs become float32; with rank 2 they are standardised by feature.
    Raises DataError that names the file and the array.
    """
    if (x_test is None) != (y_test is None):
        raise ConfigError("npz: x_test and y_test go together", "name both arrays")
    columns = (*keys, *([weight] if weight else []))
    file = find_path(path, folders)
    arrays = read_npz(file, [x, y, *columns])
    parts = [(arrays[x], arrays[y], {key: arrays[key] for key in columns})]
    if x_test is not None and y_test is not None:
        more = read_npz(file, [x_test, y_test])
        parts.append((more[x_test], more[y_test], {}))
    elif test_path is not None:
        more = read_npz(find_path(test_path, folders), [x, y, *columns])
        parts.append((more[x], more[y], {key: more[key] for key in columns}))
    classes, labels = _labels(f"{file}: array {y!r}", task, [target for _, target, _ in parts])
    examples = [
        Examples(torch.from_numpy(_inputs(file, inputs)), torch.from_numpy(target), kept)
        for (inputs, _, kept), target in zip(parts, labels, strict=True)
    ]
    train, test = examples[0], examples[-1]
    if len(examples) == 1:
        rows, held_out = split_rows(labels[0], test_fraction, seed=test_seed, stratify=classes is not None)
        train, test = train.take(rows), train.take(held_out)
    return Dataset(
        name or file.stem,
        train,
        test if len(test) else None,
        classes,
        _prepare_for(train.x, features=True),
        weight,
    )


def from_torch(train: Any, test: Any = None, *, name: str, classes: Sequence[str] | None = None) -> Dataset:
    """Stack a map-style torch Dataset whose items are (input, target) pairs.

    Inputs: tensors, arrays or PIL images of one shape. uint8 ones stay so and are prepared to [0, 1]; others
    become float32 and are used as they are. Targets: ints (classes, named by `classes`) or floats (a
    regression). Random transforms are drawn once, here.
    Raises DataError that names the item that cannot be stacked.
    """
    x, y = _stacked(train, f"{name}: train")
    parts = [Examples(x, y)]
    if test is not None:
        parts.append(Examples(*_stacked(test, f"{name}: test")))
    names = tuple(classes) if classes is not None else None
    if names is None and not y.is_floating_point():
        names = tuple(str(i) for i in range(max(int(part.y.max()) for part in parts) + 1))
    return Dataset(
        name, parts[0], parts[1] if len(parts) == 2 else None, names, _prepare_for(x, features=False)
    )


def _prepare_for(x: Tensor, *, features: bool) -> Any:
    if x.dtype == torch.uint8 and x.ndim > 2:
        return partial(normalise, mean=torch.tensor(0.0), std=torch.tensor(255.0))
    if features and x.ndim == 2:
        mean, std = (torch.from_numpy(part).float() for part in moments(x.double().numpy()))
        return partial(normalise, mean=mean, std=std)
    return as_float


def read_npz(path: Path, names: Sequence[str]) -> dict[str, Column]:
    """Read these arrays, all with as many rows as the first; nothing is unpickled.

    Raises DataError that names the file, the array and, for a NaN, the row.
    """
    name = "(the archive's index)"
    arrays: dict[str, Column] = {}
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(
                f"{path}: not a whole archive of arrays", "get it again, or save with numpy.savez"
            )
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise DataError(f"{path}: no array {name!r}", f"it has {', '.join(archive.files)}")
                arrays[name] = archive[name]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"{path}: array {name!r} cannot be read: {error}",
            "the file is damaged, or holds Python objects, which are refused; save plain arrays",
        ) from error
    for name in names:
        if arrays[name].ndim == 0 or arrays[name].dtype.kind not in "biufU":
            raise DataError(f"{path}: array {name!r} is {arrays[name].dtype} of shape {arrays[name].shape}")
        if len(arrays[name]) != len(arrays[names[0]]):
            raise DataError(
                f"{path}: array {name!r} has {len(arrays[name])} rows, "
                f"{names[0]!r} has {len(arrays[names[0]])}"
            )
        if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
            row = int(np.argwhere(~np.isfinite(arrays[name]))[0][0])
            raise DataError(f"{path}: array {name!r}: row {row + 1} has a NaN or infinite value")
    return arrays


def _inputs(path: Path, x: Column) -> Column:
    if x.dtype.kind == "U" or x.ndim < 2:
        raise DataError(f"{path}: the inputs are {x.dtype} of shape {x.shape}, expected numbers [n, ...]")
    if x.dtype == np.uint8 and x.ndim == 3:
        return x[:, None]
    if x.dtype == np.uint8 and x.ndim == 4:
        last = x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if last else x
    return x.astype(np.float32)


def _labels(where: str, task: str, parts: Sequence[Column]) -> tuple[tuple[str, ...] | None, list[Column]]:
    for part in parts:
        if part.size != len(part) or (part.dtype.kind == "U" and task == "regression"):
            raise DataError(f"{where} is {part.dtype} of shape {part.shape}, expected one target a row")
    parts = [part.reshape(-1) for part in parts]
    if task == "regression" or (task == "auto" and parts[0].dtype.kind == "f"):
        return None, [part.astype(np.float32) for part in parts]
    values, index = np.unique(np.concatenate(parts), return_inverse=True)
    ends = np.cumsum([len(part) for part in parts])
    labels = [index[end - len(part) : end] for part, end in zip(parts, ends, strict=True)]
    return tuple(map(str, values.tolist())), labels


def _stacked(items: Any, where: str) -> tuple[Tensor, Tensor]:
    if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
        raise DataError(
            f"{where}: not a map-style Dataset: it has no length or no items", "make it a list of pairs"
        )
    if len(items) == 0:
        raise DataError(f"{where}: the Dataset is empty")
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for i in range(len(items)):
        try:
            x, y = items[i]
            inputs.append(_tensor(x))
            targets.append(torch.as_tensor(y))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{where}: item {i} is not an (input, target) pair of numbers: {error}",
                "return a tensor and a number, for example with ToTensor() as the transform",
            ) from error
        first = inputs[0], targets[0]
        if inputs[-1].shape != first[0].shape or inputs[-1].dtype != first[0].dtype:
            raise DataError(
                f"{where}: item {i} is {inputs[-1].dtype} {list(inputs[-1].shape)}, "
                f"item 0 is {first[0].dtype} {list(first[0].shape)}",
                "resize, crop or pad the inputs to one shape in the Dataset's transform",
            )
        if targets[-1].numel() != 1 or targets[-1].is_floating_point() != first[1].is_floating_point():
            raise DataError(f"{where}: item {i} has the target {y!r}, expected one number like item 0's")
    x = torch.stack(inputs)
    y = torch.stack([target.reshape(()) for target in targets])
    return x if x.dtype == torch.uint8 else x.float(), y.float() if y.is_floating_point() else y.long()


def _tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    tensor = torch.from_numpy(np.array(x))
    if isinstance(x, Image):
        return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    return tensor
