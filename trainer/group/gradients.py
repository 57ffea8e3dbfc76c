"""Sum gradients over the workers while the backward pass still runs.

Like torch's DistributedDataParallel, with two differences. The group may change between two steps. And the buckets depend on
nothing but the model, so a worker that joins has the same as the others.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from trainer.group.group import Group

BUCKET_BYTES = 25 << 20  # as in DistributedDataParallel


class Bucket:
    """Parameters whose gradients are summed in one operation."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.missing = 0  # gradients of this step that are not there yet
        self.work: object = None  # the operation
        sizes = [parameter.numel() for parameter in parameters]
        self.buffer = torch.empty(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self.parts = [
            part.view(parameter.shape)
            for part, parameter in zip(self.buffer.split(sizes), parameters, strict=True)
        ]

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


class GradientSum:
    """Sums the gradients of a model over the workers of a group.

    Call `begin` before the last backward pass of a step and `finish` after it. In that pass every parameter that is trained
    must get a gradient. All three may raise WorkerLost; then the gradients are undefined.

    Args:
        on_start: called before a bucket is sent.
    """

    def __init__(self, model: nn.Module, group: Group, on_start: Callable[[], None] = lambda: None) -> None:
        self.group, self.on_start = group, on_start
        self.generation: object = None  # that `begin` was called in
        # The backward pass computes the gradients of the last layers first.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad][::-1]
        self.buckets = [Bucket(part) for part in _split(trained)] if group.several else []
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._arrived(bucket))

    def begin(self) -> None:
        """Sum the gradients of the next backward pass, and what was accumulated before."""
        self.generation = self.group.generation
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters) if self.group.size > 1 else 0

    def _arrived(self, bucket: Bucket) -> None:
        # After a backward pass that failed, gradients may be missing that those of the next group do not wait for.
        if not bucket.missing or self.generation is not self.group.generation:
            return
        bucket.missing -= 1
        if not bucket.missing:
            self.on_start()
            torch._foreach_copy_(bucket.parts, bucket.gradients())
            bucket.work = self.group.start(bucket.buffer)

    def finish(self) -> None:
        """Wait for the sums, and put them into the parameters' `grad`."""
        if self.group.size == 1:
            return
        for bucket in self.buckets:
            assert not bucket.missing, "a parameter has no gradient"
            self.group.wait(bucket.work)
            torch._foreach_copy_(bucket.gradients(), bucket.parts)


def _split(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Split parameters into buckets of up to BUCKET_BYTES, each of one dtype."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.nbytes > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.nbytes
    if bucket:
        yield bucket
