"""Files that are either the old one or the new one, never half of each; and trees in such files.

A tree is one safetensors file that any safetensors reader opens: tensors "0", "1", ..., the tree's shape as
JSON bytes in the tensor "structure", and in the header's metadata "meta" (JSON) and "sha256" over all else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coterie.core.codec import decode, encode
from coterie.core.errors import RunError
from coterie.core.trees import raw_bytes
from coterie.core.types import Tree

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_HEADER_LIMIT = 100_000_000  # bytes; readers refuse more, so the tree's shape is not in the header
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomic(
    path: Path, data: bytes | Callable[[BinaryIO], None], *, scratch: Path | None = None
) -> None:
    """Replace `path` by `data`, or by what `data` writes, durably: a crash leaves the old or the new file.

    scratch: folder for the temporary file, on the same file system; by default the one of `path`.
    Raises RunError when the disk is full or refuses; the old file stays and the temporary one goes.
    """
    temporary = (scratch or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        written = temporary.stat().st_size if temporary.exists() else 0
        raise write_error(path, error, written) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError, written: int) -> RunError:
    """The RunError for a failed write of `path`, of which `written` bytes had fitted."""
    if error.errno in _FULL:
        return RunError(
            f"disk full: {path} did not fit, there was room for {written} bytes of it",
            "free some space, then resume the run from its last checkpoint",
        )
    return RunError(f"cannot write {path}: {error.strerror}", "check the folder's owner, mode and disk")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably; nothing happens when it is there."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except OSError as error:
        raise write_error(folder, error, 0) from error


def remove_temporary(folder: Path) -> None:
    """Remove what killed writers left in a folder. Only for the one process that writes there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def save_tree(path: Path, tree: Tree, meta: Mapping[str, Any], *, scratch: Path | None = None) -> None:
    """Write a tree (`core.codec` says what may be in it) and its JSON metadata atomically, with a checksum.

    Tensors are streamed from where they are; only views and tensors on other devices are copied first.
    Raises RunError as `write_atomic` does, TypeError for what cannot be stored, ValueError for NaN in `meta`.
    """
    tensors = _tensors(tree)
    text = json.dumps(dict(meta), allow_nan=False)
    header = _header(tensors, {"meta": text, "sha256": _digest(text, tensors)})

    def stream(file: BinaryIO) -> None:
        file.write(header)
        for tensor in tensors.values():
            file.write(raw_bytes(tensor))

    write_atomic(path, stream, scratch=scratch)


def dump_tree(tree: Tree) -> Iterator[bytes | memoryview]:
    """The bytes of such a file, part by part, without metadata and checksum: for who keeps a digest himself.

    The same tree gives the same bytes. Raises TypeError for what cannot be stored.
    """
    tensors = _tensors(tree)
    yield _header(tensors, {})
    yield from map(raw_bytes, tensors.values())


def open_tree(path: Path) -> Tree:
    """Read what `dump_tree` gave and its keeper has verified. Safe for bytes that anybody wrote.

    The tensors are mapped: they are read when they are used, and writing to them does not change the file.
    Raises RunError naming the file and what is wrong when it is missing, cut short or not ours.
    """
    return _decoded(path, _read(path)[0])


def load_tree(path: Path) -> tuple[Tree, dict[str, Any]]:
    """Read a tree and its metadata back; the tensors are ordinary ones, in memory of their own.

    Raises RunError naming the file and what is wrong when it is missing, cut short, damaged or not ours.
    """
    mapped, metadata = _read(path)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # later pages would be unverified
    if not {"meta", "sha256"} <= metadata.keys():
        raise _damaged(path, "it was not written by Coterie")
    if _digest(metadata["meta"], tensors) != metadata["sha256"]:
        raise _damaged(path, "its SHA-256 differs from the one it was written with")
    try:
        return _decoded(path, tensors), json.loads(metadata["meta"])
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _tensors(tree: Tree) -> dict[str, Tensor]:
    """What the file of a tree holds. The widest elements first, so that all are aligned in a mapped file."""
    structure, tensors = encode(tree)
    shape = bytearray(json.dumps(structure, separators=(",", ":"), allow_nan=False).encode())
    tensors["structure"] = torch.frombuffer(shape, dtype=torch.uint8)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"safetensors files cannot hold {tensor.dtype} (tensor {name})")
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"it is cut short or no safetensors file ({error})") from error
    return tensors, metadata


def _decoded(path: Path, tensors: dict[str, Tensor]) -> Tree:
    if "structure" not in tensors:
        raise _damaged(path, "it was not written by Coterie")
    structure = tensors.pop("structure")
    try:
        return decode(json.loads(bytes(raw_bytes(structure))), tensors)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> RunError:
    return RunError(f"{path} is damaged: {reason}", "use an older checkpoint or a copy of the file")


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file: its length as a little-endian u64, then JSON padded to 8 bytes.

    Written here because the library's writer copies all tensors twice in memory, or renames a temporary
    file of its own that we could not flush.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        shape = list(tensor.shape)
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise RunError(f"{len(tensors)} tensors are too many for one file", "stack small tensors")
    return struct.pack("<Q", len(text)) + text


def _digest(meta: str, tensors: Mapping[str, Tensor]) -> str:
    out = hashlib.sha256(f"coterie/1\0{len(meta)}\0{meta}".encode())
    for name, tensor in sorted(tensors.items()):
        out.update(f"\0{name}\0{_DTYPES[tensor.dtype]}\0{tuple(tensor.shape)}\0".encode())
        out.update(raw_bytes(tensor))
    return out.hexdigest()
