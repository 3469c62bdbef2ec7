"""What an authority remembers, for all servers on this database."""

from alembic import op
from sqlalchemy import Column, Text

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create its tables."""
    op.create_table(
        "certificates",
        Column("serial", Text, primary_key=True),
        Column("role", Text, nullable=False),
        Column("name", Text, nullable=False),
        Column("pem", Text, nullable=False),
    )
    op.create_table("revocations", Column("serial", Text, primary_key=True))
    op.create_table(
        "tokens",
        Column("id", Text, primary_key=True),
        Column("record", Text, nullable=False),
        Column("used", Text),
    )
