#!/usr/bin/env python3
"""A fake native `llama-server`, with faults that the real one can't be made to show on demand.

It takes the arguments of the native launcher, answers the endpoints that Switchyard uses in llama.cpp's shapes,
and misbehaves according to `--fault NAME[:VALUE]` (may be repeated):

    slow_load:SECONDS      reads the model file evenly over that time
    crash_loading          exits with code 3 and an error in its log after half of the file
    never_ready            answers 503 for ever
    slow_health:SECONDS    waits that long before it answers /health
    crash_ready:SECONDS    crashes that long after it became ready
    crash_answering        crashes in the middle of a streamed answer
    cut_answer             crashes in the middle of an answer that isn't streamed
    refuse_first           answers the warm-up with an error
    ignore_sigterm         keeps running after SIGTERM
    slow_tokens:SECONDS    waits that long before each token
    hang_answering         never answers a chat; of a stream it sends the headers only
    thinks:SECONDS         sends thoughts before its answer, waiting that long before each word of them
    silent                 reads a streaming request and sends nothing, not even headers, until the client disconnects
    gather:NUMBER          sends the words of streams only once so many of them are under way together
    hold:MB                allocates that much memory more than a small process

A chat request with a `reply` in its body gets exactly these bytes (latin-1), with "ECHO" replaced by the request as
received; with `hang_up` the connection is closed after them. A stream with a `flood` in its body consists of so many
blocks of 64 kB.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

THOUGHTS = ["Let", "me", "see", "what", "a", "fake", "says."]
BLOCK = "words " * 10_900
ANSWER = ["I", "am", "a", "fake", "and", "answer", "in", "ten", "short", "words."]


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--fault", action="append", default=[])
    arguments, _ = parser.parse_known_args()
    server = FakeServer(arguments)
    if "ignore_sigterm" in server.faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=server.load, args=(arguments.model,), daemon=True).start()
    server.serve_forever()


class FakeServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.alias = arguments.alias
        self.faults = {name: value for name, _, value in (fault.partition(":") for fault in arguments.fault)}
        self.key = os.environ.get("LLAMA_API_KEY", "")
        self.ready = threading.Event()
        self.ballast = b""
        self.gathered = threading.Barrier(int(self.faults.get("gather", 1)))
        super().__init__((arguments.host, arguments.port), Handler)

    def load(self, path: Path) -> None:
        size = path.stat().st_size
        steps = 40
        pause = float(self.faults.get("slow_load", 0)) / steps
        with path.open("rb", buffering=0) as file:
            for step in range(steps):
                file.read(size // steps + 1)
                time.sleep(pause)
                if step == steps // 2 and "crash_loading" in self.faults:
                    die("llama_model_load: error loading model: the fake was told to crash")
        self.ballast = os.urandom(1) * int(float(self.faults.get("hold", 0)) * 1e6)
        if "never_ready" in self.faults:
            return
        self.ready.set()
        if "crash_ready" in self.faults:
            time.sleep(float(self.faults["crash_ready"]))
            die("error: the fake was told to crash when ready")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # like the real one; else each answer waits 40 ms for an acknowledgement
    server: FakeServer

    def do_GET(self) -> None:
        if not self.server.ready.is_set():
            self._json(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        elif self.path == "/health":
            time.sleep(float(self.server.faults.get("slow_health", 0)))
            self._json(200, {"status": "ok"})
        elif self._allowed():
            self._json(200, {"object": "list", "data": [{"id": self.server.alias, "object": "model"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(raw or b"{}")
        if not self._allowed():
            return
        if "reply" in body:
            self._reply(body, raw)
            return
        if self.path == "/v1/completions" and "refuse_first" in self.server.faults:
            self._json(500, {"error": {"message": "the fake refuses", "type": "server_error", "code": 500}})
        elif body.get("stream"):
            self._stream(body)
        elif self._hangs():
            time.sleep(1000)
        else:
            text = " ".join(self._token(word) for word in ANSWER[: body.get("max_tokens") or len(ANSWER)])
            choice = {
                "index": 0,
                "finish_reason": "stop",
                "text": text,
                "message": {"role": "assistant", "content": text},
            }
            cut = "cut_answer" in self.server.faults and self.path == "/v1/chat/completions"
            self._json(200, {"object": "chat.completion", "model": self.server.alias, "choices": [choice]}, cut=cut)

    def _reply(self, body: dict[str, str], raw: bytes) -> None:
        fields = sorted((name.lower(), value) for name, value in self.headers.items())
        echo = json.dumps([self.command, self.path, fields, raw.decode("latin-1")]).encode("latin-1").hex()
        self.wfile.write(body["reply"].replace("ECHO", echo).encode("latin-1"))
        self.close_connection = bool(body.get("hang_up"))

    def _hangs(self) -> bool:
        return "hang_answering" in self.server.faults and self.path == "/v1/chat/completions"

    def _token(self, word: str) -> str:
        time.sleep(float(self.server.faults.get("slow_tokens", 0)))
        return word

    def _stream(self, body: dict[str, int]) -> None:
        if "silent" in self.server.faults:
            self.connection.recv(1)
            print("llama_server: the client went away", file=sys.stderr, flush=True)
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self._hangs():
            time.sleep(1000)
        self.server.gathered.wait()
        for _ in range(body.get("flood", 0)):
            self._delta(content=BLOCK)
        for word in THOUGHTS if "thinks" in self.server.faults else ():
            time.sleep(float(self.server.faults["thinks"]))
            self._delta(reasoning_content=f"{word} ")
        for number, word in enumerate(ANSWER):
            if number == len(ANSWER) // 2 and "crash_answering" in self.server.faults:
                die("error: the fake was told to crash in an answer")
            self._delta(content=f"{self._token(word)} ")
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _delta(self, **fields: str) -> None:
        delta = {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}
        self._chunk(f"data: {json.dumps(delta)}\n\n")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        try:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        except OSError:
            print("llama_server: the client went away", file=sys.stderr, flush=True)
            raise

    def _allowed(self) -> bool:
        allowed = self.headers.get("Authorization") == f"Bearer {self.server.key}"
        if not allowed:
            self._json(401, {"error": {"message": "Invalid API Key", "type": "authentication_error", "code": 401}})
        return allowed

    def _json(self, status: int, document: dict[str, object], *, cut: bool = False) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            die("error: the fake was told to end in an answer")

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def die(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
    os._exit(3)


if __name__ == "__main__":
    main()
