"""Signatures over data: Ed25519 (RFC 8032), and the bytes of a mapping that are the same for everyone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def sign(signing_key: bytes, data: bytes) -> bytes:
    """The 64 bytes of the signature. signing_key: the 32 bytes of an Ed25519 private key."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(data)


def verify(public: bytes, data: bytes, signature: bytes) -> bool:
    """Did the holder of the private key of `public` (32 bytes) sign this? Whatever is malformed is False."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def public_of(signing_key: bytes) -> bytes:
    """The 32 bytes of the public key that belongs to a private one."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw()


def canonical(purpose: str, record: Mapping[str, Any]) -> bytes:
    """The bytes to sign for a mapping: JSON with sorted keys and no spaces, in UTF-8, behind its purpose.

    The purpose ("config", "reply") keeps a signature for one thing from being taken for another's.
    Raises ValueError for NaN, infinities, a key that is not text and whatever JSON cannot hold.
    """
    _check_keys(record)
    try:
        text = json.dumps(
            record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"cannot be signed as JSON: {error}") from None
    return f"coterie/1 {purpose}\0".encode() + text


def of_config(text: str, code: str = "") -> bytes:
    """What an operator signs of a run: its config, byte for byte (TOML), and the SHA-256 of its code.

    So a signature for one config and package fits no other pair, nor the config alone.
    """
    return canonical("config", {"config": text, "code": code} if code else {"config": text})


def _check_keys(value: Any) -> None:
    """json.dumps makes 1 and "1" the same key, so that two mappings would share a signature."""
    open_values = [value]
    while open_values:
        each = open_values.pop()
        if isinstance(each, Mapping):
            for name in each:
                if not isinstance(name, str):
                    raise ValueError(f"cannot be signed as JSON: the key {name!r} is not text")
            open_values += each.values()
        elif isinstance(each, list | tuple):
            open_values += each
