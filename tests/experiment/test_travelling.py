"""Code that travels: to the bits of one process where a policy allows it, and not a byte of it elsewhere."""

import asyncio
import hashlib
import io
import json
import os
import signal
import zipfile
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from coterie import experiment, security
from coterie.backends.network import RunOpened, operators
from coterie.cli import app
from coterie.core import ConfigError, RunError, Task, trees
from coterie.experiment import code
from coterie.experiment.away import Away
from coterie.experiment.baselines import BASELINES
from coterie.experiment.config import load, to_toml
from coterie.experiment.host import Host
from coterie.storage import Blob, Ledger, verify
from deployment import SMALL, Deployment

LAYERS = """
from torch import nn


def layers(inputs, outputs):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
"""
MODEL = """
import math
from torch import nn
from {0} import layers


class Net(nn.Module):
    def __init__(self, input_shape, outputs):
        super().__init__()
        self.layers = layers(math.prod(input_shape), outputs)

    def forward(self, x):
        return self.layers(x)
"""
FIT = """
import torch


def fit(model, data, context):
    x, y = data.train
    optimizer = torch.optim.SGD(model.parameters(), lr=context.config["lr"])
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return {"seen": float(len(y))}
"""
CONFIG = {
    **SMALL,
    "name": "brought",
    "model": {"kind": "model.py:Net"},
    "schedule": {"kind": "synchronous", "rounds": 2, "cohort": 4},
}
CUSTOM = {**CONFIG, "backend": {"trainer": {"kind": "custom", "fit": "train.py:fit"}}}
WHEEL = {**CONFIG, "model": {"kind": "brought_nets:Net"}, "schedule": {**CONFIG["schedule"], "rounds": 1}}
KEY = bytes(range(32))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a config's files beside it, and more that it does not name."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "model.py").write_text(MODEL.format("stacks"))
    (folder / "stacks.py").write_text(LAYERS)
    (folder / "train.py").write_text(FIT)
    (folder / "unnamed.py").write_text("raise SystemExit\n")
    package = folder / "brought_nets"
    package.mkdir()
    (package / "__init__.py").write_text(MODEL.format("brought_nets.parts"))
    (package / "parts.py").write_text(LAYERS)
    with zipfile.ZipFile(folder / "brought_nets-1.0-py3-none-any.whl", "w") as wheel:
        for path in package.glob("*.py"):
            wheel.write(path, f"brought_nets/{path.name}")
        about = "brought_nets-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: brought_nets\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return folder


def brought(study, config=CONFIG):
    return code.gathered(replace(load(config), folder=study))


def wheel(study):
    return security.package(study / "brought_nets-1.0-py3-none-any.whl")


def digest_of(data):
    return hashlib.sha256(data).hexdigest()


# gathering


def test_what_a_config_names_travels_with_what_that_imports_and_no_more(study, tmp_path, monkeypatch):
    names = {each.filename for each in security.members(brought(study, CUSTOM))}
    assert names == {"model.py", "stacks.py", "train.py"}
    assert {each.filename for each in security.members(brought(study))} == {"model.py", "stacks.py"}
    monkeypatch.chdir(study)  # where a file is looked for when it is not beside the config
    assert code.gathered(replace(load(CONFIG), folder=tmp_path)) == brought(study)
    assert brought(study, SMALL) is None
    assert brought(study, {**CONFIG, "model": {"kind": "torch.nn:Linear"}}) is None
    with pytest.raises(ConfigError, match="there is no file"):
        brought(study, {**CONFIG, "model": {"kind": "missing.py:Net"}})


# real processes


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    made = Deployment(tmp_path_factory.mktemp("travel"), sites=1)
    for name in ("server", *made.names):
        (made.home / name / "policy.toml").write_text('code = "signed"\n')
    made.start()
    yield made
    made.close()


