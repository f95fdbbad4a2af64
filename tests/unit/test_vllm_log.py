"""Following a vLLM start by its log. Recorded logs are of 0.32 on a CPU, others follow its sources."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engines.port import STAGE_ORDER, Evidence
from services.engines.vllm.facts import Facts, footprint
from services.engines.vllm.log import LONGEST_LINE, VllmLog, says_failure, says_progress

RECORDED = Path(__file__).parents[1] / "transcripts" / "vllm"
GIB = 2**30
GB = 10**9

OLD = "INFO 08-25 18:29:27 model_runner.py:879] "
NEW = "INFO 04-09 02:05:53 [gpu_model_runner.py:1273] "
ENGINE = "(EngineCore pid=187) INFO 05-30 07:45:55 [monitor.py:53] "
CORE_ERROR = "(EngineCore pid=187) ERROR 05-30 07:45:55 [core.py:1108] "
ECHO = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n"

LOG_0_5 = (
    "INFO 08-25 18:29:20 api_server.py:339] vLLM API server version 0.5.5\n"
    "INFO 08-25 18:29:27 llm_engine.py:184] Initializing an LLM engine (v0.5.5) with config: max_seq_len=20000\n"
    f"{OLD}Starting to load model NousResearch/Meta-Llama-3.1-8B-Instruct...\n"
    "\rLoading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]\n"
    "\rLoading safetensors checkpoint shards:  75% Completed | 3/4 [00:01<00:00,  2.02it/s]\n"
    "\rLoading safetensors checkpoint shards: 100% Completed | 4/4 [00:02<00:00,  2.02it/s]\n\n"
    f"{OLD}Loading model weights took 14.9888 GB\n"
    "INFO 08-25 18:29:40 gpu_executor.py:121] # GPU blocks: 27899, # CPU blocks: 2048\n"
    f"{OLD}Capturing the model for CUDA graphs. This may lead to unexpected consequences if the model is not static.\n"
    f"{OLD}Graph capturing finished in 12 secs.\n"
    "INFO 08-25 18:30:00 launcher.py:20] Available routes are:\n"
    "INFO:     Started server process [1]\n"
    "INFO:     Application startup complete.\n"
    "INFO:     Uvicorn running on http://0.0.0.0:8000 (Press CTRL+C to quit)\n"
)
LOG_0_6 = (
    "INFO 12-27 00:09:01 llm_engine.py:234] Initializing an LLM engine (v0.6.6.post1) with config: max_seq_len=2048,\n"
    "INFO 12-27 00:09:02 model_runner.py:1094] Starting to load model ./model...\n"
    "INFO 12-27 00:09:06 model_runner.py:1099] Loading model weights took 7.1694 GB\n"
    "INFO 12-27 00:09:07 worker.py:241] Memory profiling takes 0.75 seconds\n"
    "INFO 12-27 00:09:07 worker.py:241] model weights take 7.17GiB; PyTorch activation peak memory takes 1.83GiB; "
    "the rest of the memory reserved for KV Cache is 26.60GiB.\n"
    "INFO 12-27 00:09:08 gpu_executor.py:76] # GPU blocks: 13618, # CPU blocks: 2048\n"
    "INFO 12-27 00:09:08 gpu_executor.py:80] Maximum concurrency for 2048 tokens per request: 106.39x\n"
    "\rCapturing CUDA graph shapes:   0%|          | 0/35 [00:00<?, ?it/s]"
    "\rCapturing CUDA graph shapes:  57%|█████▋    | 20/35 [00:10<00:07,  2.03it/s]"
    "\rCapturing CUDA graph shapes: 100%|██████████| 35/35 [00:33<00:00,  1.03it/s]\n"
    "INFO 12-27 00:09:42 model_runner.py:1535] Graph capturing finished in 34 secs, took 0.41 GiB\n"
    "INFO 12-27 00:09:42 llm_engine.py:431] init engine (profile, create kv cache, warmup model) took 37.47 seconds\n"
    "INFO:     Application startup complete.\n"
)
LOG_0_8 = (
    "INFO 04-09 02:04:00 [api_server.py:1034] vLLM API server version 0.8.5\n"
    "INFO 04-09 02:04:09 [core.py:58] Initializing a V1 LLM engine (v0.8.5) with config: max_seq_len=32768\n"
    f"{NEW}Starting to load model org/model...\n"
    "INFO 04-09 02:04:20 [weight_utils.py:273] Time spent downloading weights for org/model: 67.507208 seconds\n"
    "INFO 04-09 02:04:50 [loader.py:458] Loading weights took 33.15 seconds\n"
    f"{NEW}Model loading took 61.0374 GiB and 33.525153 seconds\n"
    "INFO 04-09 02:06:09 [backends.py:416] Using cache directory: /root/.cache/vllm/x for vLLM's torch.compile\n"
    "INFO 04-09 02:06:09 [backends.py:426] Dynamo bytecode transform time: 16.61 s\n"
    "INFO 04-09 02:06:10 [backends.py:115] Directly load the compiled graph for shape None from the cache\n"
    "INFO 04-09 02:06:25 [monitor.py:33] torch.compile takes 16.61 s in total\n"
    "INFO 04-09 02:06:27 [gpu_worker.py:232] Available KV cache memory: 3.92 GiB\n"
    "INFO 04-09 02:06:28 [kv_cache_utils.py:578] GPU KV cache size: 16,064 tokens\n"
    "INFO 04-09 02:06:28 [kv_cache_utils.py:581] Maximum concurrency for 32,768 tokens per request: 0.49x\n"
    f"{NEW}Graph capturing finished in 11 secs, took 0.37 GiB\n"
    "INFO 04-09 02:06:43 [core.py:172] init engine (profile, create kv cache, warmup model) took 20.68 seconds\n"
    "INFO 04-09 02:06:43 [api_server.py:1081] Starting vLLM API server on http://0.0.0.0:8000\n"
    "INFO:     Application startup complete.\n"
)
LOG_0_11 = (  # two devices, in colour
    "\x1b[1;36m(APIServer pid=1)\x1b[0;0m INFO 10-06 12:00:00 [api_server.py:1839] vLLM API server version 0.11.0\n"
    "\x1b[1;36m(Worker pid=271)\x1b[0;0m INFO 10-06 12:00:03 [x.py:2602] Starting to load model m...\n"
    "\rLoading safetensors using Runai Model Streamer:  50% Completed | 120/240 [00:01<00:01, 99.00it/s]\n"
    "\x1b[1;36m(Worker pid=271)\x1b[0;0m INFO 10-06 12:00:09 [x.py:1] Model loading took 15.2227 GiB and 5.5 seconds\n"
    "\x1b[1;36m(Worker pid=272)\x1b[0;0m INFO 10-06 12:00:09 [x.py:1] Model loading took 15.3000 GiB and 6.5 seconds\n"
    "(Worker_TP0 pid=271) INFO 10-06 12:00:31 [gpu_worker.py:298] Available KV cache memory: 1.50 GiB\n"
    "(Worker_TP1 pid=272) INFO 10-06 12:00:31 [gpu_worker.py:298] Available KV cache memory: 1.25 GiB\n"
    "(EngineCore_DP0 pid=212) INFO 10-06 12:00:31 [kv_cache_utils.py:1087] GPU KV cache size: 49,152 tokens\n"
    "\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|█| 51/51 [00:02<00:00, 25.33it/s]\n"
    "\rCapturing CUDA graphs (decode, FULL):  96%|█████▊| 49/51 [00:01<00:00, 26.29it/s]"
    "(Worker_TP1 pid=272) INFO 10-06 12:00:39 [custom_all_reduce.py:216] Registering 8160 cuda graph addresses\n"
    "(Worker_TP0 pid=271) INFO 10-06 12:00:40 [gpu_model_runner.py:3480] Graph capturing finished in 8 secs, "
    "took -0.22 GiB\n"
    "(APIServer pid=1) INFO:     Application startup complete.\n"
)
LOG_0_33 = (
    "(APIServer pid=1) INFO 05-30 07:45:01 [api_utils.py:347]  ▄▄ ▄█ █     █     █ ▀▄▀ █  version 0.33.0\n"
    f"{ENGINE}Loading weights took 3.40 seconds\n"
    f"{ENGINE}Model loading took 8.10 GiB memory and 4.101 seconds\n"
    f"{ENGINE}Cache the graph of compile range (1, 32768) for later use\n"
    f"{ENGINE}Compiling a graph for compile range (1, 32768) takes 6.40 s\n"
    f"{ENGINE}torch.compile took 7.32 s in total\n"
    f"{ENGINE}Initial profiling/warmup run took 0.97 s\n"
    f"{ENGINE}Profiling CUDA graph memory: PIECEWISE=9 (largest=64), FULL=5 (largest=32)\n"
    f"{ENGINE}Available KV cache memory: 71.15 GiB\n"
    f"{ENGINE}GPU KV cache size: 240,000 tokens, Maximum concurrency for 240,000 tokens per request: 1.00x\n"
    "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|██████████| 9/9 [00:00<00:00, 10.60it/s]\n"
    "Capturing CUDA graphs (decode, FULL):  40%|████      | 2/5 [00:01<00:00,  3.65it/s]\r"
    f"{ENGINE}Graph capturing finished in 6 secs, took 0.38 GiB\n"
    f"{ENGINE}init engine (profile, create kv cache, warmup model) took 186.17 s (compilation: 59.75 s)\n"
    "INFO:     Application startup complete.\n"
)
LOGS = {"0.5": LOG_0_5, "0.6": LOG_0_6, "0.8": LOG_0_8, "0.11": LOG_0_11, "0.33": LOG_0_33}


def read(text: bytes | str) -> VllmLog:
    log = VllmLog()
    log.feed(text)
    return log


def is_monotonic(evidence: list[Evidence]) -> bool:
    """Whether no evidence has an earlier stage, or a smaller fraction, than the one before."""
    steps = [(STAGE_ORDER.index(e.stage), e.fraction if e.fraction is not None else 0.0) for e in evidence]
    return all(a <= b for a, b in pairwise(steps))


@pytest.mark.parametrize(
    ("name", "stage", "ready"),
    [
        ("ok-eager", "warming_up", True),
        ("ok-compile-cold", "warming_up", True),
        ("corrupt-shard", "loading_weights", False),
        ("bad-arg", None, False),
        ("missing-model", None, False),
    ],
)
def test_a_recorded_start_ends_in_its_stage(name, stage, ready):
    """Ready if it became ready; otherwise the last stage that it reached (None: loading had not begun)."""
    log = VllmLog()
    evidence = log.feed((RECORDED / f"{name}.log").read_bytes())
    assert (evidence[-1].stage if evidence else None, log.ready) == (stage, ready)


def test_a_recorded_start_shows_its_progress():
    """Eager mode on a CPU: no compilation, no graphs."""
    assert VllmLog().feed((RECORDED / "ok-eager.log").read_bytes()) == [
        Evidence("loading_weights"),
        Evidence("loading_weights", 0.0, "0 of 6 shards"),
        Evidence("loading_weights", 0.5, "3 of 6 shards"),
        Evidence("loading_weights", 1.0, "6 of 6 shards"),
        Evidence("initializing_gpu", 1.0, "cache for 65536 tokens"),
        Evidence("warming_up", 1.0),
    ]


def test_with_known_file_sizes_bytes_are_reported_beside_shards():
    """Bytes determine the fraction: the last three of these six shards are most of the weights."""
    evidence = VllmLog(shard_bytes=[GB, GB, GB, 9 * GB, 9 * GB, 4 * GB]).feed((RECORDED / "ok-eager.log").read_bytes())
    assert evidence[1:4] == [
        Evidence("loading_weights", 0.0, "0 of 6 shards, 0 of 25.0 GB"),
        Evidence("loading_weights", 0.12, "3 of 6 shards, 3.0 of 25.0 GB"),
        Evidence("loading_weights", 1.0, "6 of 6 shards, 25.0 of 25.0 GB"),
    ]


@pytest.mark.parametrize("sizes", [(), (GB, GB), (0,) * 6])
def test_sizes_of_other_files_are_ignored(sizes):
    """vLLM may load from elsewhere, or a second model's weights: bytes are unknown then."""
    evidence = VllmLog(shard_bytes=sizes).feed((RECORDED / "ok-eager.log").read_bytes())
    assert evidence[2] == Evidence("loading_weights", 0.5, "3 of 6 shards")


