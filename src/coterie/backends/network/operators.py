"""What operators ask of a server, and how a site enrols: plain calls, one answer each or a stream of them.

The server's half serves a `Desk`; the other half are functions over a channel. An error of Coterie's own
crosses as its kind, message and hint, and is raised again where it was asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Protocol

import grpc
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coterie.backends.network.mismatch import mismatch
from coterie.core.errors import ConfigError, CoterieError, DataError, Interrupted, RunError
from coterie.security import Credentials, of_config, packages, sign

OPERATOR, ENROLMENT = "coterie.v1.Operator", "coterie.v1.Enrolment"
FRAME = 4 << 20  # bytes of the largest call and answer
PIECE = 1 << 20  # bytes of code in a message
SUBMITTING = 300.0  # seconds in which a server must have checked a run: it loads data and model
KINDS = {kind.__name__: kind for kind in (ConfigError, DataError, RunError, Interrupted)}
Text = Annotated[str, Field(max_length=200_000)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Call(BaseModel):
    """What all calls share."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Submit(Call):
    """A run to queue. config: TOML. code: SHA-256 and size of a package, whose bytes follow the call.

    signature: over both (`security.of_config`), hexadecimal.
    """

    config: Text
    code: (
        tuple[
            Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], Annotated[int, Field(gt=0, le=packages.LIMIT)]
        ]
        | None
    ) = None
    signature: Annotated[str, Field(max_length=200)] = ""
    quotas: Annotated[dict[str, float], Field(max_length=3)] = {}


class Which(Call):
    """A run, by its name on the server."""

    run: Name


class Wanted(Call):
    """A file of a run's folder, from a byte on."""

    run: Name
    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    start: Annotated[int, Field(ge=0)] = 0


class Revoked(Call):
    """Serial numbers of certificates, in hexadecimal."""

    serials: Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]], Field(max_length=1000)]


class Enrol(Call):
    """A token's id and secret, and a certificate signing request (PEM)."""

    id: Annotated[str, Field(max_length=300)]
    secret: Annotated[str, Field(max_length=100, repr=False)]
    request: Annotated[str, Field(max_length=50_000)]


class Desk(Protocol):
    """What the server does for an operator; `who` is the identity of the certificate that asks.

    All but `watch` and `fetch` are called in threads.
    """

    def submit(self, who: Any, call: Submit, code: bytes) -> str:
        """Check and queue a run; return its name. code: as `call` names it."""

    def runs(self) -> list[dict[str, Any]]:
        """What is known of every run."""

    def sites(self) -> list[dict[str, Any]]:
        """What is known of every site."""

    def stop(self, run: str) -> None:
        """Stop a run; it can be resumed."""

    def resume(self, run: str) -> None:
        """Queue a stopped, interrupted or failed run again."""

    def delete(self, run: str) -> None:
        """Remove a run that has ended, with all that it left."""

    def revoke(self, serials: Sequence[str]) -> None:
        """Close what was opened with these certificates."""

    def watch(self, run: str) -> AsyncIterator[dict[str, Any]]:
        """How it goes, from now on; the last has "status"."""

    def fetch(self, run: str, file: str, start: int) -> AsyncIterator[bytes]:
        """A file of its folder."""


def operator_service(desk: Desk, admit: Callable[[Any], Any]) -> grpc.GenericRpcHandler:
    """The methods for operators. admit: awaited with a call's context; returns the identity or aborts."""

    def one(kind: type[Call] | None, answer: Callable[[Any, Any], Any]) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> bytes:
            who = await admit(context)
            try:
                # in a thread: data is loaded to check a config, and a run may take a while to stop
                return json.dumps(await asyncio.to_thread(answer, who, _parsed(kind, data))).encode()
            except CoterieError as error:
                return await _abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    async def queue_run(requests: AsyncIterator[bytes], context: Any) -> bytes:
        who = await admit(context)
        try:
            call = _parsed(Submit, await anext(requests, b""))
            digest, size = call.code or ("", 0)
            code = bytearray()
            while len(code) < size and (piece := await anext(requests, b"")):
                code += piece
            if len(code) != size or (code and hashlib.sha256(code).hexdigest() != digest):
                raise ConfigError("submit: the code arrived damaged", "submit it again")
            return json.dumps(await asyncio.to_thread(desk.submit, who, call, bytes(code))).encode()
        except CoterieError as error:
            return await _abort(context, error)

    def many(kind: type[Call], answer: Callable[[Any], AsyncIterator[Any]]) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> AsyncIterator[bytes]:
            await admit(context)
            try:
                async for each in answer(_parsed(kind, data)):
                    yield each if isinstance(each, bytes) else json.dumps(each).encode()
            except CoterieError as error:
                await _abort(context, error)

        return grpc.unary_stream_rpc_method_handler(handle)

    methods = {
        "Submit": grpc.stream_unary_rpc_method_handler(queue_run),
        "Runs": one(None, lambda who, call: desk.runs()),
        "Sites": one(None, lambda who, call: desk.sites()),
        "Stop": one(Which, lambda who, call: desk.stop(call.run)),
        "Resume": one(Which, lambda who, call: desk.resume(call.run)),
        "Delete": one(Which, lambda who, call: desk.delete(call.run)),
        "Revoke": one(Revoked, lambda who, call: desk.revoke(call.serials)),
        "Watch": many(Which, lambda call: desk.watch(call.run)),
        "Fetch": many(Wanted, lambda call: desk.fetch(call.run, call.file, call.start)),
    }
    return grpc.method_handlers_generic_handler(OPERATOR, methods)


