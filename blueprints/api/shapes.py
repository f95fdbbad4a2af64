"""The contract's JSON documents, made from the services' values. Sizes become decimal GB, times ISO 8601 in UTC."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from datetime import UTC, datetime

from services.downloads.download import Download
from services.downloads.library import Recommended
from services.memory.ledger import Account
from services.pins import Pin
from services.providers.health import ServiceHealth
from services.providers.installation import Installation
from services.providers.local_services import LocalService
from services.providers.openai_key import OpenAIKey
from services.sizes import gigabytes
from services.status import ModelStatus, Status
from services.switching.events import SwitchView
from services.switching.jobs import Job
from services.switching.plan import Plan
from services.switching.reporter import limit_figures

Json = dict[str, object]
MIB = 1_048_576


def gb(size: int | None) -> float | None:
    """Convert bytes to decimal gigabytes with three digits; None stays None."""
    return None if size is None else gigabytes(size)


def whole_seconds(seconds: float | None) -> int | None:
    return None if seconds is None else math.ceil(seconds)


def iso_time(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_document(status: Status, waiting: Mapping[str, int]) -> Json:
    """`GET /v1/models/status`."""
    return {
        "models": {m.id: model_document(m) for m in status.models},
        "gpu": gpu_document(status.devices),
        "active_model": status.active_model,
        "switch": switch_document(status.switch, status.queued, waiting) if status.switch else None,
        "version": status.version,
    }


def model_document(model: ModelStatus) -> Json:
    load = model.load
    return {
        "status": model.state,
        "health": "unhealthy" if model.unresponsive else _HEALTH.get(model.state),
        "engine": model.engine,
        "kind": model.kind,
        "remote": model.remote,
        "description": model.description,
        "size_gb": gb(model.size_bytes),
        "gpu_memory_used_gb": gb(model.used_bytes),
        "gpu_memory_required_gb": gb(model.required_bytes),
        "memory_basis": model.memory_basis,
        "load_progress": 100 if model.state == "running" else load.percent if load else 0,
        "stage": load.stage if load else None,
        "detail": load.detail if load else None,
        "estimated_load_time_seconds": _rounded(model.estimated_load_seconds),
        "estimated_time_remaining_seconds": whole_seconds(load.eta_seconds) if load else None,
        "device": model.device,
        "in_flight": model.in_flight,
        "pinned": model.pin is not None,
        "pin": None if model.pin is None else pin_document(model.pin),
        "favorite": model.favorite,
        "last_used": iso_time(model.last_used),
        "tags": list(model.tags),
        "warning": model.warning,
        "error": model.error,
    }


def pin_document(pin: Pin) -> Json:
    """A pin: by whom, until when (None: for ever) and why."""
    return {"owner": pin.owner, "until": iso_time(pin.until), "reason": pin.reason}


_HEALTH = {
    "running": "healthy",
    "loading": "starting",
    "unloading": "stopping",
    "asleep": "asleep",
    "failed": "unhealthy",
}


def gpu_document(devices: tuple[Account, ...]) -> Json:
    """Return the `gpu` block: the sum of all GPUs, or the host's memory without one, and each device by itself."""
    gpus = [d for d in devices if d.kind == "gpu"] or list(devices)
    total = sum(d.total_bytes for d in gpus)
    available = sum(d.available_bytes for d in gpus)
    used = total - available
    return {
        "total_memory_gb": gb(total),
        "used_memory_gb": gb(used),
        "available_memory_gb": gb(available),
        "total_gb": gb(total),
        "used_gb": gb(used),
        "available_gb": gb(available),
        "total_mb": total // MIB,
        "used_mb": used // MIB,
        "available_mb": available // MIB,
        "devices": [device_document(d) for d in devices],
    }


def device_document(device: Account) -> Json:
    return {
        "id": device.id,
        "name": device.name,
        "kind": device.kind,
        "total_gb": gb(device.total_bytes),
        "used_gb": gb(device.used_bytes),
        "available_gb": gb(device.available_bytes),
        "reserved_gb": gb(device.reserved_bytes),
        "other_gb": gb(device.other_bytes),
        "models": {model: gb(size) for model, size in device.ours},
    }


def switch_document(switch: SwitchView | None, queued: tuple[str, ...], waiting: Mapping[str, int]) -> Json:
    """`GET /v1/models/switch`: the switch under way, and what waits for it."""
    return {
        "active": switch is not None,
        "switch_id": switch.id if switch else None,
        "fromModel": switch.from_model if switch else None,
        "toModel": switch.to_model if switch else None,
        "stage": switch.stage if switch else None,
        "progress": switch.percent if switch else None,
        "eta": whole_seconds(switch.eta_seconds) if switch else None,
        "detail": switch.detail if switch else None,
        "requested_by": switch.requested_by if switch else None,
        "queue": _queue(queued, waiting),
    }


def plan_document(plan: Plan) -> Json:
    """`POST /v1/models/switch/plan`."""
    return {
        "feasible": plan.feasible,
        "target": plan.target,
        "required_gb": gb(plan.required_bytes),
        "available_gb": gb(plan.available_bytes),
        "unload": [
            {
                "model": u.model,
                "frees_gb": gb(u.frees_bytes),
                "idle_seconds": None if u.idle_seconds is None else round(u.idle_seconds),
                "reload_seconds": _rounded(u.reload_seconds),
                "sleeps": u.sleeps,
                "in_flight": u.in_flight,
            }
            for u in plan.unload
        ],
        "blocked_by": [{"model": b.model, "reason": b.reason} for b in plan.blocked_by],
        "estimated_seconds": _rounded(plan.estimated_seconds),
        "memory_basis": plan.memory_basis,
        "after": {"available_gb": gb(plan.after_available_bytes) if plan.feasible else None},
        "alternatives": list(plan.alternatives),
        "limits": limit_figures(plan.limits),
    }


