"""Watch for the cloud's preemption notice on this machine, and tell Ray to drain the node.

On Kubernetes Ray gets the notice itself: `ray start --block` answers a pod's SIGTERM by draining its node. On plain
machines the notice appears only in the cloud's metadata service, which this module polls. From then on both cases are
the same: the node drains, and the scaling policy reacts to draining nodes.

Google's `maintenance-event` is ignored on purpose. A GPU machine gets it an hour ahead, and an hour without the machine
costs more than the few steps that are lost when it ends without notice
(https://cloud.google.com/compute/docs/gpus/gpu-host-maintenance).
"""

import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

import ray
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

log = logging.getLogger("maestream")

POLL_S = 5.0  # as AWS recommends
TIMEOUT_S = 2.0  # of one request; the service runs on the machine's own host
FAILED_POLLS = 3  # consecutive failed polls after which a warning is logged
EC2_NOTICE_S = 120.0
GCE_NOTICE_S = 30.0
METADATA = "http://169.254.169.254"  # in both clouds; Google also has metadata.google.internal
FIRMWARE = Path("/sys/class/dmi/id")
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores http_proxy


class PreemptionNotice(NamedTuple):
    """What the cloud is about to do with this machine."""

    action: str  # a verb: terminate, stop, hibernate or preempt
    seconds: float  # from now


def ec2_notice() -> PreemptionNotice | None:
    """Return the interruption notice of an EC2 spot instance; None while there is none (HTTP status 404).

    It contains the action (terminate, stop or hibernate) and its approximate time, two minutes ahead:
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    In a container on a bridge network the token request works only if the instance's HttpPutResponseHopLimit is 2 or
    more.

    Raises:
        OSError, ValueError, KeyError: if the service does not answer, or its answer is malformed.
    """
    token = _request("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        answer = _request("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    fields = json.loads(answer)
    return PreemptionNotice(str(fields["action"]), _seconds_until(str(fields.get("time"))))


def _seconds_until(when: str) -> float:
    """Return the seconds from now until an ISO time such as 2026-09-18T08:22:00Z.

    A time in the past, too far ahead or malformed is replaced: the notice is assumed to have come just after the last
    poll. It occurs when a clock is wrong, and for hibernation, which begins at once.
    """
    try:
        seconds = datetime.fromisoformat(when).timestamp() - time.time()
    except ValueError:
        seconds = 0
    return seconds if 0 < seconds <= EC2_NOTICE_S else EC2_NOTICE_S - POLL_S


def gce_notice() -> PreemptionNotice | None:
    """Return the notice of a spot or preemptible machine of Google; None while there is none.

    `preempted` changes from FALSE to TRUE up to 30 s before the machine is stopped, and one poll interval may have
    passed since: https://cloud.google.com/compute/docs/instances/create-use-spot

    Raises:
        OSError, ValueError: if the service does not answer, or its answer is malformed.
    """
    answer = _request("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip()
    if answer not in ("TRUE", "FALSE"):
        raise ValueError(f"unexpected value of `preempted`: {answer[:40]!r}")
    return PreemptionNotice("preempt", GCE_NOTICE_S - POLL_S) if answer == "TRUE" else None


def _request(path: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(METADATA + path, headers=headers, method=method)
    with _NO_PROXY.open(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


CLOUDS: dict[str, Callable[[], PreemptionNotice | None]] = {"Amazon EC2": ec2_notice, "Google": gce_notice}


def detect_cloud() -> str | None:
    """Return the cloud that this machine belongs to, a key of CLOUDS, from its firmware; None for any other.

    EC2's older machines (p3, g3) identify themselves as Xen, version 4.11.amazon.
    """
    files = (FIRMWARE / "sys_vendor", FIRMWARE / "bios_version")
    text = " ".join(file.read_text() for file in files if file.exists())
    return next((cloud for cloud in CLOUDS if cloud.split()[0].lower() in text.lower()), None)


def watch(node_id: str, on_notice: Callable[[str], None]) -> threading.Thread | None:
    """Poll for the preemption notice of this machine in a daemon thread.

    When the notice arrives, the thread tells Ray to drain the node, calls `on_notice` and ends. One worker per node is
    enough. A worker that is started while the node drains does not call `on_notice` again.

    Args:
        node_id: Ray's id of this node, in hexadecimal.
        on_notice: called with the notice as one sentence.

    Returns:
        The thread; None on machines without such notices.
    """
    cloud = detect_cloud()
    if cloud is None:
        return None
    thread = threading.Thread(
        target=_watch, args=(cloud, node_id, on_notice), name="preemption-notice", daemon=True
    )
    thread.start()
    return thread


def _watch(cloud: str, node_id: str, on_notice: Callable[[str], None]) -> None:
    failed = 0
    while True:
        try:
            if notice := CLOUDS[cloud]():
                message = f"{cloud} will {notice.action} node {node_id[:8]} in {notice.seconds:.0f} s"
                if drain(node_id, message, notice.seconds):
                    on_notice(message)
                return
            failed = 0
        except Exception as error:  # of the cloud or of Ray: the next poll may succeed
            failed += 1
            if failed == FAILED_POLLS:
                log.warning(f"node {node_id[:8]} cannot get preemption notices from {cloud}: {error}")
        time.sleep(POLL_S)


def drain(node_id: str, reason: str, seconds: float) -> bool:
    """Tell Ray that a node will disappear in `seconds` seconds. Returns False if it was draining already.

    This is the call behind the hidden command `ray drain-node` (ray/scripts/scripts.py of Ray 2.60). Ray treats the
    node as preempted if it dies after that time, and as failed if it dies earlier. A second call would move that time.

    Raises:
        RuntimeError: if Ray refuses.
    """
    if node_id in ray._private.state.state.get_draining_nodes():
        return False
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = gcs.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, reason, deadline_ms, timeout=POLL_S)
    if not accepted:
        raise RuntimeError(f"Ray refuses to drain it: {why}")
    return True
