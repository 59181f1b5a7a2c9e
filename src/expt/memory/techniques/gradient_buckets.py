"""Gradients of several processes, summed in buckets while the backward pass goes on.

What `torch.nn.parallel.DistributedDataParallel` does, with one difference that recovery needs: a
process that runs out of memory in the middle of a step can still do its part of what the others
wait for (`abandon`), so that all of them come to the end of the step and agree on what to do. The
number of reductions in a step and their order never depend on what happened in it.

A bucket is made when the first of its gradients is there, in the last backward pass of a step;
gradients move into it one by one, and go with it when they are set to None. So there is no copy of
all gradients, only as much as one gradient beside them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expt.errors import ModelError

BUCKET_BYTES = 25 * 2**20
"""As in `DistributedDataParallel`: large enough to be sent fast, small enough to begin early."""
Wait = Callable[[], object]
"""Waits until a reduction is done."""
Reduce = Callable[[Tensor], Wait]
"""Begins to sum a tensor over all processes, in place."""
Share = Callable[[list[bool]], list[bool]]
"""Tells the others which gradients there are here; returns which there are anywhere."""


@dataclass
class Bucket:
    """Weights whose gradients are summed together, and the tensor that holds these in a step."""

    starts: dict[Tensor, int] = field(default_factory=dict)
    """Where each weight's gradient begins."""
    length: int = 0
    flat: Tensor | None = None
    wait: Wait | None = None
    views: dict[Tensor, Tensor] = field(default_factory=dict)

    def add(self, weight: Tensor) -> None:
        """Give a weight a place, behind the others."""
        self.starts[weight] = self.length
        self.length += weight.numel()

    @property
    def complete(self) -> bool:
        """Whether every gradient is in it."""
        return len(self.views) == len(self.starts)

    def take(self, weight: Tensor) -> None:
        """Move a weight's gradient in; where there is none, zeros."""
        if weight in self.views:
            return
        if self.flat is None:
            self.flat = weight.new_empty(self.length)
        start = self.starts[weight]
        part = self.flat[start : start + weight.numel()]
        # A kernel that steps all weights at once wants gradients to lie in memory as weights do.
        whole = weight.is_contiguous()
        view = part.view(weight.shape) if whole else part.as_strided(weight.shape, weight.stride())
        if weight.grad is None:
            view.zero_()
        else:
            view.copy_(weight.grad)
            weight.grad = view
        self.views[weight] = view


class GradientBuckets:
    """The buckets of a model's trained weights.

    Args:
        weights: trained or not; gradients are summed in the opposite order, which is about that
            in which a backward pass makes them.
        reduce: see `Reduce`.
        share: see `Share`.
        bucket_bytes: a bucket is closed when it holds as much.

    """

    def __init__(
        self,
        weights: Iterable[Tensor],
        reduce: Reduce,
        share: Share = lambda present: present,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        trained = [weight for weight in weights if weight.requires_grad]
        self.buckets = _filled(trained[::-1], bucket_bytes)
        self._reduce, self._share = reduce, share
        self._of = {weight: bucket for bucket in self.buckets for weight in bucket.starts}
        self._begun = 0
        self._summing = False
        known = weakref.ref(self)  # a weight that held its bucket would never be given back

        def made(weight: Tensor) -> None:
            buckets = known()
            if buckets is not None:
                buckets._made(weight)

        for weight in trained:
            weight.register_post_accumulate_grad_hook(made)

    @property
    def count(self) -> int:
        """How many weights there are."""
        return len(self._of)

    def begin(self) -> None:
        """Begin a step: nothing is summed yet."""
        self._begun, self._summing = 0, False
        for bucket in self.buckets:
            bucket.flat, bucket.wait = None, None
            bucket.views.clear()

    @contextmanager
    def summing(self, last: bool = True) -> Iterator[None]:
        """Run a backward pass inside; gradients are summed in the `last` of a step."""
        self._summing = last
        try:
            yield
        finally:
            self._summing = False

    def finish(self) -> None:
        """Sum what is left, and wait; a weight that nobody had a gradient for still has none."""
        present = [weight.grad is not None for bucket in self.buckets for weight in bucket.starts]
        self.drain()
        anywhere = iter(self._share(present))
        for bucket in self.buckets:
            for weight in bucket.starts:
                weight.grad = bucket.views[weight] if next(anywhere) else None
        self.begin()  # what the gradients do not hold is given back

    def abandon(self) -> None:
        """Give the gradients up, which a step that failed left, and do this process's part."""
        for bucket in self.buckets[self._begun :]:
            bucket.flat = None
            bucket.views.clear()
        for weight in self._of:
            weight.grad = None
        self.drain()

    def drain(self) -> None:
        """Do this process's part of all sums that have not begun, and wait for all."""
        for bucket in self.buckets:
            for weight in bucket.starts:
                bucket.take(weight)
        self._reduce_in_order()
        for bucket in self.buckets:
            assert bucket.wait is not None
            bucket.wait()

    def _made(self, weight: Tensor) -> None:
        """Take a gradient that a backward pass has just made."""
        if not self._summing:
            return
        assert weight.grad is not None
        if weight.grad.layout is not torch.strided:
            raise ModelError(
                "a layer of this model has sparse gradients, which several processes cannot sum; "
                "make it with sparse=False, or train with trainer.devices=1"
            )
        self._of[weight].take(weight)
        self._reduce_in_order()

    def _reduce_in_order(self) -> None:
        """Begin the sums that can be, in the order that is the same everywhere."""
        for bucket in self.buckets[self._begun :]:
            if not bucket.complete:
                return
            assert bucket.flat is not None
            bucket.wait = self._reduce(bucket.flat)
            self._begun += 1


def _filled(weights: Sequence[Tensor], bucket_bytes: int) -> list[Bucket]:
    """Put weights into buckets in their order; one has a single type and device."""
    buckets: list[Bucket] = []
    kinds = [(weight.dtype, weight.device) for weight in weights]
    for place, weight in enumerate(weights):
        full = not buckets or buckets[-1].length * weights[place - 1].itemsize >= bucket_bytes
        if full or kinds[place] != kinds[place - 1]:
            buckets.append(Bucket())
        buckets[-1].add(weight)
    return buckets
