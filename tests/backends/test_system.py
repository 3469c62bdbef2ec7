"""Simulated devices: the models of time and availability against their closed forms and brute force."""

import inspect
import math
from statistics import NormalDist, correlation

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.algorithms import ALGORITHMS, Local
from coterie.backends.system import (
    AVAILABILITY,
    COMPUTE,
    DURATIONS,
    NETWORK,
    Arrival,
    Link,
    device,
    drop_out,
    examples,
    in_stages,
)
from coterie.core import ConfigError, Task, derive, trees, uniform
from coterie.trainers import Loop, rows_of
from worlds import first_task, linear_world

KEY = derive(31, "system")
NORMAL = NormalDist()
CLIENTS = [f"client-{index}" for index in range(4000)]
FULL = {"epochs": 1, "batch_size": None, "steps": None}


def task(client="client-0", round=0, kind="train", down=None, **config):
    return Task(0, client, round, round, down or {}, kind=kind, config={**FULL, **config})


def distance(values, cdf):
    """Kolmogorov and Smirnov's, times the square root of n: above 1.95 once in a thousand."""
    ordered, n = sorted(values), len(values)
    gaps = (max((i + 1) / n - cdf(v), cdf(v) - i / n) for i, v in enumerate(ordered))
    return max(gaps) * math.sqrt(n)


def log_normal_cdf(median, sigma):
    return lambda value: NORMAL.cdf(math.log(value / median) / sigma)


@pytest.mark.parametrize(
    ("stays", "dropped", "arrival"),
    [
        (math.inf, False, Arrival(10.0)),
        (10.0, False, Arrival(10.0)),
        (math.inf, True, Arrival(10.0, "dropped out")),
        (9.9, True, Arrival(9.9, "went offline")),
        (0.0, True, Arrival(0.25, "offline")),
    ],
)
def test_how_a_task_ends(stays, dropped, arrival):
    made = device(
        duration=lambda task: 10.0,
        online=lambda client, now, need: stays,
        dropped=lambda task: dropped,
        notice=lambda task: 0.25,
    )
    assert made(task(), 3.0) == arrival


def test_a_device_that_says_nothing_answers_after_a_second():
    assert device()(task(), 5.0) == Arrival(1.0)


def test_durations_keep_their_draws():
    """What older runs drew: derive(key, purpose, ...), a normal quantile of its first 53 bits."""

    def normal(*path):
        return NORMAL.inv_cdf(uniform(derive(KEY, *path)))

    asked = task("client-9", round=4)
    log_normal = DURATIONS["log_normal"](seconds=2.0, sigma=0.7, jitter=0.2, key=KEY)
    exponent = 0.7 * normal("speed", "client-9") + 0.2 * normal("jitter", 4, "client-9")
    assert log_normal(asked) == 2.0 * math.exp(exponent)
    half_normal = DURATIONS["half_normal"](seconds=2.0, key=KEY)
    assert half_normal(asked) == 2.0 * abs(normal("delay", 4, "client-9"))
    assert DURATIONS["constant"](seconds=2.0, key=KEY)(asked) == 2.0
    lost = drop_out(0.3, key=KEY)
    assert lost(asked) == (uniform(derive(KEY, "drop-out", 4, "client-9")) < 0.3)


def test_log_normal_durations_have_their_distribution():
    duration = DURATIONS["log_normal"](seconds=3.0, sigma=0.8, jitter=0.6, key=KEY)
    assert distance([duration(task(c)) for c in CLIENTS], log_normal_cdf(3.0, 1.0)) < 1.95


def test_half_normal_durations_have_their_distribution():
    duration = DURATIONS["half_normal"](seconds=3.0, key=KEY)
    assert distance([duration(task(c)) for c in CLIENTS], lambda v: 2 * NORMAL.cdf(v / 3.0) - 1) < 1.95


def test_speeds_have_their_distribution_and_stay_with_the_client():
    speed = COMPUTE["log_normal"](samples_per_second=50.0, sigma=1.2, key=KEY)
    assert distance([speed(task(c)) for c in CLIENTS], log_normal_cdf(50.0, 1.2)) < 1.95
    assert len({speed(task("client-3", round)) for round in range(50)}) == 1


def test_jitter_is_drawn_for_each_task():
    speed = COMPUTE["log_normal"](samples_per_second=50.0, sigma=0.0, jitter=0.3, key=KEY)
    drawn = [speed(task("client-3", round)) for round in range(4000)]
    assert distance(drawn, log_normal_cdf(50.0, 0.3)) < 1.95


