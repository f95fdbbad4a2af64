#!/usr/bin/env python3
"""A fake `ollama` 0.24.0, server and command in one, with faults that the real one can't be made to show on
demand. `tests/support/ollama.py` documents its configuration; its parts are in `ollama_parts`.

    ollama serve | pull [--insecure] NAME | list | ps | --version
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(arguments: list[str]) -> int:
    # Each command imports only what it needs: a runner must start at once.
    if arguments[:1] == ["runner"]:
        from ollama_parts.runner import run as hold

        hold(arguments[1:])
    elif arguments[:1] == ["serve"]:
        from ollama_parts.serve import serve

        return serve()
    elif arguments[:1] in (["pull"], ["list"], ["ls"], ["ps"]):
        from ollama_parts.client import run

        return run(arguments)
    elif arguments in (["--version"], ["-v"]):
        print("ollama version is 0.24.0")
    else:
        print(f'Error: unknown command "{" ".join(arguments)}" for "ollama"', file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