def submitted(federation, config, package, mine=None, **more):
    mine = mine or security.credentials(federation.home / "operator")
    with federation.channel() as channel:
        return operators.submit(channel, to_toml(load(config)), mine, code=package, **more)


@pytest.mark.parametrize("kind", ["archive", "wheel"])
def test_brought_code_runs_to_the_bits_of_one_process(kind, federation, study, tmp_path):
    config = WHEEL if kind == "wheel" else CUSTOM
    package = wheel(study) if kind == "wheel" else brought(study, CUSTOM)
    run = submitted(federation, config, package)

    def restart(round):
        if kind == "archive" and round == 1:
            federation.kill("server")  # which must find the package again
            federation.start("server")

    assert federation.watch(run, restart) == {"status": "finished", "error": ""}
    result = federation.result(run)
    here = experiment.run(replace(load(config), folder=study), out=tmp_path / "here")
    assert result["model_digest"] == here.model_digest
    assert result["final"] == pytest.approx(here.final)
    for name in ("server", *federation.names):
        key = security.public_of(security.load_signing_key(federation.home / name))
        told = [each for each in verify(federation.home / name / "ledger.jsonl", key) if "code" in each.facts]
        mine = [each.facts for each in told if each.facts["run"] == run]
        assert {each["code"] for each in mine} == {digest_of(package)}
        assert len(package) in [each.get("size") for each in mine]
    shown = CliRunner().invoke(app, ["audit", "show", str(federation.home / "site-1"), "--run", run])
    assert digest_of(package)[:12] in shown.stdout


def test_the_server_refuses_before_it_queues(federation, study):
    package = brought(study)
    with pytest.raises(ConfigError, match=r"policy modules: model.kind = 'model.py:Net' names code"):
        submitted(federation, CONFIG, b"")  # nothing is brought
    with pytest.raises(
        ConfigError, match=r"the code that travels with the run: .* there is no file .*other.py"
    ):
        submitted(federation, {**CONFIG, "model": {"kind": "other.py:Net"}}, package)
    ours = security.credentials(federation.home / "operator")
    signature = security.sign(ours.signing_key, security.of_config(to_toml(load(CONFIG)), digest_of(package)))
    for config, data in ((CONFIG, wheel(study)), ({**CONFIG, "seed": 6}, package)):
        call = operators.Submit(
            config=to_toml(load(config)), signature=signature.hex(), code=(digest_of(data), len(data))
        )
        with federation.channel() as channel, pytest.raises(ConfigError, match="does not fit the config and"):
            sent(channel, call, data)
    call = operators.Submit(
        config=to_toml(load(CONFIG)), signature="", code=(digest_of(package), len(package))
    )
    with federation.channel() as channel, pytest.raises(ConfigError, match="arrived damaged"):
        sent(channel, call, bytes([package[0] ^ 1]) + package[1:])
    foreign = replace(ours, signing_key=KEY)
    with pytest.raises(ConfigError, match="does not fit the config and code"):
        submitted(federation, CONFIG, package, mine=foreign)
    with pytest.raises(ConfigError, match="no name that may be unpacked"):
        submitted(federation, CONFIG, _zipped("../model.py"))
    call = {"config": "", "code": ["ab" * 32, security.packages.LIMIT + 1]}
    with federation.channel() as channel, pytest.raises(ConfigError, match="submit: code"):
        sent(channel, json.dumps(call).encode())
    policy = federation.home / "server" / "policy.toml"
    before = policy.read_text()
    policy.unlink()
    try:
        with pytest.raises(ConfigError, match="the server refuses: policy code: no code may travel here"):
            submitted(federation, CONFIG, package)
    finally:
        policy.write_text(before)
    assert not list((federation.home / "server").rglob("unnamed.py"))


def _zipped(name):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, "x = 1\n")
    return made.getvalue()


def sent(channel, call, data=b""):
    """Submit as a client that follows no rule."""
    call = call if isinstance(call, bytes) else call.model_dump_json().encode()
    with operators._raised():
        channel.stream_unary(f"/{operators.OPERATOR}/Submit")(iter([call, data]))


