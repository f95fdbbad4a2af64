#!/usr/bin/env python3
"""A fake of OpenAI's API: models, chat (whole, streamed, with pictures), images and embeddings, with faults on demand.

Standard library only. It runs in the test's own process (`OpenAIServer`), which sets faults while it serves, or as a
program (`openai_server.py --port 9000 --key KEY`), which takes them as `POST /faults {"fault", "on"?, "times"?}`.
Faults are `NAME[:VALUE]`:

    unauthorized           401 in OpenAI's words, which quote a part of the key
    rate_limited:SECONDS   429 with Retry-After; without a value, without the header
    quota                  429 that no waiting helps: the account's quota is used up
    error                  500
    overloaded:SECONDS     503 with Retry-After
    refused                400: the content policy
    unsupported:PARAMETER  400 as long as the request has this parameter
    slow:SECONDS           waits that long before it answers
    stuck                  reads the request and never answers
    cut                    closes the connection half way through the body
    wrong_type             200 with an HTML page
    redirect               302 to another address
    garbled                200 with JSON that is cut off
    empty                  200 with an answer that holds nothing
    no_image               the picture is none: base64 of a text
    link                   a link instead of a picture
    nan, prose, far_off    the score is NaN, a text without JSON, out of range
    endless                a body without end
    slow_tokens:SECONDS    waits that long before each token of a stream

`in_flight` counts the requests that are being answered, `disconnects` those whose client left before the end.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-proj-4fakeKeyOfTheTests8Zq"
TEXT_MODEL, IMAGE_MODEL, EMBEDDING_MODEL = "gpt-5", "gpt-image-1", "text-embedding-3-small"
MODELS = (TEXT_MODEL, "gpt-5-mini", IMAGE_MODEL, EMBEDDING_MODEL)
ANSWER = ("A", "quiet", "harbour", "at", "dawn,", "painted", "in", "soft", "light.")

Document = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One received request. `headers` have names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    document: Document


@dataclass
class Fault:
    """A fault for requests whose path ends with `on`; `left` is how often it still occurs, None for ever."""

    name: str
    value: str
    on: str
    left: int | None


class OpenAIServer(ThreadingHTTPServer):
    """The server, as a context manager. `reply` returns what a chat answers, given the request; None: the usual."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, port: int = 0, key: str = KEY, prefix: str = "/v1") -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key = key
        self.prefix = prefix
        self.url = f"http://127.0.0.1:{self.server_address[1]}{prefix}"
        self.reply: Callable[[Document], str | None] = lambda _document: None
        self.calls: list[Call] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.disconnects = 0
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def __enter__(self) -> OpenAIServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), name="openai-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def fault(self, fault: str, *, on: str = "", times: int | None = None) -> None:
        """Set a fault for the next `times` requests (None: until `reset`) to paths that end with `on`."""
        name, _, value = fault.partition(":")
        with self._lock:
            self._faults.append(Fault(name, value, on, times))

    def reset(self) -> None:
        """Forget faults and what was counted, save requests that are still in flight."""
        with self._lock:
            self._faults.clear()
            self.calls.clear()
            self.most_in_flight, self.disconnects, self.reply = self.in_flight, 0, lambda _document: None

    def asked(self, path: str) -> list[Document]:
        """Return the bodies of the requests whose path ends with `path`."""
        return [call.document for call in self.calls if call.path.endswith(path)]

    def take_fault(self, path: str, document: Document) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if path.endswith(fault.on) and (fault.name != "unsupported" or fault.value in document):
                    if fault.left is not None:
                        fault.left -= 1
                        if fault.left <= 0:
                            self._faults.remove(fault)
                    return fault
        return None

    def begin(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def end(self, *, disconnected: bool) -> None:
        with self._lock:
            self.in_flight -= 1
            self.disconnects += disconnected

    def handle_error(self, _request: object, _address: object) -> None:
        """Log nothing: clients of tests leave."""


class ClientLeft(Exception):
    """The client closed the connection before it had the whole answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: OpenAIServer

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            document = json.loads(raw or b"{}")
        except ValueError:
            document = None
        if self.path == "/faults":
            self.server.fault(document["fault"], on=document.get("on", ""), times=document.get("times"))
            self._json(200, {})
        else:
            self._handle(document)

    def _handle(self, document: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.begin(Call(self.command, self.path, headers, document if isinstance(document, dict) else {}))
        disconnected = False
        try:
            self._answer(document)
        except (ClientLeft, OSError):
            disconnected, self.close_connection = True, True
        finally:
            self.server.end(disconnected=disconnected)

    def _answer(self, document: Any) -> None:
        self._fault = Fault("", "", "", None)
        if not isinstance(document, dict):
            self._error(400, "We could not parse the JSON body of your request.", None)
            return
        self._fault = self.server.take_fault(self.path, document) or self._fault
        refusals: dict[str, Callable[[str], object]] = {
            "unauthorized": lambda _: self._unauthorized(),
            "rate_limited": lambda seconds: self._error(
                429, "Rate limit reached for requests. Please try again later.", "rate_limit_exceeded", seconds
            ),
            "quota": lambda _: self._error(
                429,
                "You exceeded your current quota, please check your plan and billing details.",
                "insufficient_quota",
            ),
            "error": lambda _: self._error(500, "The server had an error while processing your request.", None),
            "overloaded": lambda seconds: self._error(503, "The engine is overloaded.", None, seconds),
            "refused": lambda _: self._error(
                400, "Your request was rejected by our safety system.", "content_policy_violation"
            ),
            "unsupported": lambda name: self._error(
                400,
                f"Unsupported parameter: '{name}' is not supported with this model.",
                "unsupported_parameter",
                param=name,
            ),
            "slow": lambda seconds: self._wait(float(seconds)),
            "stuck": lambda _: self._wait(None),
            "wrong_type": lambda _: self._send(
                200, b"<html><body>Welcome to the hotel's network</body></html>", "text/html"
            ),
            "redirect": lambda _: self._send(302, b"", "text/plain", {"Location": "http://127.0.0.1:9/v1/models"}),
            "garbled": lambda _: self._send(200, b'{"id": "x", "choices": [{"mess', "application/json"),
            "empty": lambda _: self._json(200, {"id": "x", "object": "list", "choices": [], "data": [], "created": 1}),
            "endless": lambda _: self._endless(),
        }
        refuse = refusals.get(self._fault.name)
        if refuse is not None:
            refuse(self._fault.value)
            if self._fault.name != "slow":
                return
        if self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._unauthorized()
            return
        routes: dict[tuple[str, str], Callable[[Document], object]] = {
            ("GET", "/models"): lambda _: self._json(
                200, {"object": "list", "data": [_model(name) for name in MODELS]}
            ),
            ("POST", "/chat/completions"): self._chat,
            ("POST", "/images/generations"): self._image,
            ("POST", "/embeddings"): self._embeddings,
        }
        path = self.path.partition("?")[0]
        route = routes.get((self.command, path.removeprefix(self.server.prefix)))
        if route is None or not path.startswith(self.server.prefix):
            self._error(404, f"Invalid URL ({self.command} {path})", None)
        elif self.command == "POST" and document.get("model") not in MODELS:
            words = f"The model `{document.get('model')}` does not exist or you do not have access to it."
            self._error(404, words, "model_not_found")
        else:
            route(document)

    def _chat(self, document: Document) -> None:
        text = self._text(document)
        if document.get("stream"):
            self._stream(text.split(" "))
            return
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": document["model"]}
        self._json(200, {**head, "choices": [choice], "usage": usage})

    def _text(self, document: Document) -> str:
        scripted = self.server.reply(document)
        if scripted is not None:
            return scripted
        picture = _picture_of(document)
        if picture is None:
            return " ".join(ANSWER)
        odd = {
            "nan": '{"alignment": NaN, "aesthetic": 0.5, "comment": "?"}',
            "prose": "What a lovely picture! I would give it an eight.",
            "far_off": '{"alignment": 8, "aesthetic": 7}',
        }
        if self._fault.name in odd:
            return odd[self._fault.name]
        digest = hashlib.sha256((picture + json.dumps(document["messages"][0])).encode()).digest()
        scores = {"alignment": digest[0] / 255, "aesthetic": digest[1] / 255}
        return json.dumps({**scores, "comment": "The light is right, the boats are missing."})

    def _stream(self, words: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, word in enumerate(words):
            if self._fault.name == "cut" and number == len(words) // 2:
                self.close_connection = True
                return
            if self._fault.name == "slow_tokens":
                self._wait(float(self._fault.value))
            delta = {"content": word if number == 0 else f" {word}"}
            chunk = {
                "object": "chat.completion.chunk",
                "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
            }
            self._chunk(f"data: {json.dumps(chunk)}\n\n")
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _image(self, document: Document) -> None:
        width, height = (int(part) for part in str(document.get("size", "64x64")).split("x"))
        picture = png(width, height, str(document.get("prompt")))
        if self._fault.name == "no_image":
            picture = b"This is no picture."
        data: Document = {"b64_json": base64.b64encode(picture).decode()}
        if self._fault.name == "link":
            data = {"url": "http://127.0.0.1:9/picture.png"}
        self._json(200, {"created": 1, "data": [data]})

    def _embeddings(self, document: Document) -> None:
        texts = document["input"] if isinstance(document["input"], list) else [document["input"]]
        data = [{"object": "embedding", "index": i, "embedding": [0.1, 0.2]} for i, _ in enumerate(texts)]
        self._json(200, {"object": "list", "model": document["model"], "data": data})

    def _unauthorized(self) -> None:
        key = str(self.headers.get("Authorization") or "").removeprefix("Bearer ")
        shown = f"{key[:8]}{'*' * max(0, len(key) - 12)}{key[-4:]}"
        words = f"Incorrect API key provided: {shown}. You can find your API key at https://platform.openai.com/account/api-keys."
        if not key:
            words = "You didn't provide an API key. You need to provide your API key in an Authorization header."
        self._error(401, words, "invalid_api_key")

    def _error(self, status: int, words: str, code: str | None, seconds: str = "", param: str | None = None) -> None:
        error = {"message": words, "type": "invalid_request_error", "param": param, "code": code}
        headers = {"Retry-After": seconds} if seconds else {}
        self._send(status, json.dumps({"error": error}).encode(), "application/json", headers)

    def _json(self, status: int, document: Document) -> None:
        self._send(status, json.dumps(document).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("x-request-id", "req_1")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self._fault.name == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _endless(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.close_connection = True
        while not self.server.closing.is_set():
            self.wfile.write(b" " * 65_536)

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _wait(self, seconds: float | None) -> None:
        """Wait, for ever if None. Raises ClientLeft as soon as the client closes the connection."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and not self.server.closing.is_set():
            readable, _, _ = select.select([self.connection], [], [], min(left, 0.05))
            if readable:
                with suppress(BlockingIOError):
                    if not self.connection.recv(1, socket.MSG_PEEK):
                        raise ClientLeft
                time.sleep(0.01)  # a pipelined request, which nothing sends

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def png(width: int, height: int, prompt: str) -> bytes:
    """Return a picture of one colour, which depends on the prompt."""
    colour = hashlib.sha256(prompt.encode()).digest()[:3]
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    rows = zlib.compress(bytes(1 + width) * height, 1)
    parts = ((b"IHDR", header), (b"PLTE", colour), (b"IDAT", rows), (b"IEND", b""))
    chunks = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _picture_of(document: Document) -> str | None:
    """Return the address of the picture in a chat's messages, None without one."""
    for message in document.get("messages", []):
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part.get("type") == "image_url":
                return str(part["image_url"]["url"])
    return None


def _model(name: str) -> Document:
    return {"id": name, "object": "model", "created": 1, "owned_by": "openai"}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--key", default=KEY)
    arguments = parser.parse_args()
    with OpenAIServer(arguments.port, arguments.key) as server:
        print(f"OpenAI's API at {server.url}", flush=True)
        server.closing.wait()


if __name__ == "__main__":
    main()
