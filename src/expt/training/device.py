"""Fabric for one device or several, with the arithmetic that was asked for and no other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision

from expt.config.schema import Device, Precision
from expt.memory.measuring.device_memory import device_type
from expt.training.host_heap import keep_freed_memory

if TYPE_CHECKING:
    from torch import nn

MIXED: dict[Precision, Literal["16-mixed", "bf16-mixed"]] = {
    Precision.fp16: "16-mixed",
    Precision.bf16: "bf16-mixed",
}


def make_fabric(
    device: Device, precision: Precision, ranks: int = 1, sharded: bool = False
) -> Fabric:
    """Return Fabric on `device`; `auto` precision is bf16 on CUDA, else fp32.

    For the CPU, the process is set to keep the memory that a step frees for the next one. Of
    several `ranks`, which have joined `torch.distributed`, this is one; with `sharded` it has a
    part of the model.
    """
    kind = device_type(device.value)
    if kind == "cpu":
        keep_freed_memory()
    if precision is Precision.auto:
        precision = Precision.bf16 if kind == "cuda" else Precision.fp32
    options: dict[str, Any] = {"precision": "32-true"}
    if precision is not Precision.fp32:
        # As a plugin: given by name, Fabric would turn fp16 into bf16 on a CPU.
        options = {"plugins": [MixedPrecision(MIXED[precision], kind)]}
    if ranks == 1:
        return Fabric(accelerator=kind, devices=1, **options)
    return _one_of(ranks, kind, sharded, options)


def _one_of(ranks: int, kind: str, sharded: bool, options: dict[str, Any]) -> Fabric:
    """Return Fabric for one of several processes."""
    import os

    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    class Whole(DDPStrategy):
        """Every process has the whole model; gradients are summed by `GradientBuckets`."""

        def setup_module(self, module: nn.Module) -> Any:
            """Return the model as it is."""
            return module

    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    strategy = (
        ModelParallelStrategy(_shard, data_parallel_size=ranks, tensor_parallel_size=1)
        if sharded
        else Whole()
    )
    plugins = [TorchElasticEnvironment(), *options.pop("plugins", [])]
    fabric = Fabric(
        accelerator=kind, devices=local, num_nodes=ranks // local, strategy=strategy,
        plugins=plugins, **options,
    )  # fmt: skip
    fabric.launch()
    return fabric


def _shard(module: nn.Module, mesh: Any) -> nn.Module:
    from expt.memory.techniques.sharding import shard

    return shard(module, mesh["data_parallel"])
