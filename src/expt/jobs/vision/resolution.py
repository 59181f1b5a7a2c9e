"""How many pixels an image may have: the size that fits the memory, and tiles with a cap.

    tower = AdaptiveResolution(tower, multiples(14, 112, 336), bytes_of, limit_bytes=6 * 2**30)
    parts = tiles(image, side=336, cap=6)  # [1 to 7, 3, 336, 336]

`bytes_of(size)` is the peak at images of that side, best from a plan (`expt.memory.plan`); where
plans take long, `planned_points` draws a line between a few of them.

Letters: `C` channels, `H`, `W` pixels, `K` tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.errors import ConfigError, DataError
from expt.units import format_bytes

MAX_SIDE = 8192
"""Pixels of an image's longer side from which on it is refused: 8192 x 8192 in fp32 is 768 MiB."""


class AdaptiveResolution(nn.Module):
    """An encoder whose images are brought to the largest size that fits.

    The size is chosen once, so that all steps of a run are alike; with `limit_bytes` every run
    chooses the same. `size` says which it is.

    Args:
        encoder: takes images [..., 3, size, size].
        sizes: sides in pixels to choose from, like ``multiples(14, 112, 336)``.
        bytes_of: the peak in bytes with images of a side; must not fall when the side grows.
        limit_bytes: what the peak must not exceed; None: what is free when this is built.
        device: whose free memory is asked.

    Raises:
        ConfigError: see `largest_that_fits`.

    """

    def __init__(
        self,
        encoder: nn.Module,
        sizes: Sequence[int],
        bytes_of: Callable[[int], int],
        limit_bytes: int | None = None,
        device: torch.device | str = "cuda",
    ) -> None:
        super().__init__()
        limit = free_bytes(torch.device(device)) if limit_bytes is None else limit_bytes
        self.encoder, self.size = encoder, largest_that_fits(sizes, bytes_of, limit)

    def forward(self, images: Tensor, **arguments: Any) -> Any:
        """Encode images [..., 3, H, W] of any size; `arguments` go to the encoder."""
        return self.encoder(resized(images, self.size), **arguments)


def multiples(patch: int, low: int, high: int) -> list[int]:
    """Return the multiples of a patch's side from `low` to `high` pixels, both included.

    Raises:
        ConfigError: there is none.

    """
    found = [size for size in range(patch, high + 1, patch) if size >= low] if patch >= 1 else []
    if not found:
        raise ConfigError(f"no multiple of patch={patch} lies between {low} and {high} px")
    return found


def largest_that_fits(
    sizes: Sequence[int], bytes_of: Callable[[int], int], limit_bytes: int
) -> int:
    """Return the largest of `sizes` whose bytes are within the limit, by bisection.

    Raises:
        ConfigError: there are no sizes, one is below 1 px, or not even the smallest fits.

    """
    ordered = sorted(set(sizes))
    if not ordered or ordered[0] < 1 or ordered[-1] > MAX_SIDE:
        raise ConfigError(f"sizes={list(sizes)} must be sides of 1 to {MAX_SIDE} px, at least one")
    low, high = 0, len(ordered)  # ordered[:low] fits, ordered[high:] does not
    least = 0
    while low < high:
        middle = (low + high) // 2
        needed = bytes_of(ordered[middle])
        least = needed if middle == 0 else least
        low, high = (middle + 1, high) if needed <= limit_bytes else (low, middle)
    if low == 0:
        raise ConfigError(
            f"images of {ordered[0]} px, the smallest of {len(ordered)} sizes, take "
            f"{format_bytes(least)} and {format_bytes(limit_bytes)} is there; try a smaller size, "
            "fewer images at a time (EncodedInChunks) or a smaller batch"
        )
    return ordered[low - 1]


def planned_points(points: Mapping[int, int]) -> Callable[[int], int]:
    """Return the bytes of any size between a few planned ones: size in px -> bytes.

    Between two points it is a straight line over the pixels (size squared). Activations grow
    like pixels and materialised attention faster, so the line is not below them. Below the
    smallest point, it is that point's bytes.

    Raises:
        ConfigError: no points; the function raises it above the largest, where nothing is known.

    """
    known = sorted(points.items())
    if not known:
        raise ConfigError("planned_points needs the bytes of at least one size")

    def bytes_of(size: int) -> int:
        if size > known[-1][0]:
            raise ConfigError(
                f"the bytes of {size} px are not known: the largest size planned is {known[-1][0]} "
                "px; plan a larger one, or leave it out"
            )
        above = next(place for place, (side, _) in enumerate(known) if side >= size)
        if above == 0:
            return known[0][1]
        (low, low_bytes), (high, high_bytes) = known[above - 1], known[above]
        share = (size**2 - low**2) / (high**2 - low**2)
        return math.ceil(low_bytes + share * (high_bytes - low_bytes))

    return bytes_of


