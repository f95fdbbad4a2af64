#!/usr/bin/env python3
"""Fakes of other gateways: relays of bytes with the command lines of llama-swap, LiteLLM and llama-server's router.

A copy named `llama-swap`, `litellm` or `llama-server` behaves like that program as far as the benchmark uses it: it
reads the same configuration, starts or finds its engine in the same way, and relays connections to it. `--version`
prints a version. Environment:

    FAKE_GATEWAY_BREAKS     number of connections after which every answer is a 500
"""

from __future__ import annotations

import argparse
import asyncio
import configparser
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

BLOCK = 65_536
BROKEN = b"HTTP/1.1 500 Broken\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
HEALTHY = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def main() -> None:
    name = Path(sys.argv[0]).name
    if "--version" in sys.argv:
        print(f"{name} version 0 (a fake)")
        return
    port, engine_port = {"llama-swap": llama_swap, "litellm": litellm, "llama-server": router}[name]()
    asyncio.run(serve(port, engine_port))


def llama_swap() -> tuple[int, int]:
    """Starts the command of its one model, with a port of its choice."""
    arguments = parsed("--config", "--listen")
    (model,) = json.loads(Path(arguments.config).read_text())["models"].values()
    engine_port = free_port()
    subprocess.Popen(shlex.split(model["cmd"].replace("${PORT}", str(engine_port))))
    return int(arguments.listen.rpartition(":")[2]), engine_port


def litellm() -> tuple[int, int]:
    """Relays to the address that its configuration names."""
    arguments = parsed("--config", "--host", "--port")
    (model,) = json.loads(Path(arguments.config).read_text())["model_list"]
    return int(arguments.port), urlsplit(model["litellm_params"]["api_base"]).port or 0


def router() -> tuple[int, int]:
    """Starts the program at its own path for its one model, at the first request; see `serve`."""
    return int(parsed("--models-preset", "--host", "--port", "--threads-http").port), 0


def start_own_program() -> int:
    """Start the model and wait until it reports that it is ready, as llama-server's router does."""
    preset = configparser.ConfigParser(delimiters="=")
    preset.read_string("[top]\n" + Path(parsed("--models-preset").models_preset).read_text())
    model, port = preset.sections()[-1], free_port()
    child = subprocess.Popen(
        [sys.argv[0], "--model", preset[model]["model"], "--alias", model, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "LLAMA_SERVER_ROUTER_PORT": "1"},
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert any(line.startswith(b"cmd_child_to_router:state:") for line in child.stdout)
    return port


def parsed(*names: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in names:
        parser.add_argument(name, required=True)
    return parser.parse_known_args()[0]


async def serve(port: int, engine_port: int) -> None:
    """Relay every connection to the engine. Without one, a connection that asks for health is answered here."""
    breaks = int(os.environ.get("FAKE_GATEWAY_BREAKS", sys.maxsize))
    numbers = itertools.count(1)
    engine = [engine_port]

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError):
            first = await reader.read(BLOCK)
            if first.startswith(b"GET /health") and not engine[0]:
                writer.write(HEALTHY)
            elif next(numbers) > breaks:
                writer.write(BROKEN)
            else:
                engine[0] = engine[0] or start_own_program()
                await relay(first, reader, writer, engine[0])

    async with await asyncio.start_server(accept, "127.0.0.1", port) as server:
        await server.serve_forever()


async def relay(first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, engine_port: int) -> None:
    engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", engine_port)
    with closing(engine_writer):
        engine_writer.write(first)
        await asyncio.wait(
            [asyncio.create_task(copy(reader, engine_writer)), asyncio.create_task(copy(engine_reader, writer))],
            return_when=asyncio.FIRST_COMPLETED,
        )


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(BLOCK):
            writer.write(data)
            await writer.drain()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
