"""The composition root below Flask: builds every service once from the settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from services.catalog import Catalog
from services.chats import Chats
from services.config import Settings
from services.deleted_models import DeletedModels
from services.downloads.disk import DiskCheck
from services.downloads.fetcher import Fetcher, Source
from services.downloads.huggingface.fetcher import HuggingFaceFetcher
from services.downloads.huggingface.process import HubProcess
from services.downloads.huggingface.vllm_weights import VllmWeights
from services.downloads.library import Library, refresh_and_find
from services.downloads.ollama.pull import OllamaFetcher
from services.downloads.ollama.registry import Registries
from services.downloads.ollama.updates import UpdateCheck
from services.downloads.queue import DownloadQueue
from services.engines.llamacpp.engine import LlamaCpp
from services.engines.llamacpp.folder import ModelFolder
from services.engines.ollama.engine import Ollama
from services.engines.ollama.instance import ServerProcess
from services.engines.ollama.watch import OllamaWatch
from services.engines.openai.account import Account
from services.engines.openai.engine import OpenAI
from services.engines.port import Engine, GpuBytes
from services.engines.processes import ProcessRegistry
from services.engines.python_server.about import FLUX, VISION, VISION_MODEL, About
from services.engines.python_server.engine import Machine, PythonServerEngine
from services.engines.python_server.packages import Packages
from services.engines.vllm.engine import Vllm
from services.engines.vllm.instance import GpuHeld
from services.engines.vllm.spec import VllmSettings
from services.env_file import ComposeChoice, EnvFile
from services.gateway.chat_client import ChatClient
from services.gateway.relay import Relay
from services.gateway.router import Router
from services.memory.devices import DeviceMonitor
from services.native_threads import run_in_thread
from services.periodic import Periodic
from services.pins import Pins
from services.preferences import PreferenceStore
from services.providers.availability import SERVICES, Availability
from services.providers.docker_service import DockerService
from services.providers.health import HealthChecks
from services.providers.installation import Installer
from services.providers.local_services import LocalServices
from services.providers.ollama_service import OllamaService, find_ollama
from services.providers.openai_key import OpenAIKey
from services.providers.ports import Capability, Choice, JobProviders
from services.providers.selection import Selection
from services.restart import Restart
from services.scheduling import ThreadScheduler
from services.state_folder import DATABASE, StateError, check_writable, owner, prepare
from services.status import StatusService
from services.store.damage import Damaged
from services.store.database import Store
from services.store.deferred import DeferredLoads, DeferredNotes, DeferredWrites
from services.store.records import new_id
from services.store.repository import (
    ConversationRepository,
    DownloadRepository,
    LoadRepository,
    NoteRepository,
    StudioRepository,
    open_store,
)
from services.studio.pictures import Pictures
from services.studio.studio import Studio
from services.switching.context import SwitchingContext
from services.switching.events import Board
from services.switching.first_loads import FirstLoads
from services.switching.fleet import ACTIVE_KEY
from services.switching.idle import IdleWatch
from services.switching.jobs import SwitchError
from services.switching.learning import Learned
from services.switching.planner import Planner
from services.switching.switcher import Switcher
from version import VERSION

log = structlog.get_logger(__name__)

FIRST_PASS_WAIT_SECONDS = 2.0
"""How long the start waits for the first pass over the engines."""
CATALOG_SECONDS = 2.0
"""Interval between scans for new, changed and removed models."""
IDLE_SECONDS = 1.0
"""Interval between looks for unused models."""
SERVERS_DIR = Path(__file__).parent / "local_servers"
SERVERS_ENV = "local-servers-env"
"""Folder below the state folder: the virtual environment of the local servers."""
PRUNE_SECONDS = 60.0
"""Interval between prunes of engines' logs."""


if TYPE_CHECKING:
    from services.engines.containers.docker_runtime import DockerRuntime
    from services.metrics import Metrics
    from services.providers.factory import ProviderFactory


