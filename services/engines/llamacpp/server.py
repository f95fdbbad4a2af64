"""The embedded engine's child process: llama.cpp's own server, for one model.

Started in advance, it waits with everything imported for one JSON line on stdin, the load request. It writes one JSON
line per event to stdout: `{"event": "standby"}`, `{"event": "loading"}`, `{"event": "ready", "origin": "http://…"}`.
llama.cpp logs to stderr. It imports nothing of the app, so that it starts quickly.

Run as `python -I -S server.py SITE_PACKAGES`: skipping `site` saves about 15 ms of a 90 ms start (measured).
"""

import json
import signal
import sys


def emit(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> None:
    sys.path.append(sys.argv[1])
    import xllamacpp as llama

    emit("standby")
    line = sys.stdin.readline()
    if not line:
        return  # stdin was closed: the app has ended, or stops its standby process
    request = json.loads(line)
    params = llama.CommonParams()
    params.model.path = request["path"]
    if not request["mapped"]:
        params.load_mode = llama.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.model_alias = {request["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = request["context_length"]
    params.n_parallel = request["parallel"]
    params.kv_unified = True  # one KV cache for all slots, so that a single chat may use the whole context
    params.n_threads_http = request["parallel"] + 2
    params.cpuparams.n_threads = request["threads"]
    params.cache_ram_mib = 0  # the default caches up to 8 GiB of old prompts, which the ledger can't account for
    params.warmup = False  # the switcher warms the model up with a real token
    params.ui = False
    params.api_keys = [request["key"]]
    params.cors_origins = ""
    params.verbosity = 2
    emit("loading")
    server = llama.Server(params)
    emit("ready", origin=server.listening_address)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
