import gzip
import hashlib

import numpy as np
import pytest
import torch

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import derive
from coterie.data import Dataset, Examples, datasets, natural, populate, shakespeare
from coterie.data.sources import HOMES
from coterie.data.splits import as_float
from coterie.data.text import next_character, read_speeches

PLAY = "ROMEO:\nAy me!\nSad hours\n\nNURSE:\n\nJULIET:\nO!\n\n\nROMEO:\nshe speaks: O\n"


def text_of(dataset, ids):
    return "".join(dataset.classes[i] for i in ids.tolist()).replace("\\n", "\n")


def windows(texts, **options):
    return next_character("t", texts, **({"column": "who", "length": 3, "test_fraction": 0.0} | options))


@pytest.fixture(scope="session")
def plays(shared):
    if not (shared / "tiny-shakespeare").is_dir():
        pytest.skip("no tiny-shakespeare/ in the folder of real data")
    return shared


@pytest.fixture(scope="session")
def bard(plays):
    return shakespeare(folders=[plays])


def test_speeches_are_joined_by_role(tmp_path):
    (tmp_path / "play.txt").write_text(PLAY)
    found = read_speeches(tmp_path / "play.txt")
    assert found == {"ROMEO": "Ay me!\nSad hours\nshe speaks: O", "JULIET": "O!"}
    assert list(found) == ["ROMEO", "JULIET"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"ROMEO:\nAy\n\nno role\nO!\n", r"line 4: 'no role' names no role"),
        (b"ROMEO:\nAy \xff\n", "byte 10 is not UTF-8"),
    ],
)
def test_a_damaged_play_is_refused_with_its_place(tmp_path, raw, message):
    (tmp_path / "play.txt").write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_speeches(tmp_path / "play.txt")
    assert str(tmp_path / "play.txt") in str(caught.value)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6])
def test_windows_are_each_texts_own_and_targets_are_one_ahead(length):
    texts = {"a": "hello world", "b": "hey ", "c": "x", "d": ""}
    made = windows(texts, length=length)
    expected = [
        (who, text[at : at + length], text[at + 1 : at + length + 1])
        for who, text in texts.items()
        for at in range(0, len(text), length)
        if at + length + 1 <= len(text)
    ]
    rows = zip(made.train.keys["who"].tolist(), made.train.x, made.train.y, strict=True)
    assert [(who, text_of(made, x), text_of(made, y)) for who, x, y in rows] == expected
    assert made.classes == tuple(sorted(set("".join(texts.values()))))
    assert made.train.x.dtype == made.train.y.dtype == torch.int64
    assert made.input_shape == (length,)
    assert made.prepare(made.train.x).dtype == torch.int64
    assert made.test is None


def test_the_last_windows_of_each_text_are_the_test_set():
    made = windows({"ten": "0123456789", "four": "abcd", "seven": "tuvwxyz"}, test_fraction=0.34)
    # 3, 1 and 2 windows; a third of them, rounded, but never the only one
    assert [text_of(made, x) for x in made.train.x] == ["012", "345", "abc", "tuv"]
    assert [text_of(made, x) for x in made.test.x] == ["678", "wxy"]
    assert made.test.keys["who"].tolist() == ["ten", "seven"]
    assert [text_of(made, y) for y in made.test.y] == ["789", "xyz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0: must be >= 1"),
        ({"length": 5}, "length=5: the longest text has 5 characters"),
        ({"test_fraction": 1.0}, r"test_fraction=1\.0"),
        ({"test_fraction": -0.1}, r"test_fraction=-0\.1"),
    ],
)
def test_options_that_leave_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        windows({"a": "hello"}, **options)