def test_compiling_on_a_cpu_is_initialising_of_unknown_progress():
    """vLLM logs nothing for most of a cold start, so only earlier starts can tell the progress.

    The size of the cache is logged after that. If this stage counted as warm-up, a start would have no initialising
    stage and be at 95 % for most of its time.
    """
    assert VllmLog().feed((RECORDED / "ok-compile-cold.log").read_bytes())[3:] == [
        Evidence("initializing_gpu", None, "compiling for this CPU"),
        Evidence("initializing_gpu", 0.8, "measuring memory"),
        Evidence("initializing_gpu", 0.9),
        Evidence("initializing_gpu", 1.0, "cache for 65536 tokens"),
        Evidence("warming_up", 1.0),
    ]


def test_a_recorded_start_reports_its_figures():
    """A CPU build logs no memory of the weights, only the size of their files."""
    assert read((RECORDED / "ok-eager.log").read_bytes()).facts == Facts(
        version="0.32.0",
        max_model_len=512,
        checkpoint_bytes=round(0.04 * GIB),
        weights_seconds=0.24,
        kv_cache_bytes=GIB,
        kv_cache_tokens=65536,
        max_concurrency=128.0,
        init_seconds=3.04,
    )
    assert footprint(Facts(kv_cache_bytes=GIB)) is None


