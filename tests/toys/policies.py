"""A policy of a few weights, for demonstrations as small."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Policy(nn.Module):
    """A chunk of actions from state, tokens and the mean colour of the pictures."""

    def __init__(
        self, action_size: int, state_size: int, chunk: int, cameras: int = 0, samples: int = 1
    ) -> None:
        super().__init__()
        self.shape, self.samples = (chunk, action_size), samples
        self.words = nn.Embedding(64, 4)
        self.out = nn.Linear(state_size + 4 + 3 * cameras, chunk * action_size)

    def forward(
        self,
        state: Tensor,
        noise: Tensor,
        level: Tensor,
        tokens: Tensor,
        images: Tensor | None = None,
        actions: Tensor | None = None,
    ) -> Tensor:
        seen = [state, self.words(tokens.clamp(min=0) % 64).mean(dim=1)]
        if images is not None:
            seen.append(images.float().mean(dim=(3, 4)).flatten(1) / 255)
        found = self.out(torch.cat(seen, dim=1)).view(-1, *self.shape)
        if self.training:
            return found
        return found[:, None] + 0.1 * noise if self.samples > 1 else found + 0.1 * noise[:, 0]
