#!/usr/bin/env python3
"""Score pictures with CLIP and an aesthetic predictor: a server on loopback, for Switchyard and for use by hand.

    python3 services/local_servers/vision_service.py

README.md beside this file describes the requests and where the scores come from.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from errors import OutOfMemoryError, RequestError, invalid
from memory import attempted_bytes, free_bytes, free_ram, held_bytes, is_out_of_memory
from program import arguments, leave, serve
from serving import Progress
from vision_api import MAX_BODY_BYTES, Judgement, vision_routes
from weights import LoadError, Report, fetch, fetch_file, parameters, quiet, require_packages
from work import Job

CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"
"""LAION's improved aesthetic predictor, `sac+logos+ava1-l14-linearMSE`, as the TRL library publishes it (3.7 MB)."""
FILES = ["*.json", "*.txt", "*.safetensors"]
ALIGNMENT_SCALE = 2.5
HEAD_LAYERS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Outputs of the head's linear layers by their numbers in the weights file; the numbers between are dropouts."""
MAX_PIXELS = 40_000_000
CAPTION_TOKENS = 60
WORKING_BYTES = 500_000_000
"""Memory beside the weights, an estimate: one picture of 224x224 takes less, its original in full size up to 160 MB."""

log = logging.getLogger("local-servers")


