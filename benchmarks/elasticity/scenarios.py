"""The faults of benchmarks.elasticity, and what maestream must achieve."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.elasticity import faults
from benchmarks.elasticity.faults import FaultTarget
from benchmarks.elasticity.report import Limits

SIDES = ("in place", "restart", "stock")


@dataclass(frozen=True)
class Scenario:
    """A fault, and its requirements.

    Args:
        nodes: at the start.
        ends_with: number of workers of a run that has recovered; None: any.
        beyond_link: one of them is in a network namespace of its own.
        sides: that can do it.
    """

    title: str
    inject: Callable[[FaultTarget], None]
    limits: Limits
    nodes: int = 3
    ends_with: int | None = None
    beyond_link: bool = False
    sides: tuple[str, ...] = SIDES


SCENARIOS = (
    Scenario("worker killed", faults.kill_worker, Limits(1, 0, survivors=2), ends_with=3),
    Scenario("rank 0 killed", faults.kill_first_worker, Limits(1, 0, survivors=2), ends_with=3),
    Scenario("worker hangs (SIGSTOP)", faults.stop_worker, Limits(6, 0, survivors=2), ends_with=3),
    Scenario("node killed", faults.kill_node, Limits(2.5, 0, survivors=2), ends_with=2),
    Scenario("rank 0's node killed", faults.kill_first_node, Limits(2.5, 0, survivors=2), ends_with=2),
    Scenario("power cut of a node", faults.cut_power, Limits(6, 0, survivors=2), ends_with=2),
    Scenario(
        "network cut for a node", faults.cut_network, Limits(6, 0, survivors=2), ends_with=2, beyond_link=True
    ),
    Scenario(f"notice of {faults.NOTICE_S} s", faults.send_notice, Limits(0.5, 0, survivors=2), ends_with=2),
    Scenario("SIGTERM of a node", faults.terminate_node, Limits(0.5, 0, survivors=2), ends_with=2),
    Scenario(
        "node added", faults.add_node, Limits(0.5, 0, survivors=2), nodes=2, ends_with=3,
        sides=("in place", "stock"),
    ),
    Scenario("all nodes lost, others come", faults.lose_all_nodes, Limits()),
    Scenario("driver killed, same command", faults.kill_driver, Limits()),
    Scenario("job stopped, same command", faults.stop_job, Limits(repeated=0)),
)  # fmt: skip
