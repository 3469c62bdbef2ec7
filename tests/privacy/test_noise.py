"""Samplers against closed forms in exact arithmetic, against opendp's, and against broken ones.

Draws come from `insecure_source` with a fixed seed, except where opendp or the system draws: those tests
fail by chance once in 10^7 runs (FALSE_ALARM) each.
"""

import subprocess
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from coterie.core import native
from coterie.core.errors import ConfigError
from coterie.privacy import noise

FALSE_ALARM = 1e-7
KEY = bytes(range(32))
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler, so no kernels")
mpmath.mp.prec = 400


def gaussian_pmf(sigma):
    sigma = mpmath.mpf(sigma)
    # Poisson summation: sums to many digits from few terms when sigma is large
    total = sigma * mpmath.sqrt(2 * mpmath.pi) * mpmath.jtheta(3, 0, mpmath.exp(-2 * mpmath.pi**2 * sigma**2))
    return lambda x: mpmath.exp(-(mpmath.mpf(x) ** 2) / (2 * sigma**2)) / total


def laplace_pmf(scale):
    ratio = mpmath.exp(-1 / mpmath.mpf(scale))
    return lambda x: (1 - ratio) / (1 + ratio) * ratio ** abs(x)


def skellam_pmf(mu):
    mu = mpmath.mpf(mu)
    return lambda x: mpmath.exp(-2 * mu) * mpmath.besseli(abs(x), 2 * mu)


GAUSSIAN, LAPLACE, SKELLAM = noise.discrete_gaussian, noise.discrete_laplace, noise.skellam
PMF = {GAUSSIAN: gaussian_pmf, LAPLACE: laplace_pmf, SKELLAM: skellam_pmf}


def law(table):
    """{value: probability} of a table, as exact fractions: cells are equally likely, cut at their edges."""
    cells, full = len(table.entries), 1 << noise.CELL
    mass = [0] * cells
    for cell, (entry, rest) in enumerate(zip(table.entries.tolist(), table.rest.tolist(), strict=True)):
        edge = (entry >> 16 << 64) | rest
        mass[cell] += edge
        mass[entry & 0xFFFF] += full - edge
    return {table.factor * (table.first + i): Fraction(m, cells * full) for i, m in enumerate(mass) if m}


def probability(tables, x):
    """P(sum of one or two draws = x), exactly."""
    first, *others = map(law, tables)
    if not others:
        return first.get(x, Fraction(0))
    (second,) = others
    return sum(p * first.get(x - y, 0) for y, p in second.items())


def exactly(fraction):
    return mpmath.mpf(fraction.numerator) / fraction.denominator


# --- exact laws


@pytest.mark.parametrize(
    ("tables", "pmf"),
    [
        (noise._gaussian(Fraction(1, 4)), gaussian_pmf("0.5")),
        (noise._gaussian(Fraction(36)), gaussian_pmf(6)),
        (noise._laplace(Fraction(1, 2)), laplace_pmf("0.5")),
        (noise._laplace(Fraction(5)), laplace_pmf(5)),
        ((noise._skellam(Fraction(1, 2)),), skellam_pmf("0.5")),
        ((noise._skellam(Fraction(20)),), skellam_pmf(20)),
    ],
    ids=["gaussian 0.5", "gaussian 6", "laplace 0.5", "laplace 5", "skellam 0.5", "skellam 20"],
)
def test_one_table_is_within_the_stated_distance(tables, pmf):
    found = law(*tables)
    assert sum(found.values()) == 1
    inside = sum(abs(exactly(p) - pmf(x)) for x, p in found.items())
    outside = abs(1 - sum(pmf(x) for x in found))
    assert (inside + outside) / 2 < mpmath.mpf(2) ** -101 < noise.total_variation(1)


@pytest.mark.parametrize("sigma", [161, 1000, 4000])
def test_two_gaussian_tables_are_one_wider_gaussian(sigma):
    """Pointwise, far closer than the tail that is cut, wherever a draw is likelier than 2^-30."""
    tables, pmf = noise._gaussian(Fraction(sigma) ** 2), gaussian_pmf(sigma)
    assert len(tables) == 2
    for x in [*range(-12, 13), sigma, -2 * sigma - 1, 3 * sigma, 5 * sigma, -6 * sigma]:
        assert abs(exactly(probability(tables, x)) / pmf(x) - 1) < mpmath.mpf(2) ** -70


