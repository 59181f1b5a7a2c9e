"""The device that a plan is for, which need not be here: its arithmetic and its bytes."""

from __future__ import annotations

import logging
from typing import Literal, cast

import torch

from expt.config.schema import Device, MemoryConfig, Precision, TrainerConfig
from expt.errors import ConfigError
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import total_bytes
from expt.memory.planning.predict import Target
from expt.units import CONTEXT_BYTES, parse_bytes

log = logging.getLogger(__name__)


def arithmetic(precision: Precision, target: Target) -> Literal["fp32", "bf16", "fp16"]:
    """Return the arithmetic that a precision means on a device."""
    if precision is Precision.auto:
        return "bf16" if target == "cuda" else "fp32"
    return cast(Literal["fp32", "bf16", "fp16"], precision.value)


def target_of(trainer: TrainerConfig, asked: str | None) -> Target:
    """Return the device to plan for: the one asked for, the run's, or else CUDA."""
    if asked is not None:
        return cast(Target, asked)
    return "cpu" if trainer.device in (Device.cpu, Device.mps) else "cuda"


def target_remark(trainer: TrainerConfig, asked: str | None) -> str | None:
    """Return that a plan is for a card that nobody named and that is not here, if so."""
    if asked is None and trainer.device is Device.auto and not torch.cuda.is_available():
        return "planned for cuda, which is not here; memory.target=cpu plans for this machine"
    return None


def budget_bytes(value: object, target: Target) -> int | None:
    """Return the bytes of a budget on a device that need not be here.

    Raises:
        ConfigError: a share or `auto` of a card that is not here.

    """
    if value is None:
        return None
    if target == "cpu" or torch.cuda.is_available():
        return Budget.parse(value, torch.device(target)).bytes
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ConfigError(
            f"memory.budget={value} depends on the card, and there is none here; give an amount, "
            "like memory.budget=24GiB, or memory.target=cpu"
        ) from error


def card_bytes(card: object, target: Target) -> int | None:
    """Return what CUDA's allocator has on a card: the one named, or here; None: not known."""
    if target != "cuda":
        return None
    if card is not None:
        return parse_bytes(card) - CONTEXT_BYTES
    return total_bytes(torch.device("cuda")) - CONTEXT_BYTES if torch.cuda.is_available() else None


def allocator_limit(memory: MemoryConfig, target: Target) -> int | None:
    """Return what the allocator gives free segments back for: the budget, or the card."""
    limits = [card_bytes(memory.card, target)]
    if target == "cuda" and memory.budget is not None:
        try:
            limits.append(budget_bytes(memory.budget, target))
        except ConfigError:
            log.info("the budget's bytes are not known", exc_info=True)
    return min((limit for limit in limits if limit is not None), default=None)
