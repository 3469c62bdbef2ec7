"""What server and sites say to each other, and the one door by which bytes become messages.

A message is JSON, checked against its model field by field: strict types, no field that is not known, every
string, list and number within bounds. Tensors never travel in messages: they are named as `Blob`s. `Hello`
keeps its form for ever, so that peers of any two versions can tell each other why they part.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_serializer,
)

from coterie.core.codec import decode, encode
from coterie.core.errors import RunError
from coterie.storage import Blob

PROTOCOL = (1, 0)  # peers of one major version work together when their minors differ by at most one
FRAME = (1 << 20) + 4096  # bytes of the largest message, and chunk, that a server takes; gRPC refuses more
LETTER = 16 << 20  # bytes of the largest message that a site takes: one may name many clients
ROWS = 2000  # tasks in one Assign
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BadMessage(RunError):
    """Bytes from a peer that are no message, or not one that may come here."""


def _named(blob: Blob) -> Blob:
    if not _DIGEST.fullmatch(blob.digest) or not 0 < blob.size < 2**50:
        raise ValueError("no blob")
    return blob


def _config_in(value: Any, info: ValidationInfo) -> Any:
    if info.mode != "json":
        return value
    if not isinstance(value, str) or len(value) > 1 << 18:
        raise ValueError("no text, or too long")
    try:
        return decode(json.loads(value), {})
    except RecursionError:
        raise ValueError("too deep") from None


def _config_out(value: dict[str, Any]) -> str:
    structure, tensors = encode(value)
    if tensors:
        raise TypeError("a task's config holds tensors; they belong into `down`")
    return json.dumps(structure, allow_nan=False)


Id = Annotated[int, Field(ge=0, lt=2**53)]
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
]  # of a run or a site: names a folder
Client = Annotated[str, Field(min_length=1, max_length=200)]
Line = Annotated[str, Field(max_length=4000)]
Page = Annotated[str, Field(max_length=200_000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Trace = Annotated[str, Field(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$")]
Named = Annotated[Blob, AfterValidator(_named)]
Config = Annotated[dict[str, Any], BeforeValidator(_config_in), PlainSerializer(_config_out)]  # core.codec
Any64 = Annotated[float, AllowInfNan(True)]  # whether NaN stops a run is for its plan to say
Version = Annotated[tuple[Id, Id], FailFast()]
Row = Annotated[tuple[Id, Client, Id | None, Id | None], FailFast()]  # task, client, memory, thread


class Said(BaseModel):
    """What all messages share."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )

    limit: ClassVar[int] = FRAME

    def __bytes__(self) -> bytes:
        """The message as it travels. Raises BadMessage when it is too large."""
        data = self.model_dump_json().encode()
        if len(data) > self.limit:
            raise BadMessage(f"a message of {len(data)} bytes; at most {self.limit} may travel")
        return data


class Hello(Said):
    """Site: who I am. process: a name of the process, any; attempt: of it to connect. runs: open here."""

    message: Literal["hello"] = "hello"
    protocol: Version
    software: Line
    features: Annotated[list[Line], FailFast(), Field(max_length=50)]
    site: Name
    process: Annotated[str, Field(max_length=64)] = ""
    attempt: Id = 0
    runs: Annotated[list[Name], FailFast(), Field(max_length=1000)] = []


class Welcome(Said):
    """Server: what both of us can. silence: seconds after which a site without a sign of life is lost."""

    message: Literal["welcome"] = "welcome"
    protocol: Version
    software: Line
    features: Annotated[list[Line], FailFast(), Field(max_length=50)]
    silence: Annotated[float, Field(gt=0, le=1e6)]


class Away(Said):
    """Server: you may not stay, for this reason."""

    message: Literal["away"] = "away"
    reason: Line


class RunOpened(Said):
    """Server: a run that the site takes part in. signer: certificate (PEM) of who signed the config."""

    limit: ClassVar[int] = LETTER
    message: Literal["run-opened"] = "run-opened"
    run: Name
    name: Line
    config: Page  # TOML
    config_digest: Line
    clients: Annotated[list[Client], FailFast(), Field(max_length=500_000)] = []  # that are hosted here
    code: Named | None = None  # a package that the run needs
    signature: Line = ""
    signer: Page = ""


class Opened(Said):
    """Site: I take part."""

    message: Literal["opened"] = "opened"
    run: Name


