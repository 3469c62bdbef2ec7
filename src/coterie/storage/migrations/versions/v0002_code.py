"""Code that travels with a run."""

from alembic import op
from sqlalchemy import Column, Text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Name its package."""
    op.add_column("runs", Column("code", Text, nullable=False, server_default=""))
