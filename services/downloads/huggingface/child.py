"""Brings one model from the Hugging Face hub: `python -m services.downloads.huggingface.child LAYOUT FOLDER NAME`.

LAYOUT says how FOLDER is laid out: `models` is the models folder, which takes GGUF files; `cache` is a Hugging Face
cache, which takes what vLLM loads. A process of its own, so that stopping it stops the bytes at once, and
huggingface_hub's 20 MB stay out of the app. It says on stdout what it does, one JSON object a line:

    {"phase": PHASE, "parts": {PATH: [BYTES_HERE, BYTES_IN_ALL]}, "expected_bytes": BYTES | null}
    {"error": CODE, "message": TEXT, "may_resume": BOOL}     the last line of a download that failed
    {"done": true}                                           the last line of one that worked
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
from services.downloads.huggingface.redirects import watch_redirects
from services.downloads.huggingface.transfer import TRIES, Layout, Speaker, Transfer


def _end_with_parent() -> None:
    """The app holds the other end of stdin and never writes: an end of file means that it is gone, however it went.

    PR_SET_PDEATHSIG would not do: it is bound to the thread that started this process, not to the app.
    """
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Bring one model from the Hugging Face hub.")
    parser.add_argument("layout", choices=["models", "cache"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", type=parse)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before a first try again")
    parser.add_argument("--asks", type=int, default=TRIES, help="how often to ask at most what there is")
    parser.add_argument("--host", action="append", default=[], help="a host that the hub may send us to; repeatable")
    arguments = parser.parse_args()
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    watch_redirects(arguments.host)
    speaker = Speaker()
    layout: Layout = (CacheLayout if arguments.layout == "cache" else ModelsLayout)(arguments.folder, arguments.name)
    try:
        Transfer(layout, arguments.name, speaker, pause=arguments.pause, asks=arguments.asks).run()
    except Exception as error:
        failed = explain(error, arguments.name, layout.place, layout.advice)
        if failed is None:
            raise
        speaker.say({"error": failed.code, "message": failed.message, "may_resume": failed.may_resume})
        return 1
    speaker.say({"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main())
