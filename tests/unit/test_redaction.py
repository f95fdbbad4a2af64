"""What errors show of rejected values."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, SecretStr

from services.redaction import is_secret, shown


class Entry(BaseModel):
    id: str
    keys: list[SecretStr] = []


class Table(BaseModel):
    entries: tuple[Entry, ...] = ()
    key: SecretStr | None = None


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("key", True),
        ("entries 0 keys", True),
        ("entries 0 keys 1", True),
        ("entries 0 id", False),
        ("entries", False),
        ("entries 0 unknown", False),
        ("unknown key", True),
    ],
)
def test_a_secret_is_found_by_its_type_wherever_it_is(location, expected):
    """In a table of a list too; a key that no table has keeps the table that it is in."""
    assert is_secret(Table, location.split()) is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", " (it is 'x')"),
        (7, " (it is 7)"),
        ({"key": "s"}, ""),
        (["s"], ""),
        ("http://user:s@host:1/path", " (it is 'http://…@host:1/path')"),
        ("user:s@host", " (it is '…@host')"),
        ("http://user:s/@s@host?x=s", " (it is 'http://…@host?…')"),
    ],
)
def test_credentials_in_a_value_are_hidden(value, expected):
    """Everything before the last @, because a mistyped password may hold one."""
    assert shown(value) == expected
    assert shown(value, secret=True) == ""
