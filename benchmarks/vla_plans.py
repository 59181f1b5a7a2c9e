"""Predicted peaks of the vision-language-action job: against the profiler, and at real size."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import planned_steps
from common import ROOT, markdown, settings_for
from prediction import as_row, error, measure, peaks_table, profiled_peak
from vla_pictures import TWO_SIZES

GB = 1e9
PICTURES = ROOT / "outputs" / "demonstrations" / "benchmark"
SMALL_QWEN = (
    "model.backbone={model_type:qwen2_5_vl,image_token_id:500,video_token_id:501,"
    "vision_start_token_id:502,vision_end_token_id:503,text_config:{hidden_size:128,"
    "intermediate_size:256,num_hidden_layers:6,num_attention_heads:4,num_key_value_heads:2,"
    "vocab_size:512,bos_token_id:1,eos_token_id:2,pad_token_id:0,rope_parameters:"
    "{rope_type:default,rope_theta:1000000.0,mrope_section:[4,6,6]}},vision_config:{depth:4,"
    "hidden_size:64,intermediate_size:128,num_heads:4,out_hidden_size:128,"
    "fullatt_block_indexes:[3]}}"
)
CPU = ("trainer.device=cpu", "loader.num_workers=0", "memory.feature_cache=off")
SEEN = ("experiment=vla", "data=metaworld")
QWEN = (*SEEN, "+memory=full", "model=vla_qwen", "model.dropout=0.0", "memory.precision=bf16")
LIVE, KEPT = "memory.feature_cache=off", "memory.feature_cache=prefix"
CHECKPOINTED = "memory.activation_checkpointing=true"
PLAIN = "memory.activation_checkpointing=false"


def pictures() -> str:
    """Return the setting of a few demonstrations with pictures, which are made where missing."""
    subprocess.run(
        [sys.executable, "-m", "expt.jobs.vla.demonstrate", str(PICTURES), "--episodes", "6"],
        check=True, capture_output=True,
    )  # fmt: skip
    return f"data.path={PICTURES}"


def predictions() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return tiny configurations whose plan is compared with the profiler, by name."""
    where = pictures()
    state = ("experiment=vla", "+memory=lite")
    seen = (*SEEN, where, "+memory=lite", "data.batch_size=8", "data.eval_batch_size=8")
    qwen = (*seen, SMALL_QWEN, "model.live_layers=3", "model.expert_width=96", "model.rank=8")
    found = {
        "small, state, lite": state,
        "small, state, full": ("experiment=vla", "+memory=full"),
        "small, state, bf16": (*state, "memory.precision=bf16"),
        "small, state, ddpm": (*state, "model.objective=ddpm"),
        "small, two cameras": seen,
        "small, expert only": (*seen, "model.rank=0"),
        "Qwen2.5-VL, tiny": (*qwen, PLAIN),
        "Qwen2.5-VL, tiny, checkpointed": (*qwen, CHECKPOINTED),
        "Qwen2.5-VL, tiny, bf16": (*qwen, PLAIN, "memory.precision=bf16"),
        "Qwen2.5-VL, tiny, bf16, checkpointed": (
            *qwen, CHECKPOINTED, "memory.precision=bf16",
        ),
        "Qwen2.5-VL, tiny, one picture of 112 px": (
            *qwen, PLAIN, "data.cameras=[front]", "model.image_size=112",
        ),
        "Qwen2.5-VL, tiny, LoRA in all layers": (*qwen, PLAIN, "model.live_layers=6"),
        "Qwen2.5-VL, tiny, one micro-batch": (*qwen, PLAIN, "memory.gradient_accumulation=1"),
    }  # fmt: skip
    rows = {name: partial(measure, overrides=(*lines, *CPU)) for name, lines in found.items()}
    return rows | {"Qwen2.5-VL, tiny, two pictures of different size": two_sizes}


def two_sizes() -> dict[str, Any]:
    """Return what a loop over transformers' own model needs, without our job."""
    made = planned_steps.loop(TWO_SIZES)
    made.parts[0]()
    return as_row(made.predicted, profiled_peak(made.parts[0], made.live[0]))


def prediction_table(rows: Mapping[str, Any]) -> str:
    gaps = sorted(abs(error(row)) for row in rows.values())
    return (
        f"Predicted against measured peak on the CPU, over {len(gaps)} tiny configurations: median "
        f"error {100 * statistics.median(gaps):.2f} %, worst {100 * gaps[-1]:.2f} %.\n\n"
    ) + peaks_table(rows)


