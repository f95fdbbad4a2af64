"""The cause of a failed vLLM start, from its log. Recorded logs are of 0.32 on a CPU, others follow its sources."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from services.engines.vllm.log import VllmLog

RECORDED = Path(__file__).parents[1] / "transcripts" / "vllm"
SERVING = "INFO:     Application startup complete.\n"

ENGINE = "(EngineCore pid=187) INFO 05-30 07:45:55 [monitor.py:53] "
CORE_ERROR = "(EngineCore pid=187) ERROR 05-30 07:45:55 [core.py:1108] "
ECHO = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n"
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 768.00 MiB. GPU 0 has a total capacity of 95.01 GiB of which 438.31 MiB is "
    "free. Including non-PyTorch memory, this process has 94.57 GiB memory in use."
)


def read(text: bytes | str) -> VllmLog:
    log = VllmLog()
    log.feed(text)
    return log


@pytest.mark.parametrize(
    ("name", "code", "cause"),
    [
        (
            "corrupt-shard",
            "damaged_file",
            "SafetensorError: Error while deserializing header: invalid header length",
        ),
        ("bad-arg", "bad_argument", "unrecognized arguments: --no-such-flag"),
        (
            "missing-model",
            "model_not_found",
            "HFValidationError: Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end "
            "with '-' or '.' and the maximum length is 96: './nope'.",
        ),
    ],
)
def test_a_recorded_failure_has_its_first_cause(name, code, cause):
    """Without prefixes; later errors that vLLM logs are ignored."""
    failure = read((RECORDED / f"{name}.log").read_bytes()).failure
    assert failure is not None
    assert (failure.code, failure.cause) == (code, cause)


@pytest.mark.parametrize("name", ["ok-eager", "ok-compile-cold"])
def test_a_recorded_successful_start_has_no_failure(name):
    """Its stop on request is no failure either."""
    assert read((RECORDED / f"{name}.log").read_bytes()).failure is None


@pytest.mark.parametrize(
    ("text", "code", "cause", "figures"),
    [
        (
            f"{CORE_ERROR}Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization. "
            f"(original error: {OUT_OF_MEMORY})\n{CORE_ERROR}torch.OutOfMemoryError: {OUT_OF_MEMORY}\n",
            "out_of_memory",
            "Failed to load model - not enough GPU memory.",
            ["asked for 805 MB", "460 MB of 102.0 GB was free", "max_model_len"],
        ),
        (
            "ERROR 12-27 00:09:08 engine.py:366] CUDA out of memory. Tried to allocate 1.25 GiB. GPU 0 has a total "
            "capacty of 15.77 GiB of which 281.12 MiB is free.\n",
            "out_of_memory",
            "CUDA out of memory. Tried to allocate 1.25 GiB.",
            ["1.3 GB", "295 MB of 16.9 GB"],
        ),
        (
            f"{CORE_ERROR}RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. "
            "Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine.\n",
            "out_of_memory",
            "CUDA out of memory occurred when warming up sampler",
            ["1024 requests at once", "smaller max_num_seqs"],
        ),
        (
            f"{CORE_ERROR}ValueError: Free memory on device cuda:0 (12.18/23.56 GiB) on startup is less than desired "
            "GPU memory utilization (0.92, 21.67 GiB). Decrease GPU memory utilization or reduce GPU memory used by "
            "other processes.\n",
            "memory_not_free",
            "Free memory on device cuda:0 (12.18/23.56 GiB)",
            ["13.1 GB of 25.3 GB was free", "23.3 GB", "gpu_memory_utilization to 0.51 or less"],
        ),
        (
            f"{ENGINE}Available KV cache memory: -0.30 GiB\n{CORE_ERROR}ValueError: No available memory for the cache "
            "blocks. Try increasing `gpu_memory_utilization` when initializing the engine.\n",
            "no_room_for_cache",
            "No available memory for the cache blocks.",
            ["322 MB was missing", "gpu_memory_utilization"],
        ),
        (
            "ERROR 04-05 01:12:55 [core.py:390] ValueError: To serve at least one request with the models's max seq "
            "len (131072), (4.79 GiB KV cache is needed, which is larger than the available KV cache memory (4.06 "
            "GiB). Based on the available memory, the estimated maximum model length is 109776. Try increasing "
            "`gpu_memory_utilization` or decreasing `max_model_len` when initializing the engine.\n",
            "context_too_long",
            "To serve at least one request",
            ["131072 tokens needs 5.1 GB", "there is 4.4 GB", "longest that fits is 109776 tokens"],
        ),
        (
            "[rank0]: ValueError: The model's max seq len (32768) is larger than the maximum number of tokens that can "
            "be stored in KV cache (27296). Try increasing `gpu_memory_utilization`.\n",
            "context_too_long",
            "The model's max seq len (32768)",
            ["32768 tokens", "longest that fits is 27296 tokens"],
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, User-specified max_model_len (65536) is greater than the derived max_model_len "
            "(max_position_embeddings=32768.0 or model_max_length=None in model's config.json). [type=value_error]\n",
            "context_beyond_model",
            "User-specified max_model_len (65536) is greater",
            ["65536 tokens", "max_model_len to 32768 or less"],
        ),
        (
            f"{CORE_ERROR}AssertionError: Error in memory profiling. Initial free memory 58.23 GiB, current free "
            "memory 59.34 GiB. This happens when other processes sharing the same container release GPU memory.\n",
            "memory_changed",
            "Error in memory profiling.",
            ["62.5 GB to 63.7 GB"],
        ),
        (
            "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/a/b\n"
            "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1-2)\n\n"
            "Cannot access gated repo for url https://huggingface.co/google/gemma-3-1b-pt/resolve/main/config.json.\n"
            "Access to model google/gemma-3-1b-pt is restricted. You must have access to it and be authenticated.\n"
            "OSError: You are trying to access a gated repo.\n",
            "gated_model",
            "Access to model google/gemma-3-1b-pt is restricted.",
            ["google/gemma-3-1b-pt is gated", "set HF_TOKEN"],
        ),
        (
            "huggingface_hub.errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-2)\n\n"
            "Access to model meta-llama/L-8B is restricted and you are not in the authorized list. Visit it to ask.\n",
            "gated_model",
            "Access to model meta-llama/L-8B is restricted",
            ["no access to meta-llama/L-8B"],
        ),
        (
            "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/a/b\n"
            "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: Root=1-2)\n\n"
            "Repository Not Found for url: https://huggingface.co/org/nope/resolve/main/config.json.\n"
            "If you are trying to access a private or gated repo, make sure you are authenticated.\n",
            "model_not_found",
            "Repository Not Found for url: https://huggingface.co/org/nope",
            ["Check the name", "HF_TOKEN"],
        ),
        (
            "requests.exceptions.HTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/a/b\n",
            "gated_model",
            "HTTPError: 403 Client Error",
            ["HF_TOKEN"],
        ),
        (
            "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them.\n",
            "hub_unreachable",
            "We couldn't connect to 'https://huggingface.co'",
            ["network"],
        ),
        (
            f"{CORE_ERROR}OSError: [Errno 28] No space left on device\n",
            "disk_full",
            "[Errno 28] No space left on device",
            ["disk is full"],
        ),
        (
            "  Value error, Model architectures ['MiniCPMV'] are not supported for now. Supported architectures: a\n",
            "unsupported",
            "Model architectures ['MiniCPMV'] are not supported for now.",
            ["newer image"],
        ),
        (
            "  Value error, The repository org/m contains custom code which must be executed to load the model.\n",
            "bad_argument",
            "The repository org/m contains custom code",
            ["trust_remote_code"],
        ),
        (
            "  Value error, Total number of attention heads (64) must be divisible by tensor parallel size (3).\n",
            "bad_argument",
            "Total number of attention heads (64)",
            ["arguments"],
        ),
        ("RuntimeError: No CUDA GPUs are available\n", "no_gpu", "No CUDA GPUs are available", ["driver"]),
        (
            f"{CORE_ERROR}Traceback (most recent call last):\n"
            f'{CORE_ERROR}  File "vllm/llama.py", line 134, in __init__\n'
            f"{CORE_ERROR}    self.q_size = self.num_heads * self.head_dim\n"
            f"{CORE_ERROR}TypeError: unsupported operand type(s) for *: 'int' and 'NoneType'\n",
            "engine_failed",
            "TypeError: unsupported operand type(s)",
            ["logged"],
        ),
    ],
)
def test_a_failure_is_recognised_before_later_errors(text, code, cause, figures):
    """The cause is vLLM's text, the advice has the log's figures."""
    failure = read(text + f"{CORE_ERROR}EngineCore failed to start.\n{ECHO}").failure
    assert failure is not None
    assert failure.code == code
    assert failure.cause.startswith(cause)
    for figure in figures:
        assert figure in failure.advice


def test_one_text_has_each_size_in_one_form():
    """vLLM's words and the advice tell the same figures, so vLLM's GiB are converted; its own line is kept beside."""
    failure = read(f"{CORE_ERROR}torch.OutOfMemoryError: {OUT_OF_MEMORY}\n").failure
    assert "Tried to allocate 805 MB. GPU 0 has a total capacity of 102.0 GB of which 460 MB is free." in failure.words
    assert "iB" not in failure.words
    assert "768.00 MiB" in failure.cause
    line = "ValueError: Free memory on device cuda:0 (12.18/23.56 GiB) on startup is less than desired GPU memory"
    assert "(13.1 GB/25.3 GB)" in read(f"{CORE_ERROR}{line} utilization (0.92, 21.67 GiB).\n").failure.words


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError",
        "ValueError: Free memory on device is less than desired GPU memory utilization",
        "ValueError: Free memory on device (0/0 GiB) on startup is less than desired GPU memory utilization (0, 0 GiB)",
        "ValueError: No available memory for the cache blocks",
        "ValueError: To serve at least one request with the model's max seq len",
        "ValueError: max_model_len is greater than the derived max_model_len",
        "AssertionError: Error in memory profiling",
        "huggingface_hub.errors.GatedRepoError",
    ],
)
def test_advice_works_without_figures(line):
    """If a version words its figures differently, the advice has no figures."""
    failure = read(f"{line}\n").failure
    assert failure is not None
    assert failure.code != "engine_failed"
    assert failure.advice.endswith(".")
    assert "None" not in failure.advice


def test_the_first_cause_is_kept():
    """Later failures are consequences and say less."""
    text = (
        f"{CORE_ERROR}safetensors.SafetensorError: header too large\n{CORE_ERROR}ValueError: No space left on device\n"
    )
    failure = read(text).failure
    assert failure is not None
    assert failure.code == "damaged_file"


def test_the_same_failure_with_figures_is_preferred():
    """0.9 logs a sentence without figures before the exception that has them."""
    text = f"{CORE_ERROR}Failed to load model - not enough GPU memory.\n{CORE_ERROR}RuntimeError: {OUT_OF_MEMORY}\n"
    failure = read(text).failure
    assert failure is not None
    assert "805 MB" in failure.advice


def test_vllms_logged_error_is_preferred_to_a_printed_exception():
    """Python prints a failure of logging itself as a traceback, and continues."""
    text = "--- Logging error ---\nTypeError: not all arguments converted\n" + f"{CORE_ERROR}KeyError: 'absmax'\n"
    failure = read(text).failure
    assert failure is not None
    assert failure.cause == "KeyError: 'absmax'"


def test_a_consequence_is_used_if_there_is_no_cause():
    """The lines with the real cause can be missing."""
    failure = read(ECHO).failure
    assert failure is not None
    assert failure.code == "engine_failed"
    assert failure.cause.startswith("Engine core initialization failed.")


def test_a_failure_after_a_progress_bar_on_its_line_is_found():
    """A progress bar doesn't end its line."""
    bar = "Loading safetensors checkpoint shards:  25% Completed | 1/4 [00:00<00:01,  2.02it/s]"
    failure = read(f"{bar}{CORE_ERROR}torch.OutOfMemoryError: {OUT_OF_MEMORY}\n").failure
    assert failure is not None
    assert failure.cause.startswith("OutOfMemoryError: CUDA out of memory.")


