"""Activation checkpointing: keep a block's inputs, compute the rest again in the backward pass.

Works on any module without its cooperation: a block is an element of a `ModuleList` that holds
no further `ModuleList`, which is where repeated layers live. The random state is kept per block,
so that dropout draws the same numbers again (Chen et al., arXiv:1604.06174).

Modes: True, every block; n, every n-th block; ``"selective"``, every block, but the outputs of
matrix products, convolutions and attention kernels are kept, so that what is computed again is
cheap (element-wise work and normalisation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from expt.memory.block_randomness import Pair, next_pair
from expt.memory.techniques import Checkpointing
from expt.memory.wrapping import layer_of, unwrap, wrap

NAME = "activation_checkpointing"
KEPT = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Operators whose output the selective mode keeps."""
DROPOUT_ARGUMENT = "dropout_p"


def checkpoint_activations(model: nn.Module, mode: Checkpointing = True) -> int:
    """Checkpoint `model` in place as `mode` says, whatever it was before; return how many blocks.

    May be called between any two steps of a live model; False takes checkpointing off.
    """
    remove_checkpointing(model)
    chosen = chosen_blocks(model, mode)
    for block in chosen:
        wrap(block, NAME, Checkpointed(block, selective=mode == "selective"))
    return len(chosen)


def remove_checkpointing(model: nn.Module) -> int:
    """Take checkpointing off every block; return how many had it."""
    removed = 0
    for block in model.modules():
        layer = layer_of(block, NAME)
        if isinstance(layer, Checkpointed):
            layer.release()
            removed += unwrap(block, NAME)
    return removed


def chosen_blocks(model: nn.Module, mode: Checkpointing) -> list[nn.Module]:
    """Return the blocks that a mode checkpoints."""
    if mode is False:
        return []
    blocks = repeated_blocks(model)
    if mode is True or mode == "selective":
        return blocks
    assert isinstance(mode, int)
    return blocks[mode - 1 :: mode]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the innermost elements of the model's `ModuleList`s, each once."""
    found = {
        id(block): block
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for block in parent
        if not any(isinstance(part, nn.ModuleList) for part in block.modules())
    }
    return list(found.values())


class Checkpointed:
    """The layer around one block's `forward`; see `expt.memory.wrapping`."""

    def __init__(self, block: nn.Module, selective: bool) -> None:
        self.selective = selective
        # What is kept must not be written over: torch refuses a kept output that was.
        self.in_place = [part for part in block.modules() if selective and _in_place(part)]
        for part in self.in_place:
            part.inplace = False  # type: ignore[assignment]

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the block; what it saves for the backward pass is computed again then."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        own = None if torch.compiler.is_compiling() else next_pair()
        if own is not None:  # inside a capture, which lets nobody read the random state
            kwargs |= {"preserve_rng_state": False, "context_fn": partial(_joined, own, _no_pair)}
            kwargs["early_stop"] = False  # the repetition draws exactly as much as the first run
        if not self.selective:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        selective = partial(create_selective_checkpoint_contexts, _policy)
        kwargs["context_fn"] = selective if own is None else partial(_joined, own, selective)
        return checkpoint(partial(_with_own_casts, forward), *args, use_reentrant=False, **kwargs)

    def release(self) -> None:
        """Let the block's modules work in place again."""
        for part in self.in_place:
            part.inplace = True  # type: ignore[assignment]


def _no_pair() -> Pair:
    return nullcontext(), nullcontext()


def _joined(own: Pair, more: Callable[[], Pair]) -> Pair:
    """Return contexts that enter both pairs'."""
    first, second = (_both(*contexts) for contexts in zip(own, more(), strict=True))
    return first, second


@contextmanager
def _both(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _in_place(part: nn.Module) -> bool:
    return getattr(part, "inplace", False) is True


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is dear to compute; what draws random numbers must draw them again.

    A kept attention output would not advance the generator, and dropout after it would draw
    other numbers than in the forward pass.
    """
    if operator not in KEPT or _draws(operator, args, kwargs):
        return CheckpointPolicy.PREFER_RECOMPUTE
    return CheckpointPolicy.MUST_SAVE


def _draws(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in operator._schema.arguments]
    if DROPOUT_ARGUMENT not in names:
        return False
    given = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get(DROPOUT_ARGUMENT, 0.0))


def _with_own_casts(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call `forward` without autocast's cache of cast weights.

    With it, a weight that was cast earlier is not cast again in the forward pass but is in the
    backward pass, and the operators of the two no longer correspond.
    """
    with _uncached(args, kwargs):
        return forward(*args, **kwargs)


def _uncached(*trees: Any) -> AbstractContextManager[object]:
    kinds = {value.device.type for value in tree_iter(trees) if isinstance(value, Tensor)}
    for kind in kinds & {"cpu", "cuda"}:
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return torch.autocast(kind, dtype=dtype, cache_enabled=False)
    return nullcontext()
