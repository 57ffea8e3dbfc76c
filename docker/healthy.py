#!/usr/bin/env python3
"""HEALTHCHECK of the images: is the Ray node well that `ray start` began in this container? Where it began none, a command of
maestream's is all there is, and that lives as long as the container."""

import sys
import urllib.request
from pathlib import Path

STARTED = Path("/tmp/ray/ray_current_cluster")  # written by `ray start`, when it is done
FIRST = Path("/proc/1/cmdline").read_bytes().replace(b"\0", b" ")  # what the container was started with
NODE = "http://127.0.0.1:52365/api/local_raylet_healthz"  # of Ray's agent; needs no token

if STARTED.exists() or b"ray start" in FIRST:
    try:
        here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the network has
        here.open(NODE, timeout=5).close()
    except OSError as error:
        sys.exit(f"{NODE}: {error}")
