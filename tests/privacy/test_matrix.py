"""Oracles: dense float64 algebra, brute force over all participations, closed forms, jax-privacy."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from coterie.core.codec import decode, encode
from coterie.core.errors import ConfigError
from coterie.privacy import matrix, toeplitz
from coterie.privacy.matrix import Correlated, correlated

Matrix = NDArray[np.float64]
KINDS = [("tree", {}), ("banded", {"bands": 3}), ("banded", {"bands": 1}), ("blt", {"buffers": 2})]
SIZES = [(12, 3, 4), (12, 3, 2), (12, 4, 3), (11, 5, 2), (9, 3, 3), (8, 8, 1), (10, 7, 2)]


def strategy(noise: Correlated, rounds: int) -> Matrix:
    """C, from what the stream makes of the unit vectors: C^-1 z for z = each column of the identity."""
    state, rows = noise.init(), []
    for z in torch.eye(rounds, dtype=torch.float64):
        w, state = noise.next(state, {"a": z})
        rows.append(w["a"])
    return np.linalg.inv(torch.stack(rows).numpy())


def patterns(rounds: int, separation: int, participations: int) -> Iterator[tuple[int, ...]]:
    for count in range(1, participations + 1):
        for chosen in itertools.combinations(range(rounds), count):
            if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
                yield chosen


def brute_force(c: Matrix, separation: int, participations: int) -> float:
    """The largest |C u| over all patterns and all signs of the contributions."""
    return max(
        float(np.linalg.norm(c[:, chosen] @ signs))
        for chosen in patterns(len(c), separation, participations)
        for signs in itertools.product((1.0, -1.0), repeat=len(chosen))
    )


@pytest.mark.parametrize(("rounds", "separation", "participations"), SIZES)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_sensitivity_and_errors_of_a_stream_are_those_of_its_dense_matrix(
    kind: str, options: dict[str, int], rounds: int, separation: int, participations: int
) -> None:
    noise = correlated(kind, rounds, separation=separation, participations=participations, **options)
    c = strategy(noise, rounds)
    exact = brute_force(c, separation, participations)
    if kind == "tree":  # a bound: equal in 5 of these 7 cases, 3% above in the worst
        assert exact - 1e-9 <= noise.sensitivity <= 1.03 * exact
    else:
        assert noise.sensitivity == pytest.approx(exact, rel=1e-10)
    b = np.tril(np.ones_like(c)) @ np.linalg.inv(c)
    np.testing.assert_allclose(b @ c, np.tril(np.ones_like(c)), atol=1e-12)
    variances = np.square(b).sum(1)
    assert noise.max_error == pytest.approx(noise.sensitivity * math.sqrt(variances.max()), rel=1e-10)
    assert noise.mean_error == pytest.approx(noise.sensitivity * math.sqrt(variances.mean()), rel=1e-10)


@pytest.mark.parametrize(("separation", "participations"), [(1, 12), (2, 6), (4, 3), (8, 2), (12, 1)])
def test_a_tree_is_charged_exactly_where_separation_is_a_power_of_two(
    separation: int, participations: int
) -> None:
    noise = correlated("tree", 12, separation=separation, participations=participations)
    c = strategy(noise, 12)
    exact = max(np.square(c[:, p].sum(1)).sum() for p in patterns(12, separation, participations))
    assert noise.sensitivity == pytest.approx(math.sqrt(exact), rel=1e-12)


def test_a_tree_node_ends_in_each_round_and_integers_stay_integers() -> None:
    rounds = 37
    noise = correlated("tree", rounds)
    assert noise.bits == 0
    assert noise.sensitivity == math.sqrt(6)  # nodes over round 1: 1, 2, 4, 8, 16, 32
    draws = torch.randint(-(2**40), 2**40, (rounds, 5), generator=torch.Generator().manual_seed(1))
    state, total = noise.init(), torch.zeros(5, dtype=torch.int64)
    for t in range(1, rounds + 1):
        w, state = noise.next(state, (draws[t - 1],))
        total += w[0]
        ends = [t & -(1 << height) for height in range(6) if t >> height & 1]  # of the nodes of [0, t)
        assert torch.equal(total, sum(draws[end - 1] for end in ends))
        assert len(state["noise"]) == t.bit_count() == len(ends)
    assert w[0].dtype == torch.int64


@pytest.mark.parametrize(("kind", "options"), [("tree", {}), ("banded", {"bands": 6})])
def test_what_is_released_in_integers_is_a_function_of_the_private_release_alone(
    kind: str, options: dict[str, int]
) -> None:
    """The integers u = 2^bits C x + z are private; from u alone, in Python's integers, comes 2^bits x + w."""
    rounds = 30
    noise = correlated(kind, rounds, separation=10, **options)
    assert noise.bits is not None
    c = strategy(noise, rounds) * 2**noise.bits
    whole = np.rint(c).astype(np.int64)
    np.testing.assert_allclose(c, whole, atol=1e-8)
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(-(2**30), 2**30, (rounds, 50), generator=generator)
    z = torch.randint(-(2**42), 2**42, (rounds, 50), generator=generator)
    u = whole.astype(object) @ x.numpy().astype(object) + z.numpy()
    state, seen = noise.init(), []
    exact_state, half_unit = noise.init(), 2**noise.bits // 2
    for t in range(rounds):
        w, state = noise.next(state, z[t])
        past = sum((int(whole[t, s]) * seen[s] for s in range(t)), np.zeros(50, dtype=object))
        seen.append(u[t] + ((half_unit - past) >> noise.bits))
        assert (seen[t] == (x[t].numpy().astype(object) << noise.bits) + w.numpy()).all()
        exact, exact_state = noise.next(exact_state, z[t].double())
        assert float((exact - w).abs().max()) <= 1.5  # units: half of one, times the norm of C^-1's rows


