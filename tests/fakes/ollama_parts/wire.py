"""Go's formats for times, durations, sizes and JSON, including the texts of its errors."""

from __future__ import annotations

import json
import re
import time
from typing import Any

FOR_EVER = 2**63 - 1
"""Go's longest duration, in ns: about 292 years, which makes an `expires_at` in the year 2319."""
SECOND = 10**9
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": SECOND,
    "m": 60 * SECOND,
    "h": 3600 * SECOND,
}
_TYPES = {str: "string", bool: "bool", int: "number", float: "number", list: "array", dict: "object"}


class BadRequest(ValueError):
    """The request can't be decoded; the text is Go's."""


def dumps(document: object) -> str:
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def rfc3339(ns: int) -> str:
    """A time (ns since 1970) as Go's RFC3339Nano in UTC, without trailing zeros in the fraction."""
    seconds, rest = divmod(ns, SECOND)
    fraction = f".{rest:09d}".rstrip("0").rstrip(".")
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + fraction + "Z"


def slog_time() -> str:
    now = time.time_ns()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now // SECOND)) + f".{now // 10**6 % 1000:03d}Z"


def human_bytes(value: int) -> str:
    """A size in decimal units, at most six characters: `999 B`, `2.6 MB`, ` 46 MB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value >= size:
            share = value / size
            return f"{int(share)} {unit}" if share >= 10 or value % size == 0 else f"{share:.1f} {unit}"
    return f"{value} B"


def human_number(value: int) -> str:
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.1f}{unit}" if size >= 10**9 else f"{value / size:.2f}{unit}"
    return str(value)


def keep_alive(value: object) -> int | None:
    """A request's `keep_alive` in ns: seconds as a number, or a duration with its unit; negative means for ever.

    None for null, which leaves the current value. Raises BadRequest for everything else.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        raise BadRequest("Unsupported type: 'bool'")
    if isinstance(value, list):
        raise BadRequest("Unsupported type: '[]interface {}'")
    if isinstance(value, dict):
        raise BadRequest("Unsupported type: 'map[string]interface {}'")
    duration = parse_duration(value) if isinstance(value, str) else int(float(value) * SECOND)  # type: ignore[arg-type]
    return FOR_EVER if duration < 0 else min(duration, FOR_EVER)


def parse_duration(text: str) -> int:
    """Go's time.ParseDuration, in ns."""
    quoted = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    sign, rest = (-1 if text.startswith("-") else 1), text[1:] if text[:1] in {"-", "+"} else text
    if rest == "0":
        return 0
    total = 0.0
    if not rest:
        raise BadRequest(f"time: invalid duration {quoted}")
    while rest:
        number = re.match(r"\d+\.?\d*|\.\d+", rest)
        if number is None:
            raise BadRequest(f"time: invalid duration {quoted}")
        rest = rest[number.end() :]
        unit = re.match(r"[^.\d]*", rest).group()  # type: ignore[union-attr]
        if not unit:
            raise BadRequest(f"time: missing unit in duration {quoted}")
        if unit not in _UNITS:
            raise BadRequest(f'time: unknown unit "{unit}" in duration {quoted}')
        total += float(number.group()) * _UNITS[unit]
        rest = rest[len(unit) :]
    return sign * int(total)


def read_json(body: bytes, struct: str) -> dict[str, Any]:
    """Decode a request's body. Raises BadRequest with the text of Go's decoder. Callers check for an empty body."""
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRequest(_complaint(text, error)) from None
    if not isinstance(document, dict):
        kind = _TYPES.get(type(document), "null")
        raise BadRequest(f"json: cannot unmarshal {kind} into Go value of type api.{struct}")
    for key in ("model", "name", "from"):
        if document.get(key) is not None and not isinstance(document[key], str):
            kind = _TYPES[type(document[key])]
            raise BadRequest(f"json: cannot unmarshal {kind} into Go struct field {struct}.{key} of type string")
    return document


def _complaint(text: str, error: json.JSONDecodeError) -> str:
    start = text.lstrip()
    for literal in ("null", "true", "false"):
        if start[:1] == literal[0]:
            for wanted, found in zip(literal, start, strict=False):
                if wanted != found:
                    return f"invalid character '{found}' in literal {literal} (expecting '{wanted}')"
    if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg:
        return "unexpected EOF"
    return f"invalid character '{text[error.pos]}' looking for beginning of value"
