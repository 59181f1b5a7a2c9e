"""Vision-language models of transformers, tiny: their loops over image grids are traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.memory.conftest import profiled_peak
from torch import nn
from torch.utils._pytree import tree_iter

from expt.memory import plan

transformers = pytest.importorskip("transformers")
IMAGE, START, END = 150, 152, 153
PATCHES = ((4, 4), (4, 8))


def qwen() -> nn.Module:
    text = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4,
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=151,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def batch() -> dict[str, Any]:
    """One text with two images of different size: 4 patches are a token."""
    ids: list[int] = [2, 3]
    for height, width in PATCHES:
        ids += [START, *[IMAGE] * (height * width // 4), END]
    tokens = torch.tensor([[*ids, 4, 5, 6]])
    patches = sum(height * width for height, width in PATCHES)
    return {
        "input_ids": tokens,
        "labels": tokens,
        "mm_token_type_ids": (tokens == IMAGE).long(),
        "pixel_values": torch.randn(patches, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, *size] for size in PATCHES]),
    }


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_tiny_qwen_is_traced_and_predicted(lora: bool) -> None:
    def model_fn() -> nn.Module:
        model = qwen()
        if lora:
            peft = pytest.importorskip("peft")
            adapter = peft.LoraConfig(
                r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", lora_dropout=0.0
            )
            peft.inject_adapter_in_model(adapter, model)
            for name, weight in model.named_parameters():
                weight.requires_grad_("lora_" in name)
        return model

    def optimizer_fn(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([w for w in weights if w.requires_grad], foreach=False)

    planned = plan(model_fn, batch, optimizer_fn, lambda f, b: f(**b).loss, target="cpu")
    assert planned.method == "trace"
    torch.manual_seed(0)
    model = model_fn().train()
    optimizer = optimizer_fn(list(model.parameters()))

    def step() -> None:
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [v for v in tree_iter(list(optimizer.state.values())) if isinstance(v, torch.Tensor)]
    peak = profiled_peak(step, [*model.parameters(), *model.buffers(), *state])
    assert planned.peak_bytes == pytest.approx(peak, rel=0.02)
