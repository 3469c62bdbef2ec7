import json
import math
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch

from coterie.core.errors import ConfigError, RunError
from coterie.core.types import Task
from coterie.storage import RunFolder, load_tree, save_tree
from coterie.storage.files import _DTYPES, write_atomic


def test_a_tree_comes_back_with_ordinary_writable_tensors(tmp_path):
    shared = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    tree = {
        "many": {str(d): torch.tensor([0, 1, 1]).to(d) for d in _DTYPES},
        "view": shared.T[1:],
        "task": Task(id=1, client="ü", version=2, round=3, down={"w": shared}),
        "again": shared,
        "empty": torch.ones(0, 3),
        "scalar": torch.tensor(2.5),
    }
    save_tree(tmp_path / "tree", tree, {"a": [1, None]})
    back, meta = load_tree(tmp_path / "tree")
    with (tmp_path / "tree").open("r+b") as file:  # what was verified must not change with the file
        file.write(bytes((tmp_path / "tree").stat().st_size))
    assert meta == {"a": [1, None]}
    assert back["task"].down["w"] is back["again"]
    for dtype, tensor in tree["many"].items():
        assert back["many"][dtype].dtype == tensor.dtype
        assert torch.equal(back["many"][dtype].view(torch.uint8), tensor.view(torch.uint8))
    for name in ("view", "again", "empty", "scalar"):
        assert torch.equal(back[name], tree[name])
        assert back[name].untyped_storage().nbytes() == tree[name].nbytes
        back[name].add_(1)


def test_another_reader_of_the_format_finds_the_same_tensors(tmp_path):
    tree = [torch.ones(3, dtype=torch.bool), torch.arange(5.0, dtype=torch.float64), torch.ones(2).bfloat16()]
    save_tree(tmp_path / "tree", tree, {})
    raw = (tmp_path / "tree").read_bytes()
    found = safetensors.torch.load(raw)
    assert all(torch.equal(found[str(i)], tensor) for i, tensor in enumerate(tree))
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert entries["1"]["data_offsets"][0] == 0  # float64 first: aligned
    assert set(entries["__metadata__"]) == {"meta", "sha256"}


def test_what_cannot_be_stored_is_refused_before_writing(tmp_path):
    for tree, meta, error in [
        (torch.ones(1, dtype=torch.complex128), {}, TypeError),
        ({1, 2}, {}, TypeError),
        (None, {"loss": math.nan}, ValueError),
    ]:
        with pytest.raises(error):
            save_tree(tmp_path / "tree", tree, meta)
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(RunError, match="tree is missing"):
        load_tree(tmp_path / "tree")
    safetensors.torch.save_file({"0": torch.ones(2)}, tmp_path / "tree")
    with pytest.raises(RunError, match="not written by Coterie"):
        load_tree(tmp_path / "tree")


def test_files_have_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_run_folders_are_numbered_without_races(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunFolder.create(tmp_path / "runs", "a.b"), range(40)))
    assert {run.path.name for run in runs} == {f"a.b-{n}" for n in range(1, 41)}
    (tmp_path / "runs" / "a.b-40").rmdir()
    (tmp_path / "runs" / "a.b-7").rmdir()
    (tmp_path / "runs" / "aXb-99").mkdir()
    assert RunFolder.create(tmp_path / "runs", "a.b").path.name == "a.b-40"
    assert RunFolder.latest(tmp_path / "runs", "a.b") is None
    RunFolder(tmp_path / "runs" / "a.b-9").write_config({})
    RunFolder(tmp_path / "runs" / "a.b-10").write_config({})
    assert RunFolder.latest(tmp_path / "runs", "a.b").path.name == "a.b-10"
    assert RunFolder.latest(tmp_path / "none", "a.b") is None


@pytest.mark.parametrize("name", ["", "..", "a/b", ".a", "-a", "a b"])
def test_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be a folder's name"):
        RunFolder.create(tmp_path, name)


def test_out_must_be_new_or_empty_and_open_says_what_is_missing(tmp_path):
    out = tmp_path / "deep" / "out"
    with pytest.raises(ConfigError, match="no such folder"):
        RunFolder.open(out)
    run = RunFolder.create(None, "x", out)
    assert RunFolder.create(None, "x", out) == run
    with pytest.raises(ConfigError, match=r"config\.toml is missing"):
        RunFolder.open(out)
    run.write_config({"seed": 7, "none": None, "list": [{"a": None, "b": (1, 2)}]})
    assert RunFolder.open(out).config() == {"seed": 7, "list": [{"b": [1, 2]}]}
    for path in (out, out / "config.toml"):
        with pytest.raises(ConfigError, match="not an empty folder") as caught:
            RunFolder.create(None, "x", path)
        assert "--resume" in caught.value.hint
    (out / "config.toml").write_text("= 3")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        run.config()


def test_json_files_hold_no_nan(tmp_path):
    run = RunFolder(tmp_path)
    assert (run.result(), run.clients()) == (None, None)
    run.write_result({"final": {"loss": math.nan}, "bytes": [1, -math.inf]})
    run.write_clients([{"client": "a", "accuracy": 0.5}])
    assert run.result() == {"final": {"loss": None}, "bytes": [1, None]}
    assert run.clients() == [{"client": "a", "accuracy": 0.5}]
    (tmp_path / "result.json").write_text('{"a":')
    with pytest.raises(RunError, match=r"result\.json is damaged"):
        run.result()


def test_metrics_rows_and_their_truncation(tmp_path):
    run, path = RunFolder(tmp_path), tmp_path / "metrics.jsonl"
    assert run.rows() == []
    run.truncate(3)
    rows = [{"kind": "start"}, *({"round": n, "loss": n / 3} for n in range(5))]
    for row in rows:
        run.append(row)
    run.append({"round": 5, "loss": math.nan, "all": (math.inf, 1)})
    assert run.rows() == [*rows, {"round": 5, "loss": None, "all": [None, 1]}]
    whole = path.read_bytes()
    for cut in range(1, len(whole) - whole[:-1].rindex(b"\n")):  # the last line cut short at any byte
        path.write_bytes(whole[:-cut])
        assert run.rows() == rows
    run.truncate(5)
    assert run.rows() == rows
    run.truncate(2)
    assert run.rows() == rows[:4]
    run.append({"round": 3})
    assert run.rows()[-1] == {"round": 3}
    path.write_bytes(b'{"round": 0}\n\0\0\0\n{"round": 1}\n')
    with pytest.raises(RunError, match="line 2 is damaged"):
        run.rows()


def test_only_one_process_writes_a_run(tmp_path):
    run = RunFolder(tmp_path)
    with run.lock(), pytest.raises(RunError, match="another process") as caught, run.lock():
        pass
    assert caught.value.hint
    with run.lock():
        pass
