"""Throw bytes at every decoder of the network: `python tests/faults/fuzz.py 1000000 [seed]`.

What comes out is a message or BadMessage; anything else is a bug. Inputs are real messages and chunks, with
bytes flipped, cut, doubled and spliced, and values replaced by nasty ones.
"""

import hashlib
import json
import random
import resource
import sys

from coterie.backends.network import messages, transfer
from coterie.backends.network.messages import BadMessage, parse
from coterie.storage import Blob

BLOB = Blob("a" * 64, 7)
CONFIG = {"epochs": 1, "lr": 0.1, "deep": [(1, {"a": None})], "nan": float("nan"), "big": 2**70}
SEEDS = [
    messages.Hello(protocol=(1, 0), software="x", features=["zstd"], site="a", runs=["r"]),
    messages.Welcome(protocol=(1, 0), software="x", features=[], silence=120.0),
    messages.Away(reason="revoked"),
    messages.RunOpened(run="r", name="n", config="a = 1", config_digest="d", clients=["é"], code=BLOB),
    messages.Opened(run="r"),
    messages.Declined(run="r", reason="no"),
    messages.Assign(
        run="r", kind="train", version=1, round=1, config=CONFIG, down=BLOB, tasks=[(1, "c", None, 0)],
        trace="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
    ),
    messages.Answered(
        run="r", id=1, version=0, up=BLOB, weight=float("nan"), metrics={"loss": 1e300}, answers=[("c", 2)]
    ),
    messages.Failed(run="r", id=1, reason="x", detail="y"),
    messages.Taken(run="r", id=1),
    messages.Dropped(run="r", ids=[1, 2]),
    messages.Accepted(run="r", version=1, accepted={"c": 1}, flying=[2]),
    messages.RunClosed(run="r", status="finished"),
    messages.Beat(progress={"r": 1}),
    messages.Rang(id=-1),
    messages.Want(run="r", digest="b" * 64, start=0),
    messages.Offer(run="r", id=1, up=BLOB),
    messages.Have(held=3),
]  # fmt: skip
NASTY = [
    None, True, -1, 0, 2**53, 2**64, 10**400, 0.5, 1e308, float("nan"), float("-inf"), "", "x" * 5000, "../../etc",
    "\u0000", "\ud800", "0x" + "f" * 3000, [], [[]] * 50, {}, {"x": {}}, {"tensor": "0"}, {"tuple": 3},
    {"fraction": ["0x1", "0x0"]}, '{"dict": [[1, {"int": "zz"}]]}', '{"task": {}}', "[" * 3000, "NaN",
]  # fmt: skip


def harmed(draw: random.Random, data: bytes) -> bytes:
    """Bytes near the given ones."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(out) + 1)
        match draw.randrange(5):
            case 0 if at < len(out):
                out[at] ^= 1 << draw.randrange(8)
            case 1:
                del out[at : at + draw.randint(1, 20)]
            case 2:
                out[at:at] = out[at : at + draw.randint(1, 50)] * draw.randint(1, 5)
            case 3:
                out[at:at] = draw.randbytes(draw.randint(1, 8))
            case _:
                out[at : at + draw.randint(0, 3)] = draw.choice(
                    [b"{", b"}", b"[", b'"', b"\\u0000", b"-", b"1e999"]
                )
    return bytes(out)


def replaced(draw: random.Random, value: object) -> object:
    """JSON with one value, or a key, exchanged for a nasty one."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.05:
            return {**value, draw.choice(["x", "message", "__class__", ""]): draw.choice(NASTY)}
        return {**value, key: replaced(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], replaced(draw, value[at]), *value[at + 1 :]]
    return draw.choice(NASTY)


def fuzz(count: int, seed: int = 0) -> int:
    """Try so many inputs; return how many of them were messages or chunks. Raises what a decoder should not."""
    draw = random.Random(seed)
    texts = [bytes(message) for message in SEEDS]
    values = [json.loads(text) for text in texts]
    frames = [
        transfer.packed(5, b"abc" * 100, hashlib.sha256(), compress=squeeze) for squeeze in (True, False)
    ]
    good = 0
    for _ in range(count):
        try:
            match draw.randrange(5):
                case 0:
                    data, _ = transfer.opened(harmed(draw, draw.choice(frames)), 5, hashlib.sha256())
                    assert len(data) <= transfer.CHUNK
                case 1 | 2:
                    parse(harmed(draw, draw.choice(texts)))
                case _:
                    value = replaced(draw, draw.choice(values))
                    message = parse(json.dumps(value).encode("utf-8", "surrogatepass"))
                    assert repr(parse(bytes(message))) == repr(message)
            good += 1
        except BadMessage:
            pass
    return good


if __name__ == "__main__":
    tried = int(sys.argv[1])
    passed = fuzz(tried, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{tried} inputs, {passed} of them well-formed; peak memory {peak} MiB")
