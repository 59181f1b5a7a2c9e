"""Checkpoints of several processes, in the format of one: any number of them can go on from it.

Where weights are shared out (FSDP), they and their optimizer state are put together one by one, and
kept in the first process's host memory until they are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from expt.memory.techniques.wrapping import bare, bare_optimizer
from expt.training.ranks import OneRank, is_shared_out, whole


def gather(state: dict[str, Any], left_out: set[str], ranks: OneRank) -> dict[str, Any]:
    """Return a checkpoint's state with model and optimizer put together, complete on the first.

    Args:
        state: with the objects themselves under ``model`` and ``optimizer``, and this process's
            random state.
        left_out: weights that are not to be in it.
        ranks: all of them have to call this.

    """

    def put_together(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_shared_out(value):
            return value
        complete = whole(value)
        return complete.cpu() if ranks.first else None

    found = dict(state)
    weights = bare(state["model"]).state_dict()
    found["model"] = {
        name: put_together(value) for name, value in weights.items() if name not in left_out
    }
    if "optimizer" in state:
        found["optimizer"] = tree_map(put_together, bare_optimizer(state["optimizer"]).state_dict())
    if "random" in state:
        found["ranks"] = ranks.gathered(state["random"])
    return found


def shared_out(weights: Mapping[str, Tensor], model: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return this process's parts of weights, as those of the model's state are shared out."""
    return {
        name: _part(value, model[name]) if name in model else value
        for name, value in weights.items()
    }


def shared_out_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return this process's part of an optimizer's state; a count of steps is everybody's."""
    groups = bare_optimizer(optimizer).param_groups
    own = [weight for group in groups for weight in group["params"]]
    stored = [number for group in state["param_groups"] for number in group["params"]]
    by_number = dict(zip(stored, own, strict=True))

    def parts(number: int, entries: Mapping[str, Any]) -> dict[str, Any]:
        weight = cast(nn.Parameter, by_number[number])
        return {
            name: _part(value, weight)
            if isinstance(value, Tensor) and value.shape == weight.shape
            else value
            for name, value in entries.items()
        }

    return {**state, "state": {n: parts(n, entries) for n, entries in state["state"].items()}}


def _part(value: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process has of another one."""
    if not is_shared_out(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Every process has read the whole; nothing need be sent.
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