def test_0_5_is_parsed():
    """No square brackets, no count of graphs, no size of the cache."""
    log = VllmLog()
    assert log.feed(LOG_0_5) == [
        Evidence("loading_weights"),
        Evidence("loading_weights", 0.0, "0 of 4 shards"),
        Evidence("loading_weights", 0.75, "3 of 4 shards"),
        Evidence("loading_weights", 1.0, "4 of 4 shards"),
        Evidence("initializing_gpu", 1.0),
        Evidence("warming_up"),
        Evidence("warming_up", 0.95),
        Evidence("warming_up", 1.0),
    ]
    assert log.ready
    assert log.facts == Facts(
        version="0.5.5", max_model_len=20000, weights_bytes=round(14.9888 * GIB), graph_seconds=12.0
    )


def test_0_6_is_parsed():
    """One bar for the graphs, drawn on one line."""
    log = VllmLog()
    assert log.feed(LOG_0_6)[2:6] == [
        Evidence("initializing_gpu", 0.8, "measuring memory"),
        Evidence("initializing_gpu", 1.0),
        Evidence("warming_up", 0.0, "0 of 35 graphs"),
        Evidence("warming_up", pytest.approx(0.9 * 20 / 35), "20 of 35 graphs"),
    ]
    assert log.facts == Facts(
        version="0.6.6.post1",
        max_model_len=2048,
        weights_bytes=round(7.1694 * GIB),
        profile_seconds=0.75,
        kv_cache_bytes=round(26.60 * GIB),
        max_concurrency=106.39,
        graph_bytes=round(0.41 * GIB),
        graph_seconds=34.0,
        init_seconds=37.47,
    )
    assert footprint(log.facts) == pytest.approx((7.1694 + 26.60 + 0.41 + 1) * GIB, abs=4)


