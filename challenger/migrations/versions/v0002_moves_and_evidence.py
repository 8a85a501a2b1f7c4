"""Every transaction before it is sent, the digest of every file that a game may be played from, and the blocks that
were read: what a crash, a corrupt disk and a reorganised chain must not take away.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "moves",
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("chain", sa.BigInteger(), nullable=False),
        sa.Column("account", sa.String(42), nullable=False),
        sa.Column("nonce", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.BigInteger(), nullable=False),
        sa.Column("label", sa.String(64), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("block", sa.BigInteger(), nullable=True),
    )
    op.create_index("ix_moves_state", "moves", ["state"])
    op.create_table(
        "evidence",
        sa.Column("job", sa.String(66), primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
    )
    op.create_table(
        "blocks",
        sa.Column("number", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.add_column("jobs", sa.Column("block", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("games", sa.Column("ended", sa.BigInteger(), nullable=True))
    op.create_index("ix_jobs_state", "jobs", ["state"])
    op.create_index("ix_games_state", "games", ["state"])
