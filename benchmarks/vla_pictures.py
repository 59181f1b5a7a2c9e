"""A tiny Qwen2.5-VL with LoRA as its own users train it, on two pictures of different size."""

from __future__ import annotations

from typing import Any

import torch
from foreign_loops import Loop, of
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503,
    "text_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6],
        },
    },
    "vision_config": {
        "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 128, "fullatt_block_indexes": [3],
    },
}  # fmt: skip
GRIDS = ((1, 16, 16), (1, 8, 24))
"""Of each picture: frames, and patches of 14 pixels by height and width; four make a token."""
PATCH_VALUES = 3 * 2 * 14 * 14
WORDS = 24


def model() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**CONFIG))
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q|k|v|o)_proj", lora_dropout=0.0)
    return get_peft_model(whole, lora)


def batch() -> dict[str, Tensor]:
    """Return one dialogue, whose words follow its pictures."""
    parts: list[int] = []
    for frames, height, width in GRIDS:
        parts += [502, *[500] * (frames * height * width // 4), 503]
    ids = torch.tensor([[*parts, *range(10, 10 + WORDS)]])
    labels = ids.clone()
    labels[:, :-WORDS] = -100
    patches = sum(frames * height * width for frames, height, width in GRIDS)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 500).int(),
        "labels": labels,
        "pixel_values": torch.randn(patches, PATCH_VALUES),
        "image_grid_thw": torch.tensor(GRIDS),
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


TWO_SIZES = Loop(model, batch, of("AdamW"), step)
