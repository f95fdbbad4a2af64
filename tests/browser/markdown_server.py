#!/usr/bin/env python3
"""The fake llama-server, answering in Markdown: what it takes to see code, tables and links on a page.

A model whose id ends in `plain` answers with the fake's ten short words; `--fault text:FILE` names another answer.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fakes"))

import llama_server

TEXT = """\
Here is **bold**, a [link](https://example.org/) and `code`:

```python
def greet(name: str) -> str:
    return f"Hello, {name}"
```

| model | size |
|---|---:|
| mini | 0.7 MB |
| small | 8.7 MB |

1. <script>alert(1)</script>
2. [no](javascript:alert(1))

Done.
"""

if __name__ == "__main__":
    named = [argument.removeprefix("text:") for argument in sys.argv if argument.startswith("text:")]
    if not any(argument.endswith("plain") for argument in sys.argv):
        llama_server.ANSWER[:] = (Path(named[0]).read_text(encoding="utf-8") if named else TEXT).split(" ")
    llama_server.main()
