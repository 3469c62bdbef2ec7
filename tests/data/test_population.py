import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import derive
from coterie.data import (
    Dataset,
    Examples,
    Numbered,
    batches,
    digits,
    iid,
    populate,
    power_law,
    sampled,
    spread,
)
from coterie.data.splits import as_float

KEY = derive(7, "population")


@pytest.fixture
def dataset(labelled):
    names = tuple(str(i) for i in range(10))
    return Dataset("made", labelled, None, names, prepare=as_float)


def numbered(n):
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1)
    return Dataset("numbered", Examples(x, torch.zeros(n, dtype=torch.int64)), None, ("only",), as_float)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 300), holdout=st.floats(0, 0.99), data=st.data())
def test_splits_lose_and_double_nothing(n, holdout, data):
    clients = data.draw(st.integers(1, n))
    rows = numbered(n)
    parts = iid(rows.train, key=KEY, clients=clients)
    people = populate(rows, parts, holdout=holdout, key=KEY)
    assert people.clients == tuple(parts)
    for client, held in parts.items():
        mine = people.data(client)
        train, test = (set(x[:, 0].int().tolist()) for x, _ in (mine.train, mine.test))
        assert train
        assert len(train) + len(test) == len(held)
        assert train | test == set(held.tolist())
        assert people.sizes(client) == (len(train), len(test))
        assert len(mine.train[1]) == len(train)
        assert len(test) == len(held) - 1 or abs(len(test) - holdout * len(held)) <= 0.5 + 1e-9


def test_a_split_depends_on_the_key_and_the_client_alone(dataset):
    parts = iid(dataset.train, key=KEY, clients=10)
    client, other = list(parts)[3], list(parts)[4]
    everyone = populate(dataset, parts, holdout=0.3, key=KEY)
    alone = populate(dataset, {client: parts[client]}, holdout=0.3, key=KEY)
    assert np.array_equal(everyone.split(client)[1], alone.split(client)[1])
    rekeyed = populate(dataset, parts, holdout=0.3, key=derive(8))
    assert set(rekeyed.split(client)[1]) != set(everyone.split(client)[1])
    renamed = populate(dataset, {other: parts[client]}, holdout=0.3, key=KEY)
    assert set(renamed.split(other)[1]) != set(everyone.split(client)[1])


def test_no_holdout_gives_empty_tests_of_the_right_shape(dataset):
    people = populate(dataset, iid(dataset.train, key=KEY, clients=3), holdout=0, key=KEY)
    x, y = people.data(people.clients[0]).test
    assert x.shape == (0, 5)
    assert y.shape == (0,)
    assert len(people.pooled().train[1]) == len(dataset.train)


def test_pooled_is_the_union_of_the_clients():
    rows = numbered(500)
    people = populate(rows, power_law(rows.train, key=KEY, clients=9, exponent=1.0), holdout=0.2, key=KEY)
    pooled = people.pooled()
    for part in ("train", "test"):
        one_by_one = torch.cat([getattr(people.data(client), part)[0] for client in people.clients])
        assert torch.equal(getattr(pooled, part)[0], one_by_one)
    assert len(pooled.train[1]) + len(pooled.test[1]) == 500
    assert pooled.weight is None


def test_what_a_client_holds_is_prepared():
    data = digits()
    people = populate(data, iid(data.train, key=KEY, clients=4), key=KEY)
    x, y = people.data(people.clients[1]).train
    rows, _ = people.split(people.clients[1])
    assert x.dtype == torch.float32
    assert torch.equal(x, data.train.x[torch.from_numpy(rows)].float() / 16)
    assert torch.equal(y, data.train.y[torch.from_numpy(rows)])


def test_weights_are_sums_over_training_rows(dataset):
    parts = iid(dataset.train, key=KEY, clients=5)
    people = populate(dataset, parts, holdout=0.25, key=KEY, weight="age")
    for client in people.clients:
        rows, _ = people.split(client)
        assert people.data(client).weight == float(sum(int(dataset.train.keys["age"][row]) for row in rows))
    assert populate(dataset, parts, key=KEY).data(people.clients[0]).weight is None
    named = Dataset("made", dataset.train, None, dataset.classes, as_float, weight="age")
    assert populate(named, parts, key=KEY).data(people.clients[0]).weight is not None


@pytest.mark.parametrize("holdout", [-0.1, 1.0, float("nan")])
def test_a_holdout_outside_its_range_is_refused(dataset, holdout):
    with pytest.raises(ConfigError, match="holdout="):
        populate(dataset, {"a": np.arange(5)}, holdout=holdout, key=KEY)


@pytest.mark.parametrize(
    ("partition", "message"),
    [
        ({}, "no clients"),
        ({"a": np.arange(3), "b": np.arange(0)}, "'b' has no rows"),
        ({"a": np.arange(3), "b": np.arange(2, 5)}, "row 2 is held 2 times"),
        ({"a": np.array([2999, 3000])}, "from 0 to 2999"),
        ({"a": np.array([-1, 3])}, "from 0 to 2999"),
        ({"a": np.array([0.0, 1.0])}, "whole numbers"),
    ],
)
def test_a_bad_partition_is_refused(dataset, partition, message):
    with pytest.raises(DataError, match=message):
        populate(dataset, partition, key=KEY)


