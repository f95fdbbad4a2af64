#!/usr/bin/env python3
"""Generate pictures with FLUX.1-schnell, by diffusers: a server on loopback, for Switchyard and for use by hand.

    python3 services/local_servers/flux_service.py

README.md beside this file describes the requests and the memory it needs.
"""

from __future__ import annotations

import gc
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from errors import OutOfMemoryError, RequestError
from image_api import MAX_BODY_BYTES, ImageRequest, image_routes
from memory import (
    BYTES_PER_PARAMETER,
    WORKING_BYTES,
    Offload,
    Placement,
    attempted_bytes,
    free_bytes,
    free_ram,
    held_bytes,
    is_out_of_memory,
    place,
)
from program import arguments, leave, serve
from serving import Progress
from weights import LoadError, Report, fetch, parameters, quiet, require_packages
from work import Job

MODELS = {"flux-schnell": "black-forest-labs/FLUX.1-schnell"}
"""Short names of models."""
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")
FILES = ["model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*"]
FILES += [f"{component}/*.{ending}" for component in COMPONENTS for ending in ("json", "safetensors")]
"""Not all: the repository holds the weights a second time, in one file."""


@dataclass(frozen=True)
class Variant:
    """What a kind of FLUX was trained for. Text beyond its tokens is ignored."""

    steps: int
    guidance: float
    tokens: int


SCHNELL = Variant(steps=4, guidance=0.0, tokens=256)
DEV = Variant(steps=28, guidance=3.5, tokens=512)
"""Their model cards' values; only FLUX.1-dev has an input for guidance."""

log = logging.getLogger("local-servers")


class Flux:
    """A FLUX pipeline, as a service and as its painter."""

    name = "flux"
    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, model: str, offload: Offload | None) -> None:
        self.model = model
        self.routes = image_routes(self)
        self._wanted = offload
        self._placement: Placement | None = None
        self._pipeline: Any = None
        self._variant = SCHNELL

    @property
    def default_steps(self) -> int:
        return self._variant.steps

    def load(self, report: Report) -> None:
        require_packages(("torch", "diffusers", "transformers", "accelerate", "safetensors", "PIL"))
        quiet()
        folder = fetch(MODELS.get(self.model, self.model), FILES, report)
        sizes = {component: parameters(_folder(folder, component)) for component in COMPONENTS}
        import torch

        gpu_free = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
        self._placement = place(sizes, gpu_free, free_ram(), self._wanted)
        log.info("%s goes to %s, offload: %s", self.model, self._placement.device, self._placement.offload)
        self._pipeline = self._assemble(folder, sizes, self._placement, report)
        self._variant = DEV if self._pipeline.transformer.config.guidance_embeds else SCHNELL

    def health(self) -> Mapping[str, object]:
        placement = self._placement
        if placement is None:
            return {"memory_bytes": held_bytes(None)}
        return {
            "device": placement.device,
            "offload": placement.offload,
            "memory_bytes": held_bytes(placement.device),
            "needed_bytes": placement.needed_bytes,
        }

    def paint(self, request: ImageRequest, job: Job) -> bytes:
        import torch
        from PIL import Image

        job.check()
        pixels = self._pixels(request, job)
        if not bool(torch.isfinite(pixels).all()):
            raise RequestError(
                500, "bad_image", "The model's result is not a number in places, so there is no picture."
            )
        rows = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(rows).save(file, "PNG")
        return file.getvalue()

    def _pixels(self, request: ImageRequest, job: Job) -> Any:
        """Return the picture as a tensor of colour, row and column, in RAM. Raises OutOfMemoryError and Cancelled.

        The error's figures: what the attempt found free, and what it had taken and asked for when it failed, or what
        is estimated if that is more.
        """
        import torch

        placement = cast(Placement, self._placement)
        pipeline = self._pipeline

        def after_step(_: object, index: int, __: object, tensors: dict[str, Any]) -> dict[str, Any]:
            job.step(index + 1, request.steps)
            return tensors

        try:
            made = pipeline(
                request.prompt,
                width=request.width,
                height=request.height,
                num_inference_steps=request.steps,
                guidance_scale=self._variant.guidance,
                generator=torch.Generator("cpu").manual_seed(request.seed),  # the same picture on every device
                max_sequence_length=self._variant.tokens,
                callback_on_step_end=after_step,
                output_type="pt",
            )
            return made.images[0].cpu()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.warning("Out of memory: %s", error)
            left, attempted = free_bytes(placement.device), attempted_bytes(error)
        finally:
            # What was interrupted left a component on the GPU, where the next picture would find no room.
            pipeline.maybe_free_model_hooks()
        # Only here is the error with its traceback gone, and with it every tensor of the attempt.
        gc.collect()
        if placement.device != "cpu":
            torch.cuda.empty_cache()
        free = free_bytes(placement.device)
        taken = max(free - left, 0) if free is not None and left is not None else 0
        needed = max(taken + attempted, WORKING_BYTES * (request.width * request.height // 1024**2))
        raise OutOfMemoryError(placement.device, free, needed)

    def _assemble(self, folder: Path, sizes: Mapping[str, int], placement: Placement, report: Report) -> Any:
        import torch
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        classes = dict(
            zip(COMPONENTS, (CLIPTextModel, T5EncoderModel, FluxTransformer2DModel, AutoencoderKL), strict=True)
        )
        total = BYTES_PER_PARAMETER * sum(sizes.values())
        done = 0
        report(Progress("loading", done, total))
        loaded = {}
        for component, kind in classes.items():
            part = kind.from_pretrained(folder, subfolder=component, dtype=torch.bfloat16, use_safetensors=True)
            loaded[component] = part.to(placement.device) if placement.offload == "none" else part
            done += BYTES_PER_PARAMETER * sizes[component]
            report(Progress("loading", done, total))
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            tokenizer=CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
            tokenizer_2=T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer_2"),
            **loaded,
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.enable_tiling()
        if placement.offload == "model":
            pipeline.enable_model_cpu_offload(device=placement.device)
        elif placement.offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=placement.device)
        return pipeline


def _folder(model: Path, component: str) -> Path:
    try:
        index = json.loads((model / "model_index.json").read_bytes())
    except (OSError, ValueError) as error:
        raise LoadError(f"{model} is not a diffusers model: it has no readable model_index.json.") from error
    if not isinstance(index, dict) or index.get("_class_name") != "FluxPipeline":
        raise LoadError(f"{model} is not a FLUX model: its model_index.json names another pipeline.")
    return model / component


def main() -> int:
    parser = arguments("Generate pictures with FLUX.1-schnell.", 8001, "black-forest-labs/FLUX.1-schnell")
    offloads = ("none", "model", "sequential")
    parser.add_argument(
        "--offload", choices=offloads, help="keep weights in RAM until they are needed (as memory demands)"
    )
    given = parser.parse_args()
    return serve(Flux(given.model, given.offload), given.host, given.port)


if __name__ == "__main__":
    leave(main())
