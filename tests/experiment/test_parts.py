from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.errors import ConfigError
from coterie.experiment.parts import (
    arguments,
    build,
    call,
    convert,
    describe,
    expected,
    load_object,
    nearest,
    plain,
    resolve,
    split,
)


def synchronous(
    *, key: bytes, rounds: int, cohort: int | float = 10, order: Literal["fixed", "shuffled"] = "shuffled"
):
    """Wait for the whole cohort.

    More words.
    """
    if rounds < 0:
        raise ConfigError(f"synchronous(rounds={rounds}): must be >= 0", "0 only evaluates")
    return ("synchronous", key, rounds, cohort, order)


def buffered(
    *, size: int, steps: tuple[int, ...] = (1, 2), discount: Callable[[int], float] | None = None, **more: Any
):
    """Fill a buffer."""
    return ("buffered", size, steps, discount, more)


@dataclass
class Gossip:
    """Mix with neighbours."""

    degree: int = 2
    where: Path = Path("here")


TABLE = {"synchronous": synchronous, "buffered": buffered, "gossip": Gossip}
KEY = {"key": b"k"}


def error_of(call: Callable[[], Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value


def test_build_calls_the_kind_with_its_keys_and_what_is_provided():
    section = {"kind": "synchronous", "rounds": 3}
    assert build(TABLE, section, "schedule", KEY) == ("synchronous", b"k", 3, 10, "shuffled")
    assert section == {"kind": "synchronous", "rounds": 3}
    assert build(TABLE, {"kind": "gossip", "degree": 4}, "schedule", KEY) == Gossip(
        4
    )  # takes no key, gets none
    assert build(TABLE, {"name": "gossip"}, "schedule", by="name") == Gossip()


@pytest.mark.parametrize(
    ("section", "message", "hint"),
    [
        (
            {"kind": "synchronus", "rounds": 1},
            "schedule.kind = 'synchronus': no such kind",
            "did you mean 'synchronous'?",
        ),
        ({"kind": "zzz"}, "schedule.kind = 'zzz': no such kind", "there are: buffered, gossip, synchronous"),
        ({"kind": 3}, "schedule.kind = 3", "there are:"),
        ({"kind": ["gossip"]}, "schedule.kind = ['gossip']", "there are:"),
        ({"rounds": 1}, "schedule.kind: missing", "buffered, gossip, synchronous"),
        ({"kind": "synchronous"}, "schedule.rounds: missing", "a whole number"),
        (
            {"kind": "synchronous", "round": 1},
            "schedule.round: unknown key",
            "did you mean 'rounds'? synchronous takes: cohort, order, rounds",
        ),
        ({"kind": "synchronous", "rounds": 1, "key": "x"}, "schedule.key: unknown key", "synchronous takes"),
        ({"kind": "synchronous", "rounds": "fast"}, "schedule.rounds = 'fast': expected a whole number", ""),
        ({"kind": "synchronous", "rounds": True}, "schedule.rounds = True: expected a whole number", ""),
        ({"kind": "synchronous", "rounds": 2.0}, "schedule.rounds = 2.0: expected a whole number", ""),
        (
            {"kind": "synchronous", "rounds": 1, "cohort": "all"},
            "schedule.cohort = 'all': expected a whole number or a number",
            "",
        ),
        (
            {"kind": "synchronous", "rounds": 1, "order": "best"},
            "schedule.order = 'best': expected one of 'fixed', 'shuffled'",
            "",
        ),
        (
            {"kind": "synchronous", "rounds": -1},
            "schedule: synchronous(rounds=-1): must be >= 0",
            "0 only evaluates",
        ),
        (
            {"kind": "buffered", "size": 1, "steps": [1, 2.5]},
            "schedule.steps = [1, 2.5]: expected a list, each a whole number",
            "",
        ),
        (
            {"kind": "buffered", "size": 1, "discount": "x"},
            "schedule.discount = 'x': expected Callable or 'none'",
            "",
        ),
        ({"kind": "gossip", "degre": 1}, "schedule.degre: unknown key", "did you mean 'degree'?"),
    ],
)
def test_bad_sections(section: dict[str, Any], message: str, hint: str):
    for use in (build, resolve):
        if use is resolve and section.get("rounds") == -1:
            continue  # only calling the function finds that out
        error = error_of(lambda use=use: use(TABLE, section, "schedule", KEY))
        assert message in error.args[0]
        assert hint in error.hint


def test_open_functions_take_any_key_but_not_what_is_provided():
    assert build(TABLE, {"kind": "buffered", "size": 1, "any": [2]}, "s") == (
        "buffered",
        1,
        (1, 2),
        None,
        {"any": [2]},
    )
    assert (
        "s.key: unknown"
        in error_of(lambda: build(TABLE, {"kind": "buffered", "size": 1, "key": 2}, "s", KEY)).args[0]
    )


def test_errors_of_the_function_keep_their_type_and_get_a_place_once():
    class Special(ConfigError):
        pass

    def outer(*, message: str):
        raise Special(message, "hint")

    for message, shown in [
        ("bad", "a.b: bad"),
        ("a.b.c = 3: bad", "a.b.c = 3: bad"),
        ("a.bc: bad", "a.b: a.bc: bad"),
    ]:
        error = error_of(lambda message=message: call(outer, {"message": message}, "a.b"))
        assert (type(error), error.args[0], error.hint) == (Special, shown, "hint")
    with pytest.raises(ZeroDivisionError):  # not ours to explain
        call(lambda: 1 / 0, {}, "a")


def test_resolve_fills_in_what_a_config_can_express_and_is_stable():
    full = resolve(TABLE, {"kind": "buffered", "size": 1, "extra": 2}, "s")
    assert full == {
        "kind": "buffered",
        "size": 1,
        "steps": [1, 2],
        "extra": 2,
    }  # discount = None cannot be written
    assert resolve(TABLE, full, "s") == full
    assert resolve(TABLE, {"kind": "gossip"}, "s") == {"kind": "gossip", "degree": 2, "where": "here"}
    full = resolve(TABLE, {"kind": "synchronous", "rounds": 2}, "s", KEY)
    assert full == {"kind": "synchronous", "rounds": 2, "cohort": 10, "order": "shuffled"}
    assert build(TABLE, full, "s", KEY) == build(TABLE, {"kind": "synchronous", "rounds": 2}, "s", KEY)


def test_describe_lists_kinds_summaries_and_keys():
    first = describe(TABLE, KEY)[0]
    assert (first.kind, first.summary) == ("synchronous", "Wait for the whole cohort.")
    assert [tuple(each) for each in first.settings] == [
        ("rounds", "a whole number", None, True),
        ("cohort", "a whole number or a number", 10, False),
        ("order", "one of 'fixed', 'shuffled'", "shuffled", False),
    ]


def test_split_shares_a_section_out_by_parameter_name():
    def sgd(lr: float, momentum: float = 0.0): ...
    def local(lr: float = 0.1, epochs: int = 1, optimizer: Any = None): ...
    def rest(**more: Any): ...

    section = {"lr": 1, "momentum": 0.5, "epochs": 2}
    assert split([sgd, local], section, "c", ("optimizer",)) == [
        {"lr": 1.0, "momentum": 0.5},
        {"lr": 1.0, "epochs": 2},
    ]
    error = error_of(lambda: split([sgd, local], {"lr": 1, "epoch": 2}, "c", ("optimizer",)))
    assert error.hint == "did you mean 'epochs'? sgd with local takes: epochs, lr, momentum"
    assert "c.lr: missing" in error_of(lambda: split([local, sgd], {"epochs": 2}, "c")).args[0]
    assert split([sgd, rest], {"lr": 1, "x": 2}, "c") == [{"lr": 1.0}, {"x": 2}]


@pytest.mark.parametrize(
    ("annotation", "value", "result"),
    [
        (float, 1, 1.0),
        (float, math.inf, math.inf),
        (int, 10**30, 10**30),
        (bool, True, True),
        (Path, "a/b", Path("a/b")),
        (tuple[float, float], [1, 2.5], (1.0, 2.5)),
        (Sequence[str], ["a"], ["a"]),
        (Mapping[str, Any], {"a": {"b": [1, "x"]}}, {"a": {"b": [1, "x"]}}),
        (dict[str, int], {"a": 1}, {"a": 1}),
        (float | None, "none", None),
        (Literal["a", 3], 3, 3),
        (Any, object, object),
        ("Unresolved", 3, 3),
    ],
)
def test_convert_accepts(annotation: Any, value: Any, result: Any):
    assert convert(value, annotation, "x") == result
    assert type(convert(value, annotation, "x")) is type(result)


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (float, "1", "a number"),
        (float, True, "a number"),
        (float, "none", "a number"),
        (int, "1", "a whole number"),
        (str, 1, "text"),
        (bool, 1, "true or false"),
        (bool, "yes", "true or false"),
        (Path, 1, "a path"),
        (int | None, "x", "a whole number or 'none'"),
        (Literal["a", "b"], "c", "one of 'a', 'b'"),
        (tuple[int, str], [1], "a list of 2, each a whole number or text"),
        (list[Any], {}, "a list, each any value"),
        (list, 3, "a list"),
        (Sequence[int], "12", "a list, each a whole number"),
        (dict[str, Any], [], "a table"),
        (ConfigError, "x", "ConfigError"),
    ],
)
def test_convert_refuses(annotation: Any, value: Any, words: str):
    assert error_of(lambda: convert(value, annotation, "a.x")).args[0] == f"a.x = {value!r}: expected {words}"
    assert expected(annotation) == words


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)  # lone surrogates are not text
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(text, JSON, max_size=4))
def test_tables_pass_through_unchanged(table: dict[str, Any]):
    converted = convert(table, dict[str, Any], "x")
    assert json.dumps(converted) == json.dumps(table)  # tells 1 from 1.0 and True
    assert json.dumps(plain(table, "x")) == json.dumps(table)


