"""The handbook's memory arithmetic: LLaVA-1.5 planned whole, by stage and by optimizer.

    python benchmarks/arithmetic.py [--again] [--only SECTION]

`plans` are 7B and 13B by their configs, predicted for CUDA: no weights, no GPU. `check` measures
tiny models of the same classes on the CPU, with torch's profiler, against their plans. Rows that
are in the result file already are kept unless `--again`. Rows of the 8-bit optimizer need the extra
`optim`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from common import markdown, run_sections, settings_for
from prediction import error, measure

NAME = "arithmetic"
GB, MIB = 1e9, 2**20
MODELS = {"7B": "model=llava", "13B": "model=llava_13b"}
PROJECTOR, LANGUAGE = "'*multi_modal_projector*'", "'*language_model*','*lm_head*'"
STAGES = {
    "projector": f"trainer.trainable=[{PROJECTOR}]",
    "language": f"trainer.trainable=[{PROJECTOR},{LANGUAGE}]",
    "all": "trainer.trainable=null",
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "SGD": ("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false"),
    "SGD with momentum": ("optimizer=sgd",),
    "AdamW, foreach": ("optimizer=adamw_foreach",),
    "AdamW, fused": ("optimizer=adamw",),
    "AdamW, 8 bits": ("optimizer=adamw_8bit",),
    "Adafactor": ("optimizer=adafactor",),
}
FULL_PRECISION = ("model.dtype=float32", "memory.precision=fp32")
CLAIMS = {
    "7B, all, AdamW, foreach": "weights 14.6, before activations > 57",
    "13B, all, AdamW, foreach": "173.6 in all",
    "13B, all, AdamW, foreach, fp32": "173.6 in all",
}
TINY = (
    "experiment=llava", "trainer.device=cpu", "data.pixels=56", "data.batch_size=4",
    "data.tokens=16",
    *(
        f"model.source.text_config.{line}"
        for line in (
            "vocab_size=512", "hidden_size=128", "intermediate_size=344", "num_hidden_layers=4",
            "num_attention_heads=4", "num_key_value_heads=4", "pad_token_id=2",
        )
    ),
    *(
        f"model.source.vision_config.{line}"
        for line in (
            "hidden_size=64", "intermediate_size=256", "num_hidden_layers=3",
            "num_attention_heads=4", "image_size=56", "projection_dim=32",
        )
    ),
    "model.source.image_token_index=500",
)  # fmt: skip
Rows = Mapping[str, Callable[[], dict[str, Any]]]


def plans() -> Rows:
    """Return the rows at real size, by name."""
    found = {}
    for size, model in MODELS.items():
        for stage, trainable in STAGES.items():
            for name, optimizer in OPTIMIZERS.items():
                line = ("experiment=llava", model, trainable, *optimizer)
                found[f"{size}, {stage}, {name}"] = line
        whole = ("experiment=llava", model)
        foreach, fused = OPTIMIZERS["AdamW, foreach"], OPTIMIZERS["AdamW, fused"]
        found[f"{size}, all, AdamW, foreach, fp32"] = (*whole, *foreach, *FULL_PRECISION)
        found[f"{size}, all, AdamW, fused, batch 8"] = (*whole, *fused, "data.batch_size=8")
        checkpointed = "memory.activation_checkpointing=true"
        found[f"{size}, all, AdamW, fused, batch 8, checkpointed"] = (
            *whole, *fused, "data.batch_size=8", checkpointed,
        )  # fmt: skip
        found[f"{size}, all, AdamW, foreach, checkpointed"] = (*whole, *foreach, checkpointed)
    return {name: partial(planned, lines) for name, lines in found.items()}


def planned(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return what a step is predicted to need on CUDA, and what it holds before activations."""
    from expt.run.build import build
    from expt.run.planner import Planner

    settings = settings_for(*lines)
    planner = Planner(settings, build(settings, "data"), "cuda")
    started, cpu = time.perf_counter(), time.process_time()
    found = planner.plan()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    model = planner.model()
    weights = list(model.parameters())
    gradients = gradient_bytes(model, planner.data)
    state = found.by_category["optimizer_state"]
    parameters = found.by_category["parameters"]
    return {
        "weights": sum(weight.numel() for weight in weights),
        "trained_weights": sum(weight.numel() for weight in weights if weight.requires_grad),
        "parameter_bytes": parameters,
        "gradient_bytes": gradients,
        "state_bytes": state,
        "before_activations_bytes": parameters + gradients + state,
        "peak_bytes": found.peak_bytes,
        "interval_bytes": list(found.interval_bytes),
        "reserved_bytes": found.reserved_bytes,
        "by_category": dict(found.by_category),
        "phase": found.phase,
        "method": found.method,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def gradient_bytes(model: Any, data: Any) -> int:
    """Return the bytes of all gradients of a model on fake tensors; not every weight has one."""
    with next(model.parameters()).fake_mode:
        batch = data.example("train", 1)
        data.loss(model(**batch.inputs), batch).backward()
    return sum(weight.grad.nbytes for weight in model.parameters() if weight.grad is not None)


def plan_table(rows: Mapping[str, Any]) -> str:
    columns = (
        "LLaVA-1.5, trained, optimizer", "claimed", "parameters", "gradients", "state",
        "before activations", "peak", "in", "planned in",
    )  # fmt: skip
    body = [
        (
            name,
            CLAIMS.get(name, ""),
            *(
                f"{row[f'{part}_bytes'] / GB:.2f}"
                for part in ("parameter", "gradient", "state", "before_activations", "peak")
            ),
            row["phase"].replace("_", " "),
            f"{row['cpu_seconds']:.0f} s",
        )
        for name, row in rows.items()
    ]
    slowest = max(row["cpu_seconds"] for row in rows.values())
    return (
        "Predicted for CUDA in GB (1e9 bytes): weights in bf16 where no other type is named, one "
        "picture of 576 tokens and 64 tokens of text, batch 1 where no other is named. A plan took "
        f"at most {slowest:.0f} seconds of one core.\n\n"
    ) + markdown(columns, body)


def checks() -> Rows:
    """Return tiny models whose plan is compared with the profiler, by name."""
    found = {}
    for kind, lines in {
        "fp32": FULL_PRECISION, "bf16": ("model.dtype=bfloat16", "memory.precision=bf16"),
    }.items():  # fmt: skip
        for stage, trainable in STAGES.items():
            for name, optimizer in OPTIMIZERS.items():
                found[f"{kind}, {stage}, {name}"] = (*TINY, *lines, trainable, *optimizer)
    return {name: partial(measure, overrides=lines) for name, lines in found.items()}


def check_table(rows: Mapping[str, Any]) -> str:
    gaps = {name: error(row) for name, row in rows.items()}
    worst = max(gaps, key=lambda name: abs(gaps[name]))
    body = [
        (
            name,
            f"{row['predicted_bytes'] / MIB:.2f} MiB",
            f"{row['measured_bytes'] / MIB:.2f} MiB",
            f"{100 * gaps[name]:+.2f} %",
            row["phase"].replace("_", " "),
        )
        for name, row in rows.items()
    ]
    return (
        f"Predicted against measured peak on the CPU, over {len(gaps)} tiny models of the same "
        f"classes: worst error {100 * gaps[worst]:+.2f} % ({worst}).\n\n"
    ) + markdown(("weights, trained, optimizer", "predicted", "measured", "error", "phase"), body)


SECTIONS: dict[str, tuple[Callable[[], Rows], Callable[[Mapping[str, Any]], str]]] = {
    "plans": (plans, plan_table),
    "check": (checks, check_table),
}


if __name__ == "__main__":
    run_sections(NAME, SECTIONS, str(__doc__))
