"""Sharding: every process has a part of each weight, of its gradient and its optimizer state.

FSDP2 (`torch.distributed.fsdp.fully_shard`) on the repeated blocks of a model and on what is left.
A block's weights are put together before it runs, forward and backward, and given back after it;
so what is there at once are this process's parts, and the whole of a block or two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from expt.errors import ConfigError
from expt.memory.techniques.repeated_blocks import repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Share a model out over the processes of a mesh of one dimension, in place.

    Gradients are summed over the processes, not averaged. What is left beside the blocks is given
    back after use as well, so that no whole weight outlives a step or an evaluation.

    Raises:
        ConfigError: a weight is a single number, which has no parts.

    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    single = [name for name, weight in model.named_parameters() if weight.ndim == 0]
    if single:
        raise ConfigError(
            f"trainer.strategy=fsdp: {single[0]} of {type(model).__name__} is a single number, "
            "which cannot be shared out; give it a shape of [1], or use trainer.strategy=ddp"
        )
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    for block in repeated_blocks(model):
        if any(True for _ in block.parameters()):
            fully_shard(block, **settings)
    fully_shard(model, **settings)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
    return model