@dataclass(frozen=True)
class Services:
    """Every service that a view may call. `start` before the first request, `close` after the last."""

    settings: Settings
    preferences: PreferenceStore
    pins: Pins
    board: Board
    catalog: Catalog
    switcher: Switcher
    status: StatusService
    metrics: Callable[[], Metrics]
    router: Router
    relay: Relay
    chats: Chats
    studio: Studio
    downloads: DownloadQueue
    library: Library
    updates: UpdateCheck
    ollama_service: OllamaService
    local_services: LocalServices
    docker_service: DockerService
    selection: Selection
    health: HealthChecks
    openai_key: OpenAIKey
    engines: dict[str, Engine]
    folder: ModelFolder
    devices: DeviceMonitor
    background: tuple[Periodic, ...]
    first_loads: FirstLoads
    store: Store
    damaged: Damaged
    writes: DeferredWrites
    restart: Restart
    compose: ComposeChoice

    def start(self) -> None:
        """Start the background work: readings, periodic tasks, the switcher, downloads, the preload.

        Waits a moment for the first pass over the engines, so that the first page after a restart doesn't show loaded
        models as stopped.
        """
        self.devices.start()
        self.docker_service.start_watching()
        for engine in self.engines.values():
            engine.prepare()
        for periodic in self.background:
            periodic.start()
        self.switcher.start()
        self.downloads.start()
        self.updates.start()
        ThreadScheduler().spawn("first-loads", self.first_loads.run)
        self.switcher.wait_first_pass(FIRST_PASS_WAIT_SECONDS)

    def close(self) -> None:
        """Stop answers, downloads, models and engines, in this order.

        Leaves no process behind except those that the next start adopts: a local service and, on a restart, loaded
        models.
        """
        self.board.close()
        self.chats.close()
        self.studio.close()
        self.updates.stop()
        for periodic in self.background:
            periodic.stop()
        self.downloads.close()
        self.switcher.close(for_good=not self.restart.models_stay)
        self.relay.close()
        for engine in self.engines.values():
            engine.close()
        self.local_services.close()
        self.ollama_service.close()
        self.docker_service.close()
        self.devices.stop()
        self.writes.close()
        self.store.close()


def build_services(settings: Settings) -> Services:
    """Wire every service. Starts none, but ends processes that an earlier run left unfinished.

    Raises StateError and StoreError.
    """
    prepare(settings.state_dir)
    registry = ProcessRegistry(settings.state_dir)
    registry.end_leftovers()
    registry.prune_logs()
    store = open_store(settings.state_dir / DATABASE)
    writes = DeferredWrites()
    stored_notes = NoteRepository(store)
    notes = DeferredNotes(stored_notes, writes)
    damaged = Damaged(settings.state_dir / DATABASE, notes)
    if damaged.current is not None:
        log.error("the database was damaged and set aside; a new one was created", file=str(damaged.current))
    devices = DeviceMonitor(settings.memory_budget_bytes)
    hub = HubProcess(registry, hosts=settings.download_hosts)
    board = Board()
    preferences = PreferenceStore(settings.preferences, stored_notes, board.touch)
    pins = Pins(stored_notes, board.touch)
    folder = ModelFolder(settings.models_dir, on_change=board.touch)
    watch = OllamaWatch(settings.ollama_base_url)
    service = OllamaService(
        watch,
        registry,
        find_binary=lambda: find_ollama(settings.ollama_binary),
        environment=lambda: _ollama_environment(settings, downloads),
        on_change=board.touch,
    )
    ollama = _ollama(settings, watch, service, devices)
    packages = Packages(
        settings.local_servers_dir or SERVERS_DIR, settings.local_servers_env or settings.state_dir / SERVERS_ENV
    )
    installer = Installer(packages, registry, margin_bytes=settings.disk_margin_bytes, on_change=board.touch)
    machine = Machine(lambda: devices.readings, _gpu_bytes(devices), lambda device: _loaded_on(board, device))
    servers = {
        about.name: PythonServerEngine(
            about,
            url,
            model,
            registry,
            packages,
            machine=machine,
            on_change=board.touch,
            start_timeout=settings.load_timeout_seconds,
        )
        for about, url, model in _servers(settings)
    }
    account = _openai_account(settings)
    engines: dict[str, Engine] = {
        "llamacpp": _llamacpp(settings, folder, registry, devices),
        "ollama": ollama,
        "vllm": _vllm(settings, devices, hub, owner(settings.state_dir, lambda: notes.get("owner") or new_id()[:12])),
        **servers,
        "openai": OpenAI(account),
    }
    catalog = Catalog(settings.models, engines, DeletedModels(notes))
    catalog.on_change(board.publish)
    catalog.keep_listed(lambda: [view.entry for view in board.current.instances.values()])
    learned = Learned(DeferredLoads(LoadRepository(store), writes))
    context = SwitchingContext(settings, preferences, pins, board, catalog, engines, ThreadScheduler())
    planner = Planner(context, devices, learned)
    switcher = Switcher(context, planner, learned, notes, check_state=lambda: _check_state(settings))
    downloads = _downloads(settings, store, registry, hub, ollama, catalog)
    updates = UpdateCheck(
        ollama.installed,
        _registries(settings),
        every_seconds=settings.update_check_hours * 3600,
    )
    router = Router(settings, preferences, board, catalog, switcher)
    docker_service = DockerService(
        lambda: _docker(settings.docker_host),
        used=any(entry.engine == "vllm" for entry in settings.models),
        on_change=board.touch,
    )
    health = HealthChecks(
        watch,
        lambda: [model.name for model in ollama.installed()],
        settings.flux_api_url,
        settings.local_vision_api_url,
    )
    openai_key = OpenAIKey(settings.openai_base_url, settings.openai_api_key)
    relay = Relay(settings.upstream_timeout_seconds, serving=lambda: board.current.origins)
    selection = Selection(
        Choice(settings.llm_provider, settings.image_provider, settings.vision_provider),
        Availability(health, openai_key, lambda: catalog.models, docker_service.check).problem,
        notes=notes if settings.remember_providers else None,
        on_change=board.touch,
    )

    status = StatusService(context, devices, planner)

    @cache
    def metrics() -> Metrics:
        from services.metrics import Metrics, Sources  # on demand: most consoles are never scraped

        sources = Sources(status.current, lambda: board.current, switcher.tally, lambda: router.waiting, downloads.all)
        return Metrics(sources, VERSION)

    @cache
    def factory() -> ProviderFactory:
        from services.providers.adapters.upstream import Gateway  # on demand: the adapters take half a megabyte
        from services.providers.factory import ProviderFactory

        return ProviderFactory(settings, account, Gateway(board, catalog, switcher, router, relay))

    return Services(
        settings=settings,
        preferences=preferences,
        pins=pins,
        board=board,
        catalog=catalog,
        switcher=switcher,
        status=status,
        metrics=metrics,
        router=router,
        relay=relay,
        chats=Chats(ConversationRepository(store), ChatClient(router, relay)),
        studio=_studio(settings, store, writes, lambda: factory().for_job(selection.check(_loads_by_switch(catalog)))),
        downloads=downloads,
        library=Library(catalog, switcher, updates, settings.recommended, settings.longest_switch_seconds),
        updates=updates,
        ollama_service=service,
        local_services=LocalServices(service, servers, switcher, board, installer),
        docker_service=docker_service,
        selection=selection,
        health=health,
        openai_key=openai_key,
        engines=engines,
        folder=folder,
        devices=devices,
        background=(
            Periodic("look-for-models", catalog.refresh, CATALOG_SECONDS, first_seconds=CATALOG_SECONDS),
            Periodic("expire-leases", pins.expire, IDLE_SECONDS, first_seconds=IDLE_SECONDS),
            Periodic("idle", IdleWatch(context, switcher).check, IDLE_SECONDS, first_seconds=IDLE_SECONDS),
            Periodic(
                "prune-logs", lambda: run_in_thread(registry.prune_logs), PRUNE_SECONDS, first_seconds=PRUNE_SECONDS
            ),
        ),
        first_loads=FirstLoads(context, switcher, notes.get(ACTIVE_KEY) or None),
        store=store,
        damaged=damaged,
        writes=writes,
        restart=Restart(
            settings,
            lambda: board.current.switch.to_model if board.current.switch else None,
            lambda: run_in_thread(check_writable, settings.state_dir),
        ),
        compose=ComposeChoice(EnvFile(settings.env_file, settings.env_key) if settings.env_file else None),
    )


