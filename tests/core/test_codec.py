import json
import math
import struct
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.codec import MAX_DEPTH, decode, encode
from coterie.core.types import Reply, Task

DTYPES = [
    *[torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64],
    *[torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool],
]


def bits(tensor):
    """The elements' bytes by way of Python lists of the tensor itself, not of the code under test."""
    raw = torch.empty(tensor.shape, dtype=tensor.dtype)
    raw.copy_(tensor)
    return bytes(raw.untyped_storage())


def same(a, b):
    """Exactly the same: types, order of keys, bits of floats and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        keys = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return keys and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, Task | Reply):
        return all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a == b


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    size = dtype.itemsize * count
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(b & 1 for b in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=dtype) if count else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.fractions()
    | st.binary(min_size=8, max_size=8).map(lambda raw: struct.unpack("d", raw)[0])
)
keys = st.text(max_size=4) | st.integers(-(2**60), 2**60)
ids = st.integers(0, 2**60)


def containers(child):
    task = st.builds(
        Task,
        id=ids,
        client=st.text(max_size=5),
        version=ids,
        round=ids,
        down=child,
        config=st.dictionaries(st.text(max_size=3), plain, max_size=2),
        memory=st.none() | ids,
        thread=st.none() | ids,
    )
    reply = st.builds(
        Reply,
        task=task,
        up=child,
        weight=st.floats() | st.integers() | st.fractions(),
        metrics=st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
        samples=ids,
        answers=st.lists(st.tuples(st.text(max_size=3), ids), max_size=2).map(tuple),
    )
    lists = st.lists(child, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(keys, child, max_size=4) | task | reply


trees = st.recursive(plain | tensors(), containers, max_leaves=12)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_decode_undoes_encode_exactly_also_through_json(tree):
    structure, found = encode(tree)
    assert same(decode(structure, found), tree)
    text = json.dumps(structure, allow_nan=False)
    assert same(decode(json.loads(text), found), tree)
    assert all(t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes for t in found.values())


def test_numbers_json_would_change():
    huge = 7**20_000  # more decimal digits than Python prints
    nan = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    tree = [
        huge,
        -huge,
        2**53,
        2**53 + 1,
        -0.0,
        5e-324,
        math.inf,
        -math.inf,
        nan,
        1.0,
        1,
        True,
        Fraction(huge, 3),
    ]
    text = json.dumps(encode(tree)[0])
    assert same(decode(json.loads(text), {}), tree)
    assert same(
        decode(json.loads(text, parse_int=lambda digits: int(float(digits))), {}), tree
    )  # as JavaScript


def test_keys_keep_their_type_and_strings_that_look_like_tags_are_strings():
    tree = {1: "a", "1": "b", "tensor": "0", "dict": {"int": "0x1"}, "\ud800": {"tuple": []}}
    assert same(decode(json.loads(json.dumps(encode(tree)[0])), {}), tree)


def test_one_tensor_object_is_stored_once_and_comes_back_as_one():
    shared, equal = torch.ones(3), torch.ones(3)
    structure, found = encode({"a": shared, "b": (shared, equal)})
    assert len(found) == 2
    tree = decode(structure, found)
    assert tree["a"] is tree["b"][0]
    assert tree["a"] is not tree["b"][1]


def test_views_are_copied_out_of_their_storage():
    base = torch.arange(1_000.0)
    tree = {
        "slice": base[3:5],
        "whole": base,
        "again": base[:],
        "transposed": base.reshape(50, 20).T,
        "expanded": torch.ones(1).expand(4),
        "conj": torch.tensor([1 + 2j]).conj(),
        "neg": torch.tensor([1 + 2j]).conj().imag,
        "weight": torch.nn.Parameter(torch.ones(2)),
    }
    structure, found = encode(tree)
    assert same(decode(structure, found), tree | {"weight": torch.ones(2)})
    storages = [t.untyped_storage() for t in found.values()]
    assert all(s.nbytes() == t.nbytes for s, t in zip(storages, found.values(), strict=True))
    assert len({s.data_ptr() for s in storages}) == len(storages)
    assert not any(t.requires_grad or t.is_conj() or t.is_neg() for t in found.values())


@pytest.mark.parametrize(
    ("tree", "path"),
    [
        ({"a": [0, {1, 2}]}, "/a/1"),
        ({"a": {(1, 2): 0}}, "/a"),
        ({True: 0}, "/"),
        ({"a": {"b": np.float64(1.0)}}, "/a/b"),
        ((0, OrderedDict(a=1)), "/1"),
        ([b"bytes"], "/0"),
        ({"a": torch.ones(2).to_sparse()}, "/a"),
        ({"a": torch.ones(2, device="meta")}, "/a"),
        (Task(id="1", client="c", version=0, round=0, down=None), "/"),
        ([Task(id=1, client="c", version=0, round=0, down={"w": {1}})], "/0/down/w"),
    ],
)
def test_what_has_no_exact_encoding_is_refused_with_its_path(tree, path):
    with pytest.raises(TypeError, match=f"at {path}( is|$)"):
        encode(tree)


def nested(depth):
    tree = 0
    for _ in range(depth):
        tree = {2**60: tree}
    return tree


def test_depth_is_bounded_and_equal_on_both_sides():
    assert same(decode(encode(nested(MAX_DEPTH))[0], {}), nested(MAX_DEPTH))
    with pytest.raises(TypeError, match="levels deep"):
        encode(nested(MAX_DEPTH + 1))
    deep = []
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(ValueError, match="levels deep"):
        decode(deep, {})


TASK = encode(Task(id=1, client="c", version=0, round=0, down=None))[0]["task"]
REPLY = encode(Reply(Task(1, "c", 0, 0, None), None, 1.0))[0]["reply"]


@pytest.mark.parametrize(
    "structure",
    [
        *[{}, {"tuple": [], "dict": []}, {"pickle": "x"}, math.nan, math.inf, object(), b"x", {1: 2}],
        *[
            {"tensor": "1"},
            {"tensor": []},
            {"tensor": None},
            {"tuple": 3},
            {"tuple": {"a": 1}},
            {"tuple": "ab"},
        ],
        *[{"dict": 3}, {"dict": [[1]]}, {"dict": [[1, 2, 3]]}, {"dict": [[None, 2]]}, {"dict": [[True, 2]]}],
        *[
            {"dict": [["a", 1], ["a", 2]]},
            {"dict": {"ab": 1}},
            {"dict": [[[], 2]]},
            {"dict": [[{"tuple": []}, 2]]},
        ],
        *[{"int": 3}, {"int": "z"}, {"int": None}, {"float": "00"}, {"float": 1.0}, {"float": "zz"}],
        *[{"fraction": ["0x1", "0x0"]}, {"fraction": ["0x1"]}, {"fraction": [1, 2]}, {"fraction": 3}],
        *[{"task": []}, {"task": {}}, {"task": TASK | {"extra": 1}}, {"task": TASK | {"id": "1"}}],
        *[{"task": TASK | {"id": True}}, {"task": TASK | {"config": None}}, {"task": TASK | {"memory": 1.0}}],
        *[
            {"reply": REPLY | {"task": None}},
            {"reply": REPLY | {"weight": "1"}},
            {"reply": REPLY | {"answers": []}},
        ],
        {"reply": REPLY | {"answers": {"tuple": [{"tuple": ["c", "1"]}]}}},
        {"reply": {"task": 1}},
    ],
)
def test_decode_refuses_what_encode_never_writes(structure):
    with pytest.raises(ValueError, match="decode: "):
        decode([structure], {})


def test_decode_refuses_left_over_and_false_tensors():
    with pytest.raises(ValueError, match="no leaf refers to"):
        decode([], {"0": torch.ones(1)})
    with pytest.raises(ValueError, match="missing"):
        decode({"tensor": "0"}, {"0": "not a tensor"})


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda child: (
        st.lists(child, max_size=4)
        | st.dictionaries(
            st.sampled_from(["tuple", "dict", "int", "task", "tensor", "fraction", "id"]), child, max_size=2
        )
    ),
    max_leaves=15,
)


@settings(max_examples=300, deadline=None)
@given(json_like)
def test_decode_of_anything_is_a_tree_or_a_value_error(structure):
    try:
        tree = decode(structure, {})
    except ValueError:
        return
    assert same(decode(encode(tree)[0], {}), tree)
