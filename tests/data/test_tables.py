import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import derive
from coterie.data import from_table, natural, populate

DRAW = np.random.default_rng(0)
N = 200
COLUMNS = {
    "age": DRAW.integers(20, 80, N),
    "pay": 1e9 + DRAW.standard_normal(N),
    "job": DRAW.choice(["nurse", "cook", "clerk"], N),
    "site": DRAW.choice(["A", "B"], N),
    "w": DRAW.uniform(1, 2, N),
    "ill": DRAW.integers(0, 2, N),
    "days": DRAW.uniform(0, 30, N),
}


def csv(path, columns):
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write(folder, kind, columns=COLUMNS):
    if kind == "csv":
        return csv(folder / "stays.csv", columns)
    if kind == "csv.gz":
        return csv(folder / "stays.csv.gz", columns)
    pq.write_table(pa.table(dict(columns)), folder / "stays.parquet", row_group_size=50)
    return folder / "stays.parquet"


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet"])
def test_columns_are_encoded_as_scikit_learn_does(tmp_path, kind):
    path = write(tmp_path, kind)
    data = from_table(path, target="ill", drop=["days"], keys=["site"], weight="w", test_fraction=0)
    assert data.name == "stays"
    assert data.test is None
    assert data.classes == ("0", "1")
    assert data.train.y.tolist() == COLUMNS["ill"].tolist()
    numbers = StandardScaler().fit_transform(np.stack([COLUMNS["age"], COLUMNS["pay"]], axis=1))
    jobs = OneHotEncoder(sparse_output=False).fit_transform(COLUMNS["job"].reshape(-1, 1))
    wanted = np.concatenate([numbers, jobs], axis=1)
    assert data.train.x.dtype == torch.float32
    assert np.allclose(data.prepare(data.train.x).numpy(), wanted, atol=1e-5)
    assert data.train.keys["site"].tolist() == COLUMNS["site"].tolist()
    parts = natural(data.train, key=derive(0), column="site")
    people = populate(data, parts, holdout=0, key=derive(0))
    assert people.data("site=A").weight == pytest.approx(COLUMNS["w"][COLUMNS["site"] == "A"].sum())


def test_only_training_rows_set_the_scale(tmp_path):
    data = from_table(write(tmp_path, "parquet"), target="ill", features=["age"], test_fraction=0.3)
    x = data.train.x[:, 0].double()
    assert x.mean().abs() < 1e-6
    assert x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert len(data.test) == pytest.approx(60, abs=1)
    again = from_table(tmp_path / "stays.parquet", target="ill", features=["age"], test_fraction=0.3)
    other = from_table(
        tmp_path / "stays.parquet", target="ill", features=["age"], test_fraction=0.3, test_seed=1
    )
    assert torch.equal(again.test.x, data.test.x)
    assert not torch.equal(other.test.x, data.test.x)


def test_a_test_file_is_encoded_like_the_training_file(tmp_path):
    train = csv(tmp_path / "a.csv", {"age": [10, 20], "job": ["cook", "nurse"], "y": ["no", "yes"]})
    test = csv(tmp_path / "b.csv", {"job": ["cook", "pilot"], "age": [30, 40.5], "y": ["yes", "maybe"]})
    data = from_table(train, target="y", test_path=test)
    assert data.classes == ("maybe", "no", "yes")
    assert data.train.x.tolist() == [[-1, 1, 0], [1, 0, 1]]
    assert data.test.x.tolist() == [[3, 1, 0], [pytest.approx(5.1), 0, 0]]
    assert data.test.y.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("values", "task", "classes"),
    [
        (["b", "a", "b", "a"], "auto", ("a", "b")),
        ([True, False, True, True], "auto", ("False", "True")),
        ([2, 10, 2, 10], "auto", ("2", "10")),
        ([2.0, 10.0, 2.0, 10.0], "auto", ("2", "10")),
        ([0.5, 1.0, 2.0, 3.0], "auto", None),
        ([2, 10, 2, 10], "regression", None),
        ([0.5, 1.5, 0.5, 1.5], "classification", ("0.5", "1.5")),
    ],
)
def test_the_task_follows_from_the_target(tmp_path, values, task, classes):
    pq.write_table(pa.table({"x": [1.0, 2, 3, 4], "y": values}), tmp_path / "t.parquet")
    data = from_table(tmp_path / "t.parquet", target="y", task=task, test_fraction=0)
    assert data.classes == classes
    if classes is None:
        assert data.train.y.tolist() == values
    else:
        assert [data.classes[i] for i in data.train.y] == [
            str(int(v)) if isinstance(v, float) and v == int(v) else str(v) for v in values
        ]


def test_many_whole_numbers_are_a_regression(tmp_path):
    path = csv(tmp_path / "t.csv", {"x": range(30), "y": range(30)})
    assert from_table(path, target="y").task == "regression"
    assert len(from_table(path, target="y", task="classification").classes) == 30


def test_odd_columns(tmp_path):
    table = {
        "x": pa.array([1.0, 2.0, 3.0]),
        "same": pa.array([0.1, 0.1, 0.1]),
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "yes": pa.array([True, False, True]),
        "y": pa.array([0, 1, 0]),
    }
    pq.write_table(pa.table(table), tmp_path / "t.pq")
    data = from_table(tmp_path / "t.pq", target="y", test_fraction=0)
    assert data.train.x[:, 1].tolist() == [0, 0, 0]
    assert data.train.x[:, 2:4].tolist() == [[1, 0], [0, 1], [1, 0]]
    assert data.train.x.shape == (3, 5)
    pq.write_table(pa.table(table | {"list": pa.array([[1], [2], [3]])}), tmp_path / "t.pq")
    with pytest.raises(DataError, match="'list' holds list"):
        from_table(tmp_path / "t.pq", target="y")