def enrolment_service(enrol: Callable[[str, str, bytes], bytes]) -> grpc.GenericRpcHandler:
    """The one method for who has no certificate yet. enrol: token's id, secret, request -> certificate."""

    async def handle(data: bytes, context: Any) -> bytes:
        try:
            call = _parsed(Enrol, data)
            return json.dumps(enrol(call.id, call.secret, call.request.encode()).decode()).encode()
        except CoterieError as error:
            return await _abort(context, error)

    methods = {"Enrol": grpc.unary_unary_rpc_method_handler(handle)}
    return grpc.method_handlers_generic_handler(ENROLMENT, methods)


def ask(channel: grpc.Channel, method: str, call: Call | None = None, *, service: str = OPERATOR) -> Any:
    """Make a call; return its answer. Raises what the server raised, RunError when it cannot be reached."""
    with _raised():
        return json.loads(channel.unary_unary(f"/{service}/{method}")(_bytes(call), timeout=60))


def stream(channel: grpc.Channel, method: str, call: Call) -> Iterator[Any]:
    """The answers to a call as they come: objects of `Watch`, bytes of `Fetch`."""
    with _raised():
        for data in channel.unary_stream(f"/{OPERATOR}/{method}")(_bytes(call)):
            yield data if method == "Fetch" else json.loads(data)


def channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    """To a server. credentials None: without encryption, on purpose."""
    options = [("grpc.max_receive_message_length", FRAME), ("grpc.max_send_message_length", FRAME)]
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)


def submit(
    channel: grpc.Channel,
    config: str,
    mine: Credentials | None,
    quotas: Mapping[str, float] | None = None,
    code: bytes = b"",
) -> str:
    """Give a server a config (TOML) to run, signed by an operator; return the run. Raises as `ask`.

    code: a package (`security.packages`) that travels with it.
    """
    digest = hashlib.sha256(code).hexdigest() if code else ""
    signature = "" if mine is None else sign(mine.signing_key, of_config(config, digest)).hex()
    named = (digest, len(code)) if code else None
    call = Submit(config=config, signature=signature, quotas=dict(quotas or {}), code=named)
    pieces = (code[start : start + PIECE] for start in range(0, len(code), PIECE))
    with _raised():
        send = channel.stream_unary(f"/{OPERATOR}/Submit")
        return str(json.loads(send(itertools.chain([_bytes(call)], pieces), timeout=SUBMITTING)))


def credentials(mine: Credentials) -> grpc.ChannelCredentials:
    """What a party shows to a server, and whom it trusts."""
    return grpc.ssl_channel_credentials(mine.ca, mine.key, mine.certificate)


@contextmanager
def reached(
    addresses: Sequence[str], credentials: grpc.ChannelCredentials | None, within: float = 10.0
) -> Iterator[grpc.Channel]:
    """A channel to the first of these servers that is up; standbys are not. Raises RunError when none is."""
    with ExitStack() as stack:
        up: queue.SimpleQueue[grpc.Channel] = queue.SimpleQueue()
        for address in addresses:
            made = stack.enter_context(channel(address, credentials))
            grpc.channel_ready_future(made).add_done_callback(lambda _, made=made: up.put(made))
        first = _soon(up, 1.0)
        for address in addresses if first is None else ():
            if wrong := mismatch(address, encrypted=credentials is not None):
                raise RunError(wrong)
        first = first or _soon(up, within)
        if first is None:
            raise RunError(
                f"server {', '.join(addresses)} does not answer within {within:g} s",
                "is it running, and do its certificate and yours come from one authority?",
            )
        yield first


def _soon(up: queue.SimpleQueue[grpc.Channel], seconds: float) -> grpc.Channel | None:
    try:
        return up.get(timeout=seconds)
    except queue.Empty:
        return None


@contextmanager
def _raised() -> Iterator[None]:
    """Raise what the other side told."""
    try:
        yield
    except grpc.RpcError as error:
        raise problem_of(error) from None


def problem_of(error: Any) -> CoterieError:
    """The error that a failed call carries."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.FAILED_PRECONDITION:
        try:
            told: Mapping[str, str] = json.loads(details)
            return KINDS[told["kind"]](told["message"], told["hint"])
        except (ValueError, KeyError, TypeError):
            pass
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return RunError(f"the server refuses: {details}")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return RunError(
            f"the server cannot be reached: {details[:300]}",
            "is it running, is the address right, and do its certificate and yours come from one authority?",
        )
    return RunError(f"the server failed: {code.name.lower().replace('_', ' ')}: {details[:300]}")


def _parsed(kind: type[Call] | None, data: bytes) -> Any:
    if kind is None:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{kind.__name__.lower()}: {where}: {first['msg'][:200]}") from None


def _bytes(call: Call | None) -> bytes:
    return (
        b"" if call is None else call.model_dump_json(exclude_defaults=True).encode()
    )  # an older server knows fewer fields


async def _abort(context: Any, error: CoterieError) -> bytes:
    kind = next((each.__name__ for each in type(error).__mro__ if each.__name__ in KINDS), "RunError")
    problem = {"kind": kind, "message": str(error.args[0])[:1500], "hint": error.hint[:1500]}  # in a header
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, json.dumps(problem))
    raise AssertionError
