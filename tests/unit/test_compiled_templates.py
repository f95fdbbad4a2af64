"""Templates are compiled once per change, not once per run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jinja2
import pytest
from flask import Flask

from blueprints.compiled_templates import CompiledTemplates, compile_changed

MakeApp = Callable[[], Flask]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The names of the templates that are compiled during the test."""
    names: list[str | None] = []
    original = jinja2.Environment.compile

    def compile_and_note(self: jinja2.Environment, source: str, name: str | None = None, *rest: object) -> object:
        names.append(name)
        return original(self, source, name, *rest)  # type: ignore[call-overload]

    monkeypatch.setattr(jinja2.Environment, "compile", compile_and_note)
    return names


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeApp:
    """Make the app of another run, whose templates are `page.html` and what it includes."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    folder = tmp_path / "templates"
    folder.mkdir()
    (folder / "page.html").write_text("{% include 'part.html' %}")
    (folder / "part.html").write_text("one")

    def run() -> Flask:
        app = Flask("test", root_path=str(tmp_path))
        app.jinja_env.bytecode_cache = CompiledTemplates(tmp_path / "cache")
        return app

    return run


def page(app: Flask) -> str:
    return app.jinja_env.get_template("page.html").render()


def test_no_page_compiles_a_template_after_the_start(app: Flask, compiled: list[str | None]) -> None:
    """The first page took 0.1 s for it, in which nothing else was answered."""
    compile_changed(app)
    compiled.clear()
    for address in ("/", "/models", "/docs"):
        assert app.test_client().get(address).status_code == 200
    assert compiled == []


def test_the_next_run_compiles_only_what_has_changed(make: MakeApp, tmp_path: Path, compiled: list[str | None]) -> None:
    compile_changed(make())
    assert sorted(map(str, compiled)) == ["page.html", "part.html"]
    (tmp_path / "templates" / "part.html").write_text("two")
    compiled.clear()
    app = make()
    compile_changed(app)
    assert (page(app), compiled) == ("two", ["part.html"])


def test_damaged_files_are_compiled_again(make: MakeApp, tmp_path: Path) -> None:
    compile_changed(make())
    for length in (200, 40, 20, 3, 0):
        for file in (tmp_path / "cache").iterdir():
            with file.open("r+b") as damaged:
                damaged.truncate(length)
        assert page(make()) == "one"


def test_a_folder_that_can_not_be_written_is_no_error(make: MakeApp, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    app = make()
    compile_changed(app)
    assert page(app) == "one"


def test_nothing_is_written_where_python_writes_no_bytecode(
    make: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    app = make()
    compile_changed(app)
    assert page(app) == "one"
    assert not [*(tmp_path / "cache").iterdir()]
