#!/usr/bin/python3
"""A fake `vllm serve` (0.32.0), with faults that the real one can't be made to show on demand.

It writes the recorded log of a real vLLM, piece by piece, then answers the endpoints that Switchyard uses in vLLM's
shapes. It is the `vllm` of the image that `tests.support.docker` builds, and needs only Python. The environment
variable FAKE_VLLM holds its options as a JSON object:

    log: NAME              the recorded log to write (`ok-eager`); one of a failure exits as that run did
    load_seconds: S        how long writing the whole log takes (0.5)
    hang_at: STAGE         writes nothing more from there on; STAGE is one of STAGES
    crash_at: STAGE        exits with code 1 and a traceback at that stage
    out_of_memory: true    the same at loading_weights, with CUDA's message
    exit_ready: S          exits that long after it became ready, with `exit_code` (0)
    refuse_first: true     answers completions with an error
    refuse_sleep: true     answers /sleep with an error
    refuse_wake: true      answers /wake_up with an error
    exit_asleep: true      exits once it sleeps
    exit_falling_asleep: true   reports that it sleeps, and exits when /is_sleeping is requested
    gpu: NAME              the fake GPU (`tests/fakes/gpu`) that it runs on
    gpu_bytes: N           that GPU's size, of which it claims the share in --gpu-memory-utilization
    asleep_bytes: N        what it keeps of that while it sleeps (1.5 GB)
    crash_answering: true  exits in the middle of an answer
    slow_tokens: S         waits that long before each token
    slow_stop: S           takes that long to exit after SIGTERM
    ignore_sigterm: true   keeps running after SIGTERM
    hold_mb: N             allocates that much memory from loading_weights on
    transcripts: FOLDER    where the recorded logs are (/transcripts)
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ANSWER = ["I", "am", "a", "fake", "and", "answer", "in", "ten", "short", "words."]
STAGES = {
    "starting": b"version 0.32.0",
    "loading_weights": b"Starting to load model",
    "initializing_gpu": b"Loading weights took",
    "warming_up": b"KV cache size",
}
"""The stages, with the text in the log that begins each of them."""
ASLEEP_BYTES = 1_500_000_000
READY = b"Application startup complete."
RECORDED_MODEL = b"models/tiny-b"
PIECE = re.compile(rb"\r?[^\r\n]*(?:\r?\n)?")
"""What is written at a time: a line, or one state of a progress bar."""
RECORDED_STATE = re.compile(rb"(\r[^\r\n]+)\n(?=\r)")
"""A state of a progress bar as recorded: with a newline, which in reality only the last one had."""
OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.53 GiB "
    "of which 1.12 GiB is free. Process 4711 has 22.40 GiB memory in use."
)
SECONDARY = (
    "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
)


def main() -> None:
    arguments = parse(sys.argv[1:])
    faults = json.loads(os.environ.get("FAKE_VLLM", "{}"))
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, signal.SIG_IGN if faults.get("ignore_sigterm") else lambda *_: stopping.set())
    threading.Thread(target=end_on_signal, args=(stopping, float(faults.get("slow_stop", 0))), daemon=True).start()
    write_log(arguments, faults)
    with FakeServer(arguments, faults) as server:
        if "exit_ready" in faults:
            threading.Timer(faults["exit_ready"], os._exit, (faults.get("exit_code", 0),)).start()
        server.serve_forever()


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of `vllm serve MODEL …`; an unknown one exits with code 2, as in the real one."""
    parser = argparse.ArgumentParser(prog="vllm", allow_abbrev=False)
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--max-model-len", default="4096")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    for flag in ("--enable-sleep-mode", "--enforce-eager", "--trust-remote-code", "--enable-prefix-caching"):
        parser.add_argument(flag, action="store_true")
    for name in ("gpu-memory-utilization", "kv-cache-memory-bytes", "tensor-parallel-size", "dtype", "quantization"):
        parser.add_argument(f"--{name}")
    for name in ("max-num-seqs", "kv-cache-dtype", "download-dir", "revision", "load-format", "seed", "swap-space"):
        parser.add_argument(f"--{name}")
    return parser.parse_args(argv)


