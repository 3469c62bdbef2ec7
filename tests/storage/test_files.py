import json
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.errors import ConfigError, RunError
from coterie.core.seeds import derive, rng
from coterie.core.types import Task
from coterie.storage import Memories, RunFolder, load_tree, save_tree
from coterie.storage.files import _DTYPES, write_atomic
from coterie.storage.memories import folder_name


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


@given(st.lists(st.text(), unique=True, min_size=2, max_size=20))
def test_client_folders_are_distinct_safe_components(clients):
    names = [folder_name(client) for client in clients]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_-]{1,120}", name) for name in names)


def test_client_folders_of_hostile_names():
    clients = [
        "../../x",
        "/etc",
        ".",
        "..",
        "",
        "a" * 5000,
        "A",
        "a",
        "_41",
        "a/b",
        "a\0b",
        "\ud800",
        ".partial",
    ]
    test_client_folders_are_distinct_safe_components.hypothesis.inner_test(clients)
    assert folder_name("client-01") == "client-01"


@pytest.mark.parametrize("on_disk", [True, False])
def test_memories_against_brute_force(tmp_path, on_disk):
    """Random commits, lost tasks, restarts: what checkpoints refer to is there, and nothing else."""
    draw = rng(derive(3, "memories", str(on_disk)))
    folder = tmp_path if on_disk else None
    memories, truth, current, kept = Memories(folder, 150), {}, {}, [{}]
    clients = [f"c{i}" for i in range(6)]
    files = lambda: {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")}  # noqa: E731
    for generation in range(0, 400, 4):
        asked = draw.choice(clients, size=3, replace=False).tolist()
        for offset, client in enumerate(asked):
            truth[client, generation + offset] = float(draw.random())
            memories.put(
                client, generation + offset, torch.tensor([truth[client, generation + offset]]).expand(10)
            )
        memories.forget(asked[0], generation)
        accepted = {client: generation + i for i, client in enumerate(asked) if i and draw.random() < 0.8}
        memories.commit(accepted)
        if on_disk and draw.random() < 0.1:  # killed before the checkpoint: the commit never happened
            memories = Memories(folder, 150)
            continue
        current = current | accepted
        kept = [*kept, current][-2:]
        memories.prune(kept)
        for mapping in kept:
            for client, g in mapping.items():
                assert memories.get(client, g).tolist() == torch.full((10,), truth[client, g]).tolist()
        if on_disk:
            wanted = {f"{c}/{g}.safetensors" for mapping in kept for c, g in mapping.items()}
            assert wanted <= files()
            changed = set(accepted)  # the others may hold what a kill left, until they change
            assert {f for f in files() if f.split("/")[0] in changed} <= wanted
            assert memories._cached_bytes <= 150
        else:
            held = {(c, g) for c, trees in memories._cache.items() for g in trees}
            assert held == {(c, g) for mapping in kept for c, g in mapping.items()}
        assert all(g > current.get(c, -1) for c, held in memories._pending.items() for g in held)


def test_memories_edges(tmp_path):
    for memories in (Memories(), Memories(tmp_path)):
        assert memories.get("a", None) is None
        with pytest.raises(RunError, match=r"generation 3|3\.safetensors is missing"):
            memories.get("a", 3)
        memories.put("a", 3, torch.ones(2))
        memories.prune([{"a": 2}])  # not accepted yet: its reply is on its way
        memories.commit({"a": 3, "b": 9})
        assert memories.get("a", 3).tolist() == [1, 1]
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "3.safetensors").rename(tmp_path / "b" / "3.safetensors")
    with pytest.raises(RunError, match="another client's memory"):
        Memories(tmp_path).get("b", 3)


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
