"""The certificates in real TLS handshakes, of Python's ssl and of gRPC."""

import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta

import pytest

from coterie.security import Authority, certificates, credentials, identity_of, request_of

grpc = pytest.importorskip("grpc")


@pytest.fixture(scope="module")
def parties(tmp_path_factory):
    """Folders of a server and of sites: one in order, and some that must not come in."""
    base = tmp_path_factory.mktemp("parties")
    ca, other = Authority.create(base / "ca"), Authority.create(base / "other")
    ca.equip(base / "server", "server", "main", hosts=["localhost"])
    ca.equip(base / "site", "site", "a")
    other.equip(base / "stranger", "site", "a")
    other.equip(base / "impostor", "server", "main", hosts=["localhost"])
    ca.equip(base / "expired", "site", "b")
    past = datetime.now(UTC) - timedelta(days=1)
    pem = certificates.signed(
        request_of(base / "expired", "b", "site"),
        "site",
        "b",
        ca._signer(),
        ca.certificate,
        days=0.5,
        now=past,
    )
    (base / "expired" / "tls.crt").write_bytes(pem)
    ca.equip(base / "self", "site", "c")
    key = certificates.serialization.load_pem_private_key((base / "self" / "tls.key").read_bytes(), None)
    (base / "self" / "tls.crt").write_bytes(certificates.self_signed(key, "self", datetime.now(UTC)))
    return base


def shake(server, client, ca):
    """Handshake in memory; return what the server learns of the client. Raises ssl.SSLError."""
    contexts = []
    for side, folder in ((ssl.PROTOCOL_TLS_SERVER, server), (ssl.PROTOCOL_TLS_CLIENT, client)):
        context = ssl.SSLContext(side)
        context.verify_mode = ssl.CERT_REQUIRED
        if folder:
            context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
        context.load_verify_locations(ca / "ca.crt")
        contexts.append(context)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = contexts[0].wrap_bio(up, down, server_side=True)
    two = contexts[1].wrap_bio(down, up, server_hostname="localhost")
    for _ in range(4):
        for each in (two, one):
            with suppress(ssl.SSLWantReadError):
                each.do_handshake()
    return identity_of(ssl.DER_cert_to_PEM_cert(one.getpeercert(binary_form=True)).encode())


def test_those_of_one_authority_meet(parties):
    assert shake(parties / "server", parties / "site", parties / "ca") == identity_of(
        (parties / "site" / "tls.crt").read_bytes()
    )


@pytest.mark.parametrize(
    ("server", "client", "why"),
    [
        ("server", "stranger", "certificate verify failed"),
        ("server", "expired", "certificate has expired"),
        ("server", "self", "self.signed"),
        ("server", "server", "unsuitable certificate purpose"),
        ("server", None, "peer did not return a certificate"),
        ("impostor", "site", "certificate verify failed"),
        ("site", "site", "certificate verify failed"),  # a site cannot play the server
    ],
)
def test_others_do_not(parties, server, client, why):
    with pytest.raises(ssl.SSLError, match=why):
        shake(parties / server, parties / client if client else None, parties / "ca")


@contextmanager
def served(folder):
    """A gRPC server that answers with the caller's identity; yields its port."""

    def who(request, context):
        found = identity_of(context.auth_context()["x509_pem_cert"][0])
        return f"{found} {found.signing_key.hex()}".encode()

    handler = grpc.method_handlers_generic_handler(
        "coterie.test", {"Who": grpc.unary_unary_rpc_method_handler(who)}
    )
    own = credentials(folder)
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[handler])
        port = server.add_secure_port(
            "localhost:0", grpc.ssl_server_credentials([(own.key, own.certificate)], own.ca, True)
        )
        server.start()
        yield port
        server.stop(0).wait()


def ask(port, folder, ca):
    key, chain = (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes()
    secure = grpc.ssl_channel_credentials((ca / "ca.crt").read_bytes(), key, chain)
    with grpc.secure_channel(f"localhost:{port}", secure) as channel:
        return channel.unary_unary("/coterie.test/Who")(b"", timeout=10).decode()


def test_grpc(parties):
    with served(parties / "server") as port:
        own = identity_of((parties / "site" / "tls.crt").read_bytes())
        assert ask(port, parties / "site", parties / "ca") == f"site a {own.signing_key.hex()}"
        for name in ("stranger", "expired", "self"):
            with pytest.raises(grpc.RpcError) as error:
                ask(port, parties / name, parties / "ca")
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    with served(parties / "impostor") as port, pytest.raises(grpc.RpcError):
        ask(port, parties / "site", parties / "ca")
