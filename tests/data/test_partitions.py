import inspect
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.decomposition import PCA

from coterie.core.errors import ConfigError, DataError
from coterie.core.seeds import derive
from coterie.data import PARTITIONS, Examples, describe, partitions

KEY = derive(7, "partition")


def make(n, labels, seed=0, values=5):
    draw = np.random.default_rng(seed)
    x = torch.from_numpy(draw.standard_normal((n, 3)).astype(np.float32))
    return Examples(x, torch.from_numpy(draw.integers(0, labels, n)), {"site": draw.integers(0, values, n)})


def check(partition, n):
    for client, rows in partition.items():
        assert isinstance(client, str)
        assert rows.dtype == np.int64
        assert len(rows) > 0
        assert (np.diff(rows) > 0).all()
    assert np.array_equal(np.sort(np.concatenate(list(partition.values()))), np.arange(n))


def skews(clients):
    """Every kind with settings that fit any data of at least 4 * clients rows."""
    return {
        "iid": {"clients": clients},
        "dirichlet": {"clients": clients, "alpha": 0.2, "min_samples": 2},
        "shards": {"clients": clients, "shards_per_client": 3},
        "power_law": {"clients": clients, "exponent": 1.3},
        "log_normal": {"clients": clients, "sigma": 2.0},
        "natural": {"column": "site"},
        "hash": {"clients": clients},
        "range": {"clients": clients, "column": "index"},
        "feature_skew": {"clients": clients, "sigma": 0.3},
    }


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 30),
    extra=st.integers(0, 200),
    labels=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_nothing_is_lost_or_doubled_and_the_key_decides(clients, extra, labels, seed):
    n = 4 * clients + extra
    examples = make(n, labels, seed)
    for kind, options in skews(clients).items():
        key = derive(seed, kind)
        partition = PARTITIONS[kind](examples, key=key, **options)
        check(partition, n)
        again = PARTITIONS[kind](examples, key=key, **options)
        assert list(partition) == list(again)
        assert all(np.array_equal(partition[client], again[client]) for client in partition)
        if kind not in ("natural", "hash"):
            assert len(partition) == clients