# a site


class Sent:
    """In the place of a link: has a package, and hears what fails."""

    def __init__(self, data=b""):
        self.data, self.failed, self.fetched = data, [], 0

    async def fetch(self, run, blob):
        self.fetched += 1
        self.host.blobs.path(blob.digest).write_bytes(self.data)

    def fail(self, run, id, reason, detail):
        self.failed.append((reason, detail))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A site's keys, its operator's, and those of an operator of somebody else's authority."""
    home = tmp_path_factory.mktemp("people")
    for place in ("ours", "theirs"):
        authority = security.Authority.create(home / place / "ca", place)
        for role in ("site", "operator"):
            folder = home / place / role
            pem = authority.issue(security.new_key(folder, role, role), role, role, days=1)
            security.install(folder, pem, authority.certificate)
    return home


def opening(people, data, config=CONFIG, *, signer="ours", signed=None, size=None):
    text, mine = to_toml(load(config)), security.credentials(people / signer / "operator")
    digest = digest_of(data)
    over = security.of_config(*(signed or (text, digest)))
    return RunOpened(
        run="r-1", name="r", config=text, config_digest=digest_of(text.encode()), code=Blob(digest, size or len(data)),
        signature=security.sign(mine.signing_key, over).hex(), signer=mine.certificate.decode(),
    )  # fmt: skip


def asked(people, home, run, data, policy='code = "signed"\n', then=lambda host: None, begin=None):
    """Ask a site to take part; return why not, and the host and its link."""
    home.mkdir(exist_ok=True)
    (home / "policy.toml").write_text(policy)
    begun = []

    async def play():
        with Ledger(
            home / "ledger.jsonl", lambda data: security.sign(KEY, data), security.public_of(KEY)
        ) as ledger:
            options = {"begin": begin or (lambda job, done, broken: begun.append(job))}
            if begin == "real":
                options = {}
            host = Host("site-1", home, ledger, keys=people / "ours" / "site", **options)
            host.sender = link = Sent(data)
            link.host = host
            reason = await host.opened(run)
            if then is not None and (wait := then(host)):
                await wait
            host.running = {} if begun else host.running
            host.close()
            return reason, link, begun

    return asyncio.run(play())


def test_a_site_unpacks_what_its_policy_allows_once(people, study, tmp_path):
    data = brought(study)
    reason, link, (job,) = asked(people, tmp_path / "s", opening(people, data), data)
    assert (reason, link.fetched) == ("", 1)
    assert {path.name for path in job.code.folder.iterdir()} == {"model.py", "stacks.py"}
    policy = f'code = ["sha256:{digest_of(data)}"]\nsigners = ["operator"]\n'
    reason, link, _ = asked(people, tmp_path / "s", opening(people, data), data, policy)
    assert (reason, link.fetched) == ("", 0)


