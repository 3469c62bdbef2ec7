"""What an authority remembers holds for all servers on a database, in whatever order they ask."""

import shutil
import threading

import pytest
from typer.testing import CliRunner

from coterie.cli import app
from coterie.security import Authority, Untrusted, identity_of, new_key, register
from coterie.storage.database import Database
from coterie.storage.register import Register


@pytest.fixture
def two(tmp_path, database_url):
    """One authority at two servers: each has its copy of the folder, both have the database."""
    Authority.create(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    databases = [Database(database_url), Database(database_url)]
    yield [
        Authority.open(tmp_path / name, Register(each))
        for name, each in zip(("one", "two"), databases, strict=True)
    ]
    for each in databases:
        each.close()


def test_a_token_used_at_one_server_is_refused_at_the_other(two, tmp_path):
    one, other = two
    token = one.token("a", ["h:1"])
    mine, theirs = new_key(tmp_path / "mine", "a", "site"), new_key(tmp_path / "theirs", "a", "site")
    pem = one.enrol(token.id, token.secret, mine)
    with pytest.raises(Untrusted, match="used already"):
        other.enrol(token.id, token.secret, theirs)
    with pytest.raises(Untrusted, match="not known"):
        other.enrol(token.id, "x" * 43, mine)
    again = other.enrol(token.id, token.secret, mine)  # whose answer was lost on its way
    assert {each.pem for each in other.issued("site", "a")} == {pem, again}
    assert identity_of(other.renew(mine, pem)).name == "a"  # the other knows what this one signed


def test_a_token_of_the_folder_is_used_once_too(two, tmp_path):
    """Made by `pki token` before the server had a database; the other server has a copy of the folder."""
    one, other = two
    token = Authority.open(one.folder).token("a", ["h:1"])
    shutil.copytree(one.folder / "tokens", other.folder / "tokens")
    one.enrol(token.id, token.secret, new_key(tmp_path / "mine", "a", "site"))
    with pytest.raises(Untrusted, match="used already"):
        other.enrol(token.id, token.secret, new_key(tmp_path / "theirs", "a", "site"))
    used = Authority.open(one.folder).token("b", ["h:1"])
    Authority.open(one.folder).enrol(used.id, used.secret, new_key(tmp_path / "b", "b", "site"))
    with pytest.raises(Untrusted, match="used already"):  # in the folder, of which the database has not heard
        one.enrol(used.id, used.secret, new_key(tmp_path / "b2", "b", "site"))


def test_of_many_at_the_same_moment_one_wins(two, tmp_path):
    token = two[0].token("a", ["h:1"])
    requests = [new_key(tmp_path / str(n), "a", "site") for n in range(8)]
    record, _ = two[0].register.token(token.id)
    start, won = threading.Barrier(8), []

    def use(n):
        start.wait()
        won.append(two[n % 2].register.use_token(token.id, record, str(n)) == str(n))

    threads = [threading.Thread(target=use, args=(n,)) for n in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def test_a_revocation_holds_at_both_whoever_made_it(two, tmp_path, database_url):
    one, other = two
    serials = [
        identity_of(one.issue(new_key(tmp_path / name, name, "site"), "site", name)).serial for name in "abc"
    ]
    other.revoke(serials[0])
    assert one.revoked() == {serials[0]}
    Authority.open(one.folder).revoke(serials[1])  # with the folder alone: passed on as soon as it is seen
    assert one.revoked() == other.revoked() == set(serials[:2])
    command = ["pki", "revoke", "c", "--ca", str(tmp_path / "nowhere"), "--database", database_url]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert one.revoked() == other.revoked() == set(serials)
    (last,) = one.issued("site", "c")
    request = new_key(tmp_path / "d", "c", "site")
    with pytest.raises(Untrusted, match="is revoked"):
        other.renew(request, last.pem)
    listed = ["pki", "list", "--json", "--ca", str(tmp_path / "nowhere"), "--database", database_url]
    assert CliRunner().invoke(app, listed).output.count('"revoked"') == 3


def test_a_folder_that_is_mounted_read_only_stays_as_it_is(two, tmp_path, monkeypatch):
    monkeypatch.setattr(register.os, "access", lambda path, mode: False)  # root may write everywhere
    one, other = two
    before = sorted(one.folder.rglob("*"))
    token = one.token("a", ["h:1"])
    who = identity_of(one.enrol(token.id, token.secret, new_key(tmp_path / "a", "a", "site")))
    one.revoke(who.serial)
    assert sorted(one.folder.rglob("*")) == before
    assert [(each.identity, each.revoked) for each in other.issued()] == [(who, True)]


def test_a_token_stays_used_when_the_database_is_lost(two, tmp_path):
    one, _ = two
    token = Authority.open(one.folder).token("a", ["h:1"])
    one.enrol(token.id, token.secret, new_key(tmp_path / "a", "a", "site"))
    with pytest.raises(Untrusted, match="used already"):
        Authority.open(one.folder).enrol(token.id, token.secret, new_key(tmp_path / "b", "a", "site"))
