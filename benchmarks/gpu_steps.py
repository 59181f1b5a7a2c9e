"""Seconds, windows and bytes of a training step at 207 sensors, other loops, and the floor.

The floor is what the arithmetic and the least traffic of a step take at the device's own measured
rates, whichever is more:

- arithmetic: the step's floating-point operations as `torch.utils.flop_counter` counts them
  (matrix products and attention), over the rate of a large matrix product in the same precision;
- traffic: every activation that the backward pass needs is written and read once, and so is its
  gradient (4 x the plan's activations), and the optimizer reads weight, gradient and two moments
  and writes three of them in fp32 (28 bytes a weight), over the rate of a large copy, whose bytes
  are counted once read and once written.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from common import do_step, make_trainer, settings_for
from gpu_correctness import listen, order
from rival_loops import now

from expt.memory.techniques.techniques import apply
from expt.run.build import build
from expt.run.planner import plan_training

WARM_STEPS = 6
"""Before the clock starts: a step is captured in the fourth."""
MOMENTS_BYTES = 28
PASSES_OVER_ACTIVATIONS = 4


def step(
    preset: str, device: str, seconds: float, *overrides: str, data: str = "data=metr_la_week"
) -> dict[str, Any]:
    """Return time, windows a second and peaks of the steps of one configuration."""
    said: list[str] = []
    trainer = make_trainer(
        f"+memory={preset}", data, f"trainer.device={device}", *overrides,
        apply=apply,
    )  # fmt: skip
    listen(trainer, said)
    trainer.model.train()
    batch = trainer.data.batch_size
    batches = [samples for samples in order(trainer, 200) if len(samples) == batch]
    trainer.meter.start_epoch()
    started = time.perf_counter()
    for samples in batches[:WARM_STEPS]:
        with trainer.meter.step():
            do_step(trainer, samples)
    warm_seconds = now(trainer.fabric.device) - started
    count, start = 0, now(trainer.fabric.device)
    while count < 3 or time.perf_counter() - start < seconds:
        do_step(trainer, batches[count % len(batches)])
        count += 1
        if count % 50 == 0:
            now(trainer.fabric.device)  # the host must not run ahead of the clock
    took = (now(trainer.fabric.device) - start) / count
    return {
        "preset": preset,
        "overrides": list(overrides),
        "precision": str(trainer.fabric.strategy.precision.precision),
        "batch_size": batch,
        "seconds_per_step": took,
        "windows_per_second": batch / took,
        "steps": count,
        "warm_up_seconds": warm_seconds,
        "captured": bool(getattr(trainer.steps, "captured", False)),
        "said": said,
        "peak_allocated_bytes": trainer.meter.peak_allocated_bytes(),
        "peak_reserved_bytes": trainer.meter.peak_reserved_bytes(),
    }


def rivals(preset: str, device: str, rounds: int, steps: int, *overrides: str) -> dict[str, Any]:
    """Time our whole loop, a DataLoader loop and lightning's Trainer, round by round."""
    from loop_times import measure
    from rival_loops import found_lightning

    given = ("data=metr_la_week", *overrides)
    found = measure(preset, device, rounds, steps, found_lightning(), *given)
    batch = settings_for(f"+memory={preset}", *given).arguments["data"]["batch_size"]
    for name in ("ours", "bare loop", "lightning"):
        if name in found:
            found[name]["windows_per_second"] = batch / found[name]["seconds_per_step"]
    return found


def floor(preset: str, precision: str, device: str, *overrides: str) -> dict[str, Any]:
    """Return the least time of a step: counted work over measured rates."""
    from torch.utils.flop_counter import FlopCounterMode

    given = [
        f"+memory={preset}", "data=metr_la_week", f"memory.precision={precision}",
        "trainer.compile=off", *overrides,
    ]  # fmt: skip
    settings = settings_for(*given)
    target: Any = device
    plan = plan_training(settings, build(settings, "data"), target, evaluation=False)
    trainer = make_trainer(*given, f"trainer.device={device}")
    trainer.model.train()
    samples = trainer.batches.of(torch.arange(trainer.data.batch_size))
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(samples)
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    moved = PASSES_OVER_ACTIVATIONS * plan.by_category["activations"] + MOMENTS_BYTES * parameters
    measured = rates(trainer.fabric.device, precision, small=bool(overrides))
    arithmetic = counter.get_total_flops() / measured["operations_per_second"]
    traffic = moved / measured["bytes_per_second"]
    return {
        "preset": preset,
        "precision": precision,
        "operations": counter.get_total_flops(),
        "moved_bytes": moved,
        **measured,
        "arithmetic_seconds": arithmetic,
        "traffic_seconds": traffic,
        "floor_seconds": max(arithmetic, traffic),
    }


def rates(device: torch.device, precision: str, small: bool = False) -> dict[str, float]:
    """Measure the device's rates: a large matrix product, and a large copy."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    size = 256 if small else 8192
    left = torch.randn(size, size, device=device, dtype=kind)
    product = best_seconds(lambda: left @ left, device)
    source = torch.empty((2**20 if small else 2**30), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    return {
        "operations_per_second": 2 * size**3 / product,
        "bytes_per_second": 2 * source.nbytes / copy,
    }


def best_seconds(work: Any, device: torch.device, rounds: int = 5, inner: int = 10) -> float:
    """Return the seconds of one call, the best of some rounds."""
    work()
    found = []
    for _ in range(rounds):
        start = now(device)
        for _ in range(inner):
            work()
        found.append((now(device) - start) / inner)
    return min(found)