def test_bad_weights_and_unknown_names_are_refused(dataset):
    with pytest.raises(DataError, match="finite number > 0"):
        populate(dataset, {"a": np.arange(5)}, key=KEY, weight="site")
    zero = Examples(dataset.train.x, dataset.train.y, {"w": np.zeros(3000)})
    with pytest.raises(DataError, match="finite number > 0"):
        populate(
            Dataset("z", zero, None, dataset.classes, as_float), {"a": np.arange(5)}, key=KEY, weight="w"
        )
    with pytest.raises(ConfigError, match="column 'wait'"):
        populate(dataset, {"a": np.arange(5)}, key=KEY, weight="wait")
    with pytest.raises(ConfigError, match="client 'b'"):
        populate(dataset, {"a": np.arange(5)}, key=KEY).data("b")


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 100),
    epochs=st.integers(0, 4),
    size=st.none() | st.integers(1, 120),
    drop_last=st.booleans(),
)
def test_batches_cover_each_epoch_once(n, epochs, size, drop_last):
    got = list(batches(n, epochs=epochs, batch_size=size, key=KEY, drop_last=drop_last))
    wanted = size or n
    a_pass = (n // wanted if drop_last else -(-n // wanted)) if n else 0
    assert len(got) == epochs * a_pass
    for epoch in range(epochs):
        mine = got[epoch * a_pass : (epoch + 1) * a_pass]
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *mine])
        assert len(np.unique(rows)) == len(rows)
        assert set(rows.tolist()) <= set(range(n))
        assert len(rows) == (n - n % wanted if drop_last and n else n)
        assert all(len(batch) == wanted for batch in mine[:-1])


def test_batches_are_reshuffled_each_epoch_and_follow_the_key():
    one = list(batches(100, epochs=2, batch_size=None, key=KEY))
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(one[0], np.arange(100))
    again = list(batches(100, epochs=2, batch_size=None, key=KEY))
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    longer = list(batches(100, epochs=3, batch_size=None, key=KEY))
    assert np.array_equal(longer[1], one[1])
    assert not np.array_equal(next(batches(100, epochs=1, batch_size=None, key=derive(8))), one[0])


def test_bad_batches_are_refused_at_the_call():
    with pytest.raises(ConfigError, match="batch_size=0"):
        batches(10, epochs=1, batch_size=0, key=KEY)
    with pytest.raises(ConfigError, match="epochs=-1"):
        batches(10, epochs=-1, batch_size=1, key=KEY)


def test_a_million_clients_cost_nothing_until_they_are_asked(dataset):
    parts = sampled(dataset.train, key=KEY, clients=10**6, samples=40)
    people = populate(dataset, parts, holdout=0.25, key=KEY)
    assert len(people.clients) == len(parts) == 10**6
    client = people.clients[765_432]
    assert client == "client-765432"
    assert people.sizes(client) == (30, 10)
    train, test = people.split(client)
    mine = people.data(client)
    assert np.array_equal(people.rows(client), train)
    assert torch.equal(mine.train[0], dataset.train.x[torch.from_numpy(train)])
    assert torch.equal(mine.test[1], dataset.train.y[torch.from_numpy(test)])
    assert len({*train.tolist(), *test.tolist()}) == 40
    again = populate(dataset, sampled(dataset.train, key=KEY, clients=800_000, samples=40), key=KEY)
    assert set(again.partition[client].tolist()) == {*train.tolist(), *test.tolist()}
    for unknown in ("client-1000000", "client-0", "client-00000000", "client-x", "a", "client-٣٣٣٣٣٣"):
        assert unknown not in people.clients
        with pytest.raises(ConfigError, match="is not in the partition"):
            people.data(unknown)
        with pytest.raises(ConfigError, match="is not in the partition"):
            people.sizes(unknown)
    pooled = people.pooled()  # the rows that they share, once
    assert torch.equal(pooled.train[0], dataset.train.x)
    assert len(pooled.test[1]) == 0


def test_a_lazy_partition_is_checked_where_it_is_looked_at(dataset):
    small = Dataset("small", dataset.train.take(np.arange(50)), None, dataset.classes, as_float)
    with pytest.raises(DataError, match="from 0 to 49"):
        populate(small, sampled(dataset.train, key=KEY, clients=10**6), key=KEY)


def test_numbered_clients_are_the_tuple_that_they_stand_for():
    for total in (1, 1000, 1001):
        lazily, plain = Numbered(total), [f"client-{i:0{3 + (total > 1000)}d}" for i in range(total)]
        assert list(lazily) == plain
        assert lazily[-1] == plain[-1]
        assert lazily[total // 2 :: 3] == plain[total // 2 :: 3]
        assert [lazily.index(client) for client in plain] == list(range(total))
        assert all(client in lazily for client in plain)
        with pytest.raises(IndexError):
            lazily[total]
        with pytest.raises(ValueError, match="not in the list"):
            lazily.index(f"client-{total:04d}")
    assert spread(Numbered(10**6), 4) == ["client-000000", "client-250000", "client-500000", "client-750000"]
    assert spread(Numbered(3), 4) == list(Numbered(3))
