"""Krum against brute force in NumPy (Blanchard et al. 2017)."""

from itertools import permutations

import numpy as np
import pytest
import torch

from coterie.aggregators import krum, krum_scores
from coterie.core.errors import ConfigError, QuorumLost
from coterie.core.trees import digest


def brute_force(points, f, m=1):
    """The mean of the m points whose n - f - 2 nearest others are nearest, with indices and scores."""
    n = len(points)
    scores = []
    for i in range(n):
        distances = sorted(
            sum((points[i][d] - points[j][d]) ** 2 for d in range(len(points[i]))) for j in range(n) if j != i
        )
        scores.append(sum(distances[: n - f - 2]))
    best = sorted(range(n), key=scores.__getitem__)[:m]
    return np.mean([points[i] for i in best], axis=0), best, scores


def update(point):
    point = torch.as_tensor(point, dtype=torch.float64)
    return {"delta": {"w": point[:2].reshape(1, 2), "b": point[2:]}, "buffers": {"steps": torch.tensor(7)}}


def flat(aggregate):
    return torch.cat([aggregate["delta"]["w"].reshape(-1), aggregate["delta"]["b"]]).numpy()


def picked(aggregator, points, order=None):
    acc = aggregator.init()
    for index in order if order is not None else range(len(points)):
        acc = aggregator.add(acc, update(points[index]), float(index + 1))
    return aggregator.finish(acc)


@pytest.mark.parametrize(
    ("n", "f", "m"), [(5, 0, 1), (7, 2, 1), (11, 4, 1), (9, 1, 3), (10, 3, 7), (6, 0, 6)]
)
def test_picks_what_brute_force_picks(n, f, m):
    draw = np.random.default_rng(n)
    for _ in range(5):
        points = draw.normal(size=(n, 5))
        expected, _, scores = brute_force(points, f, m)
        aggregate, weight, count = picked(krum(byzantine=f, select=m), points)
        np.testing.assert_allclose(flat(aggregate), expected, rtol=1e-12, atol=1e-12)
        assert (weight, count) == (n * (n + 1) / 2, n)
        np.testing.assert_allclose(krum_scores(torch.from_numpy(points), f).numpy(), scores, rtol=1e-12)


@pytest.mark.parametrize("select", [1, 2])
def test_order_and_nesting_do_not_matter(select):
    points = np.random.default_rng(1).normal(size=(5, 4))
    aggregator = krum(byzantine=1, select=select)
    found = {digest(picked(aggregator, points, order)[0]) for order in permutations(range(5))}
    assert len(found) == 1
    left, right = aggregator.init(), aggregator.init()
    for index in (4, 0):
        left = aggregator.add(left, update(points[index]), 1.0)
    for index in (2, 3, 1):
        right = aggregator.add(right, update(points[index]), 1.0)
    assert digest(aggregator.finish(aggregator.merge(right, left))[0]) in found


@pytest.mark.parametrize("select", [1, 3])
@pytest.mark.parametrize("alike", [True, False])
def test_hostile_updates_are_never_chosen(alike, select):
    """f far away updates, colluding or not, among n - f honest ones in a ball."""
    draw = np.random.default_rng(2)
    f, n = 3, 9
    for _ in range(20):
        honest = draw.normal(size=(n - f, 4))
        hostile = np.full((f, 4), 1e6) if alike else draw.normal(size=(f, 4)) * 1e30
        points = draw.permutation(np.concatenate([hostile, honest]))
        aggregate, _, _ = picked(krum(byzantine=f, select=select), points)
        assert np.abs(flat(aggregate)).max() < 10


def test_infinite_distances_are_the_last():
    points = np.concatenate([np.random.default_rng(3).normal(size=(5, 4)), np.full((1, 4), 1e300)])
    aggregate, _, _ = picked(krum(byzantine=1), points)
    points[-1] = 1e6  # far away as well, and its square is a number
    np.testing.assert_allclose(flat(aggregate), brute_force(points, 1)[0], rtol=1e-12, atol=1e-12)


def test_ties_go_to_the_smaller_digest_in_any_order():
    points = [[0.0] * 4, [1.0] * 4, [2.0] * 4]  # n - f - 2 = 1 neighbour: all three score 4
    assert krum_scores(torch.tensor(points), 0).tolist() == [4.0, 4.0, 4.0]
    smallest = min(points, key=lambda point: digest(update(point)))
    for order in permutations(range(3)):
        assert flat(picked(krum(byzantine=0), points, order)[0]).tolist() == smallest


def test_equal_updates_are_one_another():
    aggregate, weight, count = picked(krum(byzantine=1), [[1.0, 2.0, 3.0, 4.0]] * 5)
    assert (flat(aggregate).tolist(), weight, count) == ([1.0, 2.0, 3.0, 4.0], 15.0, 5)


def test_distances_are_measured_on_the_named_part():
    """The middle one in `delta` is far away in the buffers."""
    points = [(-1.0, 0.0), (1.4, 0.0), (0.0, 50.0), (-3.0, 0.0), (3.0, 0.0)]
    for by, seen in (("delta", [point[:1] for point in points]), (None, points)):
        aggregator = krum(byzantine=1, by=by)
        acc = aggregator.init()
        for delta, buffer in points:
            acc = aggregator.add(
                acc, {"delta": torch.tensor([delta]), "buffers": torch.tensor([buffer])}, 1.0
            )
        got = aggregator.finish(acc)[0]
        index = 2 if by else 1
        assert brute_force(seen, 1)[1] == [index]
        assert (got["delta"].item(), got["buffers"].item()) == pytest.approx(points[index])


@pytest.mark.parametrize(("f", "select", "need"), [(0, 1, 3), (2, 1, 7), (1, 6, 7)])
def test_too_few_replies(f, select, need):
    points = np.random.default_rng(4).normal(size=(need, 4))
    with pytest.raises(QuorumLost, match=f"got {need - 1} replies and needs {need}"):
        picked(krum(byzantine=f, select=select), points[1:])
    picked(krum(byzantine=f, select=select), points)


@pytest.mark.parametrize("wrong", [{"byzantine": -1}, {"byzantine": 1, "select": 0}])
def test_refuses_impossible_numbers(wrong):
    with pytest.raises(ConfigError, match="krum"):
        krum(**wrong)


def test_stacked_updates_are_single_ones():
    points = np.random.default_rng(5).normal(size=(7, 4))
    aggregator = krum(byzantine=2)
    ups = {
        "delta": {
            "w": torch.from_numpy(points[:, :2]).reshape(7, 1, 2),
            "b": torch.from_numpy(points[:, 2:]),
        },
        "buffers": {"steps": torch.full((7,), 7)},
    }
    weights = [float(index + 1) for index in range(7)]
    for given_weights in (weights, torch.tensor(weights)):
        stacked, weight, count = aggregator.finish(aggregator.add(aggregator.init(), ups, given_weights))
        single = picked(aggregator, points)
        assert (digest(stacked), weight, count) == (digest(single[0]), *single[1:])


def test_must_see_every_reply():
    assert not krum(byzantine=1).linear
