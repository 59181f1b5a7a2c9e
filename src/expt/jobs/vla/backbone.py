"""What every backbone of the job is: layers of which the lower ones are frozen.

Letters: `B` samples, `N` tokens, `D` width, `T` tokens of the sentence, `C` cameras, `P` pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expt.jobs.vla.layers import HandOn

LORA = "lora_"
"""What the names of an adapter's modules and weights hold, as PEFT makes them."""


class Backbone(nn.Module, ABC):
    """Turns pictures and a sentence into hidden states, in two steps that meet at a depth.

    A subclass has the attributes `depth` (layers of its language part), `width` (D) and
    `vision_width` (of features beside the hidden states, 0 for none).
    """

    depth: int
    width: int
    vision_width: int = 0

    @abstractmethod
    def below(self, tokens: Tensor, images: Tensor | None, depth: int) -> dict[str, Tensor]:
        """Run everything up to layer `depth`.

        Args:
            tokens: int64 [B,T], negative where there is none.
            images: uint8 [B,C,3,P,P].
            depth: layers that are run; all of them: what is returned is normalised, as the model
                ends.

        Returns:
            ``hidden`` [B,N,D], ``mask`` bool [B,N], and what `above` needs beside it.

        """

    @abstractmethod
    def above(self, features: Mapping[str, Tensor], depth: int) -> tuple[Tensor, Tensor]:
        """Run the layers from `depth` on; return the hidden states [B,N,D] and their mask [B,N]."""

    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """Return the layers of the language part; those that were dropped hand on."""

    @abstractmethod
    def lower(self) -> Iterable[tuple[str, nn.Module]]:
        """Yield what comes before the first layer, with its names: vision, embeddings."""

    def processing(self) -> dict[str, Any]:
        """Return plain values beside the weights that decide what `below` makes."""
        return {}

    @abstractmethod
    def load_pretrained(self) -> str | None:
        """Read the weights; return what to say where they stay random."""

    def below_parts(self, depth: int) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that `below` runs, with their names."""
        yield from self.lower()
        names = {id(module): name for name, module in self.named_modules()}
        for layer in self.layers()[:depth]:
            yield names[id(layer)], layer

    def drop_below(self, depth: int) -> None:
        """Forget the modules that `below` runs; the names of the others stay."""
        for name, _ in list(self.below_parts(depth)):
            owner, _, own = name.rpartition(".")
            self.get_submodule(owner)._modules[own] = HandOn()

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode of the adapters; what is frozen is always as in evaluation."""
        super().train(mode)
        for name, module in self.named_modules():
            if LORA not in name:
                module.training = False
        return self


def without_adapters(name: str) -> str | None:
    """Return the name that a weight has in a model without LoRA, None for LoRA's own."""
    return None if LORA in name else name.replace(".base_layer", "")


def random_weights(seed: int = 0) -> Any:
    """Return a context in which weights are drawn from a seed of their own.

    A frozen backbone without weights to read is then the same in every process.
    """
    return _Seeded(seed)


class _Seeded:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self._state)
