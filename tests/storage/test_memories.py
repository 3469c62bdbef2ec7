"""Client memories: against a dict that forgets nothing, on a damaged disk, and without touching all clients."""

import sqlite3
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.errors import RunError
from coterie.core.seeds import derive, rng
from coterie.core.types import Task
from coterie.storage import Memories

CLIENTS = ["a", "A", "../x", "", "ü\0b", "a" * 5000]  # ids are what users make them


def on_disk(folder):
    """All (client, generation) in the file, and how many bodies it has."""
    with closing(sqlite3.connect(folder / "memories.sqlite3")) as file:
        slots = file.execute("select client, generation from generations").fetchall()
        (bodies,) = file.execute("select count(*) from bodies").fetchone()
    return set(slots), bodies


@pytest.mark.parametrize("cache_bytes", [0, 150, 1 << 20])  # everything goes to the disk early, some, nothing
@pytest.mark.parametrize("folder", [True, False])
def test_against_a_dict(tmp_path, folder, cache_bytes):
    """Random commits, lost tasks, tasks in flight, kills: what kept versions refer to is there, nothing else."""
    draw = rng(derive(3, "memories", cache_bytes, str(folder)))
    place = tmp_path if folder else None
    memories, truth = Memories(place, cache_bytes), {}
    history, newest, version, kept = {0: {}}, {0: 0}, 0, [0]
    flying = {}  # tasks that have answered, and may be accepted later
    for first in range(0, 180 if folder else 900, 6):  # a commit on disk waits for it
        asked = draw.choice(len(CLIENTS), size=3, replace=False).tolist()
        answered = {first + i: CLIENTS[client] for i, client in enumerate(asked)}
        for generation, client in answered.items():
            truth[client, generation] = float(draw.random())
            memories.put(client, generation, torch.tensor(truth[client, generation]).expand(10))
        lost = first  # known to be lost at once
        memories.forget(answered[lost], lost)
        alive = {g: c for g, c in {**flying, **answered}.items() if g != lost}
        for generation, client in alive.items():
            assert memories.get(client, generation)[9] == torch.tensor(truth[client, generation])
        chosen = {g: c for g, c in alive.items() if draw.random() < 0.6}
        accepted = {client: generation for generation, client in sorted(chosen.items())}
        flying = {g: c for g, c in alive.items() if g not in chosen and draw.random() < 0.5}
        version += 1
        memories.commit(version, accepted, flying)
        history[version] = history[version - 1] | accepted
        newest[version] = version if accepted else newest[version - 1]
        assert memories.newest() == newest[version]
        if draw.random() < 0.2:  # killed: before the checkpoint, or with its newest file damaged
            version = kept[-1] if draw.random() < 0.7 else kept[0]
            kept, flying = [n for n in kept if n <= version], {}
            if folder:
                memories.close()
                memories = Memories(place, cache_bytes)
            memories.back_to(version, newest[version])
            assert dict(memories.at(version)) == history[version]
            continue
        if draw.random() < 0.8:
            kept = [*kept, version][-2:]
            memories.prune(kept[0])
        for number in kept:
            seen = memories.at(number)
            assert dict(seen) == history[number]
            assert len(seen) == len(history[number])
            for client in CLIENTS:
                assert seen.get(client) == history[number].get(client)
            for client, generation in history[number].items():
                found = memories.get(client, generation)
                assert found.tolist() == torch.full((10,), truth[client, generation]).tolist()
        if folder:
            assert memories._cached_bytes <= cache_bytes
            assert memories._cached_bytes == 40 * len(memories._cache)
        if folder and kept[-1] == version:
            slots, bodies = on_disk(place)
            wanted = {slot for n in range(kept[0], version + 1) for slot in history[n].items()}
            assert wanted <= slots
            assert slots - wanted <= {(client, generation) for generation, client in flying.items()}
            assert bodies == len(slots)


def test_edges(tmp_path):
    for memories in (Memories(), Memories(tmp_path)):
        assert memories.get("a", None) is None
        assert memories.at(0).get("a") is None
        memories.prune(5)
        memories.back_to(0)
        memories.commit(1, {"b": 9})
        assert not list(tmp_path.iterdir())  # nothing is written for clients that remember nothing
        with pytest.raises(RunError, match="client 'a' has no memory of generation 3"):
            memories.get("a", 3)
        memories.put("a", 3, torch.ones(2))
        memories.commit(2, {}, flying={3})  # not accepted yet: its reply is on its way
        memories.commit(3, {"a": 3, "b": 9})
        assert memories.get("a", 3).tolist() == [1, 1]
        memories.put("a", 4, torch.zeros(2))
        memories.commit(4, {})  # nobody waits for it any more
        with pytest.raises(RunError, match="no memory of generation 4"):
            memories.get("a", 4)
        memories.close()


