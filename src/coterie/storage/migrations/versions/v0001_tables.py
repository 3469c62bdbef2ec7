"""The first tables."""

from alembic import op
from sqlalchemy import BigInteger, Column, Float, Integer, Text

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create all of them."""
    op.create_table(
        "runs",
        Column("id", Text, primary_key=True),
        Column("name", Text, nullable=False),
        Column("config", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("signer", Text),
        Column("status", Text, nullable=False),
        Column("error", Text, nullable=False),
        Column("created", Float, nullable=False),
        Column("folder", Text, nullable=False),
        Column("quotas", Text, nullable=False),
        Column("sites", Text, nullable=False),
    )
    op.create_table(
        "events",
        Column("run", Text, primary_key=True),
        Column("seq", BigInteger, primary_key=True),
        Column("kind", Text, nullable=False),
        Column("now", Float, nullable=False),
        Column("head", Text, nullable=False),
        Column("digest", Text),
        Column("size", BigInteger),
    )
    op.create_table(
        "commits",
        Column("run", Text, primary_key=True),
        Column("version", BigInteger, primary_key=True),
        Column("digest", Text),
        Column("size", BigInteger),
        Column("row", Text, nullable=False),
    )
    op.create_table(
        "generations",
        Column("run", Text, primary_key=True),
        Column("client", Text, primary_key=True),
        Column("version", BigInteger, primary_key=True),
        Column("generation", BigInteger, nullable=False),
        Column("until", BigInteger),
    )
    op.create_index("generations_current", "generations", ["run", "until"])
    lease = op.create_table(
        "lease",
        Column("id", Integer, primary_key=True),
        Column("epoch", BigInteger, nullable=False),
        Column("holder", Text),
        Column("expires", Float, nullable=False),
    )
    op.bulk_insert(lease, [{"id": 1, "epoch": 0, "holder": None, "expires": 0.0}])