@pytest.mark.parametrize("scale", [15, 28, 100.5, 5000])
def test_digits_make_a_geometric_variable(scale):
    """Half the tables of a wide Laplace are those of one geometric variable; digits meet nowhere twice."""
    tables = noise._laplace(Fraction(scale))
    up = tables[: len(tables) // 2]
    assert [each.factor for each in tables] == [each.factor for each in up] + [-each.factor for each in up]
    ratio = mpmath.exp(-1 / mpmath.mpf(scale))
    for x in [0, 1, 7, int(scale), 2047, 2048, 4097, 20 * int(scale)]:
        digits = [x % 2048, x // 2048 * 2048] if len(up) == 2 else [x]
        found = mpmath.mpf(1)
        for table, digit in zip(up, digits, strict=True):
            found *= exactly(law(table).get(digit, Fraction(0)))
        assert abs(found - (1 - ratio) * ratio**x) < mpmath.mpf(2) ** -100


@given(st.floats(0.01, 2.0**48))
def test_every_width_hides_its_gaps(sigma):
    """The condition of the sum of two Gaussians, on every level; and variances add up exactly."""
    variance, levels = Fraction(sigma) ** 2, 1
    while variance > noise.NARROW**2:
        fine, coarse, factor = noise._split(variance)
        assert fine + coarse * factor**2 == variance
        assert fine * coarse >= 4 * variance
        assert coarse <= noise.MEDIUM**2
        variance, levels = fine, levels + 1
    assert levels <= 9


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_a_table_is_its_weights(weights):
    found, total = law(noise.tabulate(weights)), sum(weights)
    assert sum(found.values()) == 1
    for x, weight in enumerate(weights):
        assert abs(found.get(x, 0) - Fraction(weight, total)) < Fraction(len(weights), 1 << noise.CELL)


@given(st.fractions(0, 250))
def test_exponentials_are_right(x):
    exact = mpmath.exp(-mpmath.mpf(x.numerator) / x.denominator) * mpmath.mpf(2) ** 256
    assert abs(noise.exp_fixed(x) - exact) <= 2


# --- randomness


@needs_compiler
@pytest.mark.parametrize(
    ("key", "counter", "stream"),
    [  # RFC 8439, appendix A.1, vectors 1 to 3
        (
            bytes(32),
            0,
            "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
        ),
        (
            bytes(32),
            1,
            "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
        ),
        (
            bytes(31) + b"\1",
            1,
            "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
        ),
    ],
)
def test_the_stream_is_chacha20_as_published(key, counter, stream):
    assert blocks(key, counter, 1)[:64].hex() == stream


@needs_compiler
def test_the_stream_is_the_chacha20_of_openssl():
    counter = 123_456_789
    cipher = Cipher(algorithms.ChaCha20(KEY, counter.to_bytes(16, "little")), None).encryptor()
    assert blocks(KEY, counter, 5) == cipher.update(bytes(5 * 1024))


@needs_compiler
def test_successive_words_use_each_block_of_the_stream_once():
    words = noise._stream(lambda count: KEY[:count])
    found = np.concatenate([words(128), words(256), words(128)]).view(np.uint32)
    cipher = Cipher(algorithms.ChaCha20(KEY, bytes(16)), None).encryptor()
    whole = np.frombuffer(cipher.update(bytes(4096)), np.uint32)
    assert (np.sort(found) == np.sort(whole)).all()


def blocks(key, counter, groups):
    """Bytes of the kernel's stream, put in the order of the RFC."""
    out = torch.empty(groups * 256, dtype=torch.int32)
    native.call("noise_stream", torch.frombuffer(bytearray(key), dtype=torch.int32), out, counter, groups)
    return out.view(groups, 16, 16).transpose(1, 2).contiguous().numpy().tobytes()


@needs_compiler
@pytest.mark.parametrize(
    ("sampler", "scale"), [(GAUSSIAN, 0.5), (GAUSSIAN, 3000.7), (LAPLACE, 1e6), (SKELLAM, 40.0)]
)
def test_kernel_and_numpy_make_the_same_of_the_same_words(sampler, scale, monkeypatch):
    size = 3 * noise.CHUNK + 17
    fast = sampler(size, scale, lambda count: KEY[:count])
    words = noise._stream(lambda count: KEY[:count])
    monkeypatch.setattr(native, "library", lambda: None)
    assert torch.equal(sampler(size, scale, lambda count: words(count // 8).tobytes()), fast)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_word_on_the_edge_is_decided_by_another(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    table = noise.tabulate([1, 2], first=-5, factor=7)  # cell 0 is 0 up to 2/3, then 1
    edge, rest = table.entries[0] >> np.uint64(16), table.rest[0]
    given = iter(
        [
            np.array([edge, edge - np.uint64(1), edge, edge + np.uint64(1)], np.uint64) << np.uint64(16),
            np.array([rest - np.uint64(1), rest], np.uint64),
        ]
    )
    out = torch.full((4,), 100)
    noise._pick(table, lambda count: next(given), out)
    assert out.tolist() == [65, 65, 72, 72]


def test_the_system_draws_afresh_and_global_generators_do_not_matter():
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002  the very generator that must not matter
        drawn.append(noise.discrete_gaussian((8, 8), 2.0**30))
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(3)))
    assert not (drawn[0] == drawn[1]).any()  # 64 draws, equal ones less often than 1 in 10^7


def test_a_forked_process_does_not_repeat_its_parent():
    code = """
import os, sys
from coterie.privacy import noise
first = noise.discrete_gaussian(4, 2.0**40)
reader, writer = os.pipe()
child = os.fork()
mine = repr(noise.discrete_gaussian(4, 2.0**40).tolist())
if child == 0:
    os.write(writer, mine.encode())
    os._exit(0)
os.waitpid(child, 0)
print(mine == os.read(reader, 1000).decode())
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "False\n", done.stderr


def test_an_insecure_source_repeats():
    one, two, other = (
        noise.discrete_laplace((3, 5), 100.0, noise.insecure_source(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# --- draws


TAILS = [1e-4, 1e-3, 1e-2]  # a bin of its own for each, so that a cut tail shows
LEVELS = [*TAILS, *(k / 40 for k in range(1, 40)), *(1 - t for t in TAILS)]


def chi_square(drawn, pmf):
    """p-value of these draws under a law, in bins of the LEVELS between its quantiles, fewer if it is narrow.

    What the law holds beyond the draws is shared out to the outermost bins; bins of 5 or fewer are left out.
    """
    values = drawn.flatten().tolist()
    span = range(min(values) - 1, max(values) + 2)
    below = np.cumsum([float(pmf(x)) for x in span])
    below += max(0.0, 1 - below[-1]) / 2
    cuts = [c for c in sorted({int(np.searchsorted(below, level)) for level in LEVELS}) if c < len(span) - 1]
    expected = np.diff([0.0, *below[cuts], 1.0]) * len(values)
    counted = np.bincount(np.searchsorted([span[c] for c in cuts], values), minlength=len(expected))
    keep = expected > 5
    assert keep.sum() > 1
    statistic = ((counted - expected)[keep] ** 2 / expected[keep]).sum()
    return stats.chi2.sf(statistic, keep.sum() - 1)


CASES = [
    (GAUSSIAN, 0.5), (GAUSSIAN, 3.25), (GAUSSIAN, 200.0), (LAPLACE, 0.5), (LAPLACE, 10.0), (LAPLACE, 60.0),
    (SKELLAM, 0.5), (SKELLAM, 30.0),
]  # fmt: skip


def drawn(sampler, scale, size=200_000, seed=11):
    return sampler(size, scale, noise.insecure_source(seed))


@pytest.mark.parametrize(("sampler", "scale"), CASES)
def test_draws_fit_their_mass_function(sampler, scale):
    assert chi_square(drawn(sampler, scale), PMF[sampler](scale)) > FALSE_ALARM


BREAKS = {
    "scale halved": lambda x, scale: x // 2,
    "five per cent too wide": lambda x, scale: (x * 1.05).round().long(),
    "tail cut": lambda x, scale: x.clamp(-int(2 * scale), int(2 * scale)),
    "one sign": lambda x, scale: x.abs(),
    "off by one": lambda x, scale: x + 1,
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize(("sampler", "scale"), [(GAUSSIAN, 30.0), (LAPLACE, 10.0)])
def test_a_broken_sampler_is_caught(sampler, scale, broken):
    whole = drawn(sampler, scale)
    assert chi_square(whole, PMF[sampler](scale)) > FALSE_ALARM
    assert chi_square(BREAKS[broken](whole, scale), PMF[sampler](scale)) < FALSE_ALARM


def test_a_rounded_float_gaussian_is_no_discrete_gaussian():
    rounded = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.5).round().long()
    assert chi_square(rounded, gaussian_pmf("0.5")) < FALSE_ALARM


@pytest.mark.parametrize("scale", [0.5, 1500.0])
@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_draws_are_as_opendps(name, scale):
    """Two-sample chi-square (narrow) and Kolmogorov-Smirnov (wide), and that they see a scale 20 % smaller."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T="i64"))
    if name == "gaussian":
        theirs = dp.m.make_gaussian(domain, dp.l2_distance(T="i64"), scale=scale)
    else:
        theirs = dp.m.make_laplace(domain, dp.l1_distance(T="i64"), scale=scale)
    oracle = np.array(theirs([0] * 20_000))
    ours = {"gaussian": GAUSSIAN, "laplace": LAPLACE}[name]
    test = same_counts if scale < 10 else (lambda a, b: stats.ks_2samp(a, b).pvalue)
    assert test(ours(200_000, scale).numpy(), oracle) > FALSE_ALARM
    assert test(ours(200_000, 0.8 * scale).numpy(), oracle) < FALSE_ALARM


def same_counts(a, b):
    """p-value of a two-sample chi-square test, over values that are not rare."""
    table = np.array([np.bincount((x.clip(-4, 4) + 4).astype(int), minlength=9) for x in (a, b)])
    return stats.chi2_contingency(table[:, table.sum(0) > 20]).pvalue


@pytest.mark.parametrize(
    ("sampler", "scale", "variance"),
    [
        (GAUSSIAN, 4000.0, 4000.0**2),
        (GAUSSIAN, 2.0**20 + 0.3, (2.0**20 + 0.3) ** 2),
        (GAUSSIAN, 2.0**48, 2.0**96),
        (LAPLACE, 2.0**20, 2 * 2.0**40),
        (LAPLACE, 2.0**48, 2 * 2.0**96),
        (SKELLAM, 500_000.5, 1_000_001.0),
        (SKELLAM, 2.0**23, 2.0**24),
    ],
)
def test_wide_draws_have_their_mean_variance_and_shape(sampler, scale, variance):
    x = drawn(sampler, scale, 400_000).double() / variance**0.5
    assert abs(float(x.mean())) * len(x) ** 0.5 < 5.4  # 1 in 10^7
    fourth = 6 if sampler is LAPLACE else 3
    assert abs(float(x.square().mean()) - 1) < 5.4 * ((fourth - 1) / len(x)) ** 0.5
    shape = stats.laplace(scale=0.5**0.5) if sampler is LAPLACE else stats.norm()
    assert stats.kstest(x.numpy(), shape.cdf).pvalue > FALSE_ALARM


def test_shares_of_skellam_noise_add_up():
    shares = sum(drawn(SKELLAM, 3.0, seed=seed) for seed in range(10))
    assert chi_square(shares, skellam_pmf(30)) > FALSE_ALARM
    assert chi_square(shares, skellam_pmf(27)) < FALSE_ALARM


@pytest.mark.parametrize("p", [0.0, 0.01, 1 / 3, 1.0, Fraction(1, 10**9)])
def test_bernoulli(p):
    hits = int(noise.bernoulli(100_000, p, noise.insecure_source(1)).sum())
    assert stats.binomtest(hits, 100_000, float(p)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 3 * 2**61])
def test_uniform_below(n):
    x = noise.uniform_below((200, 500), n, noise.insecure_source(1))
    assert x.shape == (200, 500)
    assert 0 <= x.min() <= x.max() < n
    bins = min(n, 100)
    counts = torch.bincount((x.double() / n * bins).floor().long().flatten(), minlength=bins)
    assert n == 1 or stats.chisquare(counts.numpy()).pvalue > FALSE_ALARM
    assert all(0 <= noise.integer_below(n, noise.insecure_source(seed)) < n for seed in range(50))


# --- refusals


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 2.0**49, 10**400, "4", True, None])
@pytest.mark.parametrize("sampler", PMF)
def test_scales_that_cannot_be_are_refused(sampler, value):
    with pytest.raises(ConfigError, match=r"must be a finite number in \(0, "):
        sampler(3, value)


@pytest.mark.parametrize("value", [5e-324, 1e-9, Fraction(1, 10**400)])
@pytest.mark.parametrize("sampler", PMF)
def test_next_to_no_noise_is_none(sampler, value):
    assert not sampler(1000, value).any()


@pytest.mark.parametrize("shape", [-1, (3, -2), (2**20, 2**20)])
def test_shapes_that_cannot_be_are_refused(shape):
    with pytest.raises(ConfigError, match="draws at once"):
        noise.discrete_gaussian(shape, 1.0)


def test_other_arguments_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="must be in"):
        noise.bernoulli(3, 1.5)
    with pytest.raises(ConfigError, match="must be in"):
        noise.uniform_below(3, 0)
    with pytest.raises(ValueError, match="at most 65536"):
        noise.tabulate([1] * 65537)


@pytest.mark.parametrize("shape", [(), 0, (0, 3), (2, 3), torch.Size([4])])
def test_shapes(shape):
    expected = (shape,) if isinstance(shape, int) else tuple(shape)
    for x in (
        noise.discrete_gaussian(shape, 300.0),
        noise.uniform_below(shape, 3),
        noise.bernoulli(shape, 0.5),
    ):
        assert x.shape == expected
