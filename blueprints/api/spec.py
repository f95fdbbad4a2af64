"""Builds `/openapi.json` from the routes: their docstrings, and what `@documented` adds.

spectree, the usual choice, reads a view's whole response before passing it on (3.0.0, `validate_response`), which
breaks streaming, and the rest of it is small. See docs/decisions.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from flask import Flask
from pydantic import BaseModel, Field
from werkzeug.routing import Rule

View = TypeVar("View", bound=Callable[..., Any])
Schema = dict[str, Any]

_REFS = "#/components/schemas/{model}"
_ERRORS_OF_ALL = (400, 403, 404, 405, 413, 422, 429, 500)


class OpenAIError(BaseModel):
    """The content of an error under /v1."""

    message: str = Field(description="what happened and what to do")
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(BaseModel):
    """An error under /v1."""

    error: OpenAIError


class ErrorAnswer(BaseModel):
    """An error elsewhere, and every refusal of the switcher."""

    status: str = Field(description="always `error`")
    error: str = Field(description="a code for programs")
    message: str = Field(description="what happened and what to do")


@dataclass(frozen=True, slots=True)
class Doc:
    """A view's API documentation beyond its docstring."""

    body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    answer: type[BaseModel] | None = None
    errors: tuple[int, ...] = ()
    media_type: str = "application/json"
    status: int = 200


def documented(
    body: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    answer: type[BaseModel] | None = None,
    errors: tuple[int, ...] = (),
    media_type: str = "application/json",
    status: int = 200,
) -> Callable[[View], View]:
    """Decorator: include a view in `/openapi.json`.

    `status` is that of success; `errors` are statuses beyond those that every endpoint may return.
    """

    def mark(view: View) -> View:
        view.documentation = Doc(body, query, answer, errors, media_type, status)  # type: ignore[attr-defined]
        return view

    return mark


def openapi(app: Flask, version: str) -> Schema:
    """Return the OpenAPI 3.1 document of all documented routes."""
    from pydantic.json_schema import models_json_schema  # on demand: half a megabyte

    paths: dict[str, Schema] = {}
    models: set[type[BaseModel]] = {OpenAIErrorAnswer, ErrorAnswer}
    for rule, method, summary, doc in _operations(app):
        models |= {m for m in (doc.body, doc.answer) if m is not None}
        paths.setdefault(_path(rule), {})[method.lower()] = _operation(rule, method, summary, doc)
    _, schemas = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda m: m.__name__)], ref_template=_REFS
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Switchyard", "version": version},
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": schemas.get("$defs", {})},
    }


def _operations(app: Flask) -> Iterator[tuple[Rule, str, str, Doc]]:
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        doc = getattr(view, "documentation", None)
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            if doc is not None:
                yield rule, method, inspect.getdoc(view) or "", doc


def _path(rule: Rule) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def _operation(rule: Rule, method: str, text: str, doc: Doc) -> Schema:
    summary, _, description = text.partition("\n\n")
    operation: Schema = {
        "operationId": f"{rule.endpoint}.{method.lower()}.{_path(rule)}",
        "summary": " ".join(summary.split()),
        "description": description,
        "parameters": [*_path_parameters(rule), *_query_parameters(doc.query)],
        "responses": _responses(rule, doc),
    }
    if doc.body is not None:
        content = {"application/json": {"schema": _ref(doc.body)}}
        operation["requestBody"] = {"required": doc.query is None, "content": content}
    return operation


def _path_parameters(rule: Rule) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in sorted(rule.arguments)
    ]


def _query_parameters(query: type[BaseModel] | None) -> list[Schema]:
    if query is None:
        return []
    properties = query.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]


def _responses(rule: Rule, doc: Doc) -> Schema:
    flat = not rule.rule.startswith(("/v1/", "/chat/completions"))
    error: Schema = _ref(ErrorAnswer) if flat else {"anyOf": [_ref(OpenAIErrorAnswer), _ref(ErrorAnswer)]}
    good: Schema = {"schema": _ref(doc.answer)} if doc.answer else {}
    responses: Schema = {str(doc.status): {"description": "Done", "content": {doc.media_type: good}}}
    for status in sorted({*_ERRORS_OF_ALL, *doc.errors}):
        responses[str(status)] = {"description": "Error", "content": {"application/json": {"schema": error}}}
    return responses


def _ref(model: type[BaseModel]) -> Schema:
    return {"$ref": _REFS.format(model=model.__name__)}
