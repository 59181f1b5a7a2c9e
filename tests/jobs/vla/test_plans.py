"""The vision-language-action job is planned at real size, without its weights."""

from __future__ import annotations

import pytest

from expt.config.validate import validated
from expt.job import Batch
from expt.run.build import build
from expt.run.planner import plan_training

pytest.importorskip("transformers")
pytest.importorskip("peft")


def test_pictures_are_kept_as_large_as_qwen_sees_them(composed) -> None:
    line = ("experiment=vla_qwen", "data.path=FOLDER")
    assert composed(*line).data.pixels == 476
    assert composed(*line, "model.image_size=308").data.pixels == 308
    assert composed(*line, "data.pixels=224").data.pixels == 224


def test_qwen_is_planned_by_its_config_and_a_cached_prefix_takes_a_third(composed) -> None:
    line = (
        "experiment=vla", "model=vla_qwen", "data=metaworld_state", "+memory=full",
        "memory.precision=bf16", "data.batch_size=2", "data.eval_batch_size=2",
        "memory.gradient_accumulation=1", "model.rank=8", "model.dropout=0",
    )  # fmt: skip
    peaks = {}
    for mode in ("off", "prefix"):
        settings = validated(composed(*line, f"memory.feature_cache={mode}"))
        data = build(settings, "data")
        planned = plan_training(settings, data, "cuda", evaluation=False)
        assert planned.method == "trace"
        peaks[mode] = planned
    # 3.75 billion frozen weights in 16 bit, but for lm_head, which the job has not.
    assert planned.by_category["gradients"] > 0
    live, kept = peaks["off"].by_category["parameters"], peaks["prefix"].by_category["parameters"]
    assert live == pytest.approx(7.8e9, rel=0.02)
    assert kept < live / 3  # 12 of 36 language layers, without embeddings and vision
    assert isinstance(data.example("train", 1), Batch)