def test_categorical_may_be_named(tmp_path):
    path = csv(tmp_path / "t.csv", {"code": [3, 1, 3], "y": [0, 1, 0]})
    data = from_table(path, target="y", categorical=["code"], test_fraction=0)
    assert data.train.x.tolist() == [[0, 1], [1, 0], [0, 1]]


def test_a_cell_that_is_no_number_is_named(tmp_path):
    path = csv(tmp_path / "t.csv", {"age": [20, 30, "4o", 50], "y": [0, 1, 0, 1]})
    with pytest.raises(DataError, match=r"t\.csv: data row 3, column 'age': '4o' is not a number"):
        from_table(path, target="y")
    with pytest.raises(DataError, match=r"data row 3, column 'age'"):
        from_table(path, target="y", categorical=[])
    good = csv(tmp_path / "good.csv", {"age": [20, 30], "y": [0, 1]})
    with pytest.raises(DataError, match=r"t\.csv: data row 3, column 'age'"):
        from_table(good, target="y", test_path=path)
    words = csv(tmp_path / "w.csv", {"days": [1.5, 2.5, "long"], "x": [1, 2, 3]})
    with pytest.raises(DataError, match=r"data row 3, column 'days': 'long' is not a number"):
        from_table(words, target="days", task="regression")


def test_gaps_are_named_or_filled_with_the_mean(tmp_path):
    path = csv(tmp_path / "t.csv", {"age": [20, "", 40], "y": [0, 1, 0]})
    with pytest.raises(DataError, match="data row 2, column 'age': no value") as caught:
        from_table(path, target="y")
    assert 'missing = "mean"' in caught.value.hint
    assert from_table(path, target="y", missing="mean", test_fraction=0).train.x.tolist() == [[-1], [0], [1]]
    with pytest.raises(DataError, match="data row 2, column 'age': the target has no value"):
        from_table(path, target="age")
    endless = csv(tmp_path / "i.csv", {"age": [20, "inf", 40], "y": [0, 1, 0]})
    with pytest.raises(DataError, match="data row 2, column 'age': infinite"):
        from_table(endless, target="y")


def test_broken_files_are_named_with_the_place(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b,y\n1,2,0\n1,2\n")
    with pytest.raises(DataError, match=r"t\.csv: not a CSV table.*Row #3"):
        from_table(path, target="y")
    path.write_text("")
    with pytest.raises(DataError, match="not a CSV table"):
        from_table(path, target="y")
    path.write_text("a,y\n")
    with pytest.raises(DataError, match="no rows"):
        from_table(path, target="y")
    path.write_text("a,a,y\n1,2,0\n")
    with pytest.raises(DataError, match="same name"):
        from_table(path, target="y")
    path.write_bytes(b"a,y\n\xff\xfe,0\n\xff,1\n")
    with pytest.raises(DataError, match="column 'a' holds binary"):
        from_table(path, target="y")
    packed = write(tmp_path, "csv.gz")
    packed.write_bytes(packed.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"stays\.csv\.gz: cannot be read after byte \d+"):
        from_table(packed, target="ill")


def test_a_broken_parquet_file_is_named_with_the_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"x": DRAW.standard_normal(400), "y": DRAW.integers(0, 2, 400)})
    pq.write_table(
        table, path, row_group_size=100, write_page_checksum=True, compression="none", use_dictionary=False
    )
    raw = bytearray(path.read_bytes())
    raw[raw.find(table["x"].to_numpy()[250].tobytes())] ^= 1  # one bit of row 250
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"t\.parquet: row group 2 cannot be read"):
        from_table(path, target="y")
    path.write_bytes(raw[:-20])
    with pytest.raises(DataError, match="footer cannot be read"):
        from_table(path, target="y")


def test_what_cannot_work_is_a_config_error(tmp_path):
    path = write(tmp_path, "parquet")
    with pytest.raises(ConfigError, match="column 'il'") as caught:
        from_table(path, target="il")
    assert caught.value.hint == "did you mean 'ill'?"
    for options in ({"features": ["ages"]}, {"drop": ["ages"]}, {"keys": ["ages"]}, {"weight": "ages"}):
        with pytest.raises(ConfigError, match="column 'ages'"):
            from_table(path, target="ill", **options)
    with pytest.raises(ConfigError, match="is the target"):
        from_table(path, target="ill", features=["age", "ill"])
    with pytest.raises(ConfigError, match="no columns are left"):
        from_table(path, target="ill", drop=[name for name in COLUMNS if name != "ill"])
    with pytest.raises(ConfigError, match="test_fraction=1"):
        from_table(path, target="ill", test_fraction=1)
    with pytest.raises(ConfigError, match="task='ranking'"):
        from_table(path, target="ill", task="ranking")
    with pytest.raises(DataError, match="too many to encode"):
        from_table(
            csv(tmp_path / "t.csv", {"id": [f"p{i}" for i in range(1500)], "y": [0, 1] * 750}), target="y"
        )


def test_paths_are_looked_for_below_the_data_folders(tmp_path):
    write(tmp_path, "csv")
    assert from_table("stays.csv", target="ill", folders=[tmp_path / "none", tmp_path]).name == "stays"
    with pytest.raises(DataError) as caught:
        from_table("stay.csv", target="ill", folders=[tmp_path])
    assert str(tmp_path / "stay.csv") in str(caught.value)
