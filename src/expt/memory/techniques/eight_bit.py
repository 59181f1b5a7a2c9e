"""AdamW whose two moments take one byte each per weight, from bitsandbytes.

An optional package, imported when the optimizer is built. The moments are quantised in blocks of
256 values (Dettmers et al., arXiv:2110.02861); tensors of fewer than `min_8bit_size` weights keep
32-bit moments. Steps differ from AdamW's by the rounding of the moments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from torch import Tensor
from torch.optim import Optimizer

from expt.errors import ConfigError


class AdamW8bit:
    """``AdamW8bit(params, …)`` is `bitsandbytes.optim.AdamW8bit`, a `torch.optim.Optimizer`.

    Args:
        params: weights, or groups of them.
        lr: step size.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient, as in AdamW.
        min_8bit_size: weights in a tensor below which its moments stay in 32 bits.

    Raises:
        ConfigError: bitsandbytes is not installed.

    """

    def __new__(  # type: ignore[misc]
        cls,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
    ) -> Optimizer:
        """Build the optimizer."""
        try:
            from bitsandbytes.optim import AdamW8bit as Implementation
        except ModuleNotFoundError as error:
            raise ConfigError(
                "8-bit AdamW needs the package bitsandbytes, which is not installed; "
                "pip install 'expt[optim]'"
            ) from error
        return cast(
            Optimizer,
            Implementation(
                params,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                min_8bit_size=min_8bit_size,
            ),
        )
