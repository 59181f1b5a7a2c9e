"""What `benchmarks/gpu.py` measures: sections of items, each a function that returns a row."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

PRESETS = ("minimal", "lite", "full")
NEEDED = {
    "torch": "torch", "hydra-core": "hydra", "omegaconf": "omegaconf", "numpy": "numpy",
    "lightning-fabric": "lightning_fabric", "pydantic": "pydantic",
}  # fmt: skip
"""Distributions and what is imported of them; pytorch-lightning brings lightning_fabric along."""
WELCOME = ("triton", "pytorch-lightning", "matplotlib", "mlflow", "optuna", "bitsandbytes")
TINY = (
    "model.embed_dim=8", "model.num_heads=2", "model.num_layers=1", "model.num_stages=1",
    "model.patch_sizes=[1]", "data.batch_size=2", "data.eval_batch_size=4",
)  # fmt: skip
SERIES = "EXPT_METR_LA"
WATCHED_STEPS = 80
"""Twice as many and eight are run, and an epoch of minimal on a week has 174 full batches."""
OWN_PROCESS = ("steps", "recovery", "memory")
"""Sections whose figures are peaks: what an item leaves behind would count in the next one's."""
MARGIN_SECONDS = 60.0
"""After the minutes are up, for a training to finish its step and save itself."""
Item = Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What to measure, on what, how thoroughly, and until when."""

    device: str
    smoke: bool
    until: float  # seconds since the epoch
    again: bool = False  # begin trainings anew
    group: str = ""  # the folder of trainings of this card and code

    @property
    def small(self) -> tuple[str, ...]:
        """Settings that make everything tiny, for `--smoke`."""
        return TINY if self.smoke else ()

    @property
    def presets(self) -> tuple[str, ...]:
        """Presets to measure; tiny ones are all alike."""
        return PRESETS[-1:] if self.smoke else PRESETS

    @property
    def precisions(self) -> tuple[str, ...]:
        """Arithmetic to measure steps in; `correctness` trains in both, also where it is tiny."""
        return ("bf16",) if self.smoke else ("bf16", "fp32")

    @property
    def seconds_left(self) -> float:
        """Seconds until the minutes are up."""
        return self.until - time.time()


def environment(plan: Plan) -> dict[str, Item]:
    def look() -> dict[str, Any]:
        import torch

        found: dict[str, Any] = {
            name: version(name) or "not installed" for name in (*NEEDED, *WELCOME)
        }
        for name, module in NEEDED.items():
            if version(name) is None and importable(module):
                found[name] = "part of another package"
        if plan.device == "cuda":
            properties = torch.cuda.get_device_properties(0)
            free, total = torch.cuda.mem_get_info()
            found |= {
                "gpu": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
                "total_bytes": total,
                "free_bytes": free,
                "cuda": torch.version.cuda,
                "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "default"),
            }
        return found

    return {"here": look}


def correctness(plan: Plan) -> dict[str, Item]:
    from gpu_correctness import CASES, against_cpu, against_eager, with_dropout
    from gpu_waiting import waiting

    steps = 3 if plan.smoke else 200
    watched = min(steps, WATCHED_STEPS)
    items: dict[str, Item] = {"no waiting": partial(waiting, plan.device, watched, *plan.small)}
    for how in hows(plan):
        for case in list(CASES)[-2 if plan.smoke else 0 :]:
            items[f"{how}, {case}"] = partial(
                against_eager, how, case, plan.device, steps, *plan.small
            )
        items[f"{how}, dropout"] = partial(with_dropout, how, plan.device, steps, *plan.small)
    items["device against cpu"] = partial(against_cpu, plan.device, min(steps, 50), *plan.small)
    return items


def steps(plan: Plan) -> dict[str, Item]:
    from gpu_steps import step

    saving = "memory.activation_checkpointing=true"
    seconds = 0.05 if plan.smoke else 3.0
    items: dict[str, Item] = {}
    for preset in plan.presets:
        kinds = [(p, how, ()) for how in ("off", *hows(plan)) for p in plan.precisions]
        kinds += [("bf16", how, (saving,)) for how in ("off", hows(plan)[0])[plan.smoke :]]
        for precision, how, extra in kinds:
            name = f"{preset}, {precision}, {how}{', checkpointing' if extra else ''}"
            items[name] = partial(
                step, preset, plan.device, seconds, f"memory.precision={precision}",
                f"trainer.compile={how}", *extra, *plan.small,
            )  # fmt: skip
    return items


def loops(plan: Plan) -> dict[str, Item]:
    from gpu_steps import rivals

    rounds, count = (1, 2) if plan.smoke else (3, 60)
    return {p: partial(rivals, p, plan.device, rounds, count, *plan.small) for p in plan.presets}


def floors(plan: Plan) -> dict[str, Item]:
    from gpu_steps import floor

    return {
        f"{preset}, {precision}": partial(floor, preset, precision, plan.device, *plan.small)
        for preset in plan.presets
        for precision in plan.precisions
    }


def memory(plan: Plan) -> dict[str, Item]:
    """Return the presets' rows of `benchmarks/gpu_memory.py`, which has many more."""
    from gpu_memory import all_rows, measure_ours

    return {
        name: partial(measure_ours, [*row["overrides"], *plan.small], plan.device)
        for name, row in all_rows().items()
        if name in {f"guide {preset} {kind}" for preset in plan.presets for kind in plan.precisions}
    }


def recovery(plan: Plan) -> dict[str, Item]:
    from gpu_trials import recovery as recover

    count = 6 if plan.smoke else 30
    small = (*plan.small, "data.batch_size=16", "model.embed_dim=16") if plan.smoke else ()
    presets = [preset for preset in plan.presets if preset != "minimal"]
    return {p: partial(recover, p, plan.device, count, *last(small)) for p in presets}


def accuracy(plan: Plan) -> dict[str, Item]:
    from gpu_trials import accuracy as train

    small = (*plan.small, "debug=smoke") if plan.smoke else ()
    # Hydra takes the values of the command line after those of debug=smoke.
    data = ["metr_la_week"] if plan.smoke else ["metr_la_29"]
    data += ["metr_la"] if os.environ.get(SERIES) and not plan.smoke else []
    models = ("lite",) if plan.smoke else ("lite", "full", "stid", "minimal")
    return {
        f"{model}, {series}, seed {seed}": partial(
            budgeted, plan, train, model, series, seed, *small
        )
        for series in data
        for seed in ((0,) if plan.smoke else (0, 1, 2))
        for model in models
    }


def budgeted(plan: Plan, train: Any, *arguments: Any) -> Mapping[str, Any]:
    """Train for the seconds that are left."""
    model, series, seed, *small = arguments
    found: Mapping[str, Any] = train(
        model, series, seed, plan.device, plan.seconds_left, *small,
        group=plan.group, anew=plan.again or plan.smoke,
    )  # fmt: skip
    return found


def hows(plan: Plan) -> tuple[str, ...]:
    """Return the values of trainer.compile to compare with off."""
    if plan.device == "cuda":
        return ("graph", "compile") if importlib.util.find_spec("triton") else ("graph",)
    return ("auto",)


def last(overrides: tuple[str, ...]) -> list[str]:
    """Return overrides without those that a later one replaces."""
    return list({line.partition("=")[0]: line for line in overrides}.values())


def importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


SECTIONS: dict[str, Callable[[Plan], dict[str, Item]]] = {
    "environment": environment,
    "correctness": correctness,
    "steps": steps,
    "floors": floors,
    "loops": loops,
    "recovery": recovery,
    "memory": memory,
    "accuracy": accuracy,
}