def test_optimal_coefficients_and_their_inverse() -> None:
    c = toeplitz.square_root(2000)
    assert c[:5].tolist() == [1, 0.5, 0.375, 0.3125, 0.2734375]
    assert torch.allclose(toeplitz.product(c, c), torch.ones(2000, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(toeplitz.inverse(c, 2000)[1:], c[1:] - c[:-1], atol=1e-12)  # A^-1 C


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_streamed_noise_solves_the_dense_system(kind: str, options: dict[str, int]) -> None:
    rounds, shape = 40, (3, 2)
    noise = correlated(kind, rounds, separation=10, **options)
    z = torch.randn(rounds, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state, found = noise.init(), []
    for row in z:
        w, state = noise.next(state, [row.T.contiguous().T])
        found.append(w[0])
    solved = np.linalg.solve(strategy(noise, rounds), z.reshape(rounds, -1).numpy())
    np.testing.assert_allclose(torch.stack(found).reshape(rounds, -1).numpy(), solved, atol=1e-11)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_pieces_change_nothing_and_an_old_state_goes_on_as_before(
    kind: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = correlated(kind, 20, separation=5, **options)
    draws = torch.randn(20, 23, generator=torch.Generator().manual_seed(3))

    def run(state: object, rounds: range) -> tuple[list[torch.Tensor], object]:
        out = []
        for t in rounds:
            w, state = noise.next(state, draws[t])
            out.append(w)
        return out, state

    _, half = run(noise.init(), range(9))
    whole, _ = run(decode(*encode(half)), range(9, 20))  # as from a checkpoint
    monkeypatch.setattr(matrix, "PIECE", 4)
    again, _ = run(half, range(9, 20))
    assert all(map(torch.equal, whole, again))


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_prefix_sums_have_the_variance_stated(kind: str, options: dict[str, int]) -> None:
    """False alarms: below 1e-6 a test (5 standard errors, two checks)."""
    rounds, draws = 21, 40_000
    noise = correlated(kind, rounds, separation=7, **options)
    generator = torch.Generator().manual_seed(4)
    state, total, first = noise.init(), torch.zeros(draws), None
    for _ in range(rounds):
        w, state = noise.next(state, torch.randn(draws, generator=generator))
        total = total + w
        first = w if first is None else first
    b = np.tril(np.ones((rounds, rounds))) @ np.linalg.inv(strategy(noise, rounds))
    stated = float(np.square(b[-1]).sum())
    assert abs(float(total.var()) / stated - 1) < 5 * math.sqrt(2 / draws)
    assert first is not None
    covariance = float((total * first).mean())  # w_1 = z_1, which enters the last sum with B[T, 1]
    assert abs(covariance - b[-1, 0]) < 5 * math.sqrt((stated + b[-1, 0] ** 2) / draws)


@pytest.mark.parametrize("objective", ["max", "mean"])
def test_optimised_strategies_stand_in_their_proved_order(objective: str) -> None:
    """All bands beat none and few; buffers come within 1% of the best; none beats the square root's worst."""
    rounds = 64
    field = f"{objective}_error"

    def error(kind: str, **options: int) -> float:
        return float(getattr(correlated(kind, rounds, objective=objective, **options), field))

    errors = [error("banded", bands=bands) for bands in (1, 2, 8, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(math.sqrt(64 if objective == "max" else 32.5))
    assert errors[-1] - 1e-6 <= error("blt", buffers=3) <= 1.01 * errors[-1]
    best = float(toeplitz.square_root(rounds).square().sum())  # sensitivity^2 = worst variance
    if objective == "max":
        assert errors[-1] == pytest.approx(best, rel=1e-6)
    else:
        assert errors[-1] < best


def test_blt_columns_decrease() -> None:
    for separation, buffers in [(3, 1), (10, 4), (100, 5)]:
        noise = correlated("blt", 100, separation=separation, buffers=buffers)
        column = strategy(noise, 100)[:, 0]
        assert column[0] == pytest.approx(1)
        assert (np.diff(column) < 1e-12).all()
        assert (column > 0).all()


def test_more_rounds_than_promised_are_refused() -> None:
    noise = correlated("tree", 2)
    state = noise.init()
    for _ in range(2):
        _, state = noise.next(state, torch.zeros(1))
    with pytest.raises(ConfigError, match=r"round 3: .* made for 2 rounds"):
        noise.next(state, torch.zeros(1))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 4 bands"):
        correlated("banded", 20, separation=4, bands=5)
    with pytest.raises(ConfigError, match=r"blt\(buffers=0\)"):
        correlated("blt", 20, buffers=0)
    with pytest.raises(ConfigError, match=r"tree\(separation=0\)"):
        correlated("tree", 20, separation=0)
    with pytest.raises(ConfigError, match="mechanism='bandmf'"):
        correlated("bandmf", 20)
    with pytest.raises(ConfigError, match="objective='worst'"):
        correlated("blt", 20, objective="worst")  # type: ignore[arg-type]
    for kind, z in [
        ("blt", torch.zeros(3, dtype=torch.int64)),
        ("tree", torch.zeros(3, dtype=torch.int32)),
        ("banded", torch.tensor([-(2**44)])),
    ]:
        noise = correlated(kind, 20)
        with pytest.raises(ConfigError, match="integer noise"):
            noise.next(noise.init(), z)


def test_one_round_is_one_gaussian() -> None:
    for kind, options in KINDS[2:]:
        noise = correlated(kind, 1, **options)
        assert (noise.sensitivity, noise.max_error, noise.mean_error) == (1, 1, 1)


@pytest.mark.parametrize(
    ("kind", "options", "theirs"),
    [
        ("banded", {"bands": 16, "objective": "max"}, 9.489479395721489),
        ("banded", {"bands": 16, "objective": "mean"}, 7.275147648561495),
        ("blt", {"buffers": 3, "objective": "max"}, 6.79180206923395),
        ("blt", {"buffers": 3, "objective": "mean"}, 5.789272601225327),
    ],
)
def test_errors_are_those_that_jax_privacy_found(
    kind: str, options: dict[str, object], theirs: float
) -> None:
    """jax-privacy 2.0.0: `toeplitz.optimize_banded_toeplitz`, `buffered_toeplitz.optimize`, in float64."""
    noise = correlated(kind, 256, separation=64, participations=4, **options)  # type: ignore[arg-type]
    ours = noise.max_error if options["objective"] == "max" else noise.mean_error
    assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.fixture
def jax_privacy() -> Iterator[Any]:
    """Its matrix_factorization, in float64."""
    found = pytest.importorskip(
        "jax_privacy.matrix_factorization", reason="jax-privacy, an oracle, is installed by hand alone"
    )
    with importlib.import_module("jax").enable_x64():
        yield found


@pytest.mark.parametrize(("rounds", "separation", "participations"), [*SIZES, (100, 30, 2), (64, 16, 9)])
def test_sensitivity_and_errors_are_jax_privacys(
    jax_privacy: Any, rounds: int, separation: int, participations: int
) -> None:
    theirs = importlib.import_module("jax_privacy.matrix_factorization.toeplitz")
    for column in (toeplitz.square_root(rounds), 0.9 * toeplitz.square_root(min(separation, 5))):
        coefficients = column.numpy()
        squared = theirs.minsep_sensitivity_squared(coefficients, separation, participations, rounds)
        ours = toeplitz.squared_sensitivity(column, rounds, separation, participations)
        assert float(ours) == pytest.approx(float(squared), rel=1e-10)
        errors = theirs.per_query_error(strategy_coef=coefficients, n=rounds)
        np.testing.assert_allclose(toeplitz.variances(column, rounds).numpy(), errors, rtol=1e-10)


@pytest.mark.parametrize(("rounds", "separation", "participations"), [*SIZES, (100, 30, 2), (64, 16, 9)])
def test_a_tree_is_charged_no_more_than_by_jax_privacys_bound(
    jax_privacy: Any, rounds: int, separation: int, participations: int
) -> None:
    """Algorithm 4 of arXiv:2306.08153 takes O(T^2) memory; our bound is at most 1% above it."""
    theirs = importlib.import_module("jax_privacy.matrix_factorization.sensitivity")
    noise = correlated("tree", rounds, separation=separation, participations=participations)
    bound = theirs.get_min_sep_sensitivity_upper_bound(
        importlib.import_module("jax").numpy.asarray(strategy(noise, rounds)), separation, participations
    )
    assert noise.sensitivity <= 1.01 * bound


@pytest.mark.parametrize(("kind", "options"), KINDS[1:])
def test_streamed_noise_is_jax_privacys(jax_privacy: Any, kind: str, options: dict[str, int]) -> None:
    rounds = 40
    theirs = importlib.import_module("jax_privacy.matrix_factorization.toeplitz")
    noise = correlated(kind, rounds, separation=10, **options)
    column = strategy(noise, rounds)[:, 0]
    z = torch.randn(rounds, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    state, found = noise.init(), []
    for row in z:
        w, state = noise.next(state, row)
        found.append(w)
    want = theirs.inverse_as_streaming_matrix(column) @ importlib.import_module("jax").numpy.asarray(
        z.numpy()
    )
    np.testing.assert_allclose(torch.stack(found).numpy(), want, atol=1e-10)