@settings(max_examples=60, deadline=None)
@given(data=st.data(), labels=st.integers(1, 10), seed=st.integers(0, 1000))
def test_pathological_gives_each_client_exactly_k_labels(data, labels, seed):
    held = data.draw(st.integers(1, labels))
    clients = data.draw(st.integers(-(-labels // held), 25))
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(labels), 30))
    examples = Examples(torch.zeros(len(y), 1), torch.from_numpy(y))
    partition = PARTITIONS["pathological"](examples, key=derive(seed, "p"), clients=clients, labels=held)
    check(partition, len(y))
    assert len(partition) == clients
    assert all(len(np.unique(y[rows])) == held for rows in partition.values())
    counts = describe(examples, partition).counts
    for holders in counts.T:
        assert np.ptp(holders[holders > 0]) <= 1
    assert np.ptp((counts > 0).sum(axis=0)) <= 1


def test_pathological_respects_labels_with_few_rows():
    y = np.repeat([0, 1, 2], [500, 500, 3])
    examples = Examples(torch.zeros(len(y), 1), torch.from_numpy(y))
    partition = partitions.pathological(examples, key=KEY, clients=20, labels=2)
    check(partition, len(y))
    counts = describe(examples, partition).counts
    assert (counts > 0).sum(axis=1).tolist() == [2] * 20
    assert (counts[:, 2] > 0).sum() == 3
    with pytest.raises(ConfigError, match="too few rows"):
        partitions.pathological(examples, key=KEY, clients=20, labels=3)


def test_another_key_gives_another_partition(labelled):
    for kind, options in skews(10).items():
        one, other = (PARTITIONS[kind](labelled, key=derive(seed, "p"), **options) for seed in (1, 2))
        same = all(np.array_equal(one[client], other[client]) for client in one)
        assert same == (kind in ("natural", "range")), kind


def test_sizes_of_even_kinds(labelled):
    for kind in ("iid", "feature_skew"):
        sizes = [len(rows) for rows in PARTITIONS[kind](labelled, key=KEY, clients=7).values()]
        assert max(sizes) - min(sizes) <= 1


def test_names_are_padded_to_sort():
    names = list(partitions.iid(make(1200, 2), key=KEY, clients=1100))
    assert names[:2] == ["client-0000", "client-0001"]
    assert names == sorted(names)
    assert list(partitions.iid(make(9, 2), key=KEY, clients=2)) == ["client-000", "client-001"]


def test_dirichlet_proportions_have_the_moments_of_the_distribution():
    """A client's share of a label has mean 1/K and variance (K-1) / (K^2 (K alpha + 1)).

    400 labels, so 4,000 shares; the tolerance is five standard errors or more (false alarm below 1e-5).
    """
    labels, rows, clients, alpha = 400, 1000, 10, 0.5
    y = np.repeat(np.arange(labels), rows)
    examples = Examples(torch.zeros(len(y), 1), torch.from_numpy(y))
    partition = partitions.dirichlet(examples, key=KEY, clients=clients, alpha=alpha)
    shares = describe(examples, partition).counts.T / rows
    assert shares.mean() == pytest.approx(1 / clients)
    expected = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert shares.var() == pytest.approx(expected, rel=0.15)
    assert abs(shares.mean(axis=0) - 1 / clients).max() < 5 * np.sqrt(expected / labels)


def test_dirichlet_is_uneven_for_small_alpha_and_even_for_large(labelled):
    distance = [
        describe(
            labelled, partitions.dirichlet(labelled, key=KEY, clients=10, alpha=alpha)
        ).mean_jensen_shannon
        for alpha in (0.05, 0.5, 5, 1e6)
    ]
    assert distance == sorted(distance, reverse=True)
    assert distance[0] > 0.6
    assert distance[-1] < 0.02


@pytest.mark.parametrize(("alpha", "clients", "least"), [(0.01, 200, 10), (1e-4, 3, 5), (0.1, 300, 10)])
def test_dirichlet_tops_up_when_redrawing_cannot_help(labelled, alpha, clients, least):
    partition = partitions.dirichlet(labelled, key=KEY, clients=clients, alpha=alpha, min_samples=least)
    check(partition, len(labelled))
    assert min(len(rows) for rows in partition.values()) >= least


def test_shards_hold_at_most_two_labels_each():
    """McMahan et al. 2017: 100 clients, 200 shards of 300 rows; balanced labels make each shard pure."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    examples = Examples(torch.zeros(len(y), 1), torch.from_numpy(y))
    partition = partitions.shards(examples, key=KEY, clients=100)
    assert {len(rows) for rows in partition.values()} == {60}
    assert max(len(np.unique(y[rows])) for rows in partition.values()) == 2


def test_power_law_sizes_follow_the_formula(labelled):
    sizes = np.array(
        [len(rows) for rows in partitions.power_law(labelled, key=KEY, clients=40, exponent=1.5).values()]
    )
    weights = np.arange(1, 41) ** -1.5
    assert (abs(sizes - (1 + (3000 - 40) * weights / weights.sum())) < 1).all()
    flat = partitions.power_law(labelled, key=KEY, clients=40, exponent=0)
    assert {len(rows) for rows in flat.values()} == {75}


def test_log_normal_sizes_have_the_sigma_asked_for():
    """The logarithms' standard deviation over 2,000 clients is sigma within 8% (five standard errors)."""
    partition = partitions.log_normal(make(400_000, 2), key=KEY, clients=2000, sigma=0.8)
    logs = np.log([len(rows) - 1 for rows in partition.values()])
    assert logs.std() == pytest.approx(0.8, rel=0.08)


def test_natural_names_and_small_groups(labelled):
    site = labelled.keys["site"]
    partition = partitions.natural(labelled, key=KEY, column="site")
    assert set(partition) == {"site=north", "site=south%2Feast", "site=a%20b", "site=%3F"}
    assert np.array_equal(partition["site=north"], np.flatnonzero(site == "north"))
    pooled = partitions.natural(labelled, key=KEY, column="site", min_samples=100)
    check(pooled, len(labelled))
    assert set(pooled) == {"site=north", "site=south%2Feast", "site=(other)"}
    assert len(pooled["site=(other)"]) == len(partition["site=a%20b"]) + len(partition["site=%3F"]) >= 100
    assert list(partitions.natural(labelled, key=KEY, column="site", min_samples=3000)) == ["site=(other)"]
    with pytest.raises(ConfigError, match="only 3000 rows"):
        partitions.natural(labelled, key=KEY, column="site", min_samples=3001)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=12), data=st.data())
