"""Chunked forward: a model runs over slices of its batch, one after the other.

In evaluation a slice's activations are gone before the next one starts, so the peak is that of a
slice. In training every slice keeps what its backward pass needs, so little is gained, and it is
off unless asked for; gradient accumulation is what saves there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from expt.errors import ModelError
from expt.memory.techniques.wrapping import unwrap, wrap

NAME = "forward_chunks"


def chunk_forward(model: nn.Module, chunks: int, in_training: bool = False) -> None:
    """Run `model` over `chunks` slices of its batch; in place, reversible.

    Sliced are the tensor arguments whose first axis is as long as that of the first one; the
    rest goes to every slice. Outputs are joined along the first axis.
    """
    wrap(model, NAME, Chunked(model, chunks, in_training))


def remove_chunking(model: nn.Module) -> bool:
    """Run the model over whole batches again; return whether it was chunked."""
    return unwrap(model, NAME)


class Chunked:
    """The layer around a model's `forward`; see `expt.memory.techniques.wrapping`."""

    def __init__(self, model: nn.Module, chunks: int, in_training: bool) -> None:
        self.model = model
        self.chunks = chunks
        self.in_training = in_training

    def __call__(self, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run the model over slices and join what it returns.

        Raises:
            ModelError: an output has no batch axis to join along.

        """
        leaves, structure = tree_flatten((args, kwargs))
        batch = next((len(leaf) for leaf in leaves if _has_axis(leaf)), 0)
        if (self.model.training and not self.in_training) or min(self.chunks, batch) < 2:
            return forward(*args, **kwargs)
        outputs = []
        for index in range(min(self.chunks, batch)):
            sliced = [
                leaf.tensor_split(min(self.chunks, batch))[index]
                if _has_axis(leaf) and len(leaf) == batch
                else leaf
                for leaf in leaves
            ]
            own_args, own_kwargs = tree_unflatten(sliced, structure)
            outputs.append(forward(*own_args, **own_kwargs))
        return tree_map(_joined, *outputs)


def _joined(*parts: Any) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if parts[0].ndim == 0:
        raise ModelError(
            "memory.forward_chunks: the model returns a tensor without a batch axis, which cannot "
            "be joined from slices; set memory.forward_chunks=1"
        )
    return torch.cat(parts)


def _has_axis(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0
