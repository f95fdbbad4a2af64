"""Alembic environment: runs the revisions on the connection passed by `open_store`."""

from __future__ import annotations

from alembic import context

from services.store.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
