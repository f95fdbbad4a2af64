"""The program of the embedded engine's child process: llama.cpp's own server, for one model.

Started ahead of time it waits, imported and empty, for its order: one JSON line on stdin. It answers on stdout with one
JSON line per event: `{"event": "standby"}`, `{"event": "loading"}`, `{"event": "ready", "origin": "http://…"}`.
What llama.cpp says goes to stderr. It imports nothing of the app, so that it starts quickly.

Run as `python -I -S server.py SITE_PACKAGES`: skipping `site` saves about 15 ms of a 90 ms start (measured).
"""

import json
import signal
import sys


def tell(event: str, **facts: object) -> None:
    print(json.dumps({"event": event, **facts}), flush=True)


def main() -> None:
    sys.path.append(sys.argv[1])
    import xllamacpp as llama

    tell("standby")
    line = sys.stdin.readline()
    if not line:
        return  # the app is gone, or has no use for us
    order = json.loads(line)
    params = llama.CommonParams()
    params.model.path = order["path"]
    if not order["mapped"]:
        params.load_mode = llama.llama_load_mode.LLAMA_LOAD_MODE_NONE
    params.model_alias = {order["alias"]}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = order["context_length"]
    params.n_parallel = order["parallel"]
    params.kv_unified = True  # one cache for all slots: a single chat may use the whole context
    params.n_threads_http = order["parallel"] + 2
    params.cpuparams.n_threads = order["threads"]
    params.cache_ram_mib = 0  # the default keeps up to 8 GiB of old prompts, which the ledger could not foresee
    params.warmup = False  # the switcher warms up with a real token
    params.ui = False
    params.api_keys = [order["key"]]
    params.cors_origins = ""
    params.verbosity = 2
    tell("loading")
    server = llama.Server(params)
    tell("ready", origin=server.listening_address)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
