"""Keeps compiled templates on disk, like Python its bytecode: compiling those of a page blocked everyone for 0.1 s."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from flask import Flask
from jinja2 import Environment, FileSystemBytecodeCache
from jinja2.bccache import Bucket

from services.yielding import Yielder


class CompiledTemplates(FileSystemBytecodeCache):
    """A folder of compiled templates; each is compiled again once its source has changed.

    Where the folder can't be written, such as in a container, templates are compiled in each run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        with suppress(OSError):
            folder.mkdir(exist_ok=True)

    def load_bytecode(self, bucket: Bucket) -> None:
        try:
            super().load_bytecode(bucket)
        except Exception:  # a file cut short by a crash of the machine; Jinja expects none, and the page would fail
            bucket.reset()

    def dump_bytecode(self, bucket: Bucket) -> None:
        if not sys.dont_write_bytecode:
            with suppress(OSError):
                super().dump_bytecode(bucket)


def init_app(app: Flask) -> None:
    app.jinja_env.bytecode_cache = CompiledTemplates(Path(app.root_path) / "templates" / "__pycache__")


def compile_changed(app: Flask) -> None:
    """Compile every template that has changed since it was compiled last, and yield to other greenlets in between.

    After an update the first page would otherwise do that at once. Does nothing where the result can't be kept.
    """
    if sys.dont_write_bytecode:
        return
    templates: Environment = app.jinja_env
    yield_if_due = Yielder()
    for name in app.jinja_env.list_templates(extensions=["html"]):
        _compile(templates, name)
        yield_if_due()


def _compile(templates: Environment, name: str) -> None:
    loader, cache = templates.loader, templates.bytecode_cache
    assert loader is not None
    assert cache is not None
    source, filename, _ = loader.get_source(templates, name)
    if cache.get_bucket(templates, name, filename, source).code is None:
        loader.load(templates, name)


if __name__ == "__main__":
    from app import create_app

    compile_changed(create_app())
