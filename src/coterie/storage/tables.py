"""The tables of a server's database, as its code sees them; `migrations/` is how a database comes to them."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, Table, Text

metadata = MetaData()

runs = Table(
    "runs",
    metadata,
    Column("id", Text, primary_key=True),  # never used again, for sites remember what they did for it
    Column("name", Text, nullable=False),
    Column("config", Text, nullable=False),  # TOML, byte for byte as it was signed
    Column("digest", Text, nullable=False),  # SHA-256 of it
    Column("signer", Text),
    Column("status", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("created", Float, nullable=False),  # seconds since 1970; queued runs start in this order
    Column("folder", Text, nullable=False),
    Column("quotas", Text, nullable=False),  # JSON
    Column("sites", Text, nullable=False),  # JSON: who takes part
    Column("code", Text, nullable=False, server_default=""),  # SHA-256 of the package that travels with it
)
events = Table(  # the write-ahead log: what a run's plan was told since its last commit
    "events",
    metadata,
    Column("run", Text, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("kind", Text, nullable=False),  # "reply", "lost", "tick"
    Column("now", Float, nullable=False),
    Column("head", Text, nullable=False),  # the event without its tensors, as the network reads it
    Column("digest", Text),  # of the blob that holds them
    Column("size", BigInteger),
)
commits = Table(
    "commits",
    metadata,
    Column("run", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),
    Column("digest", Text),  # of the blob of the state; null: too old to go back to
    Column("size", BigInteger),
    Column("row", Text, nullable=False),  # JSON: the line in metrics.jsonl
)
generations = Table(  # which of its tasks a client's memory is of, and when it was
    "generations",
    metadata,
    Column("run", Text, primary_key=True),
    Column("client", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True),  # that accepted it
    Column("generation", BigInteger, nullable=False),
    Column("until", BigInteger),  # the version that replaced it
    Index("generations_current", "run", "until"),
)
lease = Table(
    "lease",
    metadata,
    Column("id", Integer, primary_key=True),  # 1: there is one
    Column("epoch", BigInteger, nullable=False),  # grows with every holder; writes of an older one fail
    Column("holder", Text),
    Column("expires", Float, nullable=False),
)
certificates = Table(  # these three are of `register`, whose writers need no lease
    "certificates",
    metadata,
    Column("serial", Text, primary_key=True),  # hexadecimal, as everywhere
    Column("role", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("pem", Text, nullable=False),
)
revocations = Table("revocations", metadata, Column("serial", Text, primary_key=True))
tokens = Table(
    "tokens",
    metadata,
    Column("id", Text, primary_key=True),
    Column("record", Text, nullable=False),  # JSON, with a hash of the secret
    Column("used", Text),  # for which key; null: not yet
)