def test_natural_clients_all_have_min_samples(counts, data):
    values = np.repeat(np.arange(len(counts)), counts)
    examples = Examples(
        torch.zeros(len(values), 1), torch.zeros(len(values), dtype=torch.int64), {"v": values}
    )
    least = data.draw(st.integers(1, len(values)))
    partition = partitions.natural(examples, key=KEY, column="v", min_samples=least)
    check(partition, len(values))
    assert min(len(rows) for rows in partition.values()) >= least


def test_natural_names_stay_different_and_short():
    values = np.array(["a b", "a%20b", "a_b", "x" * 300, "x" * 299 + "y"])
    examples = Examples(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64), {"c": values})
    names = list(partitions.natural(examples, key=KEY, column="c"))
    assert len(set(names)) == 5
    assert max(map(len, names)) < 100


def test_hash_keeps_a_value_with_one_client_whatever_the_other_rows(labelled):
    patient = labelled.keys["patient"]
    partition = partitions.by_hash(labelled, key=KEY, clients=12, column="patient")
    home = {int(value): client for client, rows in partition.items() for value in patient[rows]}
    assert sum(len(np.unique(patient[rows])) for rows in partition.values()) == len(np.unique(patient))
    half = labelled.take(np.arange(0, len(labelled), 2))
    for client, rows in partitions.by_hash(half, key=KEY, clients=12, column="patient").items():
        assert all(home[int(value)] == client for value in half.keys["patient"][rows])


def test_range_is_ordered_and_near_the_quantiles(labelled):
    age = labelled.keys["age"]
    partition = partitions.by_range(labelled, key=KEY, clients=8, column="age")
    groups = [age[rows] for rows in partition.values()]
    assert all(left.max() < right.min() for left, right in pairwise(groups))
    largest_tie = np.bincount(age).max()
    assert max(abs(len(group) - 3000 / 8) for group in groups) <= largest_tie


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 3) | st.integers(100, 300), min_size=1, max_size=12), data=st.data())
def test_range_with_heavy_ties_leaves_nobody_empty(counts, data):
    values = np.repeat(np.arange(len(counts)), counts)
    examples = Examples(
        torch.zeros(len(values), 1), torch.zeros(len(values), dtype=torch.int64), {"v": values}
    )
    clients = data.draw(st.integers(1, len(counts)))
    partition = partitions.by_range(examples, key=KEY, clients=clients, column="v")
    check(partition, len(values))
    assert len(partition) == clients


def test_feature_skew_sorts_along_the_first_principal_component():
    draw = np.random.default_rng(3)
    x = (
        draw.standard_normal((1500, 6)) * [1, 9, 1, 1, 2, 1] @ np.linalg.qr(draw.standard_normal((6, 6)))[0]
        + 50
    )
    examples = Examples(torch.from_numpy(x.astype(np.float32)), torch.zeros(1500, dtype=torch.int64))
    score = PCA(1, svd_solver="full").fit_transform(x)[:, 0]
    groups = [score[rows] for rows in partitions.feature_skew(examples, key=KEY, clients=5, sigma=0).values()]
    means = [group.mean() for group in groups]
    assert means in (sorted(means), sorted(means, reverse=True))
    ordered = sorted(groups, key=np.mean)
    overlap = [left.max() - right.min() for left, right in pairwise(ordered)]
    assert max(overlap) < 0.1 * score.std()  # the direction comes from power iteration: near, not exact
    loose = partitions.feature_skew(examples, key=KEY, clients=5, sigma=100)
    assert np.ptp([score[rows].mean() for rows in loose.values()]) < 0.2 * np.ptp(means)