def test_bandwidth_has_its_distribution_the_same_both_ways():
    network = NETWORK["log_normal"](down=1e6, up=1e5, latency=0.1, sigma=0.9, key=KEY)
    links = [network(task(c)) for c in CLIENTS]
    assert distance([link.down for link in links], log_normal_cdf(1e6, 0.9)) < 1.95
    assert [link.up for link in links] == pytest.approx([link.down / 10 for link in links])
    assert {link.latency for link in links} == {0.1}


def test_speed_and_bandwidth_are_independent():
    speed = COMPUTE["log_normal"](samples_per_second=1.0, sigma=1.0, key=KEY)
    network = NETWORK["log_normal"](down=1.0, up=1.0, sigma=1.0, key=KEY)
    pairs = [(math.log(speed(task(c))), math.log(network(task(c)).down)) for c in CLIENTS]
    xs, ys = zip(*pairs, strict=True)
    assert abs(correlation(xs, ys)) < 3.3 / math.sqrt(len(pairs))  # once in a thousand


@given(
    count=st.integers(1, 40),
    epochs=st.integers(1, 4),
    batch_size=st.none() | st.integers(1, 50),
    steps=st.none() | st.integers(1, 60),
)
@settings(derandomize=True)
def test_examples_are_those_that_the_trainer_sees(count, epochs, batch_size, steps):
    asked = task(epochs=epochs, batch_size=batch_size, steps=steps)
    assert examples(asked, count) == sum(len(rows) for rows in rows_of(count, asked.config, KEY))


DOWN = {"model": {"params": {"w": torch.zeros(250)}, "buffers": {"n": torch.zeros(3, dtype=torch.int64)}}}
SIZE = 1024  # bytes
LINK = Link(down=512.0, up=128.0, latency=0.5)


@pytest.mark.parametrize(
    ("asked", "speed", "network", "update", "seconds"),
    [
        (task(down=DOWN, epochs=3), 10.0, LINK, None, 3 * 20 / 10 + 2 * 0.5 + SIZE / 512 + SIZE / 128),
        (task(down=DOWN, epochs=3), 10.0, LINK, 256, 6 + 1 + SIZE / 512 + 256 / 128),
        (task(down=DOWN, epochs=3), 10.0, None, None, 6.0),
        (task(down=DOWN), None, LINK, None, 1 + SIZE / 512 + SIZE / 128),
        (task(down=DOWN, kind="evaluate"), 10.0, LINK, None, 1 + SIZE / 512),
    ],
)
def test_seconds_of_a_task(asked, speed, network, update, seconds):
    duration = in_stages(
        speed=speed and (lambda task: speed),
        network=network and (lambda task: network),
        samples={"client-0": 20}.__getitem__,
        update=update and (lambda task: update),
    )
    assert duration(asked) == pytest.approx(seconds)


def test_sizes_are_those_of_the_task_at_hand():
    duration = in_stages(network=lambda task: Link(1.0, 1e30, 0.0), samples=lambda client: 1)
    trees_ = [{"w": torch.zeros(n)} for n in (1, 5, 1)]
    assert [duration(task(down=tree)) for tree in trees_] == pytest.approx([4, 20, 4])


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_an_update_is_as_large_as_what_was_sent(kind):
    """What `in_stages` assumes where nobody tells it more."""
    world, make = linear_world(), ALGORITHMS[kind]
    could = {"local": Local(), "population": 6, "mu": 0.1}
    named = inspect.signature(make).parameters
    algorithm = make(**{name: value for name, value in could.items() if name in named})
    asked = first_task(algorithm, world.problem.model())
    reply, _ = Loop(world.problem, world.seed).fit(algorithm, asked, None, world.people[asked.client])
    assert trees.nbytes(reply.up) == trees.nbytes(asked.down)


def online(kind, **options):
    return AVAILABILITY[kind](key=KEY, **options)


def test_always_is_always():
    assert online("always")("client-0", 1e9, 1e9) >= 1e9


@pytest.mark.parametrize(
    ("stays", "share", "period"),
    [
        (online("bernoulli", online=0.7, period=10.0), 0.7, 10.0),
        (online("bernoulli", online=0.2, period=10.0), 0.2, 10.0),
        (online("daily", online=0.25, period=100.0), 0.25, 100.0),
        (online("daily", online=0.9, spread=1.0, period=100.0), 0.9, 100.0),
    ],
)
def test_the_share_that_is_online(stays, share, period):
    """At any one moment, within 3.3 standard deviations: once in a thousand."""
    for now in (0.0, 3.2 * period, 1e6 * period):
        count = sum(stays(client, now, 1.0) > 0 for client in CLIENTS)
        off = abs(count - share * len(CLIENTS)) / math.sqrt(len(CLIENTS) * share * (1 - share))
        assert off < 3.3