class Vision:
    """CLIP, the aesthetic head and maybe a captioner, as a service and as its judge."""

    name = "vision"
    max_body_bytes = MAX_BODY_BYTES

    def __init__(self, model: str, head: str, captioner: str | None) -> None:
        self.model = model
        self.routes = vision_routes(self)
        self._head_name = head
        self._captioner_name = captioner
        self._device: Literal["cuda:0", "cpu"] = "cpu"
        self._needed: int | None = None
        self._clip: Any = None
        self._tokenizer: Any = None
        self._normalization: tuple[Any, Any] | None = None
        self._head: Any = None
        self._head_error: str | None = None
        self._captioner: tuple[Any, Any] | None = None

    def load(self, report: Report) -> None:
        require_packages(("torch", "transformers", "safetensors", "PIL"))
        quiet()
        folders = [fetch(self.model, FILES, report)]
        if self._captioner_name:
            folders.append(fetch(self._captioner_name, FILES, report))
        self._place(sum(parameters(folder) for folder in folders))
        report(Progress("loading"))
        self._load_clip(folders[0])
        self._load_head()
        if self._captioner_name:
            self._load_captioner(folders[1])

    def health(self) -> Mapping[str, object]:
        return {
            "device": self._device,
            "memory_bytes": held_bytes(self._device),
            "needed_bytes": self._needed,
            "aesthetic_error": self._head_error,
            "captioner": self._captioner_name,
        }

    def score(self, image: bytes, prompt: str, job: Job) -> Judgement:
        """Return the picture's alignment with the prompt, and its aesthetic score.

        The alignment is 2.5 times the cosine of CLIP's two embeddings, within 0 and 1: CLIPScore, from "CLIPScore: A
        Reference-free Evaluation Metric for Image Captioning" (Hessel et al., 2021). CLIP reads the first 75 tokens.
        """
        import torch

        picture = decoded(image)
        job.check()
        with _memory_errors(self._device), torch.inference_mode():
            words = self._tokenizer(prompt, truncation=True, return_tensors="pt").to(self._device)
            answer = self._clip(pixel_values=self._pixels(picture), **words)
            seen, asked = answer.image_embeds.float(), answer.text_embeds.float()  # both of length 1
            cosine = float((seen * asked).sum())
            aesthetic = None if self._head is None else float(self._head(seen))
        job.step(1, 1)
        return Judgement(ALIGNMENT_SCALE * cosine, aesthetic)

    def describe(self, image: bytes, job: Job) -> str:
        if self._captioner is None:
            raise RequestError(501, "not_supported", "No captioner is configured: start the server with --captioner.")
        import torch

        picture = decoded(image)
        job.check()
        processor, captioner = self._captioner
        with _memory_errors(self._device), torch.inference_mode():
            inputs = processor(images=picture, return_tensors="pt").to(self._device, captioner.dtype)
            tokens = captioner.generate(**inputs, max_new_tokens=CAPTION_TOKENS)
        job.step(1, 1)
        return str(processor.decode(tokens[0], skip_special_tokens=True)).strip()

    def _place(self, count: int) -> None:
        """Choose the GPU if it has room for that many parameters, else the CPU. Raises OutOfMemoryError."""
        import torch

        on_gpu, on_cpu, ram = 2 * count + WORKING_BYTES, 4 * count + WORKING_BYTES, free_ram()
        if torch.cuda.is_available() and torch.cuda.mem_get_info(0)[0] >= on_gpu:
            self._device, self._needed = "cuda:0", on_gpu
        elif ram is None or ram >= on_cpu:
            self._device, self._needed = "cpu", on_cpu
        else:
            raise OutOfMemoryError("the CPU", ram, on_cpu)

    def _load_clip(self, folder: Path) -> None:
        import torch
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        self._clip = CLIPModel.from_pretrained(folder, dtype=self._dtype, use_safetensors=True).to(self._device).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        processor = CLIPImageProcessor.from_pretrained(folder)
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        self._normalization = (mean, deviation)

    def _load_head(self) -> None:
        """Load the aesthetic head; without it scores are given without aesthetics, and /health says why."""
        try:
            self._head = aesthetic_head(fetch_file(self._head_name), self._clip.config.projection_dim).to(self._device)
        except Exception as error:
            self._head_error = str(error)
            log.warning("No aesthetic scores: %s", error)

    def _load_captioner(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        captioner = AutoModelForImageTextToText.from_pretrained(folder, dtype=self._dtype, use_safetensors=True)
        self._captioner = (AutoProcessor.from_pretrained(folder), captioner.to(self._device).eval())

    @property
    def _dtype(self) -> Any:
        import torch

        return torch.float32 if self._device == "cpu" else torch.float16

    def _pixels(self, picture: Any) -> Any:
        """Return the picture's central square as CLIP wants it.

        CLIP's own preprocessing scales the picture first and crops it then. That would make a picture of one row, as
        wide as a file can say, many times larger.
        """
        import torch
        from PIL import Image

        size, side = self._clip.config.vision_config.image_size, min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        raw = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
        mean, deviation = self._normalization or (0, 1)
        return ((raw / 255 - mean) / deviation)[None].to(self._device, self._dtype)


@contextmanager
def _memory_errors(device: str) -> Iterator[None]:
    """Turn torch's errors about memory into OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(device, free_bytes(device), attempted_bytes(error) or None) from None


def decoded(image: bytes) -> Any:
    """Return the picture in RGB, on white where it is transparent. Raises RequestError if it can't be decoded."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(image), formats=("PNG", "JPEG", "WEBP")) as file:
            if file.width * file.height > MAX_PIXELS:  # from the header, before a small file unpacks to gigabytes
                raise Image.DecompressionBombError
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except Image.DecompressionBombError as error:
        raise invalid(f"image has more than {MAX_PIXELS // 10**6} million pixels.") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise invalid("image can't be decoded: the file is damaged, or its kind isn't PNG, JPEG or WebP.") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def aesthetic_head(path: Path, inputs: int) -> Any:
    """Return LAION's improved aesthetic predictor: linear layers and nothing between them, on a normalized embedding.

    The architecture is that of github.com/christophschuhmann/improved-aesthetic-predictor: 768 inputs, then 1024, 128,
    64, 16 and 1 output, about 0 to 10. Dropout matters in training only. Raises LoadError for other files.
    """
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    tensors = {name.removeprefix("layers."): tensor.float() for name, tensor in tensors.items()}
    layers, width = {}, inputs
    for number, outputs in HEAD_LAYERS.items():
        layers[str(number)] = torch.nn.Linear(width, outputs)
        width = outputs
    head = torch.nn.Sequential()
    for name, layer in layers.items():
        head.add_module(name, layer)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise LoadError(f"{path.name} does not fit embeddings of {inputs} numbers, which this CLIP gives.") from error
    return head.eval()


def main() -> int:
    parser = arguments("Score pictures with CLIP and an aesthetic predictor.", 8002, CLIP)
    parser.add_argument(
        "--aesthetic-head", default=AESTHETIC_HEAD, help=f"a file, or OWNER/REPO/FILE ({AESTHETIC_HEAD})"
    )
    captioner = os.environ.get("VISION_CAPTIONER") or None
    parser.add_argument(
        "--captioner",
        default=captioner,
        help="a captioning model for /describe, such as Salesforce/blip-image-captioning-base",
    )
    given = parser.parse_args()
    return serve(Vision(given.model, given.aesthetic_head, given.captioner), given.host, given.port)


if __name__ == "__main__":
    leave(main())
