"""Pages in pieces: a changed piece is rendered once and sent to readers that don't have it; nothing else is sent."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.test import TestResponse

from blueprints.filters import dom_id
from blueprints.pieces import Piece, Sheet
from services.engines.port import Model
from services.switching.events import LoadView
from tests.support.in_process import InProcess, in_process

PAGES = ("/models", "/")
NAMES = ("a", "b", "c", "d")


def render(template: str, **context: object) -> str:
    return f'<p id="{template}">{context["words"]}</p>'


def piece(name: str, words: str) -> Piece:
    return Piece(name, name, {"words": words})


class Reader:
    """A page that has some pieces and polls for the others."""

    def __init__(self, sheet: Sheet, names: list[str]) -> None:
        self.mark = sheet.mark
        self.has = {name: str(sheet[name]) for name in names}

    def look(self, sheet: Sheet) -> list[str]:
        """The names of the received pieces."""
        came = re.findall(r'<p id="(\w+)" hx-swap-oob="morph">(.*?)</p>', sheet.since(self.mark))
        for name, words in came:
            self.has[name] = render(name, words=words)
        found = re.search(r'name="since" value="([^"]+)"', sheet.since(self.mark))
        self.mark = found[1] if found else self.mark
        return [name for name, _ in came]


@given(
    st.lists(
        st.tuples(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["x", "y"])), st.sets(st.sampled_from("PQR")))
    )
)
def test_a_polling_reader_has_the_current_pieces(rounds: list[tuple[dict[str, str], set[str]]]) -> None:
    """For any changes, additions and removals, and any times of polling; a second poll brings nothing."""
    sheet = Sheet(render)
    readers = {name: Reader(sheet, []) for name in "PQR"}
    for number, (pieces, looking) in enumerate(rounds):
        sheet.draw("group", number, lambda pieces=pieces: [piece(*one) for one in pieces.items()])
        now = {one: render(one, words=words) for one, words in pieces.items()}
        for reader in (readers[name] for name in looking):
            reader.look(sheet)
            assert {one: text for one, text in reader.has.items() if one in pieces} == now
            assert reader.look(sheet) == []


def test_a_piece_is_rendered_only_when_its_content_changes() -> None:
    rendered: list[str] = []

    def counted(template: str, **context: object) -> str:
        rendered.append(template)
        return render(template, **context)

    sheet = Sheet(counted)
    sheet.draw("group", 1, lambda: [piece("a", "x"), piece("b", "x")])
    sheet.draw("group", 2, lambda: [piece("a", "x"), piece("b", "y")])
    sheet.draw("group", 2, lambda: [piece("a", "z")])
    assert rendered == ["a", "b", "b"]


def test_a_version_of_another_run_gets_everything() -> None:
    old, new = (Sheet(render).draw("group", 1, lambda: [piece("a", "x")]) for _ in range(2))
    assert "x" in new.since(old.mark)
    for odd in ("", "-", "-1", f"{new.mark}x", "\N{SUPERSCRIPT TWO}"):
        assert "x" in new.since(odd)
    assert new.since(new.mark) == ""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcess]:
    models = [{"id": f"model-{n:03d}", "source": "switchyard-mini.gguf", "required_gb": 0.1} for n in range(200)]
    with in_process(tmp_path_factory.mktemp("app"), models=models) as console:
        yield console


class Tab:
    """An open page that polls with the URL in its own markup."""

    def __init__(self, console: InProcess, path: str) -> None:
        self.console = console
        self.page = console.client.get(path).get_data(as_text=True)
        self.fields: dict[str, str] = {}
        self._learn(self.page)

    def look(self) -> TestResponse:
        answer = self.console.client.get(self.address, query_string=self.fields, headers={"HX-Request": "true"})
        if answer.status_code == 200:
            self._learn(answer.get_data(as_text=True))
        return answer

    def _learn(self, text: str) -> None:
        found = re.search(r'id="poll"[^>]*hx-get="([^"]+)"', text)
        if found:
            path, _, query = html.unescape(found[1]).partition("?")
            self.address = path
            self.fields |= dict(part.split("=") for part in query.split("&") if part)
        for name, value in re.findall(r'<input type="hidden" class="shown"[^>]* name="(\w+)" value="([^"]*)"', text):
            self.fields[name] = value


def ids(answer: TestResponse) -> set[str]:
    """The ids of the elements that a response replaces."""
    return set(re.findall(r'id="([^"]+)"[^>]* hx-swap-oob="', answer.get_data(as_text=True)))


@pytest.mark.parametrize("path", PAGES)
def test_an_unchanged_page_gets_204(console: InProcess, path: str) -> None:
    tab = Tab(console, path)
    answer = tab.look()
    assert (answer.status_code, answer.data) == (204, b"")


@pytest.mark.parametrize(("path", "row"), [("/models", "row-"), ("/", "pick-item-")])
def test_of_200_rows_only_the_changed_one_is_sent(console: InProcess, path: str, row: str) -> None:
    console.show("model-007", "loading", load=LoadView(10, "loading_weights"))
    tab = Tab(console, path)
    console.show("model-007", "loading", load=LoadView(20, "loading_weights"))
    answer = tab.look()
    assert {name for name in ids(answer) if name.startswith(row)} == {f"{row}{dom_id('model-007')}"}
    assert len(answer.data) < 8_000
    assert tab.look().status_code == 204


@pytest.mark.parametrize(("path", "order"), [("/models", "model-rows-order"), ("/", "menu-others-order")])
def test_a_new_model_is_sent_with_its_position(
    console: InProcess, monkeypatch: pytest.MonkeyPatch, path: str, order: str
) -> None:
    tab = Tab(console, path)
    more = {**console.services.catalog.models, "joined": Model("joined", "llamacpp", "switchyard-mini.gguf")}
    monkeypatch.setattr(console.services.catalog, "_models", MappingProxyType(more))
    console.services.board.touch()
    came = ids(tab.look())
    assert order in came
    assert len([name for name in came if name.endswith(dom_id("joined"))]) == 1
    assert len(came) < 6


def test_an_invalid_version_is_no_error(console: InProcess) -> None:
    for since in ("x", "1-1", "0-99999999999999999999"):
        answer = console.client.get("/fragments/models", query_string={"since": since})
        assert answer.status_code == 200
        assert len(ids(answer)) > 200