@pytest.mark.parametrize(
    "stays",
    [
        online("bernoulli", online=0.7, period=10.0),
        online("daily", online=0.25, period=100.0),
        online("daily", online=0.6, spread=0.3, period=30.0),
    ],
)
@given(client=st.sampled_from(CLIENTS), now=st.floats(0, 1e4), part=st.floats(0, 1))
@settings(derandomize=True, max_examples=150)
def test_a_client_stays_online_as_long_as_it_says(stays, client, now, part):
    long = stays(client, now, 1e9)
    assert 0 <= long < 1e9
    if long > 1e-3:
        later = part * (long - 1e-4)
        assert stays(client, now + later, 1e9) == pytest.approx(long - later, abs=1e-6)
        assert stays(client, now, 0.9 * long) >= 0.9 * long
        assert stays(client, now + long + 1e-6, 1e9) == 0


def test_how_long_bernoulli_stays_is_geometric():
    """Of those online, a share `online` is there in the next period too, and so on."""
    stays = online("bernoulli", online=0.6, period=1.0)
    slots = [math.ceil(long) for client in CLIENTS if (long := stays(client, 0.0, 1e9)) > 0]
    for k in range(1, 5):
        reached = [n for n in slots if n >= k]
        more = sum(n > k for n in reached)
        assert abs(more - 0.6 * len(reached)) < 3.3 * math.sqrt(len(reached) * 0.6 * 0.4)


def test_everybody_in_one_time_zone_is_online_together():
    stays = online("daily", online=0.25, spread=0.0, period=100.0)
    for client in CLIENTS[:20]:
        assert stays(client, 0.0, 99.0) == 25.0
        assert stays(client, 320.0, 99.0) == pytest.approx(5.0)
        assert stays(client, 325.0, 99.0) == stays(client, 399.0, 99.0) == 0.0


@pytest.mark.parametrize("kind", ["bernoulli", "daily"])
def test_online_all_the_time(kind):
    assert online(kind, online=1.0)("client-0", 5.0, 1e9) >= 1e9


STRETCHES = st.lists(
    st.tuples(st.integers(0, 23), st.integers(1, 24)).filter(lambda pair: pair[0] < pair[1]),
    min_size=1,
    max_size=6,
)


@given(pairs=STRETCHES, period=st.none() | st.integers(24, 30), now=st.integers(0, 90))
@settings(derandomize=True, max_examples=300)
def test_traces_of_availability_by_brute_force(tmp_path_factory, pairs, period, now):
    """Second by second over many periods."""
    folder = tmp_path_factory.getbasetemp()
    lines = ["client,start,end", *(f"a,{start},{end}" for start, end in pairs)]
    (folder / "online.csv").write_text("\n".join(lines))
    stays = online("trace", file="online.csv", period=period, folder=folder)
    cycle = period or max(end for _, end in pairs)

    def there(second):
        return any(start <= second % cycle < end for start, end in pairs)

    need = 40
    expected = next((n for n in range(need + 1) if not there(now + n)), need)
    assert min(stays("a", float(now), float(need)), need) == expected
    if there(now):
        assert min(stays("a", now + 0.25, float(need)), need) >= min(expected - 0.25, need)


def write(folder, text, name="devices.csv"):
    (folder / name).write_text(text)
    return {"file": name, "folder": folder, "key": KEY}


def test_a_client_gets_its_own_device_or_is_dealt_one(tmp_path):
    rows = "".join(f"phone-{i},{i + 1},{100 * (i + 1)},{10 * (i + 1)}\n" for i in range(8))
    here = write(
        tmp_path, "\ufeffnote,client,samples_per_second,down,up\n" + rows.replace("phone", "x,phone")
    )
    speed, network = COMPUTE["trace"](**here), NETWORK["trace"](**here, latency=0.5)
    assert speed(task("phone-3")) == 4.0
    assert network(task("phone-3")) == Link(400.0, 40.0, 0.5)
    for client in CLIENTS:  # a device's numbers stay together
        assert network(task(client)).down == 100 * speed(task(client))
    counts = [sum(speed(task(client)) == i + 1 for client in CLIENTS) for i in range(8)]
    expected = len(CLIENTS) / 8
    assert sum((count - expected) ** 2 / expected for count in counts) < 24.3  # chi-square, 7: 1 in 1,000
    again = COMPUTE["trace"](**{**here, "key": derive(32, "system")})
    assert [speed(task(c)) for c in CLIENTS[:50]] != [again(task(c)) for c in CLIENTS[:50]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: must name the column 'client' once"),
        ("client,speed\na,1\n", "line 1: must name the column 'samples_per_second' once"),
        ("client,samples_per_second,samples_per_second\n", "line 1: must name the column"),
        ("client,samples_per_second\n", "holds no devices"),
        (
            "client,samples_per_second\n\na,1\nb,fast\n",
            "line 4: samples_per_second = 'fast': expected a number",
        ),
        ("client,samples_per_second\na,1\nb,0\n", "line 3: samples_per_second = 0: must be > 0"),
        ("client,samples_per_second\na,nan\n", "line 2: samples_per_second = 'nan': expected a number"),
        ("client,samples_per_second\na,1\na,2\n", "line 3: client 'a' is listed twice"),
        ("client,samples_per_second\na,1\nb,2,3\n", "line 3: 3 cells under 2 columns"),
        ('client,samples_per_second\na,1\n"b,2\n', "line 3: unexpected end of data"),
    ],
)
def test_bad_files_of_devices(tmp_path, text, said):
    with pytest.raises(ConfigError) as error:
        COMPUTE["trace"](**write(tmp_path, text))
    assert said in error.value.args[0]
    assert str(tmp_path / "devices.csv") in error.value.args[0]