def _servers(settings: Settings) -> tuple[tuple[About, str, str], ...]:
    """Return each Python server with its address and its model."""
    return (FLUX, settings.flux_api_url, settings.flux_model), (VISION, settings.local_vision_api_url, VISION_MODEL)


def _loaded_on(board: Board, device: str) -> list[str]:
    """Return the models that are loaded on a device and could be unloaded."""
    here = board.current.instances.values()
    return [
        v.model
        for v in here
        if v.device == device and v.shares is None and not (v.entry.started_elsewhere or v.entry.remote)
    ]


def _loads_by_switch(catalog: Catalog) -> Callable[[Capability, str], bool]:
    """Return whether a run loads a provider's model itself, so that it need not be loaded when the run starts."""

    def loads(capability: Capability, provider: str) -> bool:
        service = SERVICES.get((capability, provider))
        return any(m.engine == service and m.kind != "text" for m in catalog.models.values())

    return loads


def _studio(settings: Settings, store: Store, writes: DeferredWrites, providers: Callable[[], JobProviders]) -> Studio:
    pictures = Pictures(settings.state_dir / "studio-pictures", settings.studio_pictures_bytes)
    return Studio(StudioRepository(store), pictures, providers, writes, at_once=settings.studio_at_once)


def _ollama(settings: Settings, watch: OllamaWatch, service: OllamaService, devices: DeviceMonitor) -> Ollama:
    def process() -> ServerProcess | None:
        status = service.status()
        return None if status.pid is None else ServerProcess(status.pid, status.ours, service.log_path)

    def failure_cause() -> str | None:
        status = service.status()
        return status.error if status.state == "failed" else None

    return Ollama(
        watch,
        local=service.status().local,
        process=process,
        failure_cause=failure_cause,
        gpus=lambda: [reading.id for reading in devices.readings if reading.kind == "gpu"],
        gpu_bytes=_gpu_bytes(devices),
        context_length=settings.ollama_context_length,
    )