def job_document(job: Job) -> Json:
    """The response to a switch whose target is loading or ready."""
    if job.outcome == "already_loaded":
        return {
            "status": "already_loaded",
            "model": job.target,
            "message": f"Model '{job.target}' is already running and healthy",
        }
    plan = job.plan
    return {
        "status": "success",
        "model": job.target,
        "switch_id": job.id,
        "unloaded_models": list(job.unloaded),
        "start_result": {"status": "running" if job.done else "starting", "model": job.target},
        "estimated_load_time_seconds": _rounded(plan.estimated_seconds) if plan else None,
        "total_time_seconds": round(job.load_seconds, 3) if job.load_seconds is not None else None,
        "memory_info": {
            "required_gb": gb(plan.required_bytes),
            "available_before_gb": gb(plan.available_bytes),
            "freed_gb": gb(plan.freed_bytes),
        }
        if plan
        else None,
    }


def _rounded(seconds: float | None) -> float | None:
    """Round seconds for scripts: to whole ones from 10 up, else to two digits."""
    if seconds is None:
        return None
    return round(seconds) if seconds >= 10 else round(seconds, 2)


def _queue(queued: tuple[str, ...], waiting: Mapping[str, int]) -> list[Json]:
    """Return one entry per awaited model: whether a switch to it is queued, and how many requests wait for it."""
    models = [*queued, *(m for m in waiting if m not in queued)]
    return [{"model": m, "switch": m in queued, "requests": waiting.get(m, 0)} for m in models]


def installed_document(model: ModelStatus, outdated: Collection[str]) -> Json:
    """One installed model in `GET /api/providers/models/status`."""
    return {
        "name": model.id,
        "size_gb": gb(model.size_bytes),
        "size_bytes": model.size_bytes,
        "description": model.description,
        "status": model.state,
        "update_available": model.id in outdated,
    }


def recommendation_document(recommended: Recommended) -> Json:
    return {
        "model": recommended.model,
        "aliases": list(recommended.aliases),
        "source": recommended.source,
        "description": recommended.description,
        "size_gb": gb(recommended.size_bytes),
        "recommended": recommended.recommended,
        "installed": recommended.installed is not None,
        "model_id": recommended.installed,
    }


def download_document(download: Download) -> Json:
    """One download."""
    return {
        "id": download.id,
        "model": download.model,
        "source": download.source,
        "state": download.state,
        **progress_document(download),
        "position": download.position,
        "may_resume": download.may_resume,
        "created_at": iso_time(download.created_at),
        "started_at": iso_time(download.started_at),
        "finished_at": iso_time(download.finished_at),
    }


def progress_document(download: Download) -> Json:
    """One progress event. `status` is "downloading" until it is paused, cancelled, complete or error."""
    return {
        "status": _DOWNLOAD_WORDS.get(download.state, "downloading"),
        "progress": download.percent,
        "message": download.message,
        "completed_bytes": download.completed_bytes,
        "total_bytes": download.total_bytes,
        "bytes_per_second": download.bytes_per_second,
        "eta": whole_seconds(download.eta_seconds),
        "error": download.error,
        "id": download.id,
    }


_DOWNLOAD_WORDS = {"complete": "complete", "failed": "error", "paused": "paused", "cancelled": "cancelled"}


def health_document(health: ServiceHealth) -> Json:
    """Whether a local service answers. `loading`: it does, and its model is still being loaded."""
    return {
        "available": health.available,
        "latency_ms": health.latency_ms,
        "models": list(health.models),
        "error": health.error,
        "loading": health.loading,
    }


def key_document(openai: OpenAIKey) -> Json:
    """The key for OpenAI, never its text: whether it is set, and what OpenAI last said of it."""
    check = openai.latest
    return {
        "key_set": openai.is_set,
        "base_url": openai.base_url,
        "checked": check.answer if check is not None else None,
        "checked_at": iso_time(check.at) if check is not None else None,
        "error": check.error if check is not None else None,
    }


def service_document(service: LocalService) -> Json:
    """A local service. `ours`: it was started from here, so it can be stopped from here.

    `model` is the model that a start loads, `missing` the Python packages that it lacks.
    """
    status = service.status
    return {
        "service": service.name,
        "title": service.title,
        "address": service.address,
        "state": status.state,
        "running": status.state == "running",
        "ours": status.ours,
        "local": status.local,
        "port": status.port,
        "pid": status.pid,
        "uptime_seconds": None if status.uptime_seconds is None else round(status.uptime_seconds, 1),
        "version": status.version,
        "can_start": status.can_start,
        "can_stop": status.can_stop,
        "can_install": service.can_install,
        "model": service.model,
        "loaded": service.loaded,
        "missing": list(service.missing),
        "progress": _preparation_document(service),
        "installation": installation_document(service.installation) if service.installation else None,
        "error": status.error,
        "log_tail": status.log_tail,
    }


def _preparation_document(service: LocalService) -> Json | None:
    seen = service.preparation
    if seen is None:
        return None
    return {
        "stage": seen.stage,
        "completed_bytes": seen.completed_bytes,
        "total_bytes": seen.total_bytes,
        "percent": service.percent,
        "message": service.progress_words,
    }


def installation_document(installation: Installation) -> Json:
    """The installation of Python packages. `state` is running, complete, failed or cancelled."""
    return {
        "state": installation.state,
        "message": installation.message,
        "percent": installation.percent,
        "completed_bytes": installation.completed_bytes,
        "error": installation.error,
        "log_tail": installation.log_tail,
        "started_at": iso_time(installation.started_at),
        "finished_at": iso_time(installation.finished_at),
    }
