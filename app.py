"""Wires the web onto the services: blueprints, extensions, logging. No behaviour of its own."""

from __future__ import annotations

from typing import Any

from flask import Flask
from flask_limiter import Limiter
from flask_limiter.util import get_remote_address
from htmx_flask import Htmx
from limits.strategies import RateLimiter

from blueprints import (
    assets,
    chat,
    compiled_templates,
    downloads,
    filters,
    local_services,
    models,
    pages,
    provider_page,
    set_aside,
    studio,
    web,
)
from blueprints import preferences as preferences_page
from blueprints.api import (
    beam_search,
    openai,
    operations,
    preferences,
    provider_choice,
    providers,
    scripts,
    switching,
)
from blueprints.guard import Guard
from services.config import Settings, load_settings
from services.container import build_services
from services.logs import configure_logging


def create_app(settings: Settings | None = None, **overrides: Any) -> Flask:
    """The app, its services built but not started (`app.extensions["switchyard"].start()`).

    `overrides` win over the settings file and the environment. Raises ConfigError.
    """
    settings = settings or load_settings(**overrides)
    configure_logging(settings.log_level)
    app = Flask(__name__, static_folder=None)
    app.jinja_options = {"trim_blocks": True, "lstrip_blocks": True}
    app.config["MAX_CONTENT_LENGTH"] = settings.max_body_bytes
    app.config["MAX_FORM_MEMORY_SIZE"] = settings.max_body_bytes
    app.json.sort_keys = False  # type: ignore[attr-defined]
    services = app.extensions["switchyard"] = build_services(settings)
    app.extensions["switchyard.guard"] = Guard(services, _limiter(app))
    Htmx().init_app(app)
    web.init_app(app)
    compiled_templates.init_app(app)
    for module in (
        filters,
        assets,
        pages,
        chat,
        models,
        downloads,
        preferences_page,
        local_services,
        provider_page,
        set_aside,
        operations,
        switching,
        preferences,
        scripts,
        providers,
        provider_choice,
        beam_search,
        studio,
        openai,
    ):
        app.register_blueprint(module.bp)
    return app


def _limiter(app: Flask) -> RateLimiter:
    """What counts, for the guard. It limits no endpoint by itself: one tab asks thirty times a minute."""
    limiter = Limiter(key_func=get_remote_address, strategy="moving-window", storage_uri="memory://")
    app.extensions["limiter"] = {limiter}  # or its hooks look for such limits, a third of a small answer's time
    limiter.init_app(app)
    strategy: RateLimiter = limiter.limiter
    return strategy
