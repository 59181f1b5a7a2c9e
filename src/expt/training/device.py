"""Fabric for one device, with the arithmetic that was asked for and no other."""

from __future__ import annotations

from typing import Literal

from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision

from expt.config.schema import Device, Precision
from expt.memory.measuring.device_memory import device_type
from expt.training.host_heap import keep_freed_memory

MIXED: dict[Precision, Literal["16-mixed", "bf16-mixed"]] = {
    Precision.fp16: "16-mixed",
    Precision.bf16: "bf16-mixed",
}


def make_fabric(device: Device, precision: Precision) -> Fabric:
    """Return Fabric on `device`; `auto` precision is bf16 on CUDA, else fp32.

    For the CPU, the process is set to keep the memory that a step frees for the next one.
    """
    kind = device_type(device.value)
    if kind == "cpu":
        keep_freed_memory()
    if precision is Precision.auto:
        precision = Precision.bf16 if kind == "cuda" else Precision.fp32
    if precision is Precision.fp32:
        return Fabric(accelerator=kind, devices=1, precision="32-true")
    # As a plugin: given by name, Fabric would turn fp16 into bf16 on a CPU.
    return Fabric(accelerator=kind, devices=1, plugins=[MixedPrecision(MIXED[precision], kind)])
