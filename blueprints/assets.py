"""One script and one stylesheet per page: concatenated at start, compressed once, cached for ever by their hash."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flask import Blueprint, Response, abort, request, url_for

bp = Blueprint("assets", __name__)

STATIC = Path(__file__).parent.parent / "static"
BUNDLES: dict[str, tuple[str, ...]] = {
    "switchyard.js": (
        "vendor/htmx.min.js",
        "vendor/sse.min.js",
        "vendor/idiomorph-ext.min.js",
        "switchyard.js",
        "rows.js",
        "focus.js",
        "ages.js",
        "studio.js",
    ),
    "switchyard.css": (
        "css/tokens.css",
        "css/base.css",
        "css/controls.css",
        "css/frame.css",
        "css/status.css",
        "css/memory.css",
        "css/chat.css",
        "css/prose.css",
        "css/models.css",
        "css/downloads.css",
        "css/studio.css",
        "css/preferences.css",
        "css/providers.css",
        "css/docs.css",
        "css/print.css",
    ),
    "icon.svg": ("icon.svg",),
}
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
YEAR = 365 * 24 * 3600


@dataclass(frozen=True)
class Bundle:
    """The concatenated files of one asset."""

    name: str
    digest: str
    body: bytes
    packed: bytes

    @property
    def mimetype(self) -> str:
        return TYPES[self.name.rpartition(".")[2]]


@cache
def bundle(name: str) -> Bundle:
    """Concatenate and compress one asset. Raises KeyError for an unknown name."""
    body = b"\n".join((STATIC / part).read_bytes() for part in BUNDLES[name])
    return Bundle(name, hashlib.sha256(body).hexdigest()[:12], body, gzip.compress(body, 9, mtime=0))


@bp.record_once
def _prepare(_state: object) -> None:
    """Build all bundles when the app starts, so that the first page doesn't wait for them."""
    for name in BUNDLES:
        bundle(name)


@bp.app_template_global()
def asset(name: str) -> str:
    """Return the URL of an asset; it contains the asset's hash."""
    return url_for("assets.serve", digest=bundle(name).digest, name=name)


@bp.get("/assets/<digest>/<name>")
def serve(digest: str, name: str) -> Response:
    """Serve an asset.

    For an outdated hash, requested by a page from an earlier process, serve the current one uncached.
    """
    if name not in BUNDLES:
        abort(404)
    wanted = bundle(name)
    gzipped = request.accept_encodings.quality("gzip") > 0
    response = Response(wanted.packed if gzipped else wanted.body, mimetype=wanted.mimetype)
    if gzipped:
        response.content_encoding = "gzip"
    response.vary.add("Accept-Encoding")
    if digest == wanted.digest:
        response.cache_control.public = True
        response.cache_control.max_age = YEAR
        response.cache_control.immutable = True
    else:
        response.cache_control.no_store = True
    return response
