"""Ed25519 against the vectors of RFC 8032, and canonical bytes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coterie.security import canonical, public_of, sign, verify

# RFC 8032, section 7.1: secret key, public key, message, signature
VECTORS = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
]


@pytest.mark.parametrize("vector", VECTORS)
def test_rfc_8032(vector):
    secret, public, message, signature = map(bytes.fromhex, vector)
    assert public_of(secret) == public
    assert sign(secret, message) == signature
    assert verify(public, message, signature)
    assert not verify(public, message + b"x", signature)


@given(public=st.binary(max_size=40), data=st.binary(max_size=40), signature=st.binary(max_size=70))
def test_anything_else_is_false(public, data, signature):
    assert not verify(public, data, signature)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=10,
)  # fmt: skip
records = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), values, max_size=5)


@given(record=records, other=records)
def test_canonical_bytes_are_one_for_each_record(record, other):
    data = canonical("config", record)
    assert data == canonical("config", dict(reversed(record.items())))
    assert data == canonical("config", json.loads(data.partition(b"\0")[2]))  # as the other side reads it
    assert (data == canonical("config", other)) == (json.dumps(record, sort_keys=True) == json.dumps(other, sort_keys=True))  # fmt: skip
    assert data != canonical("reply", record)


def deep():
    value: list = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "record",
    [{"x": float("nan")}, {"x": float("inf")}, {1: 2}, {"a": [{2: 3}]}, {"x": b"x"}, {"x": "\ud800"}, {"x": {1}}],
)  # fmt: skip
def test_what_has_no_canonical_bytes(record):
    with pytest.raises(ValueError):  # noqa: PT011
        canonical("config", record)
    with pytest.raises(ValueError, match="cannot be signed"):
        canonical("config", {"x": deep()})