class Declined(Said):
    """Site: I do not take part, by this rule."""

    message: Literal["declined"] = "declined"
    run: Name
    reason: Line


class Assign(Said):
    """Server: tasks that differ only in what a Row says. trace: W3C traceparent, for who traces too."""

    message: Literal["assign"] = "assign"
    run: Name
    kind: Line
    version: Id
    round: Id
    config: Config
    down: Named
    tasks: Annotated[list[Row], FailFast(), Field(max_length=ROWS)]
    trace: Trace = ""

    @model_serializer(mode="wrap")
    def _known(self, rest: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not there: a site without the feature refuses a field that it does not know."""
        said: dict[str, Any] = rest(self)
        if not self.trace:
            del said["trace"]
        return said


class Answered(Said):
    """Site: a reply. version: the task's. signature: of the site, over the message without it."""

    message: Literal["answered"] = "answered"
    run: Name
    id: Id
    version: Id
    up: Named
    weight: Any64
    metrics: Annotated[dict[Line, Any64], Field(max_length=1000)] = {}
    samples: Id = 0
    answers: Annotated[
        list[Annotated[tuple[Client, Id], FailFast()]], FailFast(), Field(max_length=500_000)
    ] = []
    signature: Line = ""

    def signed(self) -> bytes:
        """What the signature is over."""
        return bytes(self.model_copy(update={"signature": ""}))


class Failed(Said):
    """Site: a task that will not be answered. detail: a traceback, as far as the site's policy shows it."""

    message: Literal["failed"] = "failed"
    run: Name
    id: Id
    reason: Line
    detail: Page = ""


class Taken(Said):
    """Server: the reply is durable here; forget it."""

    message: Literal["taken"] = "taken"
    run: Name
    id: Id


class Dropped(Said):
    """Server: nobody waits for these tasks any more."""

    message: Literal["dropped"] = "dropped"
    run: Name
    ids: Annotated[list[Id], FailFast(), Field(max_length=500_000)]


class Accepted(Said):
    """Server: a commit. accepted: the task that each client's memory is of, known since earlier or new."""

    limit: ClassVar[int] = LETTER
    message: Literal["accepted"] = "accepted"
    run: Name
    version: Id
    accepted: Annotated[dict[Client, Id], Field(max_length=500_000)]
    flying: Annotated[list[Id], FailFast(), Field(max_length=500_000)]


class RunClosed(Said):
    """Server: the run has ended."""

    message: Literal["run-closed"] = "run-closed"
    run: Name
    status: Line


class Beat(Said):
    """Site: I live. progress: for each run a number that grows while the site works for it."""

    message: Literal["beat"] = "beat"
    progress: Annotated[dict[Name, Id], Field(max_length=1000)]


class Rang(Said):
    """A plan's timer; only in the server's log."""

    message: Literal["rang"] = "rang"
    id: Annotated[int, Field(gt=-(2**53), lt=2**53)]


class Want(Said):
    """Site: send me a blob of this run from this byte on."""

    message: Literal["want"] = "want"
    run: Name
    digest: Digest
    start: Id


class Offer(Said):
    """Site: I have the update of this task for you."""

    message: Literal["offer"] = "offer"
    run: Name
    id: Id
    up: Named


class Have(Said):
    """Server: so many bytes of it are here."""

    message: Literal["have"] = "have"
    held: Id


Message = (
    Hello | Welcome | Away | RunOpened | Opened | Declined | Assign | Answered | Failed | Taken | Dropped
    | Accepted | RunClosed | Beat | Rang | Want | Offer | Have
)  # fmt: skip
_MESSAGES: TypeAdapter[Message] = TypeAdapter(Annotated[Message, Field(discriminator="message")])


def parse(data: bytes) -> Message:
    """The message that these bytes are. Raises BadMessage, which says what is wrong, and nothing else."""
    if len(data) > LETTER:
        raise BadMessage(f"a message of {len(data)} bytes; at most {LETTER} may travel")
    try:
        return _MESSAGES.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadMessage(f"no message: {where[:200]}: {first['msg'][:200]}") from None


def line(text: object, limit: int = 4000) -> str:
    """Any text cut to what a message may carry, without what UTF-8 cannot say."""
    return str(text)[:limit].encode("utf-8", "replace").decode()