def write_log(arguments: argparse.Namespace, faults: dict[str, Any]) -> None:
    """Write the recorded log up to the point where the server is ready; returns only if it gets there."""
    folder = Path(faults.get("transcripts", "/transcripts"))
    log = (folder / f"{faults.get('log', 'ok-eager')}.log").read_bytes()
    log = RECORDED_STATE.sub(rb"\1", log.replace(RECORDED_MODEL, arguments.model.encode()))
    pieces = [piece for piece in PIECE.findall(log) if piece]
    pause = float(faults.get("load_seconds", 0.5)) / len(pieces)
    for stage, piece in staged(pieces):
        if ended := re.match(rb"exit=(\d+)", piece):  # added to the recording: the run's exit code
            sys.exit(int(ended[1]))
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        if READY in piece:
            return
        if stage is not None:
            enter(stage, arguments, faults)
        time.sleep(pause)


def staged(pieces: list[bytes]) -> Iterator[tuple[str | None, bytes]]:
    """Each piece, with the stage that begins with it, if any."""
    left = dict(STAGES)
    for piece in pieces:
        stage = next((name for name, mark in left.items() if mark in piece), None)
        left.pop(stage or "", None)
        yield stage, piece


def claim(arguments: argparse.Namespace, faults: dict[str, Any]) -> None:
    """Claim the configured share of the fake GPU."""
    if "gpu" in faults:
        hold(int(faults["gpu_bytes"] * float(arguments.gpu_memory_utilization or 0.92)), faults)


def hold(size: int, faults: dict[str, Any]) -> None:
    """Record the bytes held on the GPU, for the fake driver to read."""
    if "gpu" in faults:
        Path(f"/tmp/gpu_{faults['gpu']}").write_text(str(size))


def enter(stage: str, arguments: argparse.Namespace, faults: dict[str, Any]) -> None:
    """Apply the options for the beginning of a stage."""
    if stage == "loading_weights":
        held.append(os.urandom(1) * int(float(faults.get("hold_mb", 0)) * 1e6))
        claim(arguments, faults)
        if faults.get("out_of_memory"):
            die(OUT_OF_MEMORY)
    if faults.get("hang_at") == stage:
        threading.Event().wait()
    if faults.get("crash_at") == stage:
        die(f"ValueError: the fake was told to crash at {stage}")


def end_on_signal(stopping: threading.Event, slow_stop: float) -> None:
    stopping.wait()
    print(
        "(APIServer pid=1) INFO 11-21 02:46:26 [launcher.py:254] [shutdown] API server: shutdown triggered", flush=True
    )
    time.sleep(slow_stop)
    os._exit(0)


def die(words: str) -> None:
    print(f"Traceback (most recent call last):\n{words}\n{SECONDARY}", file=sys.stderr, flush=True)
    os._exit(1)