def test_0_8_is_parsed():
    """A warm compile cache, and no bars at all."""
    log = VllmLog()
    evidence = log.feed(LOG_0_8)
    assert [e.fraction for e in evidence if e.stage == "initializing_gpu"] == [0.1, 0.2, 0.6, 0.75, 0.95, 1.0]
    assert log.facts == Facts(
        version="0.8.5",
        max_model_len=32768,
        download_seconds=67.507208,
        weights_seconds=33.15,
        weights_bytes=round(61.0374 * GIB),
        load_seconds=33.525153,
        compile_seconds=16.61,
        kv_cache_bytes=round(3.92 * GIB),
        kv_cache_tokens=16064,
        max_concurrency=0.49,
        graph_bytes=round(0.37 * GIB),
        graph_seconds=11.0,
        init_seconds=20.68,
    )


def test_0_11_with_two_devices_in_colour_is_parsed():
    """The figures of the fuller device count; a second round of graphs continues where the first ended."""
    log = VllmLog()
    evidence = log.feed(LOG_0_11)
    assert evidence[1] == Evidence("loading_weights", 0.5, "120 of 240 parts")
    assert [e.detail for e in evidence if e.stage == "warming_up"][:2] == ["51 of 51 graphs", "49 of 51 graphs"]
    assert is_monotonic(evidence)
    assert log.ready
    assert (log.facts.weights_bytes, log.facts.load_seconds) == (round(15.3 * GIB), 6.5)
    assert (log.facts.kv_cache_bytes, log.facts.graph_bytes) == (round(1.25 * GIB), None)


