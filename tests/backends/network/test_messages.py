"""Bytes become messages by one door, and nothing else comes out of it."""

import importlib.util
import json
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.backends.network import BadMessage, messages, parse
from coterie.storage import Blob

FUZZ = Path(__file__).parents[2] / "faults" / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

BLOB = Blob("a" * 64, 7)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.fractions()
CONFIGS = st.dictionaries(
    st.text(),
    st.recursive(PLAIN, lambda each: st.lists(each) | st.lists(each).map(tuple), max_leaves=8),
    max_size=5,
)


@pytest.mark.parametrize("message", fuzz.SEEDS, ids=lambda message: message.message)
def test_a_message_comes_back(message):
    assert repr(parse(bytes(message))) == repr(message)


def test_the_fuzzer_knows_every_message():
    assert {type(message) for message in fuzz.SEEDS} == set(messages.Message.__args__)


@given(config=CONFIGS)
def test_a_config_comes_back_exactly(config):
    message = messages.Assign(run="r", kind="k", version=0, round=0, config=config, down=BLOB, tasks=[])
    assert repr(parse(bytes(message)).config) == repr(config)


def test_mutated_messages_and_chunks_are_refused_or_are_others():
    assert 0 < fuzz.fuzz(20_000) < 20_000


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused(data):
    with pytest.raises(BadMessage):
        parse(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)


@given(value=JSON, kind=st.sampled_from(sorted(json.loads(bytes(each))["message"] for each in fuzz.SEEDS)))
def test_any_json_is_refused(value, kind):
    value = {**value, "message": kind} if isinstance(value, dict) else value
    with pytest.raises(BadMessage):
        parse(json.dumps(value).encode())


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("taken", {"run": "../elsewhere"}),
        ("taken", {"run": ".hidden"}),
        ("taken", {"run": "a\n"}),
        ("taken", {"id": -1}),
        ("taken", {"id": True}),
        ("taken", {"id": 1.0}),
        ("taken", {"extra": 1}),
        ("welcome", {"silence": float("nan")}),
        ("welcome", {"silence": 0.0}),
        ("want", {"digest": "A" * 64}),
        ("offer", {"up": ["a" * 64, 2**60]}),
        ("offer", {"up": ["a" * 63, 1]}),
        ("offer", {"up": ["a" * 64, 0]}),
        ("assign", {"tasks": [[1, "c", None, None]] * (messages.ROWS + 1)}),
        ("assign", {"tasks": [[1, "", None, None]]}),
        ("assign", {"config": {"lr": 0.1}}),
        ("assign", {"config": '{"tensor": "0"}'}),
        ("assign", {"config": "[" * 100_000}),
        ("assign", {"config": "[1]"}),
        ("failed", {"reason": "x" * 4001}),
        ("hello", {"protocol": [1]}),
        ("answered", {"weight": "1"}),
    ],
)
def test_what_is_out_of_bounds_is_refused_and_named(what, change):
    (value,) = (json.loads(bytes(each)) for each in fuzz.SEEDS if each.message == what)
    with pytest.raises(BadMessage, match=next(iter(change))):
        parse(json.dumps({**value, **change}).encode())


def test_nan_is_allowed_only_where_a_plan_judges_it():
    message = messages.Answered(
        run="r", id=1, version=0, up=BLOB, weight=float("inf"), metrics={"l": float("nan")}
    )
    again = parse(bytes(message))
    assert again.weight == float("inf")
    assert again.metrics["l"] != again.metrics["l"]


def test_what_is_larger_than_a_frame_is_refused_before_it_is_read():
    with pytest.raises(BadMessage, match="at most"):
        parse(b" " * (messages.LETTER + 1))
    with pytest.raises(BadMessage, match="at most"):
        bytes(messages.Dropped(run="r", ids=[2**52] * 90_000))


def test_tensors_belong_into_blobs():
    import torch

    message = messages.Assign(
        run="r",
        kind="k",
        version=0,
        round=0,
        config={"x": torch.ones(1), "y": Fraction(1, 3)},
        down=BLOB,
        tasks=[],
    )
    with pytest.raises(Exception, match="tensors"):
        bytes(message)


def test_text_is_cut_to_what_may_travel():
    assert messages.line("\ud800" + "x" * 9000) == "?" + "x" * 3999


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    for name in [name for name in sys.modules if name.startswith("coterie.backends.network")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(Exception, match=r"pip install 'coterie\[deploy\]'"):
        importlib.import_module("coterie.backends.network")
