"""What an error message may show of a rejected value: never a secret.

Errors in the settings are printed and logged, and a mistyped key is still most of a key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, SecretStr

HIDDEN = "…"
SHARED = 8
_CREDENTIALS = re.compile(r"^([a-z][a-z0-9+.-]*://)?.*@", re.IGNORECASE | re.DOTALL)
_QUERY = re.compile(r"\?.*", re.DOTALL)


def shown(value: object, *, secret: bool = False) -> str:
    """Return a rejected value for the end of a message: ` (it is 'x')`. Empty for secrets, and for whole tables.

    Of an address, the user, the password and the query are hidden.
    """
    if secret or isinstance(value, (dict, list, tuple, BaseModel)):
        return ""
    return f" (it is {without_credentials(value) if isinstance(value, str) else repr(value)})"


def without_credentials(text: str) -> str:
    """Return a text in quotes, without what may be an address's user, password and query."""
    return repr(_QUERY.sub(f"?{HIDDEN}", _CREDENTIALS.sub(rf"\1{HIDDEN}@", text)))


def without_key(text: str, key: str) -> str:
    """Return what another program says, without the key that it was given.

    Programs quote a refused key, whole or with asterisks in its middle: whatever shares SHARED characters in a row with
    the key goes, every word with asterisks in it, and a shorter key as a word.
    """
    pieces = {key[at : at + SHARED] for at in range(len(key) - SHARED + 1)}

    def clean(word: re.Match[str]) -> str:
        quoted = word[0] == key or "**" in word[0] or any(piece in word[0] for piece in pieces)
        return HIDDEN if quoted else word[0]

    return re.sub(r"[^\s\"',;()<>]+", clean, text)


def is_secret(table: type[BaseModel] | None, location: Sequence[str]) -> bool:
    """Whether what is at this place of a table, such as `models.0.key`, is a secret or part of one."""
    for part in location:
        field = None if table is None else table.model_fields.get(part)
        if field is None:
            continue  # an index, or a key of a plain table
        types = list(_types_in(field.annotation))
        if SecretStr in types:
            return True
        table = next((one for one in types if isinstance(one, type) and issubclass(one, BaseModel)), None)
    return False


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)
