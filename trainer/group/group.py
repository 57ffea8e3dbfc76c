"""The process group of a run's workers. It can be rebuilt, in the same processes, when a worker is lost, leaves or joins.

    train a step ──▶ WorkerLost: no result, nothing was changed
         ▲                │
         └── rebuild ◀────┘  abort the old group's connections; check in at the rendezvous, which returns who trains together
                             from now on, the *generation*; connect to them

Every operation either has the same result on all workers or raises WorkerLost on those that it fails on. It may succeed on
some workers and fail on others: so after `rebuild` the workers compare how far they are (`trainer.train.progress`).

A group whose connections break fails at once with gloo. With NCCL operations hang, and with both they do if a worker hangs.
So whoever learns of a lost worker calls `interrupt`, which aborts the group from another thread.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trainer.group.gloo import CONNECT_TIMEOUT, Endpoint, GlooDevice
from trainer.group.rendezvous import Address, Generation, Rendezvous, WorkerLost

CONNECT_TRIES = 10  # with other workers being lost meanwhile, some tries may fail


class Backend(Protocol):
    """How the workers' devices communicate: gloo, NCCL, or a stand-in for it in tests."""

    def connect(self, store: dist.Store, rank: int, size: int) -> Any:
        """Return a process group with the other workers."""

    def abort(self, others: Sequence[Endpoint]) -> None:
        """Make all operations of its process groups end soon, with an error or without a result.

        A process group that is just being connected is given up as well.
        """


