"""Trees <-> (JSON-able structure, named tensors): what files and messages carry instead of pickle (law 4).

None, bool, str, small ints and finite floats stand for themselves and a JSON array is a list. Everything
else is an object with one key, its tag: {"tuple": [...]}, {"dict": [[key, value], ...]}, {"int": "-0x2a"},
{"float": "7ff8000000000000"} (the IEEE 754 bits of NaN and the infinities), {"fraction": [num, den]},
{"tensor": name}, {"task": {...}}, {"reply": {...}}.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields
from fractions import Fraction
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from coterie.core.types import Reply, Task, Tree

MAX_DEPTH = 100  # far below the interpreter's own limit, which a hostile message must not reach
_SAFE_INT = 2**53  # every JSON reader keeps integers up to here
_RECORDS: dict[str, type[Task] | type[Reply]] = {"task": Task, "reply": Reply}
_PLAIN: dict[type, Callable[[Any], Any]] = {
    NoneType: lambda value: value,
    bool: lambda value: value,
    str: lambda value: value,
    int: lambda value: value if abs(value) <= _SAFE_INT else {"int": hex(value)},
    float: lambda value: value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()},
    Fraction: lambda value: {"fraction": [hex(value.numerator), hex(value.denominator)]},
}
_NUMBERS: dict[str, Callable[[Any], int | float | Fraction]] = {
    "int": lambda body: int(body, 16),
    "float": lambda body: float(struct.unpack(">d", bytes.fromhex(body))[0]),
    "fraction": lambda body: Fraction(int(body[0], 16), int(body[1], 16)),
}
_FIELD_TYPES: dict[str, tuple[type, ...]] = {  # `down` and `up` may be any tree
    **dict.fromkeys(["id", "version", "round", "samples"], (int,)),
    **dict.fromkeys(["memory", "thread"], (int, NoneType)),
    **dict.fromkeys(["client", "kind"], (str,)),
    **dict.fromkeys(["config", "metrics"], (dict,)),
    "task": (Task,),
    "weight": (float, int, Fraction),
    "answers": (tuple,),
}


def encode(tree: Tree) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into a structure for JSON and its tensors, each contiguous and on the CPU.

    A tensor object that occurs several times is stored once; a view is copied out of its storage. A tensor
    that owns its whole storage is not copied: use the result before the tree's tensors change. Gradients,
    device and `Parameter`-ness are not kept.
    Raises TypeError naming the path of a leaf or a key that has no exact encoding (subclasses such as
    OrderedDict or numpy.float64 included: they would come back as something else).
    """
    encoder = _Encoder()
    return encoder.node(tree, "", 0), encoder.tensors


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """Undo `encode`; the tree's tensors are the given ones. Safe on untrusted input: it builds data only.

    Raises ValueError for what `encode` cannot have written: unknown tags, missing or left-over tensors,
    a record's field of the wrong type.
    """
    decoder = _Decoder(tensors)
    tree = decoder.node(structure, "", 0)
    if left := sorted(set(tensors) - decoder.used):
        raise ValueError(f"decode: tensors that no leaf refers to: {left[:5]}")
    return tree


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}  # by id(): the caller's tree keeps the objects alive
        self._storages: set[int] = set()

    def node(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise TypeError(f"encode: more than {MAX_DEPTH} levels deep at {path[:200]}")
        kind = type(value)
        if kind in _PLAIN:
            return _PLAIN[kind](value)
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, path)}
        if kind is list or kind is tuple:
            nodes = [self.node(item, f"{path}/{index}", depth + 1) for index, item in enumerate(value)]
            return nodes if kind is list else {"tuple": nodes}
        if kind is dict:
            for key in value:
                if type(key) is not str and type(key) is not int:
                    raise TypeError(f"encode: key {key!r} at {path or '/'} is neither str nor int")
            items = value.items()
            return {"dict": [[_PLAIN[type(k)](k), self.node(v, f"{path}/{k}", depth + 1)] for k, v in items]}
        if kind is Task or kind is Reply:
            if problem := _misfit(value):
                raise TypeError(f"encode: {problem} at {path or '/'}")
            tag = "task" if kind is Task else "reply"
            names = [field.name for field in fields(value)]
            return {tag: {n: self.node(getattr(value, n), f"{path}/{n}", depth + 1) for n in names}}
        raise TypeError(f"encode: cannot encode {kind.__module__}.{kind.__qualname__} at {path or '/'}")

    def _tensor(self, tensor: Tensor, path: str) -> str:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        if not plain or tensor.is_quantized or tensor.is_meta:
            raise TypeError(
                f"encode: only plain dense tensors can be encoded, not {type(tensor).__name__} "
                f"({tensor.layout}, {tensor.dtype}, {tensor.device}) at {path or '/'}"
            )
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = flat.untyped_storage()
        if storage.nbytes() != flat.nbytes or storage.data_ptr() in self._storages:
            flat = flat.clone(memory_format=torch.contiguous_format)
        self._storages.add(flat.untyped_storage().data_ptr())
        name = self._names[id(tensor)] = str(len(self.tensors))
        self.tensors[name] = flat
        return name


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.used: set[str] = set()

    def node(self, node: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"decode: more than {MAX_DEPTH} levels deep at {path[:200]}")
        if node is None or isinstance(node, bool | str | int):
            return node
        if isinstance(node, float) and math.isfinite(node):
            return node
        if isinstance(node, list):
            return [self.node(item, f"{path}/{index}", depth + 1) for index, item in enumerate(node)]
        if isinstance(node, dict) and len(node) == 1:
            ((tag, body),) = node.items()
            try:
                return self._tagged(tag, body, path, depth)
            except (TypeError, AttributeError) as error:  # a body of the wrong shape
                raise ValueError(f"decode: malformed {tag!r} at {path or '/'}") from error
        raise ValueError(f"decode: {str(node)[:80]} at {path or '/'} has no meaning")

    def _tagged(self, tag: Any, body: Any, path: str, depth: int) -> Any:
        if tag == "tensor":
            if body not in self._tensors or not isinstance(self._tensors[body], Tensor):
                raise ValueError(f"decode: tensor {body!r} at {path or '/'} is missing")
            self.used.add(body)
            return self._tensors[body]
        if tag == "tuple" and isinstance(body, list):
            return tuple(self.node(body, path, depth))
        if tag == "dict":
            return self._dict(body, path, depth)
        if tag in _NUMBERS:
            try:
                return _NUMBERS[tag](body)
            except (ValueError, LookupError, ZeroDivisionError, struct.error) as error:
                raise ValueError(f"decode: malformed {tag!r} at {path or '/'}") from error
        if tag in _RECORDS:
            values = {name: self.node(item, f"{path}/{name}", depth + 1) for name, item in body.items()}
            if values.keys() != {field.name for field in fields(_RECORDS[tag])}:
                raise ValueError(f"decode: {sorted(values)} at {path or '/'} are not the fields of a {tag}")
            record = _RECORDS[tag](**values)
            if problem := _misfit(record):
                raise ValueError(f"decode: {problem} at {path or '/'}")
            return record
        raise ValueError(f"decode: unknown tag {tag!r} at {path or '/'}")

    def _dict(self, body: Any, path: str, depth: int) -> dict[str | int, Any]:
        if not isinstance(body, list) or any(type(pair) is not list or len(pair) != 2 for pair in body):
            raise ValueError(f"decode: malformed 'dict' at {path or '/'}")
        out: dict[str | int, Any] = {}
        for raw, item in body:
            key = self.node(raw, path, depth)
            if type(key) not in (str, int) or key in out:
                raise ValueError(f"decode: key {key!r} at {path or '/'} is no str or int, or comes twice")
            out[key] = self.node(item, f"{path}/{key}", depth + 1)
        return out


def _misfit(record: Task | Reply) -> str:
    """What is wrong with the types of a record's fields: peers send these, and plans trust them."""
    for field in fields(record):
        value = getattr(record, field.name)
        if type(value) not in _FIELD_TYPES.get(field.name, (type(value),)):
            return f"{type(record).__name__}.{field.name} is a {type(value).__name__}"
    if isinstance(record, Reply):
        for answer in record.answers:
            if type(answer) is not tuple or [type(part) for part in answer] != [str, int]:
                return "Reply.answers holds something other than (client, id)"
    return ""
