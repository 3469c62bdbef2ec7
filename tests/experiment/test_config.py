from __future__ import annotations

import copy
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.errors import ConfigError
from coterie.experiment import starter
from coterie.experiment.config import data_folders, load, to_toml
from coterie.experiment.parts import load_object

RAW: dict[str, Any] = {
    "name": "mnist-dirichlet",
    "seed": 7,
    "data": {"dataset": "mnist", "partition": {"kind": "dirichlet", "clients": 100, "alpha": 0.3}},
    "model": {"kind": "cnn"},
    "algorithm": {"kind": "fedavg", "client": {"optimizer": "sgd", "lr": 0.1}, "server": {"lr": 1.0}},
    "schedule": {"kind": "synchronous", "rounds": 50, "cohort": 10},
    "transforms": [{"kind": "clip", "norm": 1.0}],
}
TOML = """\
name = "mnist-dirichlet"
seed = 7
[data]
dataset = "mnist"
partition = { kind = "dirichlet", clients = 100, alpha = 0.3 }
[model]
kind = "cnn"
[algorithm]
kind = "fedavg"
client = { optimizer = "sgd", lr = 0.1 }
server = { lr = 1.0 }
[schedule]
kind = "synchronous"
rounds = 50
cohort = 10
[[transforms]]
kind = "clip"
norm = 1.0
"""


def refused(source: Any, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return caught.value


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "experiment.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_file_and_a_dict_give_the_same_config_with_defaults_filled_in(tmp_path: Path):
    before = copy.deepcopy(RAW)
    config = load(RAW)
    path = written(tmp_path, TOML)
    assert config == load(path) == load(str(path))
    assert load(path).folder == tmp_path
    assert before == RAW
    assert config.data["holdout"] == 0.1
    assert (config.backend["kind"], config.backend["trainer"], config.backend["workers"]) == (
        "inprocess",
        "auto",
        1,
    )
    assert config.run == {
        "evaluate_every": 1,
        "evaluate_clients": 1000,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "tensorboard": False,
        "on_nan": "stop",
        "threads": 1,
    }


def test_a_dict_may_hold_what_python_likes_better():
    config = load(RAW | {"model": {"kind": "cnn", "channels": (8, 16), "file": Path("a"), "bias": None}})
    assert config.model == {"kind": "cnn", "channels": [8, 16], "file": "a", "bias": "none"}
    assert "model.file = " in refused(RAW | {"model": {"kind": "cnn", "file": object()}}).args[0]


words = st.text("abcdefgh_-.\"'\\ é\n", min_size=1, max_size=8)
values = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(words, values, max_size=4), st.integers())
def test_toml_round_trip(extra: dict[str, Any], seed: int):
    config = load(RAW | {"seed": seed, "model": {"kind": "cnn", "extra": extra}})
    text = to_toml(config)
    assert load(tomllib.loads(text)) == config
    assert to_toml(load(tomllib.loads(text))) == text


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (
            {"shedule": {}},
            "shedule: unknown key",
            "did you mean 'schedule'? a config takes: algorithm, backend",
        ),
        ({"folder": "x"}, "folder: unknown key", ""),
        ({"name": 3}, "name = 3: expected text", ""),
        ({"name": "a/b"}, "name = 'a/b'", "for example"),
        ({"name": "../x"}, "name = '../x'", ""),
        ({"seed": "x"}, "seed = 'x': expected a whole number", ""),
        ({"seed": True}, "seed = True: expected a whole number", ""),
        ({"compare": ["centralized"]}, "expected a list, each one of 'centralised', 'local_only'", ""),
        ({"model": "cnn"}, "model = 'cnn': expected a table", ""),
        ({"model": {}}, "model.kind: missing", ""),
        ({"model": {"kind": 3}}, "model.kind = 3: expected text", ""),
        (
            {"transforms": {"kind": "clip"}},
            "transforms = {'kind': 'clip'}: expected a list, each a table",
            "",
        ),
        ({"transforms": [{"norm": 1}]}, "transforms[0].kind: missing", ""),
        ({"algorithm": {"kind": "fedavg", "client": 3}}, "algorithm.client = 3: expected a table", ""),
        ({"data": {"partition": {"kind": "iid"}}}, "data.dataset: missing", ""),
        ({"data": {"dataset": "mnist"}}, "data.partition: missing", "a table"),
        ({"data": {"dataset": "mnist", "partition": {}}}, "data.partition.kind: missing", ""),
        ({"data": {"dataset": 3, "partition": {"kind": "iid"}}}, "data.dataset = 3: expected text", ""),
        ({"data": {**RAW["data"], "holdout": 1}}, "data.holdout = 1.0: must be", "0.1"),
        (
            {"run": {"evalute_every": 2}},
            "run.evalute_every: unknown key",
            "did you mean 'evaluate_every'? [run] takes",
        ),
        ({"run": {"evaluate_every": 0}}, "run.evaluate_every = 0: must be >= 1", ""),
        ({"run": {"on_nan": "hope"}}, "run.on_nan = 'hope': expected one of 'stop', 'drop'", ""),
        ({"run": {"tensorboard": 1}}, "run.tensorboard = 1: expected true or false", ""),
    ],
)
def test_bad_values(change: dict[str, Any], message: str, hint: str):
    error = refused(RAW | change)
    assert message in error.args[0]
    assert hint in error.hint


