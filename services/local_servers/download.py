#!/usr/bin/env python3
"""Download what a server loads, without loading it: while another model still has the memory.

Writes a JSON object per line to stdout, `{"completed_bytes", "total_bytes"}` while something is downloaded, and
`{"error"}` before it ends with code 1. Does nothing if everything is there. The server would download by itself too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

import flux_service
import vision_service
from serving import Progress
from weights import LoadError, fetch, quiet, require_packages


def report(progress: Progress) -> None:
    if progress.total_bytes:
        figures = {"completed_bytes": progress.completed_bytes, "total_bytes": progress.total_bytes}
        print(json.dumps(figures), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Download what a server loads.")
    parser.add_argument("server", choices=("flux", "vision"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--captioner", default=os.environ.get("VISION_CAPTIONER") or None)
    given, _ = parser.parse_known_args()  # the server's other arguments change nothing about its files
    try:
        require_packages(("huggingface_hub",))
        quiet()
        if given.server == "flux":
            fetch(flux_service.MODELS.get(given.model, given.model), flux_service.FILES, report)
        else:
            for model in filter(None, (given.model, given.captioner)):
                fetch(model, vision_service.FILES, report)
    except LoadError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
