"""Finds the cause in the log of a vLLM server that failed. Pure.

The texts are those of vLLM 0.5 to 0.33, PyTorch 2.1 to 2.13 and huggingface_hub 0.23 to 1.x. A failure is logged
several times: by the worker that met it, by the engine that waited for the worker, by the server that waited for the
engine. The first cause is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from services.sizes import GIB, KIB, MIB, TIB, format_size

FailureCode = Literal[
    "out_of_memory",
    "memory_not_free",
    "no_room_for_cache",
    "context_too_long",
    "context_beyond_model",
    "memory_changed",
    "gated_model",
    "model_not_found",
    "hub_unreachable",
    "damaged_file",
    "disk_full",
    "bad_argument",
    "unsupported",
    "no_gpu",
    "engine_failed",
]

MARKS = ("rror", "RROR", "xception", "is restricted", "Not Found", "gated repo")
"""A line without any of these contains no failure."""

LONGEST_CAUSE = 300

_FAILURE_LEVELS = ("", "ERROR", "CRITICAL")
_QUOTED = ("    ", '  File "')
"""Beginnings of a traceback's frames and source lines."""
_ECHO, _PRINTED, _LOGGED, _UNDERSTOOD = range(4)
"""Ranks of a line as the cause: an echo of another failure; an exception that was only printed, so it may have been
handled; one that vLLM logged as an error, or that is probably understood; one that a rule understands."""

