"""Downloads."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "downloads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("source", sa.String(16), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("percent", sa.Integer(), nullable=False),
        sa.Column("completed_bytes", sa.BigInteger(), nullable=False),
        sa.Column("total_bytes", sa.BigInteger()),
        sa.Column("error", sa.Text()),
        sa.Column("may_resume", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
        sa.Column("started_at", sa.Double()),
        sa.Column("finished_at", sa.Double()),
    )


def downgrade() -> None:
    op.drop_table("downloads")
