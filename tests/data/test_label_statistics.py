import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from coterie.core.errors import ConfigError
from coterie.core.seeds import derive
from coterie.data import Examples, describe, dirichlet, iid


def of(y):
    return Examples(torch.zeros(len(y), 1), torch.as_tensor(y))


@settings(max_examples=100, deadline=None)
@given(labels=st.integers(1, 8), clients=st.integers(1, 9), seed=st.integers(0, 999))
def test_distances_agree_with_scipy_and_brute_force(labels, clients, seed):
    draw = np.random.default_rng(seed)
    y = draw.integers(0, labels, 80)
    rows = np.array_split(draw.permutation(80)[: draw.integers(clients, 81)], clients)
    partition = {f"c{i}": np.sort(part) for i, part in enumerate(rows)}
    found = describe(of(y), partition, [str(i) for i in range(labels)])
    held = np.concatenate(rows)
    for i, part in enumerate(rows):
        p = [sum(y[row] == label for row in part) / len(part) for label in range(labels)]
        q = [sum(y[row] == label for row in held) / len(held) for label in range(labels)]
        assert found.jensen_shannon[i] == pytest.approx(np.nan_to_num(jensenshannon(p, q, base=2)), abs=1e-7)
        assert found.earth_mover[i] == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)))
        assert found.counts[i].tolist() == [sum(y[row] == label for row in part) for label in range(labels)]
    sizes = np.array([len(part) for part in rows])
    gaps = abs(sizes[:, None] - sizes[None, :]).sum()
    assert found.gini == pytest.approx(gaps / (2 * clients * sizes.sum()))
    assert (found.smallest, found.largest) == (sizes.min(), sizes.max())
    assert found.median == np.median(sizes)
    for mean, each in (
        (found.mean_jensen_shannon, found.jensen_shannon),
        (found.mean_earth_mover, found.earth_mover),
    ):
        assert mean == pytest.approx(sum(sizes * each) / sum(sizes))


def test_the_two_ends_of_the_distances():
    y = np.repeat([0, 1], 500)
    alone = describe(of(y), {"a": np.arange(1), "b": np.arange(1, 1000)})
    assert alone.jensen_shannon[0] == pytest.approx(jensenshannon([1, 0], [0.5, 0.5], base=2), abs=1e-12)
    assert alone.earth_mover[0] == pytest.approx(1.0)
    equal = describe(of(y), {"a": np.arange(0, 1000, 2), "b": np.arange(1, 1000, 2)})
    assert equal.mean_jensen_shannon == equal.mean_earth_mover == equal.gini == 0


def test_a_regression_is_described_by_its_deciles():
    y = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float()
    facts = describe(of(y), iid(of(y), key=derive(0), clients=5))
    assert len(facts.labels) == 10
    assert facts.counts.sum(axis=0).tolist() == [100] * 10
    sorted_in_two = describe(of(torch.arange(1000.0)), {"low": np.arange(500), "high": np.arange(500, 1000)})
    assert sorted_in_two.earth_mover.tolist() == pytest.approx([1.0, 1.0])


def test_deciles_of_a_mostly_constant_target_merge():
    facts = describe(
        of(torch.tensor([0.0] * 95 + [1.0, 2, 3, 4, 5])), {"a": np.arange(50), "b": np.arange(50, 100)}
    )
    assert facts.counts.sum() == 100
    assert len(facts.labels) < 10


def test_labels_are_named_by_the_classes():
    facts = describe(of([0, 1, 1]), {"a": np.arange(3)}, ["cat", "dog", "owl"])
    assert facts.labels == ("cat", "dog", "owl")
    assert facts.counts.tolist() == [[1, 2, 0]]


def test_a_client_without_rows_is_refused():
    with pytest.raises(ConfigError, match="'b' has no rows"):
        describe(of([0, 1]), {"a": np.arange(2), "b": np.arange(0)})
    with pytest.raises(ConfigError, match="no clients"):
        describe(of([0, 1]), {})


def test_all_of_a_thousand_clients_are_described():
    examples = of(np.random.default_rng(0).integers(0, 10, 60_000))
    facts = describe(examples, dirichlet(examples, key=derive(1), clients=1000, alpha=0.1))
    assert facts.counts.shape == (1000, 10)
    assert facts.sizes.sum() == 60_000


def test_a_row_with_several_targets_counts_each_of_them_but_is_one_row():
    y = [[0, 1, 1], [1, 1, 1], [2, 2, 0]]
    facts = describe(of(y), {"a": np.array([0, 2]), "b": np.array([1])}, ["x", "y", "z"])
    assert facts.counts.tolist() == [[2, 2, 2], [0, 3, 0]]
    assert facts.sizes.tolist() == [2, 1]
    assert (facts.smallest, facts.largest) == (1, 2)
    q = [2 / 9, 5 / 9, 2 / 9]
    assert facts.jensen_shannon[1] == pytest.approx(jensenshannon([0, 1, 0], q, base=2))