Figures = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A failed start. `cause` is vLLM's most telling line without its prefixes, `advice` what to do about it."""

    code: FailureCode
    cause: str
    advice: str

    @property
    def words(self) -> str:
        """Both in one text. Its sizes are written in one way: vLLM's are in GiB, which can't be compared with ours."""
        cause = _SIZES.sub(lambda found: "/".join(_size(n + found[2]) for n in found[1].split("/")), self.cause)
        return f"{cause.rstrip('.')}. {self.advice}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """A failure recognised by one of its `marks`; `figures` are patterns whose named groups are used in the advice."""

    code: FailureCode
    marks: tuple[str, ...]
    advice: Callable[[Figures], str]
    figures: tuple[re.Pattern[str], ...] = ()
    rank: int = _UNDERSTOOD


@dataclass(frozen=True, slots=True)
class _Finding:
    failure: Diagnosis
    rank: int
    figures: int


class FailureLog:
    """Keeps the first cause among the lines it reads."""

    def __init__(self) -> None:
        self._found: _Finding | None = None
        self._serving = False
        self._failing = False

    @property
    def failure(self) -> Diagnosis | None:
        return self._found.failure if self._found else None

    def serve(self) -> None:
        """Note that the server is up.

        Earlier findings were handled, and errors of single requests are normal from now on.
        """
        self._found, self._serving, self._failing = None, True, False

    def read(self, level: str, message: str, known: Figures) -> None:
        """Read one line, split into its level (empty if none) and its text with indentation.

        `known` are figures from earlier lines.
        """
        if level not in _FAILURE_LEVELS or message.startswith(_QUOTED):
            return
        found = _find(level, message, known)
        if found is None:
            return
        if found.rank == _ECHO:
            self._failing = True
        if self._serving and not self._failing and (level == "" or found.failure.code != "out_of_memory"):
            return
        if self._found is None or _is_better(found, self._found):
            self._found = found


def _is_better(new: _Finding, old: _Finding) -> bool:
    """Whether a later line is closer to the cause, or has more figures about the same failure."""
    same = new.failure.code == old.failure.code and new.rank == old.rank
    return new.rank > old.rank or (same and new.figures > old.figures)


def _find(level: str, message: str, known: Figures) -> _Finding | None:
    rule = next((rule for mark, rule in _MARKED if mark in message), None)
    if rule is not None:
        told = {**known, **_figures(rule, message)}
        return _Finding(Diagnosis(rule.code, _clean(message), rule.advice(told)), rule.rank, len(told))
    if any(mark in message for mark in _ECHOES):
        rank = _ECHO
    elif _EXCEPTION.match(message):
        rank = _LOGGED if level else _PRINTED
    else:
        return None
    return _Finding(Diagnosis("engine_failed", _clean(message), "What it logged says more."), rank, 0)


def _figures(rule: _Rule, message: str) -> dict[str, str]:
    told: dict[str, str] = {}
    for pattern in rule.figures:
        found = pattern.search(message)
        if found is not None:
            told |= {name: text.rstrip(".") for name, text in found.groupdict().items() if text}
    return told


_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w{0,60}\.){0,8}(\w{0,60}(?:Error|Exception))(?::\s*(.*))?$")
_REFUSAL = re.compile(r"Value error, |[\w.]{1,60}(?: serve)?: error: ")
_SAYS_NOTHING = ("ValueError", "RuntimeError", "OSError", "AssertionError", "Exception")


def _clean(message: str) -> str:
    """Return the message without module names, wrappers of pydantic and argparse, and references to traces."""
    text = message.strip()
    exception = _EXCEPTION.match(text)
    if exception is not None:
        name, said = exception.group(1), exception.group(2)
        text = name if not said else said if name in _SAYS_NOTHING else f"{name}: {said}"
    refusal = _REFUSAL.match(text)
    text = text[refusal.end() :] if refusal is not None else text
    text = text.split(" [type=", 1)[0].split(" See stack trace", 1)[0].strip()
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE - 1].rstrip()}…"


def _out_of_memory(told: Figures) -> str:
    if "sequences" in told:
        return (
            f"There was no memory left to answer {told['sequences']} requests at once. Set a smaller max_num_seqs, or "
            "a smaller gpu_memory_utilization."
        )
    words = f"It asked for {_size(told['asked'])} more" if "asked" in told else "The device ran out of memory"
    if "free" in told:
        words += f"; {_size(told['free'])}"
        words += f" of {_size(told['total'])} was free" if "total" in told else " was free"
    return (
        f"{words}. Unload what else is on the device, or load it with a shorter context (max_model_len), fewer "
        "requests at once (max_num_seqs) or quantised, or choose a smaller model."
    )


def _memory_not_free(told: Figures) -> str:
    words = "Less memory is free on the device than its share (gpu_memory_utilization) asks for."
    if {"free", "total", "asked", "share"} <= told.keys():
        words = (
            f"{_size(told['free'] + ' GiB')} of {_size(told['total'] + ' GiB')} was free when it started, and it asks "
            f"for {_size(told['asked'])} (gpu_memory_utilization {told['share']})."
        )
    most = _largest_share(told)
    lower = f"set gpu_memory_utilization to {most:.2f} or less" if most else "set a smaller gpu_memory_utilization"
    return f"{words} Unload what else is on the device, or {lower}."


def _size(told: str) -> str:
    """Format a size that vLLM or PyTorch told, with its unit or in bytes, as sizes are written everywhere."""
    for unit, scale in (("KiB", KIB), ("MiB", MIB), ("GiB", GIB), ("TiB", TIB), ("bytes", 1), ("", 1)):
        if told.endswith(unit):
            return format_size(float(told.removesuffix(unit)) * scale)
    return told


def _largest_share(told: Figures) -> float:
    """Return the largest gpu_memory_utilization that fits into the free memory, in hundredths; 0 if unknown."""
    try:
        return math.floor(100 * float(told["free"]) / float(told["total"])) / 100
    except (KeyError, ValueError, ZeroDivisionError):
        return 0.0


def _no_room_for_cache(told: Figures) -> str:
    short = f": {told['missing']} was missing to have any" if "missing" in told else ""
    return (
        f"The weights left no memory for its cache{short}. Give it more of the device (gpu_memory_utilization), or "
        "load it quantised or choose a smaller model."
    )


def _context_too_long(told: Figures) -> str:
    words = f"A context of {told['asked']} tokens" if "asked" in told else "The context"
    if "needed" in told and "free" in told:
        words += f" needs {_size(told['needed'])} of cache, and there is {_size(told['free'])}."
    else:
        words += " does not fit into the cache."
    if "fits" in told:
        words += f" The longest that fits is {told['fits']} tokens: set max_model_len to that or less,"
    else:
        words += " Set a smaller max_model_len,"
    return f"{words} or give it more of the device (gpu_memory_utilization)."


def _context_beyond_model(told: Figures) -> str:
    if {"asked", "limit"} <= told.keys():
        return (
            f"It is to take {told['asked']} tokens, and the model is made for {told['limit']}. Set max_model_len to "
            f"{told['limit']} or less."
        )
    return "It is to take more tokens than the model is made for. Set a smaller max_model_len."


def _memory_changed(told: Figures) -> str:
    change = f" ({_size(told['before'])} to {_size(told['after'])})" if {"before", "after"} <= told.keys() else ""
    return (
        f"Another program changed how much memory is free while vLLM measured it{change}. Load it again once nothing "
        "else starts or stops on the device."
    )


def _gated_model(told: Figures) -> str:
    model, page = told.get("model", "The model"), told.get("model", "the model")
    if "refused" in told:
        return (
            f"The account of HF_TOKEN has no access to {page}. Ask for it on the model's page on Hugging Face, and "
            "load it again once it is granted."
        )
    return (
        f"{model} is gated. Accept its terms on its page on Hugging Face, and set HF_TOKEN to a token of the account "
        "that did."
    )


def _fixed_advice(text: str) -> Callable[[Figures], str]:
    """Return an advice function that needs no figures."""
    return lambda _told: text


_NUMBER = r"-?\d{1,12}(?:\.\d{1,9})?"
_SIZE = rf"{_NUMBER} (?:[KMGT]iB|bytes)"
_SIZES = re.compile(rf"({_NUMBER}(?:/{_NUMBER})?) ?([KMGT]iB)\b")
"""A size, or one out of another, as in `(12.18/23.56 GiB)`."""

_RULES = (
    _Rule(
        "memory_not_free",
        ("less than desired GPU memory utilization",),
        _memory_not_free,
        (
            re.compile(rf"\((?P<free>{_NUMBER})/(?P<total>{_NUMBER}) GiB\)"),
            re.compile(rf"utilization \((?P<share>{_NUMBER}), (?P<asked>{_NUMBER} GiB)\)"),
        ),
    ),
    _Rule("no_room_for_cache", ("No available memory for the cache blocks",), _no_room_for_cache),
    _Rule(
        "context_too_long",
        ("To serve at least one request with", "larger than the maximum number of tokens"),
        _context_too_long,
        (
            re.compile(r"max seq len \((?P<asked>\d{1,12})\)"),
            re.compile(rf"(?P<needed>{_NUMBER} GiB) KV cache is needed"),
            re.compile(rf"available KV cache memory \((?P<free>{_NUMBER} GiB)\)"),
            re.compile(r"(?:maximum model length is|stored in KV cache \() ?(?P<fits>\d[\d,]{0,15})"),
        ),
    ),
    _Rule(
        "context_beyond_model",
        ("greater than the derived max_model_len",),
        _context_beyond_model,
        (
            re.compile(r"max_model_len \((?P<asked>\d{1,12})\)"),
            re.compile(r"derived max_model_len \(\w{1,60}=(?P<limit>\d{1,12})"),
        ),
    ),
    _Rule(
        "memory_changed",
        ("Error in memory profiling",),
        _memory_changed,
        (
            re.compile(rf"Initial (?:free|used) memory (?P<before>{_NUMBER}(?: ?GiB)?)"),
            re.compile(rf"(?:current free|currently used) memory (?P<after>{_NUMBER}(?: ?GiB)?)"),
        ),
    ),
    _Rule(
        "out_of_memory",
        (
            "out of memory",
            "OutOfMemoryError",
            "not enough GPU memory",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "can't allocate memory",
            "Cannot allocate memory",
            "MemoryError",
        ),
        _out_of_memory,
        (
            re.compile(rf"[Tt]ried to allocate (?P<asked>{_SIZE})"),
            re.compile(rf"total capaci?ty of (?P<total>{_SIZE})"),  # PyTorch 2.1 leaves the i out
            re.compile(rf"of which (?P<free>{_SIZE}) is free"),
            re.compile(r"warming up sampler with (?P<sequences>\d{1,9}) dummy requests"),
        ),
    ),
    _Rule(
        "gated_model",
        ("GatedRepoError", "access gated repo", "a gated repo", "Access to model"),
        _gated_model,
        (
            re.compile(r"Access to model (?P<model>\S{1,200}) is restricted"),
            re.compile(r"(?P<refused>not in the authorized list)"),
        ),
    ),
    _Rule(
        "model_not_found",
        (
            "RepositoryNotFoundError",
            "Repository Not Found",
            "RevisionNotFoundError",
            "HFValidationError",
            "is not a valid model identifier",
            "Invalid repository ID or local directory",
        ),
        _fixed_advice(
            "There is neither a folder nor a model on Hugging Face of that name that can be seen from here. Check the "
            "name; if the model is private, set HF_TOKEN."
        ),
        (re.compile(r"huggingface\.co/(?:api/models/)?(?P<model>[\w.-]{1,100}/[\w.-]{1,100})"),),
    ),
    _Rule(
        "hub_unreachable",
        (
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "We couldn't connect to",
            "outgoing traffic has been disab",
        ),
        _fixed_advice(
            "Not all of the model's files are here, and Hugging Face could not be asked for them. Check the network "
            "and HF_HUB_OFFLINE, or download the model first."
        ),
    ),
    _Rule(
        "damaged_file",
        (
            "SafetensorError",
            "PytorchStreamReader failed",
            "UnpicklingError",
            "Consistency check failed",
            "Cannot find any model weights",
        ),
        _fixed_advice(
            "A file with the model's weights is damaged or incomplete. Delete the model's files and download it again."
        ),
    ),
    _Rule(
        "disk_full",
        ("No space left on device",),
        _fixed_advice(
            "The disk is full, or the container's shared memory (/dev/shm) is. Delete what isn't needed, or give it "
            "more shared memory."
        ),
    ),
    _Rule(
        "no_gpu",
        (
            "No CUDA GPUs are available",
            "Found no NVIDIA driver",
            "no CUDA-capable device",
            "CUDA driver version is insufficient",
            "Failed to infer device type",
        ),
        _fixed_advice(
            "vLLM found no GPU that it can use. Check the driver, and that containers are given the GPU (the NVIDIA "
            "Container Toolkit)."
        ),
    ),
    _Rule(
        "unsupported",
        (
            "are not supported for now",
            "failed to be inspected",
            "does not recognize this architecture",
            "Unknown quantization method",
            "compute capability",
            "no kernel image is available",
        ),
        _fixed_advice(
            "This version of vLLM can't run the model on this device. Try a newer image, or another build of it."
        ),
    ),
    _Rule(
        "bad_argument",
        ("contains custom code which must be executed",),
        _fixed_advice("It brings code of its own. If you trust who made it, set trust_remote_code for this model."),
    ),
    _Rule(
        "bad_argument",
        ("vllm: error: ", "vllm serve: error: ", ".py: error: ", "Value error, "),
        _fixed_advice(
            "This version of vLLM refuses the model's settings. Correct its arguments, or use another image."
        ),
    ),
    _Rule(
        "gated_model",
        ("401 Client Error", "403 Client Error", "Client error '401", "Client error '403"),
        _gated_model,
        rank=_LOGGED,  # a later line says whether it is gated or missing
    ),
    _Rule(
        "engine_failed",
        ("died unexpectedly", "died, exit code", "RuntimeError: Executor failed", "EngineDeadError"),
        _fixed_advice(
            "Where its log has no other error, the system ended one of its processes, as it does when memory runs out."
        ),
        rank=_ECHO,
    ),
)
"""Tried in this order."""
_MARKED = tuple((mark, rule) for rule in _RULES for mark in rule.marks)

_ECHOES = (
    "See root cause above",
    "See stack trace",
    "WorkerProc initialization failed",
    "EngineCore failed to start",
    "WorkerProc failed to start",
    "Engine process failed to start",
    "EngineCore hit an exception",
    "EngineCore encountered",
    "WorkerProc hit an exception",
    "Engine loop",
    "Background loop",
    "RuntimeError: cancelled",
)
"""Lines about a failure that another line explains."""
