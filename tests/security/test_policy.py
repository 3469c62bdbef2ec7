"""The site's policy: the default is safe, each rule refuses by name, and what leaves is what may."""

import re
import tomllib
import traceback
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.core import ConfigError
from coterie.security import Job, Policy, allowed_metrics, redacted, refusal

DIGEST = "ab" * 32
KEY = bytes(range(32))
GOOD = Job(
    run="r",
    config={"model": {"kind": "cnn"}, "data": {"dataset": "mnist"}},
    config_digest=f"sha256:{DIGEST}",
    signer="alice",
    signer_key=KEY,
    datasets=("mnist",),
    privacy={"clipping_norm": 1.0, "noise_multiplier": 1.1, "secure_aggregation": True},
    metrics=("loss",),
)


def job(**changes):
    return Job(**{name: getattr(GOOD, name) for name in Job.__dataclass_fields__} | changes)


def test_the_default_is_safe():
    policy = Policy()
    assert refusal(policy, GOOD) == ""
    assert "signers" in refusal(policy, job(signer=None, signer_key=b""))
    assert "policy code" in refusal(policy, job(code_digest=DIGEST))
    assert "modules" in refusal(policy, job(config={"model": {"kind": "subprocess:Popen"}}))
    assert "modules" in refusal(policy, job(config={"a": [{"b": "some dir/x y.py:Net"}]}))
    for section in ({"fit": "os"}, {"kind": "x.py:"}, {"dataset": "a:1"}, {"a": "x/y.py"}, {"kind": ["b:0"]}):
        assert "modules" in refusal(policy, job(config={"backend": {"trainer": section}}))
    assert refusal(policy, job(config={"a": "http://x", "b": "12:30", "c": "note: this"})) == ""
    assert (
        redacted(policy, "Traceback (most recent call last):\n  File x\nValueError: Jane Doe\n")
        == "ValueError"
    )


@pytest.mark.parametrize(
    ("rules", "changes", "said"),
    [
        ({"signers": ["bob"]}, {}, ("signers", "alice", "bob")),
        ({"signers": []}, {}, ("signers", "nothing")),
        ({"configs": ["cd" * 32]}, {}, ("configs", "abababababab")),
        ({"code": ["cd" * 32]}, {"code_digest": DIGEST}, ("code", "abababababab")),
        ({"modules": ["mine.*"]}, {"config": {"m": "mine2:Net"}}, ("modules", "m = 'mine2:Net'", "mine.*")),
        ({"datasets": ["wards/*"]}, {}, ("datasets", "mnist", "wards/*")),
        ({"datasets": ["wards/*"]}, {"datasets": ["wards/../secret"]}, ("datasets", "wards/../secret")),
        ({"metrics": ["acc*"]}, {}, ("metrics", "loss", "acc*")),
        ({"privacy": {"clipping_norm": 0.5}}, {}, ("clipping_norm", "has 1", "at most 0.5")),
        ({"privacy": {"noise_multiplier": 2.0}}, {}, ("noise_multiplier", "has 1.1", "at least 2")),
        ({"privacy": {"noise_multiplier": 2.0}}, {"privacy": None}, ("noise_multiplier", "has none")),
        ({"privacy": {"clipping_norm": 2}}, {"privacy": {"clipping_norm": float("nan")}}, ("clipping_norm", "nan")),
        ({"privacy": {"clipping_norm": 2}}, {"privacy": {"clipping_norm": 0}}, ("clipping_norm", "has 0")),
        ({"privacy": {"noise_multiplier": 1}}, {"privacy": {"noise_multiplier": True}}, ("has none",)),
        ({"privacy": {"secure_aggregation": True}}, {"privacy": {"secure_aggregation": 1}}, ("secure_aggregation",)),
    ],
)  # fmt: skip
def test_each_rule_refuses_by_name_and_says_what_would_do(rules, changes, said):
    found = refusal(Policy.read(rules), job(**changes))
    assert found.startswith("policy ")
    for part in said:
        assert part in found


@pytest.mark.parametrize(
    "rules",
    [
        {"signers": ["alice"]},
        {"signers": [f"ed25519:{KEY.hex()}"]},
        {"configs": [DIGEST]},
        {"configs": [f"sha256:{DIGEST}"]},
        {"datasets": ["mn*"]},
        {"metrics": ["l?ss"]},
        {"privacy": {"clipping_norm": 1, "noise_multiplier": 1.1, "secure_aggregation": True}},
        {"limits": {"cpu": 4, "gpu": 0, "memory": 16, "bandwidth": 0.5, "hours": ["22:00-06:00"]}},
    ],
)
def test_each_rule_lets_through_what_it_names(rules):
    assert refusal(Policy.read(rules), GOOD) == ""
    assert refusal(Policy.read({"code": [DIGEST]}), job(code_digest=f"sha256:{DIGEST}")) == ""
    assert refusal(Policy.read({"modules": ["train.py:*"]}), job(config={"fit": "train.py:fit"})) == ""


