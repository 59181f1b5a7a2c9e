"""Several processes that train one model: how many there are, and what cannot be combined with it.

The number is `trainer.devices`, or what torchrun says in the environment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from expt.config.schema import AUTO, Compile, Device, MemoryConfig, Precision, TrainerConfig

SHAPED_LIKE_WEIGHTS = (
    "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "SGD",
)  # fmt: skip
"""Optimizers of torch whose state has the shapes of the weights, and can be shared out as they."""

FUSED = ("Adam", "AdamW")
"""Those whose fused kernel takes weights that are shared out."""


def launched() -> int:
    """Return how many processes torchrun, or `expt.run.ranks`, has started; 1 if it did not."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def as_launched(trainer: TrainerConfig) -> tuple[TrainerConfig, list[str]]:
    """Return the settings with the number of processes that there are, and what contradicts it."""
    count = launched()
    if count == 1 or trainer.devices == count:
        return trainer, []
    if trainer.devices != 1:
        return trainer, [
            f"trainer.devices={trainer.devices}, and {count} processes were started (WORLD_SIZE); "
            f"leave trainer.devices out, or start {trainer.devices}"
        ]
    return replace(trainer, devices=count), []


def rank_problems(
    trainer: TrainerConfig,
    memory: MemoryConfig,
    arguments: Mapping[str, Mapping[str, Any]],
    is_trial: bool,
) -> list[str]:
    """Return one message per setting that several processes cannot have."""
    count = trainer.devices
    if count == 1:
        return []
    name = f"trainer.devices={count}"
    found = []
    if trainer.device is Device.mps:
        found.append(f"{name}: MPS is one device; set trainer.device=cpu or cuda")
    if trainer.compile in (Compile.graph, Compile.compile):
        found.append(
            f"trainer.compile={trainer.compile.value}: a captured or compiled step cannot wait for "
            f"other processes in the middle, and {name}; set trainer.compile=off"
        )
    if memory.optimizer_in_backward:
        found.append(
            "memory.optimizer_in_backward=true steps each weight before its gradient is summed "
            f"over the processes of {name}; set it to false"
        )
    if memory.smaller_runs:
        found.append(
            f"memory.fallback starts another run in the process of the first, and {name} has "
            "several; set memory.fallback=none"
        )
    if is_trial:
        found.append(
            f"{name}: a search gives every trial one device; leave trainer.devices out, and train "
            "the winner with it"
        )
    size = arguments.get("data", {}).get("batch_size")
    if size == AUTO:
        found.append(
            f"data.batch_size=auto is found for one device, and {name}; give the number of samples "
            "of a step, like data.batch_size=32"
        )
    elif isinstance(size, int) and size < count * memory.gradient_accumulation:
        parts = memory.gradient_accumulation
        found.append(
            f"data.batch_size={size} is of a whole step, and {name} with "
            f"memory.gradient_accumulation={parts} cuts it into {count * parts} parts; give "
            f"data.batch_size={count * parts} or more"
        )
    return found + (_sharding_problems(trainer, memory, arguments) if trainer.sharded else [])


def _sharding_problems(
    trainer: TrainerConfig, memory: MemoryConfig, arguments: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    name = "trainer.strategy=fsdp"
    found = []
    if trainer.ema_decay is not None:
        found.append(
            f"trainer.ema_decay={trainer.ema_decay} keeps an average of whole weights, which no "
            f"process has with {name}; set it to null, or trainer.strategy=ddp"
        )
    if memory.precision is Precision.fp16:
        found.append(
            f"memory.precision=fp16: with {name} a process sees only its part of the gradients, "
            "and fp16's scaler has to know whether any overflows; use bf16 or fp32"
        )
    if memory.saved_tensor_offload:
        found.append(
            "memory.saved_tensor_offload=true would copy every block's weights to the host, which "
            f"{name} gives back and gathers again; set it to false"
        )
    if memory.weight_offload:
        found.append(
            f"memory.weight_offload=true keeps whole weights on the host, and {name} has parts of "
            "them on every device; choose one of the two"
        )
    if memory.forward_chunks > 1:
        found.append(
            f"memory.forward_chunks={memory.forward_chunks}: with {name} all processes run the "
            "model equally often, and slices of unequal shares are not; use a smaller "
            "data.eval_batch_size"
        )
    module, _, kind = str(arguments.get("optimizer", {}).get("_target_", "")).rpartition(".")
    if kind and (not module.startswith("torch.optim") or kind not in SHAPED_LIKE_WEIGHTS):
        found.append(
            f"optimizer._target_={module}.{kind}: its state is not known to have the shape of the "
            f"weights, by which {name} shares it out; use optimizer=adamw or sgd"
        )
    elif arguments["optimizer"].get("fused") and kind not in FUSED:
        found.append(
            f"optimizer.fused=true: torch has no fused {kind} of weights that are shared out, as "
            f"{name} does; set optimizer.fused=false"
        )
    return found


def device_problems(trainer: TrainerConfig) -> list[str]:
    """Return that there are fewer cards here than processes that need one, if so."""
    if trainer.devices == 1 or trainer.device not in (Device.auto, Device.cuda):
        return []
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.devices))
    here = torch.cuda.device_count()
    if not torch.cuda.is_available() or here >= local:
        return []
    return [
        f"trainer.devices={local}: every process needs a card of its own, and there "
        f"{'is one' if here == 1 else f'are {here}'} here; give trainer.devices={here}"
        + (", or trainer.device=cpu" if trainer.device is Device.auto else "")
    ]