def test_0_33_is_parsed():
    """From the banner, the only line with the version, to the graphs."""
    log = VllmLog()
    evidence = log.feed(LOG_0_33)
    assert evidence[1:] == [
        Evidence("initializing_gpu", 0.4, "compiling"),
        Evidence("initializing_gpu", 0.6, "compiling"),
        Evidence("initializing_gpu", 0.75, "compiled"),
        Evidence("initializing_gpu", 0.8, "measuring memory"),
        Evidence("initializing_gpu", 0.85, "measuring memory"),
        Evidence("initializing_gpu", 0.95, "setting up its cache"),
        Evidence("initializing_gpu", 1.0, "cache for 240000 tokens"),
        Evidence("warming_up", 0.45, "9 of 9 graphs"),
        Evidence("warming_up", pytest.approx(0.63), "2 of 5 graphs"),
        Evidence("warming_up", 0.95),
        Evidence("warming_up", 1.0),
    ]
    assert (log.facts.version, log.facts.compile_seconds, log.facts.profile_seconds) == ("0.33.0", 7.32, 0.97)


@pytest.mark.parametrize("version", LOGS)
def test_any_line_can_be_missing(version):
    """Without any one line, the start still proceeds and ends in the same stage."""
    lines = LOGS[version].splitlines(keepends=True)
    for left_out in range(len(lines) - 3):
        log = VllmLog()
        evidence = log.feed("".join(lines[:left_out] + lines[left_out + 1 :]))
        assert is_monotonic(evidence)
        assert evidence[-1] == Evidence("warming_up", 1.0)
        assert log.ready


def test_a_progress_bar_is_reported_when_it_is_drawn():
    """The end of its line comes with its next state, which may be a minute later."""
    log = VllmLog()
    assert log.feed("\rCapturing CUDA graph shapes:  57%|█████▋    | 2") == []
    assert log.feed("0/35 [00:10") == [Evidence("warming_up", pytest.approx(0.9 * 20 / 35), "20 of 35 graphs")]
    assert log.feed("<00:07,  2.03it/s]\r") == []


def test_a_second_progress_bar_does_not_restart_the_fraction():
    """Quantised weights and draft models are read in a second round."""
    bar = "\rLoading safetensors checkpoint shards: {}% Completed | {}/2 [00:00<?, ?it/s]\n"
    evidence = VllmLog().feed("".join(bar.format(50 * done, done) for done in (0, 1, 2, 0, 1, 2)))
    assert [e.fraction for e in evidence] == [0.0, 0.5, 1.0]


def test_a_download_by_vllm_lasts_until_the_first_shard():
    """vLLM logs that it loads the model, then downloads it without logging."""
    log = VllmLog(downloads=True)
    assert log.feed(f"{NEW}Starting to load model org/model...\n") == [Evidence("downloading")]
    assert log.feed(f"{NEW}Time spent downloading weights for org/model: 67.5 seconds\n") == [
        Evidence("downloading", 1.0)
    ]
    assert log.feed("Loading safetensors checkpoint shards:   0% Completed | 0/2 [00:00<?, ?it/s]\n") == [
        Evidence("loading_weights", 0.0, "0 of 2 shards")
    ]