@pytest.mark.parametrize(
    ("changes", "policy", "said"),
    [
        ({}, "", "policy code: no code may travel here"),
        ({}, f'code = ["{"ab" * 32}"]\n', "is not among those that may run here"),
        ({}, 'code = "signed"\nsigners = ["bob"]\n', "policy signers: operator is not among them"),
        ({"signer": "theirs"}, None, "certificate"),
        ({"signed": ("other", "")}, None, "does not fit the config and code"),
        ({"signed": (to_toml(load(CONFIG)), "ab" * 32)}, None, "does not fit the config and code"),
        ({"signed": (to_toml(load(CONFIG)), "")}, None, "does not fit the config and code"),
        ({"size": security.packages.LIMIT + 1}, None, "bytes; at most"),
        (
            {"config": {**CONFIG, "data": {**CONFIG["data"], "dataset": "a.py:b"}}},
            None,
            "policy modules: data.dataset",
        ),
    ],
)
def test_a_site_refuses_by_its_rule_and_fetches_nothing(changes, policy, said, people, study, tmp_path):
    data = brought(study)
    run = opening(people, data, **changes)
    reason, link, begun = asked(
        people, tmp_path, run, data, 'code = "signed"\n' if policy is None else policy
    )
    assert said in reason
    assert (link.fetched, begun) == (0, [])
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize(
    ("data", "came", "said"),
    [
        (b"what was signed", b"something else", "its bytes are not those of its digest"),
        (_zipped("../x.py"), None, "no name that may be unpacked"),
        (_zipped("/x.py"), None, "no name that may be unpacked"),
        (b"no zip", None, "no zip file"),
    ],
)
def test_what_is_not_safe_is_declined_and_leaves_nothing(data, came, said, people, tmp_path):
    reason, _, begun = asked(people, tmp_path, opening(people, data), came or data)
    assert said in reason
    assert begun == []
    assert [*tmp_path.glob("code/*"), *tmp_path.glob("blobs/*")] == []


@pytest.mark.parametrize("told", ["type only", "full"])
def test_code_that_raises_when_it_is_imported_is_lost_with_what_the_policy_shows(told, people, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.py").write_text("raise KeyError('patient 7 \\udc80')\n")
    data = security.package(tmp_path / "bad")

    async def wait(host):
        host.work("r-1", [Task(0, "client-000", 0, 0, "ab" * 32, "train", {}, None, None)])
        while not host.sender.failed:
            await asyncio.sleep(0.02)

    policy = f'code = "signed"\ntracebacks = "{told}"\n'
    reason, link, _ = asked(people, tmp_path / "s", opening(people, data), data, policy, wait, "real")
    assert reason == ""
    ((why, trace),) = link.failed
    if told == "full":
        assert "patient 7" in why
        assert "Traceback" in trace
        assert "model.py" in trace
    else:
        assert (why, trace) == ("site site-1: KeyError", "KeyError")


# the server's half


def away(study, tmp_path, config=CONFIG, data=None):
    data = data or brought(study, config)
    package = tmp_path / digest_of(data)
    package.write_bytes(data)
    return Away(load(config), code.prepare(tmp_path / "code", package), tmp_path / "code", None)


def test_a_model_that_is_away_measures_and_trains_as_here_even_when_killed(study, tmp_path):
    with away(study, tmp_path) as model:
        here = experiment.assemble(replace(load(CONFIG), folder=study))
        there = experiment.assemble(load(CONFIG), away=model)
        assert trees.digest(there.initial) == trees.digest(here.initial)
        expected = here.problem.measure(here.initial, *here.test)
        first = model.child.process.pid
        for _ in range(2):
            measured = there.problem.measure(there.initial, *there.test)
            assert measured == {name: expected[name] for name in ("loss", "accuracy")}
            if model.child.process.pid == first:
                os.kill(first, signal.SIGKILL)
        notes = []
        assert model.baseline("centralised", 400, 2, notes.append) == BASELINES["centralised"](
            here, 400, 2, lambda text: None
        )
        assert len(notes) == 2
        model.end(RunError("stopped"))
        with pytest.raises(RunError, match="stopped"):
            there.problem.measure(there.initial, *there.test)
    assert [each.name for each in (tmp_path / "code").iterdir()] == [model.code.digest]


def test_brought_code_sees_no_secret_of_the_environment(study, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_IDENTITY", "keys")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    look = "import os\nraise RuntimeError([open('/proc/self/environ').read(), sorted(os.environ), os.getcwd()])\n"
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "model.py").write_text(look)
    with pytest.raises(ConfigError) as caught:
        away(study, tmp_path, data=security.package(tmp_path / "look"))
    said = str(caught.value)
    assert "RuntimeError" in said
    assert "secret" not in said
    assert "COTERIE_IDENTITY" not in said
    assert str(tmp_path / "code" / ".run-") in said
