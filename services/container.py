"""Builds every service once from the settings: the composition root below Flask."""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from services.catalog import Catalog, CatalogWatch
from services.chats import Chats
from services.config import Settings
from services.engines.llamacpp import LlamaCpp
from services.engines.processes import ProcessRegistry
from services.gateway.chat_client import ChatClient
from services.gateway.relay import Relay
from services.gateway.router import Router
from services.memory.devices import DeviceMonitor
from services.status import StatusService
from services.store.database import Store
from services.store.repository import ConversationRepository, LoadRepository, open_store
from services.switching.engine import Engine
from services.switching.events import Board
from services.switching.learning import Learned
from services.switching.planner import Planner
from services.switching.switcher import Switcher

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Services:
    """Everything a view may call. `start` before the first request, `close` after the last."""

    settings: Settings
    board: Board
    catalog: Catalog
    switcher: Switcher
    status: StatusService
    router: Router
    relay: Relay
    chats: Chats
    engines: dict[str, Engine]
    devices: DeviceMonitor
    watch: CatalogWatch
    store: Store

    def start(self) -> None:
        """Begin to look after models: readings, the catalogue's watch, the switcher, the model to preload."""
        self.devices.start()
        self.watch.start()
        self.switcher.start()
        for engine in self.engines.values():
            engine.prepare()
        preload = self.settings.preload
        if preload is not None and preload in self.catalog.models:
            self.switcher.switch(preload, requested_by="preload")
        elif preload is not None:
            log.warning("the model to preload is not in the catalogue", model=preload)

    def close(self) -> None:
        """Stop answers, models and engines, in this order; leaves no process behind."""
        self.board.close()
        self.chats.close()
        self.watch.stop()
        self.switcher.close()
        for engine in self.engines.values():
            engine.close()
        self.devices.stop()
        self.store.close()


def build_services(settings: Settings) -> Services:
    """Wire every service. Starts nothing but ends what an earlier run left behind."""
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    registry = ProcessRegistry(settings.state_dir)
    registry.end_leftovers()
    registry.prune_logs()
    store = open_store(settings.state_dir / "switchyard.db")
    devices = DeviceMonitor(settings.memory_budget_bytes)
    board = Board()
    engines: dict[str, Engine] = {"llamacpp": _llamacpp(settings, registry, devices)}
    catalog = Catalog(settings.models, engines)
    catalog.on_change(board.publish)
    learned = Learned(LoadRepository(store))
    planner = Planner(settings, board, catalog, engines, devices, learned)
    switcher = Switcher(settings, board, catalog, engines, planner, learned)
    router = Router(settings, board, catalog, switcher)
    relay = Relay(settings.upstream_timeout_seconds)
    return Services(
        settings=settings,
        board=board,
        catalog=catalog,
        switcher=switcher,
        status=StatusService(board, catalog, devices, planner),
        router=router,
        relay=relay,
        chats=Chats(ConversationRepository(store), ChatClient(router, relay)),
        engines=engines,
        devices=devices,
        watch=CatalogWatch(catalog),
        store=store,
    )


def _llamacpp(settings: Settings, registry: ProcessRegistry, devices: DeviceMonitor) -> LlamaCpp:
    def gpu_bytes(device: str, pid: int) -> int | None:
        return next((r.process_bytes.get(pid) for r in devices.readings if r.id == device), None)

    return LlamaCpp(
        settings.models_dir,
        registry,
        context_length=settings.context_length,
        parallel=settings.parallel_requests,
        native_server=settings.llamacpp_server,
        standby=settings.standby,
        gpu_bytes=gpu_bytes,
    )
