"""The memory techniques of a run as one value, and how they are put on a model.

`Techniques` is what the plan predicts, the ladder changes and the construction asks for; `apply`
makes a model obey it, in place, also while it trains. A technique never changes what is computed,
beyond rounding and the numbers that dropout draws, except where its own documentation says so
(the attention kernels sliding_window and top_k), and in models that normalise over the batch
(`expt.memory.techniques.batch_norm`). No torch at import.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expt.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from expt.memory.techniques.attention_kernel import AttentionKernel
    from expt.memory.techniques.checkpointing import Checkpointing


@dataclass(frozen=True)
class Techniques:
    """Settings that decide a run's peak at a given model, batch and optimizer.

    Args:
        gradient_accumulation: micro-batches per optimizer step; the loop's work, not `apply`'s.
        activation_checkpointing: which blocks are computed again in the backward pass.
        attention_kernel: for modules with an attribute of that name; None: theirs.
        attention_window: tokens to either side, for the kernel sliding_window.
        attention_top_k: keys per query, for the kernel top_k.
        saved_tensor_offload: keep what backward needs in host memory.
        weight_offload: keep frozen weights in host memory while their block does not run.
        optimizer_in_backward: step each weight as its gradient is done; the optimizer's work,
            `expt.memory.techniques.optimizer_in_backward`, not `apply`'s.
        forward_chunks: slices of the batch that a forward pass takes one after the other.
        forward_chunks_in_training: slice in training too, not in evaluation only.

    """

    gradient_accumulation: int = 1
    activation_checkpointing: Checkpointing = False
    attention_kernel: AttentionKernel | None = None
    attention_window: int | None = None
    attention_top_k: int | None = None
    saved_tensor_offload: bool = False
    optimizer_in_backward: bool = False
    forward_chunks: int = 1
    forward_chunks_in_training: bool = False
    weight_offload: bool = False


@dataclass(frozen=True)
class Applied:
    """What `apply` did; `modules` counts, per technique that is on, the modules it is on."""

    techniques: Techniques
    modules: Mapping[str, int]


def apply(model: nn.Module, techniques: Techniques) -> Applied:
    """Make `model` obey `techniques`, in place, whatever it obeyed before.

    Reads no data, so that the weights may be fake or on meta; names and state_dict stay as they
    are. Call it between steps, on the model or on what Fabric made of it.

    Raises:
        ConfigError: a technique finds nothing to apply to; the model is as it was before.

    """
    from expt.memory.techniques.attention_kernel import set_attention_kernel
    from expt.memory.techniques.checkpointing import checkpoint_activations
    from expt.memory.techniques.wrapping import bare, unwrap

    found = problems(model, techniques)
    if found:
        raise ConfigError(found)
    model = bare(model)
    # Inside of checkpointing, which runs a block's forward again.
    offloaded = _offload(model, techniques.weight_offload)
    blocks = checkpoint_activations(model, techniques.activation_checkpointing)
    attentions = set_attention_kernel(
        model,
        techniques.attention_kernel,
        techniques.attention_window,
        techniques.attention_top_k,
    )
    for name in ("saved_tensor_offload", "forward_chunks"):  # the layers have the settings' names
        unwrap(model, name)
    if techniques.saved_tensor_offload:
        from expt.memory.techniques.offload import offload_saved_tensors

        offload_saved_tensors(model)
    if techniques.forward_chunks > 1:
        from expt.memory.techniques.chunking import chunk_forward

        # Outermost: each slice is a whole forward pass.
        chunk_forward(model, techniques.forward_chunks, techniques.forward_chunks_in_training)
    counts = {
        "activation_checkpointing": blocks,
        "attention_kernel": attentions,
        "weight_offload": offloaded,
        "saved_tensor_offload": int(techniques.saved_tensor_offload),
        "forward_chunks": int(techniques.forward_chunks > 1),
    }
    return Applied(techniques, {name: count for name, count in counts.items() if count})


def problems(model: nn.Module, techniques: Techniques) -> list[str]:
    """Return why some of `techniques` cannot be applied to `model`, one message each."""
    from expt.memory.techniques.attention_kernel import attention_modules
    from expt.memory.techniques.batch_norm import batch_statistics
    from expt.memory.techniques.checkpointing import chosen_blocks
    from expt.memory.techniques.repeated_blocks import repeated_blocks
    from expt.memory.techniques.wrapping import bare

    model = bare(model)
    name, found = type(model).__name__, []
    mode = techniques.activation_checkpointing
    if mode is not False and not chosen_blocks(model, mode):
        key = f"memory.activation_checkpointing={str(mode).lower()}"
        if count := len(repeated_blocks(model)):
            found.append(f"{key}: {name} has {count} blocks, so there is no such one; try true")
        else:
            found.append(
                f"{key}: {name} has no repeated blocks to compute again; looked for: elements of "
                "a torch.nn.ModuleList, and two or more modules of one type, with modules of their "
                "own, in a torch.nn.Sequential; set it to false"
            )
    if techniques.attention_kernel is not None and not attention_modules(model):
        found.append(
            f"memory.attention_kernel={techniques.attention_kernel}: no module of {name} has a "
            "choice (an attribute attention_kernel); set it to null"
        )
    if techniques.weight_offload and not _offloadable(model):
        found.append(
            f"memory.weight_offload=true: {name} has no repeated block with frozen weights "
            "(trainer.trainable freezes all but some), so that none can wait in host memory; set "
            "it to false"
        )
    if techniques.weight_offload and mode == "nested":
        found.append(
            "memory.weight_offload=true brings weights for a whole block, and "
            "memory.activation_checkpointing=nested runs its parts alone; use true"
        )
    if techniques.forward_chunks_in_training and (parts := batch_statistics(model)):
        found.append(
            f"memory.forward_chunks_in_training=true: {name} normalises over the batch "
            f"({parts[0]}{', …' if len(parts) > 1 else ''}), and would do so over slices of it; "
            "set it to false, or memory.batch_norm=group or frozen"
        )
    return found


def _offload(model: nn.Module, wanted: bool) -> int:
    """Offload the frozen weights of blocks, or bring them back; return how many blocks."""
    name = "expt.memory.techniques.weight_offload"
    if not wanted and name not in sys.modules:
        return 0  # so nothing is offloaded
    from expt.memory.techniques.weight_offload import keep_weights, offload_weights

    if wanted:
        return offload_weights(model)
    keep_weights(model)
    return 0


def _offloadable(model: nn.Module) -> bool:
    from expt.memory.techniques.weight_offload import offloadable

    return bool(offloadable(model))


def techniques_from(stored: Mapping[str, Any]) -> Techniques:
    """Return techniques from plain values; names that are not known any more are left out."""
    known = vars(Techniques())
    return Techniques(**{name: value for name, value in stored.items() if name in known})
