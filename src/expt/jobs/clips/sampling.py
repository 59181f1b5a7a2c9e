"""Which frames of a video a clip is made of.

A clip is `frames` frames, `stride` apart. In training it starts anywhere; in evaluation a video
gives several, evenly spread. A video that is too short repeats its last frame.
"""

from __future__ import annotations

import torch


def span(frames: int, stride: int) -> int:
    """Return how many frames of a video a clip reaches over."""
    return (frames - 1) * stride + 1


def random_start(length: int, frames: int, stride: int, generator: torch.Generator) -> int:
    """Return the first frame of a training clip of a video with `length` frames."""
    last = max(length - span(frames, stride), 0)
    return int(torch.randint(last + 1, (), generator=generator))


def even_start(length: int, frames: int, stride: int, number: int, count: int) -> int:
    """Return the first frame of clip `number` of `count` that are evenly spread over a video.

    A single clip is the middle of the video.
    """
    last = max(length - span(frames, stride), 0)
    return last // 2 if count == 1 else round(last * number / (count - 1))


def clip_frames(length: int, frames: int, stride: int, start: int) -> list[int]:
    """Return the numbers of a clip's frames; where the video has ended, its last frame."""
    return [min(start + place * stride, length - 1) for place in range(frames)]
