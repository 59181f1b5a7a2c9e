"""The size that fits, and tiles with a cap."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expt.errors import ConfigError, DataError
from expt.jobs.vision.resolution import (
    AdaptiveResolution,
    free_bytes,
    largest_that_fits,
    multiples,
    planned_points,
    resized,
    tile_grid,
    tiles,
)


@pytest.mark.parametrize("limit", range(14**2, 340**2, 5000))
def test_the_largest_size_inside_the_limit_is_found_with_few_questions(limit: int) -> None:
    asked = []
    sizes = multiples(14, 1, 336)

    def bytes_of(size: int) -> int:
        asked.append(size)
        return size**2

    found = largest_that_fits(sizes, bytes_of, limit)
    assert found == max(size for size in sizes if size**2 <= limit)
    assert len(asked) <= 5  # of 24


def test_nothing_that_fits_names_the_smallest_and_what_to_try() -> None:
    with pytest.raises(ConfigError, match=r"images of 112 px.*4\.0 MiB.*1\.0 MiB.*EncodedInChunks"):
        largest_that_fits([224, 112], lambda size: 2**22 * size // 112, 2**20)


@pytest.mark.parametrize("sizes", [[], [0, 112], [112, 10_000]])
def test_sizes_are_sides_in_pixels(sizes) -> None:
    with pytest.raises(ConfigError, match="must be sides of 1 to 8192 px"):
        largest_that_fits(sizes, lambda size: 1, 10)


def test_multiples_of_a_patch() -> None:
    assert multiples(16, 100, 144) == [112, 128, 144]
    for patch, low, high in ((16, 100, 110), (0, 1, 9)):
        with pytest.raises(ConfigError, match=f"no multiple of patch={patch}"):
            multiples(patch, low, high)


def test_between_planned_points_bytes_are_not_below_what_grows_like_pixels_or_faster() -> None:
    for power in (1, 2):
        truth = {size: 1000 + size ** (2 * power) for size in range(100, 401)}
        bytes_of = planned_points({size: truth[size] for size in (400, 100, 200)})
        assert all(bytes_of(size) >= truth[size] for size in truth)
        assert [bytes_of(size) for size in (100, 200, 400)] == [truth[s] for s in (100, 200, 400)]
        assert bytes_of(50) == truth[100]
        with pytest.raises(ConfigError, match="the largest size planned is 400 px"):
            bytes_of(401)
    with pytest.raises(ConfigError, match="at least one size"):
        planned_points({})


def test_an_encoder_gets_images_of_the_chosen_size() -> None:
    adaptive = AdaptiveResolution(nn.Identity(), [8, 16, 32], lambda size: size**2, 16**2)
    assert adaptive.size == 16
    assert adaptive(torch.rand(2, 4, 3, 40, 20)).shape == (2, 4, 3, 16, 16)
    free = AdaptiveResolution(nn.Identity(), [8, 16], lambda size: size, device="cpu")
    assert free.size == 16 <= free_bytes(torch.device("cpu"))


def test_resizing_keeps_dtype_range_and_what_is_right_already() -> None:
    images = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8)
    small = resized(images, 10, 15)
    assert small.dtype == torch.uint8
    assert small.shape == (2, 3, 10, 15)
    assert abs(small.float().mean() - images.float().mean()) < 2
    assert resized(images, 20, 30) is images
    assert resized(torch.full((3, 9, 9), 0.5), 4).allclose(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("height", "width", "cap", "grid"),
    [
        (30, 30, 6, (1, 1)),  # smaller than a tile: not blown up
        (200, 200, 6, (2, 2)),
        (200, 200, 3, (1, 1)),
        (100, 300, 6, (1, 3)),
        (300, 100, 6, (3, 1)),
        (300, 200, 6, (3, 2)),
        (300, 200, 1, (1, 1)),
        (8000, 8000, 12, (3, 3)),
        (1, 8000, 12, (1, 1)),
    ],
)
def test_the_grid_has_the_proportions_of_the_image_and_at_most_the_cap(
    height, width, cap, grid
) -> None:
    assert tile_grid(height, width, 100, cap) == grid


def test_tiles_are_the_thumbnail_and_then_the_parts_of_the_image() -> None:
    image = torch.rand(3, 20, 30)
    found = tiles(image, 10, 6)
    assert found.shape == (7, 3, 10, 10)
    torch.testing.assert_close(found[0], resized(image, 10))
    torch.testing.assert_close(found[1], image[:, :10, :10])
    torch.testing.assert_close(found[3], image[:, :10, 20:])
    torch.testing.assert_close(found[6], image[:, 10:, 20:])
    assert tiles(image, 10, 1).shape == (1, 3, 10, 10)


@pytest.mark.parametrize("cap", [0, -2, True, 1.5])
def test_a_cap_below_one_is_refused(cap) -> None:
    with pytest.raises(ConfigError, match=f"cap={cap!r} of tiles must be a whole number"):
        tiles(torch.rand(3, 20, 20), 10, cap)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 0, 20), "20 x 0 px has no pixels"),
        ((3, 1, 10_000), "10000 x 1 px is above the limit of 8192 px"),
    ],
)
def test_no_pixels_and_ten_thousand_are_refused_in_one_line(shape, message) -> None:
    for function in (lambda image: tiles(image, 10, 4), lambda image: resized(image, 10)):
        with pytest.raises(DataError, match=message) as caught:
            function(torch.zeros(shape))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="not 4 axes"):
        tiles(torch.rand(1, 3, 8, 8), 4, 2)
    with pytest.raises(DataError, match="must be \\[channels, height, width\\]"):
        resized(torch.rand(8, 8), 4)