@pytest.mark.parametrize(
    ("text", "period", "said"),
    [
        ("client,start\na,1\n", None, "line 1: must name the column 'end' once"),
        ("client,start,end\na,5,5\n", None, "line 2: start = 5, end = 5: must be 0 <= start < end"),
        ("client,start,end\na,0,5\na,-1,5\n", None, "line 3: start = -1"),
        ("client,start,end\na,0,5\na,7,25\n", 24.0, "line 3: end = 25 is after the period of 24 s"),
        ("client,start,end\na,0,inf\n", None, "line 2: end = 'inf': expected a number"),
        ("client,start,end\na,0,5\n", -1.0, "period = -1.0: must be > 0"),
    ],
)
def test_bad_files_of_stretches(tmp_path, text, period, said):
    with pytest.raises(ConfigError) as error:
        AVAILABILITY["trace"](**write(tmp_path, text), period=period)
    assert said in error.value.args[0]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        COMPUTE["trace"](file="devices.csv", folder=tmp_path, key=KEY)
    with pytest.raises(ConfigError, match="cannot be read"):
        COMPUTE["trace"](file=".", folder=tmp_path, key=KEY)
    (tmp_path / "devices.csv").write_bytes(b"client,samples_per_second\n\xff\xfe,1\n")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        COMPUTE["trace"](file="devices.csv", folder=tmp_path, key=KEY)


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (COMPUTE["constant"], {"samples_per_second": 0.0}, "system.compute.samples_per_second = 0.0"),
        (COMPUTE["log_normal"], {"samples_per_second": 1.0, "sigma": -1.0}, "system.compute.sigma = -1.0"),
        (COMPUTE["log_normal"], {"samples_per_second": 1.0, "jitter": -1.0}, "system.compute.jitter = -1.0"),
        (NETWORK["constant"], {"down": math.nan, "up": 1.0}, "system.network.down = nan"),
        (NETWORK["constant"], {"down": 1.0, "up": -2.0}, "system.network.up = -2.0"),
        (NETWORK["log_normal"], {"down": 1.0, "up": 1.0, "latency": -1.0}, "system.network.latency = -1.0"),
        (AVAILABILITY["bernoulli"], {"online": 0.0}, "system.availability.online = 0.0"),
        (AVAILABILITY["bernoulli"], {"period": 0.0}, "system.availability.period = 0.0"),
        (AVAILABILITY["daily"], {"online": 1.5}, "system.availability.online = 1.5"),
        (AVAILABILITY["daily"], {"spread": 2.0}, "system.availability.spread = 2.0"),
        (DURATIONS["constant"], {"seconds": 0.0}, "system.duration.seconds = 0.0"),
    ],
)
def test_numbers_that_cannot_be(make, options, said):
    with pytest.raises(ConfigError) as error:
        make(**options, key=KEY)
    assert said in error.value.args[0]


def test_arrivals_do_not_depend_on_what_was_asked_before(tmp_path):
    """A pure function: any order, any number of times, the same for a device made anew."""

    def make():
        return device(
            duration=in_stages(
                speed=COMPUTE["log_normal"](samples_per_second=5.0, jitter=0.2, key=KEY),
                network=NETWORK["log_normal"](down=100.0, up=10.0, jitter=0.2, key=KEY),
                samples=len,
            ),
            online=AVAILABILITY["bernoulli"](period=20.0, key=KEY),
            dropped=drop_out(0.2, key=KEY),
        )

    asked = [(task(client, round, down=DOWN), 7.0 * round) for client in CLIENTS[:40] for round in range(5)]
    one, other = make(), make()
    forward = [one(*each) for each in asked]
    assert forward == [other(*each) for each in reversed(asked)][::-1]
    assert {arrival.lost for arrival in forward} == {"", "dropped out", "offline", "went offline"}
