"""Copies of a batch that a model makes sample by sample, counted without running it.

Code that takes a batch apart and moves or stacks its samples one by one pays a copy of the whole
batch, and a transfer for each sample. Seen are copies of parts of an input, and stacks of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expt.memory.planning.autocast import target_rules
from expt.memory.planning.fake import build_fake
from expt.memory.planning.hybrid import HybridFakeMode
from expt.memory.planning.plan import Target
from expt.memory.recovery.undo import RandomState

aten = torch.ops.aten
JOINS = (aten.stack.default, aten.cat.default)
COPIES = (aten._to_copy.default, aten.clone.default)
FEWEST = 2
"""Samples from which on taking a batch apart is worth a word."""


class _Copies(TorchDispatchMode):
    """Counts bytes copied of parts of `inputs`, and how often."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs = {tensor.untyped_storage()._cdata: tensor.nbytes for tensor in inputs}
        self.count = self.bytes = 0
        self._kept: list[Tensor] = []  # so that no other tensor has the address of a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in COPIES and self._is_part(args[0]):
            self.count, self.bytes = self.count + 1, self.bytes + result.nbytes
            self.inputs[result.untyped_storage()._cdata] = 2 * result.nbytes
            self._kept.append(result)
        elif func in JOINS and len(args[0]) >= FEWEST and all(map(self._is_part, args[0])):
            self.count, self.bytes = self.count + len(args[0]), self.bytes + result.nbytes
        return result

    def _is_part(self, tensor: Tensor) -> bool:
        whole = self.inputs.get(tensor.untyped_storage()._cdata)
        return whole is not None and tensor.nbytes < whole


def copied_bytes(
    model_fn: Callable[[], nn.Module],
    batch_fn: Callable[[], Any],
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    prepare: Callable[[nn.Module], None] = lambda model: None,
    target: Target = "cpu",
) -> tuple[int, int]:
    """Return the bytes of a batch that a forward pass copies in parts, and in how many copies.

    The arguments are those of `expt.memory.plan`.

    Raises:
        Exception: what the given functions raise on fake tensors.

    """
    state, fake = RandomState(torch.device("cpu")), HybridFakeMode()
    try:
        model = build_fake(model_fn, fake)
        prepare(model)
        with fake.faking():
            batch = batch_fn()
        leaves = [batch[0].inputs, batch[0].target] if isinstance(batch, tuple) else [batch]
        tensors = [leaf for leaf in tree_leaves(leaves) if isinstance(leaf, Tensor)]
        with torch.no_grad(), target_rules(target), fake, _Copies(tensors) as copies:
            loss_fn(model, batch)
    finally:
        fake.forget()
        state.restore()
    return copies.bytes, copies.count
