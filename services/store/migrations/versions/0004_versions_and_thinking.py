"""Versions of an answer, the model's thinking, and how much of the conversation it was given."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    with op.batch_alter_table("messages") as table:
        table.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
        table.add_column(sa.Column("shown", sa.Boolean(), nullable=False, server_default=sa.true()))
        table.add_column(sa.Column("thinking", sa.Text(), nullable=False, server_default=""))
        table.add_column(sa.Column("thinking_seconds", sa.Double()))
        table.add_column(sa.Column("told_from", sa.String(32)))
        table.add_column(sa.Column("context_full", sa.Boolean(), nullable=False, server_default=sa.false()))
        table.drop_constraint("uq_messages_position", type_="unique")
        table.create_unique_constraint("uq_messages_version", ["conversation_id", "position", "version"])


def downgrade() -> None:
    op.execute(sa.text("DELETE FROM messages WHERE NOT shown"))
    with op.batch_alter_table("messages") as table:
        table.drop_constraint("uq_messages_version", type_="unique")
        table.create_unique_constraint("uq_messages_position", ["conversation_id", "position"])
        for column in ("version", "shown", "thinking", "thinking_seconds", "told_from", "context_full"):
            table.drop_column(column)
