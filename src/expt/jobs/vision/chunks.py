"""`EncodedInChunks`: the images of a batch go through an encoder a few at a time.

    self.tower = EncodedInChunks(tower, chunk=4)
    tokens = self.tower(images)  # [B, n, 3, H, W] -> [B, n, S, D], however many images there are

A batch of 8 samples with 8 images each is 64 images for the encoder, and its activations are those
of 64. In chunks they are those of one chunk:

- of a frozen encoder nothing is kept but the result, since it runs without a graph;
- of a trained encoder every chunk's images are kept, and it is computed again in the backward pass
  (checkpointing, Chen et al., arXiv:1604.06174). Loss and gradients are the same to rounding.

Dropout draws other numbers than it would for all images at once, but the same ones in both passes.

Letters: `B` samples, `n` images of a sample, `M` images in all, `H`, `W` pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from expt.errors import ConfigError, ModelError


class EncodedInChunks(nn.Module):
    """An encoder of images that sees at most `chunk` of them together.

    Args:
        encoder: from images [M, 3, H, W] to a tensor [M, ...], or to an object with such a tensor
            as `last_hidden_state`, as the models of transformers return it.
        chunk: images at a time.
        trained: whether gradients have to reach the encoder or the images. None: asked in every
            forward pass of the parameters and the images, so that staged unfreezing works.
        preserve_rng_state: as in torch's `checkpoint`: what a trained encoder draws by chance is
            drawn again. False, for an encoder without dropout: the random state is not read, which
            no step that is captured as a CUDA graph allows.

    Raises:
        ConfigError: `chunk` is no number of images.

    """

    def __init__(
        self,
        encoder: nn.Module,
        chunk: int,
        trained: bool | None = None,
        preserve_rng_state: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise ConfigError(f"chunk={chunk!r} must be a whole number of images, at least 1")
        self.encoder, self.chunk, self.trained = encoder, chunk, trained
        self.preserve_rng_state = preserve_rng_state

    def forward(self, images: Tensor, **arguments: Any) -> Tensor:
        """Encode images [M, 3, H, W] -> [M, ...], or those of a batch [B, n, ...] -> [B, n, ...].

        Args:
            images: with four axes, or five for several images per sample.
            arguments: go to the encoder with every chunk.

        Raises:
            ModelError: other axes, no image at all, or an encoder that cannot be cut into chunks.

        """
        if images.dim() not in (4, 5) or images.numel() == 0:
            raise ModelError(
                f"images of shape {tuple(images.shape)} cannot be encoded: expected [images, 3, "
                "height, width] or [samples, images, 3, height, width], and at least one pixel"
            )
        alone = images.flatten(0, 1) if images.dim() == 5 else images
        encoded = self._encoded(alone, arguments)
        return encoded.unflatten(0, images.shape[:2]) if images.dim() == 5 else encoded

    def _encoded(self, images: Tensor, arguments: dict[str, Any]) -> Tensor:
        parts = images.split(self.chunk)
        recomputed = self._trains(images) and torch.is_grad_enabled()
        if recomputed or len(parts) > 1:
            self._refuse_batch_norm()
        if not recomputed:
            with torch.no_grad():
                return self._without_graph(parts, len(images), arguments)
        again = partial(
            checkpoint, self._chunk, use_reentrant=False, preserve_rng_state=self.preserve_rng_state
        )
        done = [again(part, arguments) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _without_graph(
        self, parts: tuple[Tensor, ...], count: int, arguments: dict[str, Any]
    ) -> Tensor:
        first = self._chunk(parts[0], arguments)
        if len(parts) == 1:
            return first
        # Written to their place one by one: joining them at the end would hold them twice.
        encoded = first.new_empty(count, *first.shape[1:])
        encoded[: len(first)] = first
        for number, part in enumerate(parts[1:], start=1):
            start = number * self.chunk
            encoded[start : start + len(part)] = self._chunk(part, arguments)
        return encoded

    def _chunk(self, part: Tensor, arguments: dict[str, Any]) -> Tensor:
        found = self.encoder(part, **arguments)
        encoded = found if isinstance(found, Tensor) else getattr(found, "last_hidden_state", None)
        if not isinstance(encoded, Tensor) or encoded.dim() < 1 or len(encoded) != len(part):
            raise ModelError(
                f"{type(self.encoder).__name__} must return a tensor with one entry per image, or "
                f"an object with `last_hidden_state`; for {len(part)} images it returned "
                + (f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else str(type(found)))
            )
        return encoded

    def _trains(self, images: Tensor) -> bool:
        if self.trained is not None:
            return self.trained
        return images.requires_grad or any(p.requires_grad for p in self.encoder.parameters())

    def _refuse_batch_norm(self) -> None:
        """Refuse statistics over a chunk, which are others than over all, and counted twice."""
        for name, part in self.encoder.named_modules():
            if isinstance(part, _BatchNorm) and part.training:
                raise ModelError(
                    f"{name or 'the encoder'} normalises over a batch, which is not the same in "
                    "chunks: call its eval(), or set memory.batch_norm=frozen or group"
                )
