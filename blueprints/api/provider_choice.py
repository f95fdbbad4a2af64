"""Who serves text, images and vision, and whether the services behind them answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field

from blueprints.api import shapes
from blueprints.api.spec import documented
from blueprints.environment import environment
from blueprints.web import json_object, services, validate
from services.providers.health import ServiceHealth
from services.providers.local_services import ServiceName
from services.providers.selection import as_document

bp = Blueprint("provider_choice", __name__, url_prefix="/api/providers")


class ProvidersBody(BaseModel):
    """The providers to choose; what is left out stays."""

    model_config = ConfigDict(extra="forbid")

    llm: Literal["openai", "ollama", "vllm", "llamacpp", "local"] | None = Field(
        None, description="who writes text; local: the active model"
    )
    image: Literal["openai", "dalle", "flux"] | None = Field(None, description="who draws; dalle is openai")
    vision: Literal["openai", "gpt-vision", "local"] | None = Field(
        None, description="who judges pictures; gpt-vision is openai"
    )


class HealthQuery(BaseModel):
    """What to check besides the local services."""

    check: Literal["openai"] | None = Field(None, description="also ask OpenAI whether it accepts the key")


@bp.get("/status")
@documented()
def status() -> Response:
    """Report the providers chosen now, the settings' defaults, and whether the local services answer.

    Takes less than two seconds, whatever hangs. OpenAI is not asked: its key is only known to be set or not.
    """
    found = services()
    return jsonify(
        {
            "current": as_document(found.selection.current),
            "defaults": as_document(found.selection.defaults),
            "health": _documents(found.health.all()),
            "environment": environment(),
            "openai": shapes.key_document(found.openai_key),
        }
    )


@bp.post("/switch")
@documented(body=ProvidersBody, errors=(503,))
def switch() -> Response:
    """Choose providers: all of those that are named, or none if one of them can't serve now.

    The next job uses them. Never falls back to another provider.
    """
    found = services()
    current = found.selection.switch(json_object(request.get_data()))
    return jsonify(
        {
            "status": "success",
            "current": as_document(current),
            "defaults": as_document(found.selection.defaults),
            "message": "The next job uses these providers.",
        }
    )


@bp.get("/health")
@documented(query=HealthQuery)
def health() -> Response:
    """Report whether the local services answer; with `?check=openai`, also ask OpenAI whether it accepts the key."""
    found = services()
    if validate(HealthQuery, request.args.to_dict()).check == "openai":
        found.openai_key.check()
    return jsonify({"health": _documents(found.health.all()), "openai": shapes.key_document(found.openai_key)})


def _documents(found: Mapping[ServiceName, ServiceHealth]) -> dict[str, shapes.Json]:
    return {name: shapes.health_document(health) for name, health in found.items()}
