"""Tokens: once, in time, for one site, and nothing of the secret at the server."""

import stat

import pytest

from coterie.core import ConfigError
from coterie.security import (
    Authority,
    Token,
    Untrusted,
    identity_of,
    install,
    make,
    new_key,
    redeem,
    register,
    request_of,
)

HOUR = 3600.0


@pytest.fixture
def csr(tmp_path):
    return new_key(tmp_path / "site", "a", "site")


def test_a_token_works_once_and_in_time(tmp_path, csr):
    token, record = make("a", ("fl.example.org:8444",), b"PEM", now=0.0, hours=2)
    other = new_key(tmp_path / "other", "a", "site")
    used = redeem(record, token.secret, csr, now=2 * HOUR - 1)
    assert used.used
    again = request_of(tmp_path / "site", "a", "site")  # the same keys: an answer may have been lost
    assert again != csr
    assert redeem(used, token.secret, again, now=2 * HOUR - 1) == used
    for message, arguments, now in [
        ("used already", (used, token.secret, other), 1.0),
        ("expired", (record, token.secret, csr), 2 * HOUR),
        ("expired", (used, token.secret, csr), 2 * HOUR),
        ("not known", (record, token.secret[:-1] + "-", csr), 1.0),
        ("not known", (record, "", csr), 1.0),
        ("not known", (record, "\ud800", csr), 1.0),
        ("not known", (None, token.secret, csr), 1.0),
        ("no certificate signing request", (record, token.secret, b"junk"), 1.0),
    ]:
        with pytest.raises(Untrusted, match=message) as error:
            redeem(*arguments, now=now)
        assert token.secret not in str(error.value)


def test_the_server_keeps_no_secret_and_nothing_shows_it():
    token, record = make("a", ("h:1",), b"PEM", now=0.0)
    assert token.secret not in record.model_dump_json()
    assert token.secret not in f"{token!r} {token} {record!r}"
    assert make("a", ("h:1",), b"PEM", now=0.0)[0].secret != token.secret
    assert type(record).model_validate_json(record.model_dump_json()) == record  # as a row or a file holds it


def test_a_site_enrols(tmp_path, csr):
    ca = Authority.create(tmp_path / "ca")
    path = tmp_path / "a.token"
    path.write_text(ca.token("a", ["localhost:8444"]).model_dump_json())
    token = Token.load(path)
    server = Authority.open(ca.folder)  # another process
    with pytest.raises(Untrusted, match="for 'site b', not for 'site a'"):
        server.enrol(token.id, token.secret, new_key(tmp_path / "b", "b", "site"))
    pem = server.enrol(token.id, token.secret, csr)  # a wrong request has not used it up
    assert install(tmp_path / "site", pem, token.ca.encode()) == identity_of(pem)
    assert identity_of(server.enrol(token.id, token.secret, csr)).name == "a"
    with pytest.raises(Untrusted, match="used already"):
        server.enrol(token.id, token.secret, new_key(tmp_path / "c", "a", "site"))
    for id in ("", "../../ca", "0" * 16, token.id + "\n"):
        with pytest.raises(Untrusted, match="not known"):
            server.enrol(id, token.secret, csr)
    for file in (ca.folder / "tokens").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_of_two_that_redeem_at_the_same_moment_one_wins(tmp_path, csr, monkeypatch):
    ca = Authority.create(tmp_path / "ca")
    token = ca.token("a", ["h:1"])
    other = new_key(tmp_path / "other", "a", "site")

    def overtaken(path, data, **options):
        monkeypatch.setattr(register, "write_new", real)
        Authority.open(ca.folder).enrol(token.id, token.secret, other)
        real(path, data, **options)

    real = register.write_new
    monkeypatch.setattr(register, "write_new", overtaken)
    with pytest.raises(Untrusted, match="used already"):
        ca.enrol(token.id, token.secret, csr)
    assert len(list(ca.issued())) == 1


@pytest.mark.parametrize(
    ("site", "servers", "hours"),
    [
        *(("a b", ["h:1"], 1), ("a", [], 1), ("a", ["h"], 1), ("a", ["h:0"], 1), ("a", ["h:99999"], 1)),
        *(("a", ["h:1"], hours) for hours in (0, float("nan"), 1e9)),
    ],
)
def test_tokens_that_cannot_be_made(tmp_path, site, servers, hours):
    ca = Authority.create(tmp_path / "ca")
    with pytest.raises(ConfigError):
        ca.token(site, servers, hours=hours)
    assert not (ca.folder / "tokens").exists()


def test_a_damaged_token_is_not_shown(tmp_path):
    path = tmp_path / "a.token"
    path.write_text('{"id": "1", "secret": "precious"}')
    with pytest.raises(ConfigError, match=r"a.token: this is no enrolment token") as error:
        Token.load(path)
    assert "precious" not in str(error.value)
    assert error.value.__cause__ is None
    with pytest.raises(ConfigError, match="No such file"):
        Token.load(tmp_path / "none")
