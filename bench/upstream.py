"""A fake native `llama-server`, as fast as Python gets, so that the relay is measured and not the engine.

It takes the arguments that Switchyard's launcher gives a native server (and ignores unknown ones), requires no
key, so that it can also be called directly, and answers:

    GET /health, GET /v1/models     as llama.cpp does; 503 while it loads
    POST anything                   `max_tokens` tokens (64): at once as JSON, or with `"stream": true` one send each

Each token is a chunk of its own in llama.cpp's format (about 220 bytes), sent at once, or `pause_ms` apart if the body
asks for that. One thread and one epoll loop, standard library only: about 2,500 streams of 64 tokens a second
on one core; the 66 `send` calls per stream are nearly all of that time.

A router of llama-server that has started it (`LLAMA_SERVER_ROUTER_PORT` is set) is told on stdout when it is ready.

    --load-plan FILE    the file holds the seconds that loading takes: three quarters of them reading the model
                        evenly, the rest without visible progress, like an engine that prepares its device. Default: 0.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

TOKENS = 64
READING_SHARE = 0.75
READING_STEPS = 60
BLOCK = 65_536
SEND_SECONDS = 10

ROUTER_READY = 'cmd_child_to_router:ready\ncmd_child_to_router:state:{"state": "ready", "payload": {}}'
"""What a model says to llama-server's router: versions of 2025 read the first line, later ones the second."""
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: stand-in\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--alias", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--load-plan", type=Path)
    arguments, _ = parser.parse_known_args()
    server = Upstream(arguments.host, arguments.port, arguments.alias)
    seconds = float(arguments.load_plan.read_text()) if arguments.load_plan else 0.0
    threading.Thread(target=server.load, args=(arguments.model, seconds), daemon=True).start()
    server.serve()


class Upstream:
    """The server. Sockets are blocking, but are read only when epoll reports data."""

    def __init__(self, host: str, port: int, alias: str) -> None:
        self._listener = socket.create_server((host, port), backlog=1024)
        self._poll = select.epoll()
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        self._due: list[tuple[float, int, Iterator[bytes], float]] = []
        self._ready = False
        self._models = _json(200, {"object": "list", "data": [{"id": alias, "object": "model"}]})
        self._pieces = [_chunk(_token(alias, number)) for number in range(TOKENS)]
        self._last = _chunk(b"data: [DONE]\n\n")
        self._answer = _json(200, _completion(alias, TOKENS))
        self._short_answer = _json(200, _completion(alias, 1))

    def load(self, model: Path, seconds: float) -> None:
        """Read the model over the given time, then become ready."""
        size = model.stat().st_size
        with model.open("rb", buffering=0) as file:
            for _ in range(READING_STEPS if seconds else 0):
                _read(file, size // READING_STEPS)
                time.sleep(seconds * READING_SHARE / READING_STEPS)
        time.sleep(seconds * (1 - READING_SHARE))
        self._ready = True
        if "LLAMA_SERVER_ROUTER_PORT" in os.environ:
            print(ROUTER_READY, flush=True)

    def serve(self) -> None:
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        while True:
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else -1
            for number, _ in self._poll.poll(wait):
                if number == self._listener.fileno():
                    self._accept()
                else:
                    self._receive(number)
            while self._due and self._due[0][0] <= time.monotonic():
                _, number, pieces, pause = heapq.heappop(self._due)
                self._send_next(number, pieces, pause)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        self._clients[client.fileno()] = (client, bytearray())
        self._poll.register(client.fileno(), select.EPOLLIN)

    def _receive(self, number: int) -> None:
        client, kept = self._clients[number]
        try:
            data = client.recv(BLOCK)
            kept += data
            while request := _take_request(kept):
                self._reply(client, *request)
        except OSError:
            data = b""
        if not data:
            self._drop(number)

    def _drop(self, number: int) -> None:
        client, _ = self._clients.pop(number, (None, None))
        if client is not None:
            self._poll.unregister(number)
            client.close()

    def _reply(self, client: socket.socket, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            client.sendall(self._look(head))
            return
        asked = json.loads(body or b"{}")
        tokens = min(TOKENS, asked.get("max_tokens") or TOKENS)
        if not asked.get("stream"):
            client.sendall(self._answer if tokens > 1 else self._short_answer)
            return
        client.sendall(STREAM_HEAD)
        pieces = iter([*self._pieces[:tokens], self._last, b"0\r\n\r\n"])
        pause = asked.get("pause_ms", 0) / 1000
        if pause:
            self._send_next(client.fileno(), pieces, pause)
        else:
            for piece in pieces:
                client.sendall(piece)

    def _look(self, head: bytes) -> bytes:
        if not self._ready:
            return _json(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
        return self._models if head.startswith(b"GET /v1/models") else _json(200, {"status": "ok"})

    def _send_next(self, number: int, pieces: Iterator[bytes], pause: float) -> None:
        """Send one piece and schedule the next; the end marks follow the last token at once."""
        client, _ = self._clients.get(number, (None, None))
        if client is None:
            return
        try:
            for piece in pieces:
                client.sendall(piece)
                if b"[DONE]" not in piece and len(piece) > len(self._last):
                    heapq.heappush(self._due, (time.monotonic() + pause, number, pieces, pause))
                    return
        except OSError:
            self._drop(number)


def _take_request(kept: bytearray) -> tuple[bytes, bytes] | None:
    """Remove and return the first complete request in `kept`: its head and body as bytes."""
    end = kept.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = bytes(kept[:end])
    at = head.lower().find(b"\r\ncontent-length:")
    length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
    if len(kept) < end + 4 + length:
        return None
    body = bytes(kept[end + 4 : end + 4 + length])
    del kept[: end + 4 + length]
    return head, body


def _read(file: object, size: int) -> None:
    while size > 0:
        data = file.read(min(size, 1 << 20))  # type: ignore[attr-defined]
        if not data:
            return
        size -= len(data)


def _token(alias: str, number: int) -> bytes:
    document = {
        "choices": [{"finish_reason": None, "index": 0, "delta": {"content": f" word{number}"}}],
        "created": 1_790_000_000,
        "id": "chatcmpl-Zs3pYkXo8bqWm1u5h2nTf7vRc4dLg6Ej",
        "model": alias,
        "system_fingerprint": "b6000-stand-in",
        "object": "chat.completion.chunk",
    }
    return f"data: {json.dumps(document)}\n\n".encode()


def _completion(alias: str, tokens: int) -> dict[str, object]:
    text = " ".join(f"word{number}" for number in range(tokens))
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "text": text, "message": message}
    usage = {"prompt_tokens": 8, "completion_tokens": tokens, "total_tokens": tokens + 8}
    return {"object": "chat.completion", "model": alias, "choices": [choice], "usage": usage}


def _json(status: int, document: dict[str, object]) -> bytes:
    body = json.dumps(document).encode()
    reason = "OK" if status == 200 else "Service Unavailable"
    head = f"HTTP/1.1 {status} {reason}\r\nServer: stand-in\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


if __name__ == "__main__":
    main()
