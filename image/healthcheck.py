"""Docker's question whether the container can serve: exit code 0 when `/readyz` says so, where the settings have it."""

from __future__ import annotations

import http.client
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from services.config import load_settings

TIMEOUT_SECONDS = 4

settings = load_settings()
connection = http.client.HTTPConnection(settings.host, settings.port, timeout=TIMEOUT_SECONDS)  # no proxy between us
try:
    connection.request("GET", "/readyz")
    answer = connection.getresponse()
except OSError as error:
    sys.exit(f"{settings.host}:{settings.port} does not answer: {error}")
if answer.status != 200:
    sys.exit(f"/readyz answers {answer.status}: {answer.read(1000).decode(errors='replace')}")
