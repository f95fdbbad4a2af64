#!/usr/bin/env python3
"""A fake of `services/local_servers/download.py`: everything is there already, unless a fault says otherwise.

Faults of FAKE_FLUX_FAULT and FAKE_VISION_FAULT:

    fetch:BYTES        that many bytes are downloaded, within slow-load's SECONDS (5)
    fetch-fails        the hub can't be reached
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from faults import PARTS, Faults


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("server", choices=("flux", "vision"))
    parser.add_argument("--model", required=True)
    given, _ = parser.parse_known_args()
    faults = Faults(f"FAKE_{given.server.upper()}_FAULT")
    if "fetch-fails" in faults:
        print(json.dumps({"error": "The Hugging Face hub can't be reached."}), flush=True)
        return 1
    total = int(faults.value("fetch", 0))
    for part in range(PARTS if total else 0):
        print(json.dumps({"completed_bytes": total * part // PARTS, "total_bytes": total}), flush=True)
        time.sleep(faults.value("slow-load", 5) / PARTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