def test_shakespeare_is_the_well_known_file(plays, bard):
    """Counted from the file by hand: 1,115,394 characters, 65 different ones, 309 roles."""
    raw = gzip.decompress((plays / "tiny-shakespeare" / "input.txt.gz").read_bytes())
    assert HOMES["shakespeare"][1] == {"input.txt": hashlib.sha256(raw).hexdigest()}
    assert bard.classes == ("\\n", *sorted(set(raw.decode()) - {"\n"}))
    assert len(bard.classes) == 65
    lines = raw.decode().split("\n")
    heads = {line for before, line in zip(["", *lines], lines, strict=False) if line and not before}
    assert len(heads) == 309
    spoken = {head[:-1]: [] for head in heads}
    role = None
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not before:
            role = line[:-1]
        elif line:
            spoken[role].append(line)
    texts = {role: "\n".join(part) for role, part in spoken.items()}
    counts = {role: (len(text) - 1) // 80 for role, text in texts.items() if len(text) > 80}
    assert len(counts) == 256
    roles = np.concatenate([bard.train.keys["role"], bard.test.keys["role"]])
    assert dict(zip(*np.unique(roles, return_counts=True), strict=True)) == counts
    of_romeo = bard.train.x[torch.from_numpy(bard.train.keys["role"] == "ROMEO")]
    assert text_of(bard, of_romeo.flatten()) == texts["ROMEO"][: of_romeo.numel()]


def test_no_window_is_in_both_sets(bard):
    assert len(bard.test) == pytest.approx(0.2 * (len(bard.train) + len(bard.test)), rel=0.01)
    rows = {(role, bytes(x.byte())) for role, x in zip(bard.train.keys["role"], bard.train.x, strict=True)}
    again = [(r, bytes(x.byte())) in rows for r, x in zip(bard.test.keys["role"], bard.test.x, strict=True)]
    assert sum(again) <= 5  # a few lines are spoken twice


def test_roles_are_the_clients(bard):
    people = populate(
        bard, natural(bard.train, key=derive(1), column="role", min_samples=5), holdout=0.2, key=derive(2)
    )
    x, y = people.data("role=ROMEO").train
    assert x.shape == y.shape == (people.sizes("role=ROMEO")[0], 80)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert "role=(other)" in people.clients
    assert min(sum(people.sizes(client)) for client in people.clients) >= 5


def test_both_layouts_of_the_folder_are_found(tmp_path):
    (tmp_path / "a" / "tiny-shakespeare").mkdir(parents=True)
    (tmp_path / "b" / "shakespeare").mkdir(parents=True)
    (tmp_path / "a" / "tiny-shakespeare" / "input.txt.gz").write_bytes(gzip.compress(PLAY.encode()))
    (tmp_path / "b" / "shakespeare" / "input.txt").write_text(PLAY)
    packed, plain = (shakespeare(folders=[tmp_path / name], length=4) for name in "ab")
    assert torch.equal(packed.train.x, plain.train.x)
    assert len(packed.train) == 6
    assert len(packed.test) == 1
    with pytest.raises(DataError, match="shakespeare: not found") as caught:
        shakespeare(folders=[tmp_path])
    assert "tiny-shakespeare" in caught.value.hint


def test_it_is_downloaded_only_when_asked_for(tmp_path, monkeypatch):
    def fetch(name, folder):
        (folder / name).mkdir()
        (folder / name / "input.txt").write_text(PLAY)
        return folder / name

    monkeypatch.setattr(datasets.sources, "download", fetch)
    with pytest.raises(DataError, match="not found"):
        shakespeare(folders=[tmp_path], length=4)
    assert len(shakespeare(folders=[tmp_path], length=4, download=True).train) == 6


def test_targets_may_be_several_a_row_but_only_as_labels():
    x, y = torch.zeros(3, 2), torch.tensor([[0, 1], [1, 1], [2, 0]])
    kept = Examples(x, y).take(np.array([2, 0]))
    assert kept.y.tolist() == [[2, 0], [0, 1]]
    assert Dataset("d", Examples(x, y), None, ("a", "b", "c"), as_float).task == "classification"
    with pytest.raises(DataError, match=r"torch\.float32 \[3, 2\]"):
        Examples(x, y.float())
    with pytest.raises(DataError, match=r"torch\.int64 \[3, 2, 1\]"):
        Examples(x, y[..., None])
    with pytest.raises(DataError, match="not all class indices 0 to 1"):
        Dataset("d", Examples(x, y), None, ("a", "b"), as_float)
    with pytest.raises(DataError, match=r"test targets have the shape \[1\], training ones \[2\]"):
        Dataset("d", Examples(x, y), Examples(x, y[:, :1]), ("a", "b", "c"), as_float)