def test_parameters_whose_types_are_unknown_here_stay_unchecked():
    def half(a: Unknown, b: int): ...  # noqa: F821

    assert arguments(half, {"a": "x", "b": "y"}, "s") == {"a": "x", "b": "y"}


def test_plain_says_where_a_value_does_not_fit_a_config():
    assert plain({"a": (1, Path("b"), None)}, "x") == {"a": [1, "b", "none"]}
    assert "x.a[1] = " in error_of(lambda: plain({"a": [1, object()]}, "x")).args[0]
    assert "x.3: the key 3 is not text" in error_of(lambda: plain({3: 1}, "x")).args[0]


def test_nearest():
    assert nearest("Batch-Size", ["epochs", "batch_size"]) == "batch_size"
    assert nearest("zzz", ["epochs", "batch_size"]) is None
    assert nearest("a", []) is None


def test_load_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    (tmp_path / "layers.py").write_text("WIDTH = 3\n")
    file = tmp_path / "model.py"
    file.write_text("from layers import WIDTH\n\nclass Net:\n    width = WIDTH\n\nsize = 3\n")
    net = load_object("model.py:Net", "model.kind", tmp_path)
    assert net.width == 3
    assert load_object("model.py:Net", "model.kind", tmp_path) is net
    file.write_text("class Net:\n    width = 5\n")
    assert load_object("model.py:Net", "model.kind", tmp_path).width == 5
    assert load_object("json:dumps", "model.kind") is json.dumps
    for spec, message, hint in [
        (
            "model.py:Nte",
            "model.kind = 'model.py:Nte': model.py has no class or function 'Nte'",
            "did you mean 'Net'?",
        ),
        ("modle.py:Net", "there is no file", "folder of the config"),
        ("jsonn.x:dumps", "there is no module 'jsonn'", "package.module:Name"),
        ("json:dump_s", "has no class", "did you mean 'dumps'?"),
        ("json:__name__", "has no class", ""),
        ("json:", "has no class", ""),
    ]:
        error = error_of(lambda spec=spec: load_object(spec, "model.kind", tmp_path))
        assert message in error.args[0]
        assert hint in error.hint
    (tmp_path / "needs_more.py").write_text("import no_such_module_here\n")
    for spec in ("needs_more.py:Net", "needs_more:Net"):  # the user's own import error is theirs to see
        with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
            load_object(spec, "model.kind", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_object("model.py:Net", "model.kind", tmp_path / "runs").width == 5
