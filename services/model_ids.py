"""The characters of a model's id. Pure."""

from __future__ import annotations

import unicodedata

LONGEST = 200
SIGNS = "._:/@+-"


def may_be_in_id(character: str) -> bool:
    """Return whether an id may have a character: letters of all scripts and their marks, digits, and a few signs."""
    return character in SIGNS or unicodedata.category(character)[0] in "LMN"


def check_model_id(value: str) -> str:
    """Return a valid model id. Raises ValueError.

    By code, not by a pattern: pydantic compiled its tables of all scripts once for each field, 2 ms each at the start.
    """
    if not 0 < len(value) <= LONGEST:
        raise ValueError(f"a model id has 1 to {LONGEST} characters")
    if unicodedata.category(value[0])[0] not in "LN" or not all(map(may_be_in_id, value)):
        raise ValueError(f"a model id begins with a letter or digit, and has letters, digits and {SIGNS} alone")
    if ".." in value or "//" in value:
        raise ValueError("a model id can't hold '..' or '//'")
    return value
