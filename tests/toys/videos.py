"""Small video files: squares that move to the left or to the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 32, 40


def square(frames: int = 12, right: bool = True, seed: int = 0) -> np.ndarray:
    """Return frames [n,H,W,3] in which a square moves; the frame's number is in its corner."""
    draw = np.random.default_rng(seed)
    clip = np.full((frames, HEIGHT, WIDTH, 3), 60, np.uint8)
    top = int(draw.integers(4, HEIGHT - 12))
    for number in range(frames):
        place = round(number * (WIDTH - 9) / max(frames - 1, 1))
        left = place if right else WIDTH - 9 - place
        clip[number, top : top + 8, left : left + 8] = 220
    return clip


def write_video(
    path: Path,
    frames: np.ndarray,
    codec: str = "h264",
    pixel_format: str = "yuv420p",
    rate: int = 10,
) -> Path:
    """Write frames [n,H,W,3], or with an alpha channel [n,H,W,4]; return the path."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "rgba" if frames.shape[-1] == 4 else "rgb24"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=kind)))
        container.mux(stream.encode())
    return path


def write_classes(
    root: Path, parts: Sequence[str] = ("train", "val", "test"), videos: int = 6, frames: int = 12
) -> Path:
    """Write ``ROOT/PART/{left,right}/NUMBER.mp4``; return the folder."""
    for part in parts:
        for number in range(videos):
            label = ("left", "right")[number % 2]
            clip = square(frames, label == "right", seed=100 * len(part) + number)
            write_video(root / part / label / f"{number:02d}.mp4", clip)
    return root
