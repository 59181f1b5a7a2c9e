"""Cross-attention of text to images that keeps less: shared keys and values, low rank, a gate.

Each takes the place of one layer's cross-attention, which is called as ``layer(text, image)`` and
returns what is added to the text. `expt.jobs.attention.Attention` is the plain one: every layer
projects the image's tokens to keys and values of its own and keeps both for the backward pass,
2·B·S·D numbers per layer, most of it where S (8 images of 577 tokens) is far above L.

    keys_values = ImageKeyValue(D, D)  # once per model
    layers = [SharedCrossAttention(D, H) for _ in range(12)]
    shared = keys_values(image)  # once per forward pass
    for layer in layers:
        text = text + layer(text, shared)

Letters: `B` samples, `L` tokens of text, `S` tokens of images, `D` width, `H` heads, `R` rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expt.errors import ConfigError
from expt.jobs.attention import Attention, fused


class ImageKeyValue(nn.Linear):
    """Keys and values of the image's tokens, for all layers: [B, S, image_width] -> [B, S, 2D]."""

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__(image_width, 2 * width)


class SharedCrossAttention(nn.Module):
    """Cross-attention over keys and values that `ImageKeyValue` has projected once.

    A model with it is the plain one whose layers have tied projections: the same loss and
    gradients as such, and another model than one whose layers have their own.

    Args:
        width: D of the text.
        num_heads: H, divides `width`.

    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        _check_heads(width, num_heads)
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, text: Tensor, keys_values: Tensor) -> Tensor:
        """Return what text [B, L, D] attends to in keys_values [B, S, 2D]: [B, L, D]."""
        keys, values = (self._heads(part) for part in keys_values.chunk(2, dim=-1))
        mixed = fused(self._heads(self.query(text)), keys, values)  # [B, H, L, D/H]
        return self.out(mixed.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def _heads(self, tokens: Tensor) -> Tensor:
        split: Tensor = tokens.unflatten(-1, (self.num_heads, -1))
        return split.transpose(1, 2)


class LowRankCrossAttention(nn.Module):
    """Cross-attention whose keys and values are made of `R` numbers per token of the image.

    Keys and values of a head are linear in a latent [B, S, R]. They are never made: queries are
    brought into the latent space instead, and what they attend to back out of it, so that a layer
    keeps B·S·R numbers in place of 2·B·S·D (the absorbed projections of multi-head latent
    attention, DeepSeek-V2, arXiv:2405.04434). It pays where L·H is not above S·D/R: a long image
    beside a short text. A fused kernel on CUDA wants R of at most 256. A bias of keys has no
    effect in a softmax, and one of values would be part of that of `out`.

    Args:
        width: D of the text.
        num_heads: H, divides `width`.
        rank: R, of one layer.
        image_width: of the image's tokens; None: D.

    Raises:
        ConfigError: heads that do not divide the width, or a rank outside 1 to `image_width`.

    """

    def __init__(
        self, width: int, num_heads: int, rank: int, image_width: int | None = None
    ) -> None:
        super().__init__()
        _check_heads(width, num_heads)
        image_width = width if image_width is None else image_width
        if not 1 <= rank <= image_width:
            raise ConfigError(f"rank={rank} must be from 1 to the image's width, {image_width}")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.down = nn.Linear(image_width, rank, bias=False)
        size = (num_heads, width // num_heads, rank)
        self.key_up = nn.Parameter(torch.randn(size) / math.sqrt(rank))
        self.value_up = nn.Parameter(torch.randn(size) / math.sqrt(rank))
        self.out = nn.Linear(width, width)

    @classmethod
    def approximating(cls, attention: Attention, rank: int) -> LowRankCrossAttention:
        """Return the best one of this rank for a trained attention, exact at the image's width.

        By the truncated singular value decomposition of its keys' and values' weights together.
        """
        weight, bias = attention.key_value.weight.detach(), attention.key_value.bias.detach()
        image_width, width = weight.shape[1], weight.shape[0] // 2
        made = cls(width, attention.num_heads, rank, image_width).to(weight)
        left, scale, right = torch.linalg.svd(weight.float(), full_matrices=False)
        up = (left[:, :rank] * scale[:rank]).unflatten(0, (2, attention.num_heads, -1))
        with torch.no_grad():
            made.down.weight.copy_(right[:rank])
            made.key_up.copy_(up[0])
            made.value_up.copy_(up[1])
            made.query.load_state_dict(attention.query.state_dict())
            made.out.load_state_dict(attention.out.state_dict())
            made.out.bias.add_(made.out.weight @ bias[width:])
        return made

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return what text [B, L, D] attends to in image [B, S, image_width]: [B, L, D]."""
        latent = self.down(image)[:, None]  # [B, 1, S, R]
        queries = self.query(text).unflatten(-1, (self.num_heads, -1))
        sought = torch.einsum("blhd,hdr->bhlr", queries, self.key_up)
        # Heads differ in their queries alone, so they are more queries of a single head.
        mixed = F.scaled_dot_product_attention(
            sought.flatten(1, 2)[:, None], latent, latent, scale=queries.shape[-1] ** -0.5
        )
        mixed = mixed[:, 0].unflatten(1, (self.num_heads, -1))  # [B, H, L, R]
        values = torch.einsum("bhlr,hdr->blhd", mixed, self.value_up)
        return self.out(values.flatten(-2))  # type: ignore[no-any-return]


class GatedCrossAttention(nn.Module):
    """Any cross-attention times tanh of a trained number, which begins at 0 (Flamingo).

    A pretrained language model begins as it was and lets images in as the gate opens. The gate
    trains from the first step on, what it gates from the second. Source: Alayrac et al. 2022,
    arXiv:2204.14198, section 2.2.

    It saves no memory: the gated output is kept for the gate's gradient. The OOM handbook's gate
    does skip layers, by comparing the batch's mean score with a threshold; a comparison has no
    gradient, so that gate gets none and stays what it was, and what it decides for a sample
    depends on the others of its batch.

    Args:
        attention: called as ``attention(text, image)``, returns [B, L, D].

    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return what `attention` does, [B, L, D], as far as the gate is open."""
        return self.gate.tanh() * self.attention(text, image)  # type: ignore[no-any-return]


def _check_heads(width: int, num_heads: int) -> None:
    if num_heads < 1 or width % num_heads:
        raise ConfigError(f"num_heads={num_heads} must divide width={width}")