class Group:
    """The workers that train together, as one of them sees them. The default is a single worker that is alone for good.

    Args:
        device: of the tensors that the workers exchange; tensors on the CPU can be exchanged as well.
        fixed: a process group that is not rebuilt: if it fails, operations raise its RuntimeError.
        rendezvous: where the workers meet; None: the group is fixed. `rebuild` has to be called first.
        member: the name of this worker.
        host: the address of this machine that the others reach.
        backend: for tensors on the device, even if that is the CPU; None: gloo, as for those on the CPU.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        fixed: dist.ProcessGroup | None = None,
        rendezvous: Rendezvous | None = None,
        member: str = "",
        host: str = "127.0.0.1",
        backend: Backend | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.rendezvous, self.member, self.backend = rendezvous, member, backend
        self.rank, self.size = (fixed.rank(), fixed.size()) if fixed else (0, 1)
        self.on_cpu: Any = fixed  # the process groups
        self.on_device: Any = fixed
        self.generation: Generation | None = None
        self.lost = False  # this generation has lost a worker
        self.dead: set[str] = set()  # workers that are known to be lost
        self.lock = threading.Lock()  # of the three attributes before; a change holds it until it is done
        if rendezvous:
            self.gloo = GlooDevice(host)
            self.store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.address = Address((host, self.store.port), self.gloo.endpoint)

    @property
    def changes(self) -> bool:
        """Whether the group can be rebuilt."""
        return self.rendezvous is not None

    @property
    def several(self) -> bool:
        """Whether there are several workers, or may be."""
        return self.changes or self.size > 1

    # ---- operations

    def start(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Any:
        """Start to reduce a tensor over all workers, in place. Returns what `wait` takes."""
        if self.size == 1:
            return None
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(op)
        return self._try(lambda: self._group(tensor).allreduce([tensor], options))

    def wait(self, work: Any) -> None:
        """Wait for an operation that `start` began. On a GPU only its stream waits: see `all_reduce`."""
        if work is not None:
            self._try(work.wait)
            self.check()  # an operation that was aborted may end without an error

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
        """Reduce a tensor over all workers, in place. The result is there when it returns, and that of all operations before."""
        self.wait(self.start(tensor, op))
        self._finish(tensor)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Copy the tensor of rank `source` to all workers."""
        if self.size == 1:
            return
        options = dist.BroadcastOptions()
        options.rootRank = source
        self.wait(self._try(lambda: self._group(tensor).broadcast([tensor], options)))
        self._finish(tensor)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all workers, by rank. They must have the same shape."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self.wait(self._try(lambda: self._group(tensor).allgather([parts], [tensor])))
        self._finish(tensor)
        return parts

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Return the tensors of all workers, by rank, on rank 0; None on others. They must have the same shape."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        options = dist.GatherOptions()
        options.rootRank = 0
        outputs = [] if parts is None else [parts]
        self.wait(self._try(lambda: self._group(tensor).gather(outputs, [tensor], options)))
        self._finish(tensor)
        return parts

    def barrier(self) -> None:
        """Wait for all workers."""
        self.all_reduce(torch.zeros(1))

    def check(self) -> None:
        """Raise WorkerLost if this generation has lost a worker."""
        if self.lost:
            raise WorkerLost("a worker is lost")

    def _finish(self, tensor: torch.Tensor) -> None:
        """Wait until the operations that a GPU's stream waits for are done. Raises WorkerLost if they have no result."""
        if tensor.is_cuda and self.changes:
            torch.cuda.current_stream(tensor.device).synchronize()
        self.check()

    def _group(self, tensor: torch.Tensor) -> Any:
        return self.on_device if tensor.device.type == self.device.type else self.on_cpu

    def _try(self, act: Callable[[], Any]) -> Any:
        self.check()
        try:
            return act()
        except RuntimeError as error:
            if not self.changes:
                raise
            with self.lock:
                self._abort()  # the others may wait for this worker
            raise WorkerLost(str(error)) from None

    # ---- changes

    def interrupt(self, member: str) -> None:
        """Tell the group that a worker is lost. Safe to call from any thread."""
        with self.lock:
            self.dead.add(member)
            if self.generation is not None and member in self.generation.members:
                self._abort()

    def give_up(self, number: int) -> None:
        """Abort a generation that another worker has left, if it still exists. Safe to call from any thread."""
        with self.lock:
            if self.generation is not None and self.generation.number == number:
                self._abort()

    def rebuild(self, leaving: bool = False) -> bool:
        """Leave the current generation, and become a member of the next one.

        Args:
            leaving: do not become a member, but let the others go on.

        Returns False if this worker is not a member: because it leaves, or because the run is finished. Raises RuntimeError if it
        cannot connect to the others although none is lost.
        """
        assert self.rendezvous is not None
        for _ in range(CONNECT_TRIES):
            self.close()
            generation = self.rendezvous.check_in(self.member, self.address, leaving)
            if generation is None:
                return False
            with self.lock:
                self.generation = generation
                self.rank, self.size = generation.members.index(self.member), len(generation.members)
                self.lost = bool(self.dead & set(generation.members))
            if self._connect(generation):
                return True
        raise RuntimeError(
            f"worker {self.rank} of {self.size} cannot connect to the others ({self.address.gloo[0]})"
        )

    def finish(self) -> None:
        """Say that the run is finished, so that workers that want to join end as well."""
        if self.rendezvous is not None:
            self.rendezvous.finish()

    def close(self) -> None:
        """End the connections of a group that can be rebuilt. The others see it as a lost worker."""
        if self.changes:
            with self.lock:
                self._abort()
                # The others may soon connect for the next generation: a late `interrupt` must not shut that down.
                self.generation = None
            # A process group that exists when the process exits may crash it.
            self.on_cpu = self.on_device = None

    def _abort(self) -> None:
        """End the current generation. The caller holds the lock."""
        self.lost = True
        if self.generation is None:
            return
        endpoints = [address.gloo for address in self.generation.addresses]
        others = [endpoint for endpoint in endpoints if endpoint != self.gloo.endpoint]
        self.gloo.abort(others)
        if self.backend is not None:
            self.backend.abort(others)

    def _connect(self, generation: Generation) -> bool:
        """Connect to the workers of a generation. Returns False if one cannot be reached, or is lost meanwhile."""
        if self.size == 1:
            return not self.lost
        made: list[Any] = []

        def connect() -> None:
            try:
                client = dist.TCPStore(*generation.addresses[0].store, timeout=CONNECT_TIMEOUT)
                client.set_timeout(CONNECT_TIMEOUT)
                for name, backend in (("cpu", self.gloo), ("device", self.backend)):
                    if self.generation is not generation:  # given up, and nobody waits for this thread
                        return
                    store = dist.PrefixStore(f"{generation.number}/{name}", client)
                    made.append(backend.connect(store, self.rank, self.size) if backend else made[0])
            except RuntimeError:  # also of a timeout
                pass

        # In a thread: a worker that is lost now would be waited for until the timeout.
        thread = threading.Thread(target=connect, name="connect", daemon=True)
        thread.start()
        while thread.is_alive() and not self.lost:
            thread.join(0.005)
        if self.lost or len(made) < 2:
            return False
        self.on_cpu, self.on_device = made
        return True
