"""Scaling, cropping, mirroring and colours of a clip: one draw for all of its frames.

Libraries of augmentation draw from the global random state; here everything comes from the
sample's generator, so that a sample is the same after a resume.

Letters: `T` frames, `C` channels, `H` x `W` pixels of the source, `P` of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MEAN, DEVIATION = 114.75, 57.375
"""Of all channels, in values from 0 to 255: 0.45 and 0.225 of PySlowFast, times 255."""
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Red, green and blue in a grey value (ITU-R BT.601)."""


@dataclass(frozen=True)
class Crop:
    """A square cut out of every frame, and what is done to its colours.

    Args:
        pixels: of a side of the result.
        flip: probability of mirroring left and right; 0 where the classes have a direction.
        brightness: at most added or taken away, as a part of 255.
        contrast: at most, as a part of it.

    """

    pixels: int
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0

    def random(self, frames: np.ndarray, generator: torch.Generator) -> Tensor:
        """Return a random crop of frames [T,H,W,C], uint8 [C,T,P,P]."""
        draws = torch.rand(5, generator=generator).tolist()
        height, width = frames.shape[1:3]
        top = int(draws[0] * (height - self.pixels + 1))
        left = int(draws[1] * (width - self.pixels + 1))
        clip = self._cut(frames, top, left)
        if draws[2] < self.flip:
            clip = clip.flip(-1)
        if self.brightness or self.contrast:
            gain = 1 + self.contrast * (2 * draws[3] - 1)
            shift = 255 * self.brightness * (2 * draws[4] - 1)
            clip = ((clip.float() - 127.5) * gain + 127.5 + shift).clamp(0, 255).byte()
        return clip.contiguous()

    def centre(self, frames: np.ndarray) -> Tensor:
        """Return the middle of frames [T,H,W,C], uint8 [C,T,P,P]."""
        height, width = frames.shape[1:3]
        top, left = (height - self.pixels) // 2, (width - self.pixels) // 2
        return self._cut(frames, top, left).contiguous()

    def _cut(self, frames: np.ndarray, top: int, left: int) -> Tensor:
        part = frames[:, top : top + self.pixels, left : left + self.pixels]
        return torch.from_numpy(np.ascontiguousarray(part)).permute(3, 0, 1, 2)


def normalised(clip: Tensor) -> Tensor:
    """Return a clip with mean 0 and deviation 1, roughly; floating values are so already."""
    if clip.is_floating_point():
        return clip
    return (clip.float() - MEAN) / DEVIATION


def sharpness(frames: np.ndarray) -> np.ndarray:
    """Return the variance of the Laplacian of each frame [T,H,W,C], in grey values; [T].

    The usual measure of blur (Pech-Pacheco et al., ICPR 2000).
    """
    values = frames.astype(np.float32)
    grey = values @ LUMA if values.shape[-1] == len(LUMA) else values.mean(axis=-1)
    middle = -4 * grey[:, 1:-1, 1:-1]
    edges = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    found: np.ndarray = (middle + edges).var(axis=(1, 2))
    return found