@given(start=st.integers(0, 1439), end=st.integers(0, 1440), now=st.integers(0, 1439))
def test_hours_against_walking_the_clock(start, end, now):
    def said(minute):
        return f"{minute // 60:02}:{minute % 60:02}"

    open_minutes, minute = set(), start
    while True:  # from the start, minute by minute, over midnight, until the end
        open_minutes.add(minute)
        minute = (minute + 1) % 1440
        if minute == end % 1440:
            break
    policy = Policy.read({"limits": {"hours": [f"{said(start)}-{said(end)}"]}})
    found = refusal(policy, GOOD, datetime(2026, 1, 1, *divmod(now, 60)))
    assert (found == "") == (now in open_minutes)
    if found:
        assert "limits.hours" in found


def test_metrics_that_leave():
    metrics = {"loss": 1.0, "accuracy": 0.5, "patients": 7.0}
    assert allowed_metrics(Policy(), metrics) == metrics
    assert allowed_metrics(Policy.read({"metrics": ["loss", "acc*"]}), metrics) == {
        "loss": 1.0,
        "accuracy": 0.5,
    }
    assert allowed_metrics(Policy.read({"metrics": []}), metrics) == {}


def raised():
    class OddOne(Exception):
        pass

    try:
        try:
            open("/secret/path/jane.csv")  # noqa: SIM115, PTH123
        except OSError as error:
            raise ValueError("Jane Doe\nPassword: hunter2\n  File x\nMoreError: Jane") from error
    except ValueError:
        try:
            raise OddOne("Jane")
        except OddOne:
            return traceback.format_exc()


def test_tracebacks_show_what_the_policy_lets_them():
    text = raised()
    assert redacted(Policy.read({"tracebacks": "full"}), text) == text
    assert redacted(Policy.read({"tracebacks": "none"}), text) == ""
    assert redacted(Policy(), text) == "an exception < ValueError < FileNotFoundError"
    assert redacted(Policy(), "Jane Doe: whatever") == "an exception"
    group = (
        "  + Exception Group Traceback (most recent call last):\n  | ExceptionGroup: Jane (1 sub-exception)\n"
    )
    assert redacted(Policy(), group) == "an exception"


@given(text=st.text())
def test_a_message_never_leaves(text):
    try:
        raise KeyError(text)
    except KeyError:
        found = redacted(Policy(), traceback.format_exc())
    assert set(found.split(" < ")) <= {"KeyError", "an exception"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("datasests = []", "datasests: unknown key", "did you mean 'datasets'?"),
        ("[privacy]\nnoise = 1", "privacy.noise: unknown key", "noise_multiplier"),
        ("[limits]\nhour = []", "limits.hour: unknown key", "did you mean 'hours'?"),
        ("code = 'always'", "code = 'always'", ""),
        ("code = ['x']", "code.0 = 'x'", ""),
        ("tracebacks = 'some'", "tracebacks = 'some'", ""),
        ("signers = 'alice'", "signers = 'alice'", ""),
        ("signers = ['a b']", "signers.0 = 'a b'", ""),
        ("privacy = 3", "privacy = 3", ""),
        ("[privacy]\nclipping_norm = 0", "privacy.clipping_norm = 0", ""),
        ("[privacy]\nclipping_norm = nan", "privacy.clipping_norm = nan", ""),
        ("[privacy]\nsecure_aggregation = 1", "privacy.secure_aggregation = 1", ""),
        ("[limits]\nhours = ['9-17']", "limits.hours.0 = '9-17'", ""),
        ("[limits]\nhours = ['25:00-26:00']", "limits.hours.0", ""),
        ("[limits]\ngpu = 1.5", "limits.gpu = 1.5", ""),
        ("[limits]\ngpus = ['0,1']", "limits.gpus.0 = '0,1'", ""),
        ("[limits]\ngpu_memory = 80", "limits.gpu_memory = 80", ""),
        ("[limits]\ncpu = '4'", "limits.cpu = '4'", ""),
        ("x = ", "not TOML", ""),
        ("x = " + "[" * 5000, "not TOML", ""),
    ],
)
def test_mistakes_in_the_file(tmp_path, text, message, hint):
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        Policy.load(path)
    said = str(error.value)
    assert str(path) in said
    assert message in said
    assert hint in said
    assert len(said) < 800


def test_the_guide_says_every_key():
    text = (Path(__file__).parents[2] / "docs" / "guide" / "identity.md").read_text("utf-8")
    keys = {name for name in Policy.model_fields if name not in ("privacy", "limits")}
    keys |= {
        f"{name}.{key}"
        for name in ("privacy", "limits")
        for key in type(getattr(Policy(), name)).model_fields
    }
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert keys <= set(re.findall(r"`([\w.]+)`", " ".join(rows)))
    for example in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        assert Policy.read(tomllib.loads(example)).signers == ("alice",)


def test_files_that_are_none(tmp_path):
    for make in (
        lambda path: None,
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_bytes(bytes(2 << 20)),
    ):
        make(tmp_path / "policy.toml")
        with pytest.raises(ConfigError, match=r"policy.toml"):
            Policy.load(tmp_path / "policy.toml")
