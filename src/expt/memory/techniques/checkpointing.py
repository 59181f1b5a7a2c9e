"""Activation checkpointing: keep a block's inputs, compute the rest again in the backward pass.

Works on any module without its cooperation (`repeated_blocks` finds the blocks). The random state
is kept per block, so that dropout draws the same numbers again (Chen et al., arXiv:1604.06174),
running statistics are counted once, and buffers that a block writes to are as they were the first
time (`written_buffers`). An argument that is given twice is one object again: code may ask
`key is value`.

Modes: True, every block; n, every n-th block; ``"selective"``, every block, but the outputs of
matrix products, convolutions and attention kernels are kept, so that what is computed again is
cheap (element-wise work and normalisation); ``"nested"``, every block, and inside it each of its
parts that is made of modules, so that what one block needs while it is computed again is less, and
its parts are computed a third time. It pays where a single block is most of the peak, like the
first stage of a 3D ResNet with bottlenecks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from expt.memory.techniques.block_randomness import Pair, next_pair
from expt.memory.techniques.repeated_blocks import repeated_blocks
from expt.memory.techniques.wrapping import layer_of, unwrap, wrap
from expt.memory.techniques.written_buffers import Run, WrittenBuffers

Checkpointing = bool | int | Literal["selective", "nested"]
"""False: none; True: every block; n >= 2: every n-th block; the others: see above."""

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
        if mode == "nested":
            for part in _parts(block):
                wrap(part, NAME, Checkpointed(part, selective=False))
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
    if mode is True or mode in ("selective", "nested"):
        return blocks
    assert isinstance(mode, int)
    return blocks[mode - 1 :: mode]


def _parts(block: nn.Module) -> list[nn.Module]:
    """Return a block's parts that hold modules, each of which can be called by itself."""
    parts = [part for part in block.children() if any(True for _ in part.children())]
    return [part for part in parts if not isinstance(part, nn.ModuleList | nn.ModuleDict)]


class Checkpointed:
    """The layer around one block's `forward`; see `expt.memory.techniques.wrapping`."""

    def __init__(self, block: nn.Module, selective: bool) -> None:
        self.selective = selective
        self.counting = [part for part in block.modules() if _counts(part)]
        self.buffers = WrittenBuffers(block, apart=self.counting)
        # What is kept must not be written over: the block's input, and what selective keeps,
        # where torch refuses an output that was.
        self.in_place = [part for part in block.modules() if _in_place(part)]
        for part in self.in_place:
            part.inplace = False  # type: ignore[assignment]

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the block; what it saves for the backward pass is computed again then."""
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        own = None if compiling else next_pair()
        run = self.buffers.run() if self.buffers and not compiling else None
        work = partial(_with_own_casts, forward) if self.selective else forward
        if not compiling:  # what is compiled is traced once
            work, args, kwargs = _each_once(work, args, kwargs)
        if own is not None:  # inside a capture, which lets nobody read the random state
            # And the repetition has to draw exactly as much as the first run.
            kwargs |= {"preserve_rng_state": False, "early_stop": False}
        if self.selective or self.counting or run is not None or own is not None:
            kwargs["context_fn"] = partial(self._contexts, own, run)
        return checkpoint(work, *args, use_reentrant=False, **kwargs)

    def _contexts(
        self, own: Pair | None, run: Run | None
    ) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return what goes around the forward pass, and around computing it again."""
        first: AbstractContextManager[Any] = nullcontext()
        again: AbstractContextManager[Any] = nullcontext()
        if self.selective:
            first, again = create_selective_checkpoint_contexts(_policy)
        if run is not None:
            first = _both(run.first(), first)
        if self.counting or run is not None:
            again = CountedOnce(again, self.counting, run)
        if own is None:
            return first, again
        return _both(own[0], first), _both(own[1], again)

    def release(self) -> None:
        """Let the block's modules work in place again."""
        for part in self.in_place:
            part.inplace = True  # type: ignore[assignment]


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter all of them, one inside the other."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class CountedOnce:
    """Leaves what a block counts alone inside, within another context; may be entered again.

    Buffers have the values of before. Not those of running statistics, which need no copy: a
    momentum of 0 leaves the averages as they are, and the normalisation uses the batch's own;
    taking the averages away would change what autograd saves.
    """

    def __init__(
        self, around: AbstractContextManager[Any], parts: list[_NormBase], run: Run | None
    ) -> None:
        self._around, self._parts, self._run = around, parts, run
        self._before: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        if self._run is not None:
            self._run.rewind()  # outside: what selective keeps is found by counting operators
        self._around.__enter__()
        self._before = [(part.momentum, part.num_batches_tracked) for part in self._parts]
        for part in self._parts:
            part.momentum, part.num_batches_tracked = 0.0, None

    def __exit__(self, *error: Any) -> None:
        for part, before in zip(self._parts, self._before, strict=True):
            part.momentum, part.num_batches_tracked = before
        self._around.__exit__(*error)
        if self._run is not None:
            self._run.forward()


def _each_once(
    work: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Return a function and arguments, each object among them once, that come to the same call.

    What is kept of an argument is another object afterwards, and a block that gets one twice
    would get two.
    """
    given = (*args, *kwargs.values())
    objects = {id(value): value for value in given}
    number = {key: place for place, key in enumerate(objects)}
    order = [number[id(value)] for value in given]
    return partial(_called, work, order, tuple(kwargs)), tuple(objects.values()), {}


def _called(
    work: Callable[..., Any], order: Sequence[int], names: Sequence[str], /, *objects: Any
) -> Any:
    given = [objects[place] for place in order]
    count = len(given) - len(names)
    return work(*given[:count], **dict(zip(names, given[count:], strict=True)))


def _counts(part: nn.Module) -> TypeGuard[_NormBase]:
    """Tell whether a module keeps averages over the batches it has seen."""
    return isinstance(part, _NormBase) and part.track_running_stats


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