held: list[bytes] = []


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, arguments: argparse.Namespace, faults: dict[str, Any]) -> None:
        self.arguments = arguments
        self.model = arguments.model
        self.names = arguments.served_model_name or [arguments.model]
        self.max_model_len = int(arguments.max_model_len)
        self.key = arguments.api_key
        self.faults = faults
        self.can_sleep = arguments.enable_sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        self.sleep_level = 0
        self.running = 0
        self.lock = threading.Lock()
        super().__init__((arguments.host, arguments.port), Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # like the real one; else each answer waits 40 ms for an acknowledgement
    server: FakeServer

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if path == "/health":
            self._reply(200, b"", "text/plain")
        elif path == "/version":
            self._json(200, {"version": "0.32.0"})
        elif path == "/metrics":
            self._reply(200, self._metrics().encode(), "text/plain; version=0.0.4")
        elif path == "/is_sleeping" and self.server.can_sleep:
            self._json(200, {"is_sleeping": self.server.sleep_level > 0})
            if self.server.sleep_level and self.server.faults.get("exit_falling_asleep"):
                os._exit(0)
        elif path == "/v1/models":
            if self._allowed():
                self._json(200, {"object": "list", "data": [self._card(name) for name in self.server.names]})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if url.path == "/sleep" and self.server.can_sleep:
            if self.server.faults.get("refuse_sleep"):
                self._error(500, "the fake refuses to sleep", "InternalServerError")
            else:
                self.server.sleep_level = int(parse_qs(url.query).get("level", ["1"])[0])
                hold(self.server.faults.get("asleep_bytes", ASLEEP_BYTES), self.server.faults)
                self._reply(200, b"", "text/plain")
                if self.server.faults.get("exit_asleep"):
                    os._exit(0)
        elif url.path in ("/wake_up", "/collective_rpc", "/reset_prefix_cache") and self.server.can_sleep:
            if url.path == "/wake_up" and self.server.faults.get("refuse_wake"):
                self._error(500, "the fake refuses to wake up", "InternalServerError")
                return
            if url.path == "/wake_up":
                self.server.sleep_level = 0
                claim(self.server.arguments, self.server.faults)
            self._reply(200, b"", "text/plain")
        elif url.path in ("/v1/chat/completions", "/v1/completions"):
            if self._allowed():
                self._complete(body, chat=url.path == "/v1/chat/completions")
        else:
            self._json(404, {"detail": "Not Found"})

    def _complete(self, body: dict[str, Any], *, chat: bool) -> None:
        name = body.get("model") or self.server.names[0]
        if name not in self.server.names:
            self._error(404, f"The model `{name}` does not exist.", "NotFoundError")
        elif self.server.sleep_level or self.server.faults.get("refuse_first"):
            self._error(500, "the fake sleeps, or refuses", "InternalServerError")
        else:
            with self.server.lock:
                self.server.running += 1
            try:
                self._answer(body, name, chat)
            finally:
                with self.server.lock:
                    self.server.running -= 1

    def _answer(self, body: dict[str, Any], name: str, chat: bool) -> None:
        words = ANSWER[: body.get("max_completion_tokens") or body.get("max_tokens") or len(ANSWER)]
        usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
        head = {"id": "cmpl-1", "created": int(time.time()), "model": name}
        if body.get("stream"):
            self._stream(words, head, chat, usage if (body.get("stream_options") or {}).get("include_usage") else None)
            return
        text = " ".join(self._token(number, word) for number, word in enumerate(words))
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": "stop"}
        kind = "chat.completion" if chat else "text_completion"
        self._json(200, {**head, "object": kind, "choices": [choice], "usage": usage})

    def _stream(self, words: list[str], head: dict[str, Any], chat: bool, usage: dict[str, int] | None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        kind = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}
        if chat:
            self._event({**kind, "choices": [_choice({"delta": {"role": "assistant", "content": ""}})]})
        for number, word in enumerate(words):
            text = f"{self._token(number, word)} "
            self._event({**kind, "choices": [_choice({"delta": {"content": text}} if chat else {"text": text})]})
        last = _choice({"delta": {}} if chat else {"text": ""}, "stop")
        self._event({**kind, "choices": [last]})
        if usage is not None:
            self._event({**kind, "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _token(self, number: int, word: str) -> str:
        time.sleep(float(self.server.faults.get("slow_tokens", 0)))
        if number == len(ANSWER) // 2 and self.server.faults.get("crash_answering"):
            die("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.")
        return word

    def _event(self, document: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(document)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.server.model,
            "parent": None,
            "max_model_len": self.server.max_model_len,
        }

    def _metrics(self) -> str:
        labels = f'{{engine="0",model_name="{self.server.names[0]}"}}'
        gauges = {"num_requests_running": self.server.running, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
        return "".join(f"# TYPE vllm:{key} gauge\nvllm:{key}{labels} {float(v)}\n" for key, v in gauges.items())

    def _allowed(self) -> bool:
        allowed = not self.server.key or self.headers.get("Authorization") == f"Bearer {self.server.key}"
        if not allowed:
            self._json(401, {"error": "Unauthorized"})
        return allowed

    def _error(self, code: int, message: str, kind: str) -> None:
        self._json(code, {"error": {"message": message, "type": kind, "param": None, "code": code}})

    def _json(self, code: int, document: dict[str, Any]) -> None:
        self._reply(code, json.dumps(document).encode(), "application/json")

    def _reply(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def _choice(said: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}


if __name__ == "__main__":
    main()
