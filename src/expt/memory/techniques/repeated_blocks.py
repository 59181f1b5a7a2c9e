"""The repeated blocks of a model, which is where most of its activations are made.

Looked for in this order; a module that holds or is held by one found before is left out:

1. elements of a `ModuleList` that hold no further `ModuleList`;
2. in a `Sequential`, two or more modules of one class of their own, with modules inside: the
   residual blocks of a ResNet's stage, say;
3. in a `Sequential`, two or more `Sequential`s.

A layer without modules inside, such as a `Linear`, is no block: its input is all that it keeps.
Within 2 and 3 the innermost are taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks, each once, in the order of the model's modules."""
    chosen: list[nn.Module] = []
    for candidates in (_of_lists(model), _of_sequences(model, False), _of_sequences(model, True)):
        chosen += _innermost(candidates, chosen)
    places = {id(part): place for place, part in enumerate(model.modules())}
    return sorted(chosen, key=lambda block: places[id(block)])


def _of_lists(model: nn.Module) -> list[nn.Module]:
    return [
        block
        for parent in model.modules()
        if isinstance(parent, nn.ModuleList)
        for block in parent
        if not any(isinstance(part, nn.ModuleList) for part in block.modules())
    ]


def _of_sequences(model: nn.Module, of_sequences: bool) -> list[nn.Module]:
    """Return modules of which a `Sequential` has several; `Sequential`s, or all but those."""
    found: list[nn.Module] = []
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            inside = [part for part in parent if any(True for _ in part.children())]
            counts = Counter(type(part) for part in inside)
            found += [
                part
                for part in inside
                if counts[type(part)] > 1 and (type(part) is nn.Sequential) == of_sequences
            ]
    return found


def _innermost(candidates: Iterable[nn.Module], chosen: list[nn.Module]) -> list[nn.Module]:
    """Return the candidates, each once, that hold none of the others and do not touch `chosen`."""
    unique = {id(block): block for block in candidates}
    taken = {id(part) for block in chosen for part in block.modules()}
    heads = {id(block) for block in chosen}
    return [
        block
        for block in unique.values()
        if id(block) not in taken
        and not any(
            id(part) in heads or (id(part) in unique and part is not block)
            for part in block.modules()
        )
    ]
