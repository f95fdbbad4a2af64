"""Converts between rows and records. A column and the field that it holds have the same name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from sqlalchemy import RowMapping, Table

from services.store.records import Conversation, DownloadRecord, LoadRecord, Message, StudioCandidate, StudioRun

Record = TypeVar("Record", Conversation, DownloadRecord, LoadRecord, Message, StudioCandidate, StudioRun)


def to_record(kind: type[Record], row: RowMapping, **others: Any) -> Record:
    """Return the record in a row. `others` are fields that have no column, or one that holds them differently.

    Without them, fields that have no column keep their defaults.
    """
    held = {field.name: row[field.name] for field in fields(kind) if field.name in row}
    return kind(**{**held, **others})


def to_row(record: Record, table: Table, **others: Any) -> dict[str, Any]:
    """Return the row that holds a record. `others` are columns that are no fields, or that hold one differently."""
    held = {field.name: getattr(record, field.name) for field in fields(record) if field.name in table.c}
    return held | others