@pytest.mark.parametrize(
    "line",
    [
        "INFO 12-27 00:09:08 logger.py:37] Received request cmpl-1: prompt: 'ERROR 12-27 00:09:08 engine.py:366] CUDA "
        "out of memory', params: x",
        "INFO 08-12 22:32:11 [model_runner.py:1385] If out of memory error occurs during capture, do this.",
        "WARNING 11-21 02:48:28 [system_utils.py:255] Found ulimit of 20000: `OSError: [Errno 24] Too many open files`",
        'ERROR 12-27 00:09:08 engine.py:366]     raise ValueError("No available memory for the cache blocks. "',
        'ERROR 12-27 00:09:08 engine.py:366]   File "site-packages/torch/OutOfMemoryError.py", line 1, in out',
        "FutureWarning: this raises an error from 3.0 on",
    ],
)
def test_a_quoted_failure_is_ignored(line):
    """Prompts, advice and source code."""
    assert read(f"{line}\n").failure is None


def test_errors_before_ready_are_no_failure():
    """Once the server is ready, earlier errors don't count."""
    assert read("TypeError: not all arguments converted\n" + SERVING).failure is None


def test_errors_of_single_requests_are_no_failure():
    """The server continues after them."""
    log = read(SERVING)
    log.feed("(APIServer pid=1) ERROR 05-30 07:46:55 [serving_chat.py:195] ValueError: prompt too long\n")
    log.feed("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error.\n")
    assert log.failure is None


