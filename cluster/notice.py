"""What a cloud says before it takes a machine back, passed on to Ray.

Under Kubernetes Ray itself hears of it (`ray start --block` answers a pod's SIGTERM by draining its node). On plain
machines the cloud only says so in its metadata service, where nobody looks unless we do. All that follows has one
mechanism, then: Ray's draining nodes.

Google's `maintenance-event` is left alone: a machine with a GPU gets it an hour ahead, and an hour without the
machine costs more than the few steps that its unannounced end does
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
TIMEOUT_S = 2.0  # of one request: the service is on the machine's own host
DEAF = 3  # so many polls in a row that fail are told
EC2_NOTICE_S = 120.0
GCE_NOTICE_S = 30.0
METADATA = "http://169.254.169.254"  # in both clouds; at Google also metadata.google.internal
FIRMWARE = Path("/sys/class/dmi/id")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says


class Notice(NamedTuple):
    action: str  # what the cloud will do with the machine: a verb
    seconds: float  # until it does


def ec2_notice() -> Notice | None:
    """The notice of a spot instance: there is none as long as the answer is 404.

    It gives the action (terminate, stop or hibernate) and roughly its time, two minutes ahead:
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    A container behind a bridge gets a token only where HttpPutResponseHopLimit is 2 or more.
    """
    token = _ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    try:
        answer = _ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except HTTPError as error:
        if error.code == 404:
            return None
        raise
    notice = json.loads(answer)
    return Notice(str(notice["action"]), _seconds_until(str(notice.get("time"))))


def _seconds_until(when: str) -> float:
    """Seconds until a time such as 2026-09-18T08:22:00Z; one that cannot be (a clock that is wrong, hibernation, which
    begins at once) counts as a notice that came just after the last poll."""
    try:
        seconds = datetime.fromisoformat(when).timestamp() - time.time()
    except ValueError:
        seconds = 0
    return seconds if 0 < seconds <= EC2_NOTICE_S else EC2_NOTICE_S - POLL_S


def gce_notice() -> Notice | None:
    """The notice of a spot or preemptible machine: `preempted` turns from FALSE to TRUE 30 s before the end, if all
    goes well, of which a poll may have passed.
    https://cloud.google.com/compute/docs/instances/create-use-spot
    """
    answer = _ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}).strip()
    if answer not in ("TRUE", "FALSE"):
        raise ValueError(f"preempted is {answer[:40]!r}")
    return Notice("preempt", GCE_NOTICE_S - POLL_S) if answer == "TRUE" else None


def _ask(path: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(METADATA + path, headers=headers, method=method)
    with _DIRECT.open(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


CLOUDS: dict[str, Callable[[], Notice | None]] = {"Amazon EC2": ec2_notice, "Google": gce_notice}


def this_cloud() -> str | None:
    """The cloud of this machine, by its firmware. EC2's older machines (p3, g3) say Xen, version 4.11.amazon."""
    files = (FIRMWARE / "sys_vendor", FIRMWARE / "bios_version")
    words = " ".join(file.read_text() for file in files if file.exists())
    return next((cloud for cloud in CLOUDS if cloud.split()[0].lower() in words.lower()), None)


def watch(node_id: str, on_notice: Callable[[str], None]) -> threading.Thread | None:
    """Look out for the cloud's notice about this machine, in a thread; None where no cloud gives one.

    With the notice the node is draining, as Ray sees it, and the thread ends. One worker of a node is enough; a later
    one, started while the node drains, tells nobody again.

    Args:
        node_id: of this machine, in hexadecimal, as Ray knows it.
        on_notice: is told, in one sentence.
    """
    cloud = this_cloud()
    if cloud is None:
        return None
    thread = threading.Thread(target=_watch, args=(cloud, node_id, on_notice), name="notice", daemon=True)
    thread.start()
    return thread


def _watch(cloud: str, node_id: str, on_notice: Callable[[str], None]) -> None:
    failed = 0
    while True:
        try:
            if notice := CLOUDS[cloud]():
                told = f"{cloud} will {notice.action} node {node_id[:8]} in {notice.seconds:.0f} s"
                if drain(node_id, told, notice.seconds):
                    on_notice(told)
                return
            failed = 0
        except Exception as error:  # whatever it was, of the cloud or of Ray: the next poll may do better
            failed += 1
            if failed == DEAF:
                log.warning(f"node {node_id[:8]} gets no notice if {cloud} takes it back: {error}")
        time.sleep(POLL_S)


def drain(node_id: str, reason: str, seconds: float) -> bool:
    """Tell Ray that a node will be gone in so many seconds; False if it knew.

    It is the call that the hidden command `ray drain-node` makes (ray/scripts/scripts.py of 2.60). A node that dies
    once the time is up was preempted, to Ray; one that dies before has failed. Telling again would move that time.
    """
    if node_id in ray._private.state.state.get_draining_nodes():
        return False
    gcs = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    deadline_ms = int((time.time() + seconds) * 1000)
    accepted, why = gcs.drain_node(node_id, DRAIN_NODE_REASON_PREEMPTION, reason, deadline_ms, timeout=POLL_S)
    if not accepted:
        raise RuntimeError(f"Ray does not drain it: {why}")
    return True
