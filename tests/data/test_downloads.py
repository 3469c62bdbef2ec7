import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from coterie.core.errors import ConfigError, DataError
from coterie.data import download, sources

FILES = {"one.bin": b"first" * 1000, "two.bin": b"second" * 1000}


@pytest.fixture
def home(monkeypatch):
    """A set "tiny" whose two files are served on this machine; the answers can be replaced."""
    answers = {f"/{name}": (200, {}, raw) for name, raw in FILES.items()}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            status, headers, raw = answers.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(raw))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    digests = {name: hashlib.sha256(raw).hexdigest() for name, raw in FILES.items()}
    monkeypatch.setattr(sources, "HOMES", {"tiny": ("https://nowhere.invalid/", digests)})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()
    thread.join()
    server.server_close()


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_arrive_whole_and_are_not_fetched_twice(tmp_path, home):
    base, _, asked = home
    folder = download("tiny", tmp_path, base=base, plain_http=True)
    assert folder == tmp_path / "tiny"
    assert {name: (folder / name).read_bytes() for name in names(folder)} == FILES
    (folder / "two.bin").write_bytes(b"damaged later")
    download("tiny", tmp_path, base=base, plain_http=True)
    assert (folder / "two.bin").read_bytes() == FILES["two.bin"]
    assert asked == ["/one.bin", "/two.bin", "/two.bin"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, b"forged" * 1000), "the published file has"),
        ((200, {"Content-Length": "5000"}, FILES["two.bin"][:100]), "the published file has|IncompleteRead"),
        ((404, {}, b""), "404"),
        ((500, {}, b""), "500"),
    ],
)
def test_a_bad_answer_leaves_nothing_behind(tmp_path, home, answer, message):
    base, answers, _ = home
    answers["/two.bin"] = answer
    with pytest.raises(DataError, match=message):
        download("tiny", tmp_path, base=base, plain_http=True)
    assert names(tmp_path) == ["one.bin"]


def test_an_endless_answer_is_cut_off(tmp_path, home, monkeypatch):
    base, answers, _ = home
    monkeypatch.setattr(sources, "LARGEST", 10_000)
    monkeypatch.setattr(sources, "CHUNK", 1000)
    answers["/one.bin"] = (200, {}, bytes(1_000_000))
    with pytest.raises(DataError, match=r"one\.bin: 11000 bytes"):
        download("tiny", tmp_path, base=base, plain_http=True)
    assert names(tmp_path) == []


def test_redirects_are_followed_but_not_to_other_schemes(tmp_path, home):
    base, answers, _ = home
    answers["/elsewhere"] = answers["/two.bin"]
    answers["/two.bin"] = (302, {"Location": f"{base}/elsewhere"}, b"")
    download("tiny", tmp_path, base=base, plain_http=True)
    assert (tmp_path / "tiny" / "two.bin").read_bytes() == FILES["two.bin"]
    answers["/two.bin"] = (302, {"Location": "ftp://127.0.0.1/two.bin"}, b"")
    with pytest.raises(DataError, match="which is not https"):
        download("tiny", tmp_path / "again", base=base, plain_http=True)


def test_a_redirect_from_https_to_http_is_refused():
    handler = sources._Redirects(("https",))
    with pytest.raises(OSError, match="not https"):
        handler.redirect_request(None, None, 302, "", {}, "http://example.org/x")


def test_only_https_is_used_unless_told(tmp_path, home):
    base, _, asked = home
    for address in (base, "file:///etc", "ftp://example.org"):
        with pytest.raises(ConfigError, match="is not https"):
            download("tiny", tmp_path, base=address)
    assert asked == []


def test_unknown_sets_and_unwritable_folders(tmp_path, home):
    base, _, _ = home
    with pytest.raises(ConfigError, match="no public home"):
        download("huge", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="failed"):
        download("tiny", tmp_path / "file", base=base, plain_http=True)


def test_every_public_home_is_https_and_pinned():
    for base, files in sources.HOMES.values():
        assert base.startswith("https://")
        assert base.endswith("/")
        assert all(len(bytes.fromhex(digest)) == 32 for digest in files.values())
