"""What was audited, the games, and how far the chain was read: the schema that had no number yet."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(66), primary_key=True),
        sa.Column("window_end", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("receipt", sa.JSON(), nullable=False),
    )
    op.create_table(
        "games",
        sa.Column("id", sa.String(66), primary_key=True),
        sa.Column("job", sa.String(66), nullable=False),
        sa.Column("segment", sa.JSON(), nullable=False),
        sa.Column("salt", sa.LargeBinary(32), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("evidence", sa.JSON(), nullable=False),
        sa.Column("note", sa.String(), nullable=False),
    )
    op.create_index("ix_games_job", "games", ["job"])
    op.create_table(
        "cursor",
        sa.Column("name", sa.String(16), primary_key=True),
        sa.Column("block", sa.BigInteger(), nullable=False),
    )
