"""Integer noise from the operating system's randomness, whose distance from the law it states is known.

Float noise on floats leaks through its bit patterns (Mironov 2012), so protected noise is made of integers.
Every draw here is a sum of `factor * X` over a few independent X, each from a finite law on the integers
held as an alias table (Walker 1977; Vose 1991). Tables are built from exact integer weights and read with
64 random bits, and 64 more in the one case in 2^48 where these are not enough.

- discrete Gaussian (Canonne, Kamath, Steinke 2020, arXiv:2004.00010): one table up to sigma = 160. A wider
  one is Y + c * X, with Y and c * X discrete Gaussians whose variances add up to sigma^2: their sum has the
  wanted law up to a factor within 1 +- 2^-111 at every point where var(X) * var(Y) >= 4 * sigma^2
  (Micciancio, Walter 2017, eprint 2017/259: Y then hides the gaps of c * X).
- discrete Laplace: one table up to scale 14; above, the difference of two geometric variables, each made
  of independent digits, since exp(-(r + c * q) / scale) factors. Exact but for table and tail.
- Skellam: tables of at most mu = 3 * 2^20 and sums of them, since Poisson variables add.

Law: `total_variation(count)` bounds the distance of `count` draws from ideal ones. It adds
(1 + e^epsilon) times itself to the delta of a mechanism. Beyond it, privacy rests on ChaCha20 (RFC 8439),
under a new key from the system for every call. No state stays between calls, so a forked process cannot
repeat its parent. Without a C compiler all words come from the system itself: slower, the same law.

Timing: the number of words and of table look-ups of a draw depends on the law alone; rejection (in
`uniform_below`) and the second word depend on random bits that are thrown away, never on what the noise
protects. What sampling by rejection or inversion gives away through time is in Jin, McMurtry, Rubinstein and
Ohrimenko 2022, arXiv:2112.05307. Which cache line a look-up reads does depend on the noise: who can watch
the server's cache is not kept out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coterie.core import native
from coterie.core.errors import ConfigError

Source = Callable[[int], bytes]  # how many -> so many fresh random bytes; os.urandom unless a test says else
Words = Callable[[int], NDArray[np.uint64]]
Shape = int | Sequence[int]

BITS = 256  # of fixed-point weights
CELL = 112  # bits of a cell's threshold: 48 in its entry, 64 for words on the edge
MOST_CELLS = 1 << 16
NARROW, MEDIUM = 160, 80  # sigma of a Gaussian table that is alone, and of one with a factor
FLAT, DIGIT = 14, 2048  # the scale of a two-sided Laplace table that is alone; cells of a digit
SKELLAM_TABLE, SKELLAM_MOST = 3 << 20, 3 << 28
LARGEST = 2**48  # sigma or scale: 100 of them stay far inside int64
MOST_DRAWS = 2**36
COARSER = "use a coarser grid: noise is in steps of the grid"
CHUNK = 1 << 16  # words at a time: half a megabyte stays in the second-level cache


@dataclass(frozen=True, eq=False)
class Table:
    """The law of `factor * X`, with X an integer from `first` on; see `tabulate`."""

    entries: NDArray[np.uint64]  # by cell: 48 bits of threshold above 16 bits of alias
    rest: NDArray[np.uint64]  # the threshold's 64 bits below those
    first: int
    factor: int = 1


def total_variation(count: int) -> float:
    """Bound the total-variation distance between `count` draws of any law here and as many ideal ones.

    2^-90 a draw: at most 256 tables, each off by 2^-102 where its tail is cut (12 sigma, 72 scales) and
    2^-112 where it is rounded; at most 8 sums of Gaussians at 2^-111.
    """
    return count * 2.0**-90


def insecure_source(seed: int) -> Source:
    """A repeatable source, for tests alone: whoever knows the seed can take the noise off again."""
    counter = itertools.count()
    return lambda count: hashlib.shake_256(f"insecure {seed} {next(counter)}".encode()).digest(count)


def discrete_gaussian(shape: Shape, sigma: float | Fraction, source: Source | None = None) -> Tensor:
    """Draw int64 noise with P(x) proportional to exp(-x^2 / (2 sigma^2)).

    sigma: in integer units, in (0, 2^48]; the variance is at most sigma^2, and equal to it within 1e-6 from
    sigma = 1 on. Gives (sensitivity^2 / (2 sigma^2))-zCDP in L2 (Canonne et al. 2020, theorem 4).
    Raises ConfigError.
    """
    return draw(
        _gaussian(positive("discrete_gaussian", "sigma", sigma, LARGEST, COARSER) ** 2), shape, source
    )


def discrete_laplace(shape: Shape, scale: float | Fraction, source: Source | None = None) -> Tensor:
    """Draw int64 noise with P(x) proportional to exp(-|x| / scale): the two-sided geometric law.

    scale: in integer units, in (0, 2^48]. Gives (sensitivity / scale)-DP in L1 (Ghosh, Roughgarden,
    Sundararajan 2009), but for `total_variation`. Raises ConfigError.
    """
    return draw(_laplace(positive("discrete_laplace", "scale", scale, LARGEST, COARSER)), shape, source)


def skellam(shape: Shape, mu: float | Fraction, source: Source | None = None) -> Tensor:
    """Draw the int64 difference of two Poisson(mu) variables: variance 2 mu; shares add up to Skellam again.

    mu: in (0, 3 * 2^28]; time grows with mu / (3 * 2^20). Agarwal, Kairouz, Liu 2021, arXiv:2110.04995.
    Raises ConfigError.
    """
    exact = positive("skellam", "mu", mu, SKELLAM_MOST, "draw a discrete Gaussian, or use a coarser grid")
    pieces = math.ceil(exact / SKELLAM_TABLE)
    return draw((_skellam(exact / pieces),) * pieces, shape, source)


def bernoulli(shape: Shape, p: float | Fraction, source: Source | None = None) -> Tensor:
    """Draw booleans that are true with probability p, exact to 2^-112. Raises ConfigError outside [0, 1]."""
    if not 0 <= p <= 1:
        raise ConfigError(f"bernoulli(p={p}): p must be in [0, 1]", "it is a probability")
    exact = Fraction(p)
    return draw((tabulate([exact.denominator - exact.numerator, exact.numerator]),), shape, source).bool()


def uniform_below(shape: Shape, n: int, source: Source | None = None) -> Tensor:
    """Draw int64 uniformly from 0 to n - 1, exactly (by rejection). n: in [1, 2^63]; else ConfigError."""
    if not 1 <= n <= 2**63:
        raise ConfigError(f"uniform_below(n={n}): n must be in [1, 2^63]", "an int64 holds no more")
    size, count = _size(shape)
    words = _stream(source)
    most = np.uint64(2**64 // n * n - 1)
    kept: list[NDArray[np.uint64]] = []
    while (missing := count - sum(map(len, kept))) > 0:
        fresh = words(missing)
        kept.append(fresh[fresh <= most])
    whole = np.concatenate([*kept, np.zeros(0, np.uint64)]) % np.uint64(n)
    return torch.from_numpy(whole.astype(np.int64)).reshape(size)


def integer_below(n: int, source: Source | None = None) -> int:
    """Draw one integer of any size uniformly from 0 to n - 1, exactly (by rejection)."""
    bits = (n - 1).bit_length()
    while True:
        drawn = int.from_bytes((source or os.urandom)((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if drawn < n:
            return drawn


def draw(tables: Sequence[Table], shape: Shape, source: Source | None = None) -> Tensor:
    """Sum one draw from each table, for every element of an int64 tensor of this shape."""
    size, count = _size(shape)
    words, out = _stream(source), torch.zeros(count, dtype=torch.int64)
    for part in torch.split(out, CHUNK):
        for table in tables:
            _pick(table, words, part)
    return out.reshape(size)


def tabulate(weights: Sequence[int], first: int = 0, factor: int = 1) -> Table:
    """The table of a law on first, first + 1, ... with these integer weights (Vose 1991, in exact integers).

    Probabilities are rounded down to multiples of 2^-112 / cells; the likeliest integer gets what is left.
    Raises ValueError for more than 2^16 weights.
    """
    cells = 1 << (len(weights) - 1).bit_length()
    if cells > MOST_CELLS:
        raise ValueError(f"a law on {len(weights)} integers: a table holds at most {MOST_CELLS}")
    full, total = 1 << CELL, sum(weights)
    mass = [each * cells * full // total for each in weights] + [0] * (cells - len(weights))
    mass[mass.index(max(mass))] += cells * full - sum(mass)
    edge, alias = [0] * cells, list(range(cells))
    small = [cell for cell in range(cells) if mass[cell] < full]
    large = [cell for cell in range(cells) if mass[cell] >= full]
    while small:
        cell, donor = small.pop(), large[-1]
        edge[cell], alias[cell] = mass[cell], donor
        mass[donor] -= full - mass[cell]
        if mass[donor] < full:
            small.append(large.pop())
    entries = [(e >> 64) << 16 | a for e, a in zip(edge, alias, strict=True)]
    rest = [e & (2**64 - 1) for e in edge]
    return Table(np.array(entries, dtype=np.uint64), np.array(rest, dtype=np.uint64), first, factor)


def exp_fixed(x: Fraction, bits: int = BITS) -> int:
    """2^bits * exp(-x) for x >= 0, within 2 units; 0 where x is above `bits`."""
    if x > bits:
        return 0
    one = 1 << (bits + 64)
    halvings = math.floor(x).bit_length() + 8
    y = one * x.numerator // (x.denominator << halvings)
    total = term = one
    for k in itertools.count(1):
        term = term * y // (one * k)
        if term == 0:
            break
        total += term
    total = one * one // total
    for _ in range(halvings):
        total = total * total // one
    return total >> 64


def _stream(source: Source | None) -> Words:
    """How many -> so many random words of 64 bits: a cipher's under a new key, or the source's own."""
    read = source or os.urandom
    if native.library() is None:
        return lambda count: np.frombuffer(read(8 * count), dtype="<u8").astype(np.uint64, copy=False)
    key = torch.frombuffer(bytearray(read(32)), dtype=torch.int32)
    counter = 0

    def words(count: int) -> NDArray[np.uint64]:
        nonlocal counter
        groups = -(-count * 8 // 1024)  # of 16 blocks of 64 bytes
        made = torch.empty(groups * 128, dtype=torch.int64)
        native.call("noise_stream", key, made, counter, groups)
        counter += groups * 16
        found: NDArray[np.uint64] = made.numpy().view(np.uint64)[:count]
        return found

    return words


def _pick(table: Table, words: Words, out: Tensor) -> None:
    """Add one draw from a table to each element of `out`."""
    drawn, sums, mask = words(len(out)), out.numpy(), len(table.entries) - 1
    compiled = native.library() is not None
    if compiled:
        given, entries = (torch.from_numpy(each.view(np.int64)) for each in (drawn, table.entries))
        edges = native.call("noise_pick", given, entries, out, len(out), mask, table.first, table.factor)
        if not edges:
            return
    cell = drawn & np.uint64(mask)
    entry = table.entries[cell]
    low, edge = drawn >> np.uint64(16), entry >> np.uint64(16)
    alias = entry & np.uint64(0xFFFF)
    if not compiled:
        sums += table.factor * (table.first + np.where(low < edge, cell, alias).astype(np.int64))
    at = np.flatnonzero(low == edge)  # given to the alias so far
    at = at[words(len(at)) < table.rest[cell[at]]]
    sums[at] += table.factor * (cell[at].astype(np.int64) - alias[at].astype(np.int64))


@lru_cache(maxsize=64)
def _gaussian(variance: Fraction) -> tuple[Table, ...]:
    """Tables whose sum is the discrete Gaussian of this variance parameter."""
    if variance <= NARROW**2:
        return (_gaussian_table(variance),)
    fine, coarse, factor = _split(variance)
    return (*_gaussian(fine), _gaussian_table(coarse, factor))


def _split(variance: Fraction) -> tuple[Fraction, Fraction, int]:
    """(fine, coarse, factor) with fine + factor^2 * coarse = variance and fine * coarse >= 4 * variance."""
    factor = math.isqrt(math.ceil(variance) - 1) // MEDIUM + 1
    fine = Fraction(5 * factor**2)  # at 4 the bound would hold for an infinite variance
    return fine, (variance - fine) / factor**2, factor


def _gaussian_table(variance: Fraction, factor: int = 1) -> Table:
    ratio = exp_fixed(1 / (2 * variance))
    step, weight, weights = ratio, 1 << BITS, [1 << BITS]
    for _ in range(math.isqrt(math.ceil(144 * variance)) + 1):  # 12 sigma
        weight, step = weight * step >> BITS, step * (ratio * ratio >> BITS) >> BITS
        weights.append(weight)
    return tabulate([*weights[:0:-1], *weights], 1 - len(weights), factor)


@lru_cache(maxsize=64)
def _laplace(scale: Fraction) -> tuple[Table, ...]:
    """Tables whose sum is the discrete Laplace of this scale."""
    if scale <= FLAT:
        half = _geometric(scale, math.ceil(72 * scale) + 1)
        return (tabulate([*half[:0:-1], *half], 1 - len(half)),)
    digits, factor = [], 1
    while scale > 2 * FLAT * factor:
        digits.append(tabulate(_geometric(scale / factor, DIGIT), 0, factor))
        factor *= DIGIT
    digits.append(tabulate(_geometric(scale / factor, math.ceil(72 * scale / factor) + 1), 0, factor))
    return (*digits, *(Table(each.entries, each.rest, 0, -each.factor) for each in digits))


def _geometric(scale: Fraction, count: int) -> list[int]:
    ratio = exp_fixed(1 / scale)
    return list(itertools.accumulate(range(count - 1), lambda w, _: w * ratio >> BITS, initial=1 << BITS))


@lru_cache(maxsize=64)
def _skellam(mu: Fraction) -> Table:
    """P(k) = exp(-2 mu) I_|k|(2 mu), by Miller's backward recurrence I_(k-1) = I_(k+1) + (k / mu) I_k."""
    wide = 2 * max(float(mu), 1e-300)  # float(mu) may be 0
    last = _reach(wide, 103)
    above, here, weights = 0, 1 << BITS, []
    for k in range(_reach(wide, 240), 0, -1):
        if k <= last:
            weights.append(here)
        above, here = here, above + k * mu.denominator * here // mu.numerator
    weights.append(here)
    return tabulate([*weights, *weights[-2::-1]], -last)


def _reach(variance: float, bits: int) -> int:
    """The least k, or a little more, with P(|X| > k) < 2^-bits by Chernoff's bound, X Skellam."""

    def certain(k: float) -> bool:
        spread = math.hypot(k, variance)
        return k * math.asinh(k / variance) - (spread - variance) > (bits + 2) * math.log(2)

    low, high = 0, 1
    while not certain(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if certain(middle) else (middle, high)
    return high


def positive(where: str, name: str, value: Any, most: float = math.inf, hint: str = "") -> Fraction:
    """The exact value of an argument that must be a finite number in (0, most]; else ConfigError."""
    known = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    if not (known and 0 < value <= most and value < math.inf):
        raise ConfigError(
            f"{where}({name}={value!r}): {name} must be a finite number in (0, {most:.6g}]", hint
        )
    return Fraction(value)


def _size(shape: Shape) -> tuple[tuple[int, ...], int]:
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    if min(size, default=0) < 0 or math.prod(size) > MOST_DRAWS:
        rule = f"no side below 0, and at most {MOST_DRAWS} draws at once"
        raise ConfigError(f"noise of shape {size}: {rule}", "draw a part at a time")
    return size, math.prod(size)