def test_regression_targets_need_bins_or_another_skew():
    y = torch.linspace(0, 1, 200)
    examples = Examples(torch.zeros(200, 1), y)
    for kind, options in (("dirichlet", {"alpha": 0.1}), ("shards", {}), ("pathological", {"labels": 2})):
        with pytest.raises(ConfigError, match="numbers, not labels") as caught:
            PARTITIONS[kind](examples, key=KEY, clients=5, **options)
        assert "power_law" in caught.value.hint
        assert "bins" in caught.value.hint
        partition = PARTITIONS[kind](examples, key=KEY, clients=5, bins=5, **options)
        check(partition, 200)
        spread = [y[torch.from_numpy(rows)].std().item() for rows in partition.values()]
        assert min(spread) < 0.8 * y.std().item()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dirichlet", {"clients": 10, "alpha": -1}, r"dirichlet\(alpha=-1\): alpha must be > 0"),
        ("dirichlet", {"clients": 10, "alpha": float("nan")}, "alpha must be > 0"),
        ("dirichlet", {"clients": 10, "alpha": float("inf")}, "finite"),
        ("dirichlet", {"clients": 10, "alpha": 1, "min_samples": 301}, "only 3000 rows"),
        ("dirichlet", {"clients": 10, "alpha": 1, "min_samples": 0}, "min_samples must be"),
        ("dirichlet", {"clients": 10, "alpha": 1, "bins": 5}, "labels already"),
        ("iid", {"clients": 3001}, "only 3000 rows"),
        ("iid", {"clients": 0}, "clients must be a whole number >= 1"),
        ("iid", {"clients": True}, "clients must be a whole number"),
        ("pathological", {"clients": 10, "labels": 11}, "the data has 10 labels"),
        ("pathological", {"clients": 4, "labels": 2}, "rows would be lost"),
        ("shards", {"clients": 10, "shards_per_client": 301}, "3010 shards"),
        ("power_law", {"clients": 10, "exponent": -0.5}, "exponent must be"),
        ("log_normal", {"clients": 10, "sigma": -0.5}, "sigma must be"),
        ("feature_skew", {"clients": 10, "sigma": -0.5}, "sigma must be"),
        ("natural", {"column": "sites"}, "column 'sites'"),
        ("range", {"column": "age", "clients": 100}, "different values"),
        ("hash", {"column": "site", "clients": 5}, "only 4 different values"),
        ("sampled", {"clients": 0}, "clients must be a whole number >= 1"),
        ("sampled", {"clients": 5, "samples": 3001}, "only 3000 rows"),
        ("sampled", {"clients": 5, "sigma": -1}, "sigma must be"),
        ("sampled", {"clients": 5, "alpha": 0}, r"sampled\(alpha=0\): alpha must be > 0"),
    ],
)
def test_what_cannot_work_is_a_config_error(labelled, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        PARTITIONS[kind](labelled, key=KEY, **options)


def test_gaps_and_nans_are_refused():
    y = torch.zeros(4, dtype=torch.int64)
    gaps = Examples(torch.zeros(4, 1), y, {"age": np.array([1.0, np.nan, 2.0, 3.0])})
    with pytest.raises(ConfigError, match="row 2 has no finite value"):
        partitions.by_range(gaps, key=KEY, clients=2, column="age")
    with pytest.raises(DataError, match="NaN"):
        partitions.feature_skew(
            Examples(torch.tensor([[1.0], [float("nan")], [0], [2]]), y), key=KEY, clients=2
        )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("dirichlet", {"alpha": 1.0}), ("pathological", {"labels": 1}), ("shards", {"shards_per_client": 1})],
)
def test_a_row_of_several_targets_has_no_label_to_go_by(kind, options):
    texts = Examples(torch.zeros(6, 2), torch.arange(12).reshape(6, 2), {"role": np.arange(6) % 2})
    with pytest.raises(ConfigError, match="has 2 targets") as caught:
        PARTITIONS[kind](texts, key=KEY, clients=2, **options)
    assert "natural" in caught.value.hint
    check(PARTITIONS["natural"](texts, key=KEY, column="role"), 6)
    check(PARTITIONS["iid"](texts, key=KEY, clients=2), 6)


def test_a_near_name_is_suggested(labelled):
    with pytest.raises(ConfigError) as caught:
        partitions.natural(labelled, key=KEY, column="sites")
    assert caught.value.hint == "did you mean 'site'?"