def test_missing_sections():
    for name in ("name", "data", "model", "algorithm", "schedule"):
        assert (
            refused({key: value for key, value in RAW.items() if key != name}).args[0] == f"{name}: missing"
        )


def test_files_that_cannot_be_read(tmp_path: Path):
    path = written(tmp_path, TOML)
    error = refused(tmp_path / "experimnt.toml")
    assert "there is no such file" in error.args[0]
    assert f"did you mean {path}?" in error.hint
    assert "coterie init" in refused(tmp_path / "nowhere" / "x.toml").hint
    assert "is a folder" in refused(tmp_path).args[0]
    assert "UTF-8" in refused(written(tmp_path, b"name = '\xff'")).args[0]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ('name = "x"\nseed 7\n', 2, 6),
        ("name = \n", 1, 8),
        ("a = 1\na = 2\n", 2, 6),
        ('name = "x', 1, 10),
        ("[data\n", 1, 6),
        ("x = [1,\n", 2, 1),
    ],
)
def test_syntax_errors_name_file_line_and_column(tmp_path: Path, text: str, line: int, column: int):
    path = written(tmp_path, text)
    error = refused(path)
    assert error.args[0].startswith(f"{path}:{line}:{column}: ")
    assert "(at" not in error.args[0]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("schedule.rounds=5", ["schedule", "rounds"], 5),
        ("schedule.rounds = 5", ["schedule", "rounds"], 5),
        ("data.partition.alpha=1e-1", ["data", "partition", "alpha"], 0.1),
        ("transforms.0.norm=2", ["transforms", 0, "norm"], 2),
        ("model.kind=model.py:Net", ["model", "kind"], "model.py:Net"),
        ("model.kind='cnn'", ["model", "kind"], "cnn"),
        ("model.file=a=b", ["model", "file"], "a=b"),
        ("model.wide=true", ["model", "wide"], True),
        ("model.sizes=[1, 2]", ["model", "sizes"], [1, 2]),
        ("data.partition={kind='iid', clients=3}", ["data", "partition"], {"kind": "iid", "clients": 3}),
        ("algorithm.kind=fed:avg", ["algorithm", "kind"], "fed:avg"),
        ("system.duration.kind=constant", ["system", "duration", "kind"], "constant"),
        ("model.note=1\nx=2", ["model", "note"], "1\nx=2"),
        ("model.empty=", ["model", "empty"], ""),
    ],
)
def test_overrides(override: str, path: list[Any], value: Any):
    found: Any = load(RAW, [override])
    for step in path:
        found = getattr(found, step) if found.__class__.__name__ == "Config" else found[step]
    assert found == value
    assert type(found) is type(value)


def test_later_overrides_win():
    assert load(RAW, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.dataset.x=1",
            "--set data.dataset.x=1: data.dataset = 'mnist' is not a table, so it has no 'x'",
        ),
        ("seed.a.b=1", "seed = 7 is not a table"),
        ("transforms.1.norm=2", "transforms has 1 entries"),
        ("transforms.norm=2", "transforms has 1 entries"),
        ("transforms.-1.norm=2", "transforms has 1 entries"),
        ("seed", "expected a.b=value"),
        ("=1", "expected a.b=value"),
        ("a..b=1", "expected a.b=value"),
        ("schedul.rounds=5", "schedul: unknown key"),
        ("seed=007", "seed = '007': expected a whole number"),
    ],
)
def test_bad_overrides(override: str, message: str):
    assert message in refused(RAW, override).args[0]


def test_data_folders(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("COTERIE_DATA", os.pathsep.join(["/a", "", "~/b"]))
    assert data_folders() == (Path("/a"), Path("/home/someone/b"))
    assert data_folders(Path("~/c")) == (Path("/home/someone/c"),)
    monkeypatch.setenv("COTERIE_DATA", "")
    assert data_folders() == (Path("data"), Path("/home/someone/.cache/coterie/data"))


def test_the_starter_is_a_config_with_a_comment_on_every_line_and_a_model(tmp_path: Path):
    config, model = starter.write(tmp_path / "new" / "project")
    settings = load(config)
    lines = [line for line in config.read_text().splitlines() if "=" in line and not line.startswith("#")]
    assert len(lines) > 15
    assert all("  # " in line for line in lines)
    options = {name: value for name, value in settings.model.items() if name != "kind"}
    net = load_object(settings.model["kind"], "model.kind", settings.folder)(
        input_shape=(1, 8, 8), outputs=10, **options
    )
    assert sum(each.numel() for each in net.parameters()) == 65 * 64 + 65 * 10
    model.unlink()
    with pytest.raises(ConfigError, match="is there already"):
        starter.write(config.parent)
    assert not model.exists()
