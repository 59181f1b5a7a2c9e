"""Batches of images of about the same size, so that little of them is padding.

One image of 1024 x 1024 in a batch makes every other one as large. Here samples are sorted by size,
cut into batches, and the batches shuffled:

    sampler = GroupedBySize(sizes, batch_size=16, seed=0)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=padded)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, mask in loader: ...

The order follows from sizes, batch size, seed and epoch alone, so a run can be resumed. The largest
batch is no smaller than before: it bounds the peak, and grouping lowers the mean.

Letters: `B` images of a batch, `N` samples, `C` channels, `H`, `W` pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from expt.errors import ConfigError, DataError

Size = tuple[int, int]
"""Height and width in pixels."""


class GroupedBySize(Sampler[list[int]]):
    """The batches of an epoch as lists of indices, for `DataLoader(batch_sampler=...)`.

    Args:
        sizes: of every sample.
        batch_size: samples of a batch; the last one of an epoch may have fewer.
        seed: of the order.

    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int = 0) -> None:
        self.sizes, self.batch_size, self.seed, self.epoch = sizes, batch_size, seed, 0
        self._check()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next; each has its own order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches."""
        order = ordered_by_size(self.sizes, self.batch_size, self.seed, self.epoch)
        return iter([batch.tolist() for batch in order.split(self.batch_size)])

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.sizes) // self.batch_size)

    def _check(self) -> None:
        ordered_by_size(self.sizes, self.batch_size, self.seed, 0)


def ordered_by_size(sizes: Sequence[Size], batch_size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch, int64 [N]: every sample once, its `split(batch_size)` alike.

    Samples of the same size are shuffled among batches, and batches among each other. A last
    batch that is not full has samples of any size, another one every epoch.

    Raises:
        ConfigError: no samples, or a batch size below 1.
        DataError: a sample without pixels.

    """
    if not len(sizes) or batch_size < 1:
        raise ConfigError(
            f"grouping needs samples and batch_size >= 1; got {len(sizes)} and {batch_size}"
        )
    for index, (height, width) in enumerate(sizes):
        if min(height, width) < 1:
            raise DataError(f"sample {index} of {width} x {height} px has no pixels")
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(sizes), generator=generator).tolist()
    # Portraits apart from landscapes: a batch of both is padded to a square.
    ordered = torch.tensor(sorted(shuffled, key=lambda index: _place(sizes[index])))
    whole, rest = divmod(len(sizes), batch_size)
    start = int(torch.randint(whole + 1, (), generator=generator)) * batch_size
    short, full = (
        ordered[start : start + rest],
        torch.cat((ordered[:start], ordered[start + rest :])),
    )
    places = torch.randperm(whole, generator=generator)
    return torch.cat((full.view(whole, batch_size)[places].flatten(), short))


def _place(size: Size) -> tuple[bool, int]:
    height, width = size
    return height > width, height * width


def wasted(sizes: Sequence[Size], batches: Iterable[Sequence[int]]) -> float:
    """Return the share of pixels that is padding, in %, where a batch is padded to its largest.

    Args:
        sizes: of every sample.
        batches: of indices, like those of `GroupedBySize`.

    """
    used = held = 0
    for batch in batches:
        chosen = [sizes[int(index)] for index in batch]
        used += sum(height * width for height, width in chosen)
        held += len(chosen) * max(h for h, _ in chosen) * max(w for _, w in chosen)
    return 100 * (1 - used / held) if held else 0.0


def padded(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return images [C, H, W] of several sizes as one batch, and where they are.

    Returns:
        images [B, C, H, W], of the largest height and width, 0 to the right and below;
        bool [B, H, W], True where there is an image.

    """
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.bool, device=batch.device)
    for place, image in enumerate(images):
        batch[place, :, : image.shape[-2], : image.shape[-1]] = image
        mask[place, : image.shape[-2], : image.shape[-1]] = True
    return batch, mask
