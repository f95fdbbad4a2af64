"""Fetches one model from Hugging Face: `python -m services.downloads.huggingface.child LAYOUT FOLDER NAME`.

LAYOUT is `models` for the models folder, which takes GGUF files, or `cache` for a Hugging Face cache, which takes what
vLLM loads. A process of its own, so that killing it stops the transfer at once, and huggingface_hub's 20 MB stay out of
the app. It writes one JSON object per line to stdout:

    {"phase": PHASE, "parts": {PATH: [BYTES_DONE, BYTES_TOTAL]}, "expected_bytes": BYTES | null}
    {"error": CODE, "message": TEXT, "may_resume": BOOL}     the last line of a failed download
    {"done": true}                                           the last line of a successful one
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from services.downloads.huggingface.cache import CacheLayout
from services.downloads.huggingface.errors import explain
from services.downloads.huggingface.files import ModelsLayout
from services.downloads.huggingface.names import parse
from services.downloads.huggingface.redirects import guard_redirects
from services.downloads.huggingface.transfer import MAX_TRIES, Layout, LineWriter, Transfer


def _end_with_parent() -> None:
    """Exit when stdin ends: the app holds its other end and never writes, so that means the app has ended.

    PR_SET_PDEATHSIG would not do: it is tied to the thread that started this process, not to the app.
    """
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Bring one model from the Hugging Face hub.")
    parser.add_argument("layout", choices=["models", "cache"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", type=parse)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before the first retry")
    parser.add_argument("--max-list-tries", type=int, default=MAX_TRIES, help="most tries to list the repository")
    parser.add_argument("--host", action="append", default=[], help="a host that the hub may redirect to; repeatable")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    guard_redirects(arguments.host)
    writer = LineWriter()
    layout: Layout = (CacheLayout if arguments.layout == "cache" else ModelsLayout)(arguments.folder, arguments.name)
    try:
        Transfer(layout, arguments.name, writer, pause=arguments.pause, max_list_tries=arguments.max_list_tries).run()
    except Exception as error:
        failed = explain(error, arguments.name, layout.place, layout.advice)
        if failed is None:
            raise
        writer.write({"error": failed.code, "message": failed.message, "may_resume": failed.may_resume})
        return 1
    writer.write({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
