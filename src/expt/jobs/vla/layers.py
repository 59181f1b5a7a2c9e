"""A backbone cut in two between layers, without a copy of its forward pass.

A language model runs its list of layers in its own way: masks, positions, embeddings of them. So
the list is exchanged while it runs, for one of the same length in which the layers that are not
wanted hand their input on. What a frozen lower half makes of a sample can then be kept, and the
upper half goes on from there.

Letters: `B` samples, `N` tokens, `D` width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class HandOn(nn.Module):
    """Stands where a layer is not wanted: returns the hidden states [B,N,D] it is given."""

    def forward(self, hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        """Return the hidden states."""
        return hidden_states


class Catch(nn.Module):
    """Keeps the hidden states that reach it, and hands them on."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: list[Tensor] = []

    def forward(self, hidden_states: Tensor, *others: Any, **more: Any) -> Tensor:
        """Keep and return the hidden states."""
        self.caught.append(hidden_states)
        return hidden_states


@contextmanager
def exchanged(owner: nn.Module, name: str, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Run `owner` with other layers in its list `name`; its weights' names stay as they are."""
    own = owner._modules[name]
    owner._modules[name] = nn.ModuleList(layers)
    try:
        yield
    finally:
        owner._modules[name] = own


def layers_of(language: nn.Module) -> str:
    """Return the name of the list of layers of a language model: its longest list of modules.

    Raises:
        ValueError: it has none.

    """
    lists = {
        name: part for name, part in language.named_children() if isinstance(part, nn.ModuleList)
    }
    if not lists:
        raise ValueError(f"{type(language).__name__} has no list of layers")
    return max(lists, key=lambda name: len(lists[name]))