def free_bytes(device: torch.device) -> int:
    """Return what is free now: of a card with what its allocator keeps in reserve, of the host."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    return int(psutil.virtual_memory().available)


def resized(images: Tensor, height: int, width: int | None = None) -> Tensor:
    """Bring images [..., C, H, W] to a size in pixels, square without `width`; same dtype.

    Raises:
        DataError: an image without pixels, or with a side above `MAX_SIDE`.

    """
    check_sides(images)
    goal = (height, height if width is None else width)
    if images.shape[-2:] == goal:
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    whole = not flat.is_floating_point()
    scaled = F.interpolate(
        flat.float() if whole else flat, goal, mode="bilinear", antialias=True, align_corners=False
    )
    if whole:
        scaled = scaled.round().to(images.dtype)
    return scaled.reshape(*images.shape[:-2], *goal)


def check_sides(images: Tensor, max_side: int = MAX_SIDE) -> None:
    """Refuse images [..., C, H, W] that have no pixels or far too many.

    Raises:
        DataError: as `resized` says.

    """
    if images.dim() < 3:
        raise DataError(f"an image must be [channels, height, width]; got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    _check_pixels(height, width, max_side)


def _check_pixels(height: int, width: int, max_side: int) -> None:
    if min(height, width) < 1:
        raise DataError(f"an image of {width} x {height} px has no pixels; is the file empty?")
    if max(height, width) > max_side:
        raise DataError(
            f"an image of {width} x {height} px is above the limit of {max_side} px per side; "
            "make it smaller where it is read"
        )


def tile_grid(height: int, width: int, side: int, cap: int) -> tuple[int, int]:
    """Return rows and columns of the tiles of an image: at most `cap`, of the closest proportions.

    No more tiles than the image has pixels for: a small image is not blown up.

    Raises:
        ConfigError: a side or a cap below 1.
        DataError: an image without pixels, or with a side above `MAX_SIDE`.

    """
    _check_pixels(height, width, MAX_SIDE)
    for name, value in (("side", side), ("cap", cap)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r} of tiles must be a whole number, at least 1")
    most = min(cap, math.ceil(height * width / side**2))
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]
    wanted = math.log(height / width)
    # Of grids with the same proportions, the one with most tiles shows most of the image.
    return min(grids, key=lambda g: (round(abs(math.log(g[0] / g[1]) - wanted), 9), -g[0] * g[1]))


def tiles(image: Tensor, side: int, cap: int) -> Tensor:
    """Cut an image [C, H, W] into a thumbnail and at most `cap` tiles: [1 + K, C, side, side].

    The thumbnail is first, the tiles follow row by row; an image with one tile is its thumbnail
    alone. The memory of a sample is then bounded, whatever the size of its image.

    Source: the grid by closest proportions is InternVL 1.5's dynamic resolution (Chen et al.,
    arXiv:2404.16821), the thumbnail first LLaVA-NeXT's "AnyRes" (Liu et al., 2024,
    llava-vl.github.io/blog/2024-01-30-llava-next). Unlike there, small images are not enlarged.

    Raises:
        ConfigError: a side or a cap below 1.
        DataError: an image without pixels, or with a side above `MAX_SIDE`.

    """
    if image.dim() != 3:
        raise DataError(f"tiles takes one image [channels, height, width], not {image.dim()} axes")
    rows, columns = tile_grid(image.shape[-2], image.shape[-1], side, cap)
    thumbnail = resized(image, side)[None]
    if rows * columns == 1:
        return thumbnail
    large = resized(image, rows * side, columns * side)
    cut = large.unflatten(-2, (rows, side)).unflatten(-1, (columns, side))  # [C, r, side, c, side]
    return torch.cat([thumbnail, cut.permute(1, 3, 0, 2, 4).flatten(0, 1)])
