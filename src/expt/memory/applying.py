"""Putting memory techniques on a model that may be training already."""

from __future__ import annotations

from torch import nn

from expt.errors import ConfigError
from expt.memory.checkpointing import checkpoint_activations, repeated_blocks
from expt.memory.techniques import Techniques

_CHECKPOINTED = "_expt_checkpointed"


def apply(model: nn.Module, techniques: Techniques) -> None:
    """Make `model` obey `techniques`, in place; may be called again.

    Raises:
        ConfigError: a technique finds nothing to apply to; the model is as it was before.

    """
    if techniques.attention_kernel is not None or techniques.saved_tensor_offload:
        raise ConfigError(f"{type(model).__name__} has no choice of attention kernel or offload")
    if not techniques.activation_checkpointing or vars(model).get(_CHECKPOINTED):
        return
    if not repeated_blocks(model):
        raise ConfigError(
            f"memory.activation_checkpointing=true: {type(model).__name__} has no repeated blocks "
            "(elements of a torch.nn.ModuleList) to compute again; set it to false"
        )
    checkpoint_activations(model)
    vars(model)[_CHECKPOINTED] = True