def test_every_kind_takes_examples_and_a_key():
    for function in PARTITIONS.values():
        parameters = inspect.signature(function).parameters
        assert list(parameters)[:2] == ["examples", "key"]


def test_sampled_rows_are_distinct_and_uniform(labelled):
    """Each row is held by Binomial(clients, samples / n) of the clients; false alarms 1e-6."""
    parts = partitions.sampled(labelled, key=KEY, clients=600, samples=250)
    held = np.zeros(3000)
    for rows in parts.values():
        assert rows.dtype == np.int64
        assert len(np.unique(rows)) == len(rows) == 250
        held[rows] += 1
    p = 250 / 3000
    assert abs(held.mean() - 600 * p) < 1e-9
    spread = ((held - 600 * p) ** 2).sum() / (600 * p * (1 - p))  # nearly chi-square of 2,999 degrees
    assert stats.chi2.sf(spread, 2999) > 1e-6
    assert stats.chi2.cdf(spread, 2999) > 1e-6
    firsts = np.array([rows[0] for rows in parts.values()])  # shuffled: no part of the rows comes first
    assert stats.kstest(firsts / 3000, "uniform").pvalue > 1e-6
    everything = partitions.sampled(labelled, key=KEY, clients=2, samples=3000)
    assert np.array_equal(np.sort(everything["client-001"]), np.arange(3000))


def test_sampled_sizes_are_log_normal_and_known_without_the_rows(labelled):
    parts = partitions.sampled(labelled, key=KEY, clients=4000, samples=60, sigma=0.7)
    sizes = np.array([parts.size(client) for client in parts])
    assert stats.kstest(np.log(sizes / 60) / 0.7, "norm").statistic < 0.05  # sizes are rounded
    for client in list(parts)[:200]:
        rows = parts[client]
        assert len(np.unique(rows)) == len(rows) == parts.size(client)
    wide = partitions.sampled(labelled, key=KEY, clients=2000, samples=60, sigma=5.0)
    sizes = [wide.size(client) for client in wide]
    assert (min(sizes), max(sizes)) == (1, 3000)


def test_sampled_label_shares_have_the_moments_of_the_distribution(labelled):
    """Dirichlet(alpha p), then a multinomial: mean p, variance p (1 - p) (1 + (m - 1) / (1 + alpha)) / m."""
    y, m, alpha = labelled.y.numpy(), 100, 2.0
    parts = partitions.sampled(labelled, key=KEY, clients=3000, samples=m, alpha=alpha)
    shares = np.stack([np.bincount(y[rows], minlength=10) for rows in parts.values()]) / m
    assert all(len(np.unique(rows)) == m for rows in list(parts.values())[:300])
    p = np.bincount(y) / len(y)
    variance = p * (1 - p) * (1 + (m - 1) / (1 + alpha)) / m
    large = p > 0.05  # few clients run out of these labels, which would even them out
    assert shares.mean(axis=0)[large] == pytest.approx(p[large], abs=6 * np.sqrt(variance.max() / 3000))
    assert shares.var(axis=0)[large] == pytest.approx(variance[large], rel=0.15)
    assert np.ptp([list(rows).index(max(rows)) for rows in parts.values()]) > 90  # shuffled, labels too


def test_sampled_takes_from_other_labels_when_one_runs_out():
    y = torch.tensor([0] * 5 + [1] * 95)
    parts = partitions.sampled(Examples(torch.zeros(100, 1), y), key=KEY, clients=200, samples=90, alpha=0.1)
    assert all(len(np.unique(rows)) == 90 for rows in parts.values())


def test_a_lazy_partition_is_described_by_a_sample(labelled):
    few = partitions.sampled(labelled, key=KEY, clients=2000, samples=50)
    many = partitions.sampled(labelled, key=KEY, clients=1_000_000, samples=50)
    ours, all_of_them = describe(labelled, many), describe(labelled, dict(few))
    assert (ours.among, len(ours.clients), all_of_them.among) == (1_000_000, 2000, 2000)
    assert ours.clients[:2] == ("client-000000", "client-000500")
    assert ours.mean_jensen_shannon == pytest.approx(all_of_them.mean_jensen_shannon, rel=0.05)
    assert np.array_equal(describe(labelled, few).counts, all_of_them.counts)
