"""How actions are made of noise: by flow matching, or by denoising diffusion.

Both are trained on a value between noise and actions, at a level drawn from [0, 1), and both start
from noise when actions are wanted. What is random is drawn with the sample, not here, so that a
step is the same in parts, on several devices and when it is taken again.

Letters: `B` samples, `H` steps of a chunk, `A` actions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from expt.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]
"""Of noisy actions [B,H,A] and their level [B] in [0, 1]: what the objective wants of them."""


class Objective(Protocol):
    """What the network is trained to say, and how actions follow from it."""

    def blend(self, actions: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noisy actions [B,H,A], the network's level [B], and what it should say."""

    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        """Return actions [B,H,A] from noise, in as many calls of the network as `steps`."""


class Flow:
    """Flow matching along straight lines (Lipman et al., ICLR 2023), as pi0 has it.

    The level t is the share of noise, Beta(1.5, 1) on [0.001, 1] (Black et al., arXiv:2410.24164).
    """

    smallest = 0.001

    def blend(self, actions: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Objective`; the network should say noise - actions."""
        share = self.smallest + (1 - self.smallest) * level ** (1 / 1.5)  # the inverse of t^1.5
        at = share[:, None, None]
        return at * noise + (1 - at) * actions, share, noise - actions

    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        """See `Objective`; Euler's steps of equal length."""
        value = noise
        for step in range(steps):
            share = torch.full_like(noise[:, 0, 0], 1 - step / steps)
            value = value - network(value, share) / steps
        return value


class Ddpm:
    """Denoising diffusion that predicts the noise (Ho et al., NeurIPS 2020).

    100 levels of a squared cosine (Nichol and Dhariwal, ICML 2021), sampled by DDIM without noise
    (Song et al., ICLR 2021). The schedule is that of diffusers.
    """

    levels = 100
    clip = 5.0
    """Normalised actions are not let beyond it, where nearly all is noise."""

    def __init__(self) -> None:
        try:
            from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
        except ImportError as error:
            raise ConfigError(
                "model.objective=ddpm needs the package diffusers: pip install 'expt[vla]'"
            ) from error
        betas: Tensor = betas_for_alpha_bar(self.levels)
        self.kept: list[float] = torch.cumprod(1 - betas, dim=0).tolist()

    def blend(self, actions: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Objective`; the network should say the noise."""
        index = (level * self.levels).long().clamp(max=self.levels - 1)
        kept = torch.tensor(self.kept, dtype=noise.dtype, device=noise.device)[index, None, None]
        noisy = kept.sqrt() * actions + (1 - kept).sqrt() * noise
        return noisy, index.to(noise.dtype) / self.levels, noise

    def sample(self, network: Network, noise: Tensor, steps: int) -> Tensor:
        """See `Objective`; DDIM over evenly spaced levels, from the last, which is noise alone."""
        value = noise
        indices = [round(at * self.levels / steps) - 1 for at in range(steps, 0, -1)]
        for index, following in zip(indices, [*indices[1:], None], strict=True):
            said = network(value, torch.full_like(noise[:, 0, 0], index / self.levels))
            kept = self.kept[index]
            before = 1.0 if following is None else self.kept[following]
            clean = ((value - (1 - kept) ** 0.5 * said) / kept**0.5).clamp(-self.clip, self.clip)
            said = (value - kept**0.5 * clean) / (1 - kept) ** 0.5
            value = before**0.5 * clean + (1 - before) ** 0.5 * said
        return value


OBJECTIVES: dict[str, Callable[[], Objective]] = {"flow": Flow, "ddpm": Ddpm}
"""Values of `model.objective`."""