def _openai_account(settings: Settings) -> Account:
    key = settings.openai_api_key
    return Account(settings.openai_base_url, None if key is None else key.get_secret_value())


def _check_state(settings: Settings) -> None:
    try:
        run_in_thread(check_writable, settings.state_dir)
    except StateError as error:
        raise SwitchError("state_unwritable", f"Nothing was unloaded. {error}") from None


def _vllm(settings: Settings, devices: DeviceMonitor, hub: HubProcess, owner: str) -> Vllm:
    hub_cache = settings.hub_cache_dir.expanduser()
    passed_on = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE")
    return Vllm(
        lambda: _docker(settings.docker_host),
        VllmSettings(
            image=settings.vllm_image,
            owner=owner,
            hub_cache=hub_cache,
            compile_cache=settings.vllm_cache_dir.expanduser(),
            shm_bytes=int(settings.vllm_shm_gb * 1e9),
            environment={name: os.environ[name] for name in passed_on if os.environ.get(name)},
            sleep=settings.vllm_sleep,
        ),
        VllmWeights(hub_cache, hub, margin_bytes=settings.disk_margin_bytes),
        readings=lambda: devices.readings,
        gpu_bytes=_gpu_bytes_now(devices),
        settle=devices.settle,
    )


def _docker(host: str | None) -> DockerRuntime:
    from services.engines.containers.docker_runtime import DockerRuntime  # see Vllm for why only now

    return DockerRuntime(host)


def _ollama_environment(settings: Settings, downloads: DownloadQueue) -> dict[str, str]:
    """Return the environment of an Ollama server that we start.

    It sets the context length, which Ollama would else choose by the size of the GPU, and while a download is
    unfinished it keeps Ollama from deleting partial files that are an hour old.
    """
    environment = {"OLLAMA_CONTEXT_LENGTH": str(settings.ollama_context_length or settings.context_length)}
    if any(d.source == "ollama" and not d.final for d in downloads.all()):
        environment["OLLAMA_NOPRUNE"] = "1"
    return environment


def _registries(settings: Settings) -> Registries:
    return Registries(settings.ollama_registry_url, settings.download_hosts, insecure=settings.ollama_insecure_registry)


def _downloads(
    settings: Settings, store: Store, registry: ProcessRegistry, hub: HubProcess, ollama: Ollama, catalog: Catalog
) -> DownloadQueue:
    fetchers: dict[Source, Fetcher] = {
        "ollama": OllamaFetcher(
            settings.ollama_base_url,
            find_binary=lambda: find_ollama(settings.ollama_binary),
            registries=_registries(settings),
            registry=registry,
        ),
        "huggingface": HuggingFaceFetcher(settings.models_dir, hub),
    }
    disk = DiskCheck(
        {"ollama": ollama.models_folder, "huggingface": lambda: settings.models_dir},
        margin_bytes=settings.disk_margin_bytes,
    )
    return DownloadQueue(
        fetchers,
        DownloadRepository(store),
        at_once=settings.downloads_at_once,
        disk=disk,
        on_complete=lambda download: refresh_and_find(catalog, download.source, download.model),
    )


def _gpu_bytes(devices: DeviceMonitor) -> GpuBytes:
    def held(device: str, pid: int) -> int | None:
        return next((r.process_bytes.get(pid) for r in devices.readings if r.id == device), None)

    return held


def _gpu_bytes_now(devices: DeviceMonitor) -> GpuHeld:
    """Return GPU use from a fresh reading: what a model keeps asleep must not be taken from one before it slept.

    0, which means unknown, while the driver doesn't answer.
    """

    def held(device: str, pids: Collection[int]) -> int:
        reading = next((r for r in devices.sample() if r.id == device and not r.stale), None)
        return sum(reading.process_bytes.get(pid, 0) for pid in pids) if reading is not None else 0

    return held


def _llamacpp(settings: Settings, folder: ModelFolder, registry: ProcessRegistry, devices: DeviceMonitor) -> LlamaCpp:
    return LlamaCpp(
        folder,
        registry,
        context_length=settings.context_length,
        parallel=settings.parallel_requests,
        native_server=settings.llamacpp_server,
        standby=settings.standby,
        gpu_bytes=_gpu_bytes(devices),
    )
