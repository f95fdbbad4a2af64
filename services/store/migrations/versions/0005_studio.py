"""The Studio's runs and their candidates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "studio_runs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("beam_width", sa.Integer(), nullable=False),
        sa.Column("iterations", sa.Integer(), nullable=False),
        sa.Column("candidates", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False, index=True),
        sa.Column("providers", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False, index=True),
        sa.Column("finished_at", sa.Double()),
        sa.Column("error", sa.String(64)),
        sa.Column("message", sa.Text()),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("switching_seconds", sa.JSON(), nullable=False),
        sa.Column("calls", sa.JSON(), nullable=False),
        sa.Column("origin_run", sa.String(32)),
        sa.Column("origin_number", sa.Integer()),
    )
    op.create_table(
        "studio_candidates",
        sa.Column(
            "run_id",
            sa.String(32),
            sa.ForeignKey("studio_runs.id", ondelete="CASCADE", name="fk_studio_candidates_run"),
            primary_key=True,
        ),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("iteration", sa.Integer(), nullable=False),
        sa.Column("parent", sa.Integer()),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("how", sa.Text(), nullable=False),
        sa.Column("by_rules", sa.Boolean(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("picture", sa.String(64), index=True),
        sa.Column("alignment", sa.Double()),
        sa.Column("aesthetic", sa.Double()),
        sa.Column("total", sa.Double()),
        sa.Column("comment", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.Column("rank", sa.Integer()),
    )


def downgrade() -> None:
    op.drop_table("studio_candidates")
    op.drop_table("studio_runs")