def test_a_crash_of_a_serving_engine_has_its_cause():
    """The engine logs that it exits before it logs why."""
    log = read(SERVING)
    log.feed(
        f"{CORE_ERROR}EngineCore encountered a fatal error.\n{CORE_ERROR}Traceback (most recent call last):\n"
        f"{CORE_ERROR}ValueError: The scheduled requests must be the same set\n"
        "(APIServer pid=1) ERROR 05-30 07:45:56 [async_llm.py:480] vllm.v1.engine.exceptions.EngineDeadError: "
        "EngineCore encountered an issue. See stack trace (above) for the root cause.\n"
    )
    assert log.failure is not None
    assert (log.failure.code, log.failure.cause) == ("engine_failed", "The scheduled requests must be the same set")


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                "(EngineCore pid=19) ERROR 11-21 12:04:42 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
                "unexpectedly (exit code: None), shutting down executor.",
                "(EngineCore pid=19) ERROR 11-21 12:04:42 [core.py:1512] EngineCore encountered a fatal error.",
                "(EngineCore pid=19) ERROR 11-21 12:04:42 [core.py:1512] Traceback (most recent call last):",
                '(EngineCore pid=19) ERROR 11-21 12:04:42 [core.py:1512]     raise RuntimeError("Executor failed.")',
                "(EngineCore pid=19) ERROR 11-21 12:04:42 [core.py:1512] RuntimeError: Executor failed.",
                "(APIServer pid=7) ERROR 11-21 12:04:42 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
                "EngineCore encountered an issue. See stack trace (above) for the root cause.",
                "Process EngineCore:",
                "RuntimeError: Executor failed.",
            ],
            "Worker proc VllmWorker-0 died unexpectedly (exit code: None), shutting down executor.",
        ),
        (
            [
                "(APIServer pid=7) WARNING 11-21 12:05:12 [core_client.py:817] [shutdown] MPClient: engine core exited "
                "unexpectedly; starting cleanup",
                "(APIServer pid=7) ERROR 11-21 12:05:12 [async_llm.py:906] AsyncLLM output_handler failed.",
                "(APIServer pid=7) ERROR 11-21 12:05:12 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: "
                "EngineCore encountered an issue. See stack trace (above) for the root cause.",
            ],
            "EngineDeadError: EngineCore encountered an issue.",
        ),
    ],
    ids=["worker", "engine"],
)
def test_a_killed_process_of_vllm_is_reported_as_killed(lines, cause):
    """What 0.32 logs when one of its processes gets a SIGKILL: there is no cause and no traceback in the log."""
    log = read(SERVING)
    log.feed("\n".join([*lines, ""]))
    assert log.failure is not None
    assert (log.failure.code, log.failure.cause) == ("engine_failed", cause)
    assert "memory runs out" in log.failure.advice


def test_many_lines_of_failures_take_no_memory():
    """Only one cause is kept, truncated to a length that can be shown."""
    log = VllmLog()
    line = f"{CORE_ERROR}ValueError: {'y' * 5000}\n"
    log.feed(line)
    tracemalloc.start()
    for _ in range(200):
        log.feed(line)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20_000
    assert log.failure is not None
    assert len(log.failure.cause) == 300
