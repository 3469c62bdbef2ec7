"""Law 5: every draw is a function of (seed, purpose, round, client); nothing global is touched."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.seeds import derive, permutation, rng, seeded, uniform


def test_paths_do_not_collide():
    paths = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("abc", ""),
        ("", "abc"),
        (1, "2"),
        ("1", 2),
        (12,),
        ("12",),
        (1, 2),
    ]
    assert len({derive(7, *path) for path in paths}) == len(paths)
    assert derive(7, "x", 1) != derive(8, "x", 1)
    assert derive(derive(7, "x"), "y") != derive(7, "x", "y")


@pytest.mark.parametrize("bad", [1.5, None, True, ("a",)])
def test_only_text_and_whole_numbers_name_a_draw(bad):
    with pytest.raises(TypeError, match="neither"):
        derive(7, bad)


def test_streams_repeat_and_differ():
    key = derive(3, "batches", 0, "client-1")
    assert rng(key).permutation(50).tolist() == rng(key).permutation(50).tolist()
    assert (
        rng(key).permutation(50).tolist() != rng(derive(3, "batches", 1, "client-1")).permutation(50).tolist()
    )
    assert uniform(key) == uniform(key)


def test_uniform_is_uniform():
    draws = np.array([uniform(derive(0, "u", i)) for i in range(20_000)])
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    # chi-square with 19 degrees of freedom: 62 is exceeded with probability 2e-6
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 62


def test_seeded_draws_repeat_and_the_global_generator_is_put_back():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with seeded(derive(1, "dropout")):
        first = torch.rand(4)
    assert torch.equal(torch.random.get_rng_state(), before)
    with seeded(derive(1, "dropout")):
        assert torch.equal(torch.rand(4), first)
    with pytest.raises(ZeroDivisionError), seeded(derive(1, "dropout")):
        float(torch.rand(1)) / 0
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_global_generator_is_read():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = rng(derive(9, "a")).random(3).tolist()
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert rng(derive(9, "a")).random(3).tolist() == first


@given(st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 300)), max_size=5))
def test_a_permutation_is_that_of_a_new_generator_whatever_was_drawn_before(asked):
    for seed, n in asked:
        key = derive(seed, "order")
        assert permutation(key, n).tolist() == rng(key).permutation(n).tolist()