def test_a_tree_comes_back_as_it_was(tmp_path):
    shared = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    tree = {
        "odd": torch.tensor([True, False, True]),
        "wide": torch.arange(3, dtype=torch.float64),
        "half": torch.ones(3).bfloat16(),
        "view": shared.T[1:],
        "twice": (shared, shared),
        "task": Task(id=1, client="ü", version=2, round=3, down={"w": torch.tensor(2.5)}),
        "plain": [1, None, 0.5, float("inf"), 2**70],
        "empty": torch.ones(0, 3),
    }
    memories = Memories(tmp_path)
    memories.put("a", 1, tree)
    memories.put("nothing", 2, {})
    memories.commit(1, {"a": 1, "nothing": 2})
    memories.close()
    back = Memories(tmp_path).get("a", 1)
    assert Memories(tmp_path).get("nothing", 2) == {}
    for name in ("odd", "wide", "half", "view", "empty"):
        assert back[name].dtype == tree[name].dtype
        assert back[name].shape == tree[name].shape
        assert torch.equal(back[name], tree[name])
    assert torch.equal(back["twice"][0], shared)
    assert back["plain"] == tree["plain"]
    assert back["task"].down["w"] == 2.5
    memories.put("b", 2, {1, 2})
    with pytest.raises(TypeError, match="cannot encode"):
        memories.commit(2, {"b": 2})
    assert dict(memories.at(2)) == {"a": 1, "nothing": 2}


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=30), st.integers(0, 2**53))
def test_any_numbers_come_back(numbers, generation):
    memories = Memories()
    memories.put("a", generation, {"w": torch.tensor(numbers)})
    memories.commit(1, {"a": generation})
    assert memories.get("a", generation)["w"].tolist() == numbers


def test_damage_is_noticed_and_named(tmp_path):
    memories = Memories(tmp_path)
    for client in "ab":
        memories.put(client, 1, torch.ones(500))
    memories.commit(1, {"a": 1, "b": 1})
    memories.close()
    path = tmp_path / "memories.sqlite3"
    with closing(sqlite3.connect(path)) as file:  # the two clients' memories change places
        file.execute("update generations set body = 3 - body")
        file.commit()
    with pytest.raises(RunError, match=r"memories\.sqlite3 is damaged: client 'a'.* not as it was written"):
        Memories(tmp_path).get("a", 1)
    raw = path.read_bytes()
    place = raw.index(torch.ones(500).numpy().tobytes()) + 1001
    path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    damaged = 0
    for client in "ab":
        with pytest.raises(RunError, match="is damaged") as caught:
            Memories(tmp_path).get(client, 1)
        damaged += "not as it was written" in str(caught.value)
    assert damaged == 2
    path.unlink()
    with pytest.raises(RunError, match=r"memories of version 1 are missing"):
        Memories(tmp_path).back_to(1, newest=1)
    path.write_bytes(b"not a database, but long enough to be looked at" * 20)
    with pytest.raises(RunError, match=r"memories\.sqlite3 is damaged") as caught:
        Memories(tmp_path).get("a", 1)
    assert caught.value.hint


def test_a_commit_costs_what_the_changed_clients_cost():
    """Steps of SQLite's machine, which are the same on every computer, with 100 and with 10,000 clients."""

    def steps(clients):
        memories, taken, generation = Memories(), [0], 0

        def step():
            taken[0] += 1

        for version, who in enumerate([range(clients), range(7, 17), range(7, 17), range(7, 17)], start=1):
            for index in who:
                memories.put(f"c{index}", generation + index, torch.ones(3))
            if version == 4:
                memories._open().set_progress_handler(step, 1)
            memories.commit(version, {f"c{index}": generation + index for index in who})
            memories.prune(version - 1)
            at = memories.at(version)
            assert [at.get(f"c{index}") for index in who] == [generation + index for index in who]
            generation += clients
        return taken[0]

    few, many = steps(100), steps(10_000)
    assert few > 100
    assert many < 1.5 * few


def test_a_task_that_is_done_again_after_its_commit_leaves_the_same(tmp_path):
    memories = Memories(tmp_path, cache_bytes=0)
    memories.put("a", 1, {"x": torch.ones(2)})
    memories.commit(1, {"a": 1})
    memories.put("a", 1, {"x": torch.ones(2)})
    assert memories.at(1) == {"a": 1}
    assert memories.get("a", 1)["x"].tolist() == [1, 1]
    memories.put("a", 2, {"x": torch.zeros(2)})
    memories.commit(2, {"a": 2})
    assert memories.at(2) == {"a": 2}
