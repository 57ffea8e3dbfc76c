#!/usr/bin/env python3
"""HEALTHCHECK of the images: fails if the Ray node of this container, started by `ray start`, is unhealthy.

A container without a Ray node runs a maestream command, and is healthy as long as it runs.
"""

import sys
import urllib.request
from pathlib import Path

STARTED = Path("/tmp/ray/ray_current_cluster")  # written by `ray start` when the node is up
FIRST = Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" ")  # the container's command
NODE = "http://127.0.0.1:52365/api/local_raylet_healthz"  # served by Ray's agent; needs no token

if STARTED.exists() or b"ray start" in FIRST:
    try:
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores http_proxy
        no_proxy.open(NODE, timeout=5).close()
    except OSError as error:
        sys.exit(f"{NODE}: {error}")
