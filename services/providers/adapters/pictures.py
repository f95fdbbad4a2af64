"""Recognises picture files by their first bytes, whatever a service calls them. Pure."""

from __future__ import annotations

import base64
import binascii

from services.providers.ports import Picture, ProviderError
from services.sizes import format_size

MAX_PICTURE_BYTES = 16_000_000
"""A PNG of 1536 x 1024 pixels takes up to 4 MB."""


def picture_of(data: bytes, whose: str) -> Picture:
    """Return a file as a picture. Raises ProviderError `bad_answer` if it is no PNG, JPEG or WebP."""
    media_type = media_type_of(data)
    if media_type is None:
        raise ProviderError("bad_answer", f"{whose} sent something that is no picture.")
    if len(data) > MAX_PICTURE_BYTES:
        raise ProviderError("bad_answer", f"{whose} sent a picture of more than {format_size(MAX_PICTURE_BYTES)}.")
    return Picture(data, media_type)


def picture_of_base64(text: str, whose: str) -> Picture:
    """Return a file in base64 as a picture. Raises ProviderError as `picture_of`."""
    try:
        return picture_of(base64.b64decode(text, validate=True), whose)
    except (binascii.Error, ValueError):
        raise ProviderError("bad_answer", f"{whose} sent something that is no picture.") from None


def data_url(picture: Picture) -> str:
    """Return a picture as an address that holds it."""
    return f"data:{picture.media_type};base64,{base64.b64encode(picture.data).decode('ascii')}"


def media_type_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
