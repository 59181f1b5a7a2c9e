"""Pictures shifted and lit a little otherwise, by lot.

Letters: `V` cameras, `P` pixels of a side.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT, LIGHT = 0.06, 0.2
"""The largest shift, in sides of a picture, and the largest change of brightness and contrast."""


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures uint8 [V, 3, P, P], each shifted and its light changed, by lot."""
    found = []
    for image in images:
        side = image.shape[-1]
        reach = max(int(SHIFT * side), 1)
        down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
        padded = torch.nn.functional.pad(image[None].float(), (reach,) * 4, mode="replicate")[0]
        moved = padded[:, down : down + side, right : right + side]
        bright, contrast = ((2 * torch.rand(2, generator=generator) - 1) * LIGHT + 1).tolist()
        middle = moved.mean()
        found.append(((moved - middle) * contrast + middle) * bright)
    return torch.stack(found).round().clamp(0, 255).to(torch.uint8)