def guide() -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the rows of guide C with Qwen2.5-VL-3B, by name."""
    where = pictures()
    found: dict[str, tuple[str, ...]] = {}
    for batch in (2, 4, 8):
        size = (f"data.batch_size={batch}", f"data.eval_batch_size={batch}")
        one = (*QWEN, where, *size, "memory.gradient_accumulation=1", "model.rank=8")
        whole = (*one, "model.live_layers=36")
        for name, way in (("", PLAIN), (", checkpointed", CHECKPOINTED)):
            found[f"live, batch {batch}{name}"] = (*whole, LIVE, way)
            found[f"prefix, 12 live layers, batch {batch}{name}"] = (
                *one, KEPT, way, "model.live_layers=12",
            )  # fmt: skip
            found[f"prefix, 8 live layers, batch {batch}{name}"] = (
                *one, KEPT, way, "model.live_layers=8",
            )  # fmt: skip
        for live in (4, 0):
            depth = (f"model.live_layers={live}",) if live else ("model.rank=0",)
            found[f"prefix, {live} live layers, batch {batch}"] = (*one, KEPT, PLAIN, *depth)
        if batch == 4:
            found["live, batch 4, all trained weights in bf16"] = (
                *whole, LIVE, PLAIN, "model.trained_dtype=bfloat16",
            )  # fmt: skip
            found["prefix, 12 live layers, batch 4, all trained weights in bf16"] = (
                *one, KEPT, PLAIN, "model.live_layers=12", "model.trained_dtype=bfloat16",
            )  # fmt: skip
            found["live, batch 4, frozen weights in host memory"] = (
                *whole, LIVE, PLAIN, "memory.weight_offload=true",
            )  # fmt: skip
            for rank in (4, 16, 32):
                found[f"prefix, 12 live layers, batch 4, rank {rank}"] = (
                    *one, KEPT, PLAIN, "model.live_layers=12", f"model.rank={rank}",
                )  # fmt: skip
    for preset in ("full", "lite", "minimal"):
        found[f"preset {preset}"] = (
            *SEEN, where, "model=vla_qwen", f"+memory={preset}", "data.eval_batch_size=2",
            "memory.precision=bf16",
        )  # fmt: skip
    return {name: partial(planned, lines) for name, lines in found.items()}


def planned(lines: tuple[str, ...]) -> dict[str, Any]:
    """Return what training is predicted to need on CUDA."""
    import time

    from expt.run.build import build
    from expt.run.planner import plan_training

    settings = settings_for(*lines)
    started = time.process_time()
    found = plan_training(settings, build(settings, "data"), "cuda", evaluation=False)
    return {
        "peak_bytes": found.peak_bytes,
        "reserved_bytes": found.reserved_bytes,
        "interval_bytes": list(found.interval_bytes),
        "by_category": dict(found.by_category),
        "phase": found.phase,
        "cpu_seconds": time.process_time() - started,
    }


CLAIMS = {
    "live, batch 4": "17 to 22 GB",
    "live, batch 4, checkpointed": "activations -50 to -70 %",
    "prefix, 12 live layers, batch 4": "-10 GB",
}
CARDS = (24, 40, 80)


def guide_table(rows: Mapping[str, Any]) -> str:
    columns = (
        "Qwen2.5-VL-3B, LoRA, expert", "claimed", "peak", "weights", "gradients", "optimizer",
        "activations", "reserved", "fits a card of",
    )  # fmt: skip
    body = []
    for name, row in rows.items():
        parts = row["by_category"]
        fits = [card for card in CARDS if row["reserved_bytes"] * 1.05 < (card - 0.6) * 2**30]
        body.append(
            (
                name,
                CLAIMS.get(name, ""),
                *(
                    f"{count / GB:.2f}"
                    for count in (
                        row["peak_bytes"], parts["parameters"], parts["gradients"],
                        parts["optimizer_state"], parts["activations"], row["reserved_bytes"],
                    )
                ),
                f"{min(fits)} GB" if fits else f"none of {CARDS}",
            )
        )  # fmt: skip
    seconds = [row["cpu_seconds"] for row in rows.values()]
    return (
        "Guide C at real size, predicted for CUDA in GB (1e9 bytes), bf16, rank 8 where no other "
        "is named, two pictures of 476 px and a sentence: 588 tokens. A plan took "
        f"{statistics.median(seconds):.0f} CPU seconds in the median, {max(seconds):.0f} at "
        "most.\n\n"
    ) + markdown(columns, body)