TELLING = [
    line for log in LOGS.values() for line in log.splitlines(keepends=True) if "startup complete" not in line
] + [f"{CORE_ERROR}torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.\n", ECHO, "\r", "\n", "▄█"]
streams = st.lists(st.sampled_from(TELLING) | st.text(max_size=40), max_size=30).map(
    lambda pieces: "".join(pieces).encode("utf-8", "replace")
) | st.binary(max_size=400)


@st.composite
def chunked(draw):
    """A stream of bytes, and the same split at any offsets."""
    stream = draw(streams)
    edges = [0, *sorted(draw(st.lists(st.integers(0, len(stream)), max_size=12))), len(stream)]
    return stream, [stream[a:b] for a, b in pairwise(edges)]


@settings(deadline=None, max_examples=200)
@given(chunked(), st.booleans())
def test_progress_is_monotonic_and_independent_of_the_split(case, downloads):
    """Nothing raises; characters, lines and bars can be split anywhere."""
    stream, chunks = case
    whole, pieces = VllmLog(downloads=downloads), VllmLog(downloads=downloads)
    evidence = whole.feed(stream + b"\n")
    assert is_monotonic(evidence)
    assert all(e.fraction is None or 0 <= e.fraction <= 1 for e in evidence)
    assert [e for chunk in [*chunks, b"\n"] for e in pieces.feed(chunk)] == evidence
    assert (pieces.facts, pieces.failure, pieces.ready) == (whole.facts, whole.failure, whole.ready)


@pytest.mark.parametrize("name", ["ok-eager", "ok-compile-cold", "corrupt-shard", "missing-model", "bad-arg"])
def test_a_recorded_log_gives_the_same_byte_by_byte(name):
    """As from a slow pipe."""
    recorded = (RECORDED / f"{name}.log").read_bytes()
    whole, pieces = VllmLog(), VllmLog()
    assert [e for at in range(len(recorded)) for e in pieces.feed(recorded[at : at + 1])] == whole.feed(recorded)
    assert (pieces.facts, pieces.failure, pieces.ready) == (whole.facts, whole.failure, whole.ready)


def test_text_and_bytes_give_the_same():
    """The caller may have decoded it already."""
    assert VllmLog().feed(LOG_0_6) == VllmLog().feed(LOG_0_6.encode())


def test_a_line_without_an_end_takes_no_memory():
    """A million bytes in pieces, then a stage: the line is truncated, what follows is parsed."""
    log = VllmLog()
    tracemalloc.start()
    for _ in range(1000):
        log.feed(b"x" * 1000)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 4 * LONGEST_LINE
    assert log.feed(f"\n{NEW}Starting to load model m...\n") == [Evidence("loading_weights")]


def test_a_huge_line_is_truncated():
    """The same, whether it arrives at once or in two pieces."""
    late = "x" * LONGEST_LINE + f"{NEW}Starting to load model m...\n"
    assert VllmLog().feed(late) == []
    log = VllmLog()
    assert log.feed(late[:20_000]) + log.feed(late[20_000:]) == []


@pytest.mark.parametrize(
    "line",
    [
        'INFO:     127.0.0.1:55456 - "GET /health HTTP/1.1" 200 OK',
        "(APIServer pid=1) INFO 11-21 02:44:26 [launcher.py:195] Route: /v1/models, Methods: GET",
        "INFO 06-11 11:46:37 [loggers.py:118] Engine 000: Avg throughput: 1.9 tokens/s, GPU KV cache usage: 0.0%",
        "Triton is installed, but doesn't include CPU backend. Disabling Triton.",
        "WARNING 03-22 12:15:20 [utils.py:2282] Methods determine_num_available_blocks not implemented",
        "config.json: 100%|██████████| 737/737 [00:00<00:00, 7.47MB/s]",
        "",
    ],
)
def test_noise_is_skipped_without_parsing(line):
    """Nearly every line is noise; parsing a line costs a hundred times as much as skipping it."""
    assert not says_progress(line)
    assert not says_failure(line)
