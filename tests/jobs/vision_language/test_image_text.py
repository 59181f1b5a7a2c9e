"""A whole vision-language model is trained on what is said about pictures, and is planned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from expt.config.validate import validated
from expt.errors import ConfigError, ModelError
from expt.job import Batch
from expt.jobs.vision_language.data import UNSAID, GeneratedInstructions
from expt.jobs.vision_language.model import ImageTextModel
from expt.run.build import build
from expt.run.planner import Planner

transformers = pytest.importorskip("transformers")
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 2,
}  # fmt: skip
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 60,
    "text_config": {"model_type": "llama", **TEXT},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "projection_dim": 16,
    },
}  # fmt: skip
QWEN: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62,
    "vision_end_token_id": 63,
    "text_config": {
        **TEXT, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3],
        },
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 32, "fullatt_block_indexes": [1],
    },
}  # fmt: skip

PALIGEMMA: dict[str, Any] = {
    "model_type": "paligemma",
    "image_token_index": 60, "projection_dim": 32,
    "text_config": {"model_type": "gemma", "head_dim": 16, **TEXT},
    "vision_config": {**LLAVA["vision_config"], "model_type": "siglip_vision_model"},
}  # fmt: skip


def data(**sizes: Any) -> GeneratedInstructions:
    return GeneratedInstructions(**{"pixels": 28, "tokens": 8, "samples": 16, **sizes})


def some(source: GeneratedInstructions, count: int = 4) -> Batch:
    items = [source.item("train", index, torch.Generator()) for index in range(count)]
    names = items[0].inputs
    inputs = {name: torch.stack([item.inputs[name] for item in items]) for name in names}
    return Batch(inputs, torch.stack([item.target for item in items]))


@pytest.mark.parametrize("source", [LLAVA, QWEN], ids=["llava", "qwen"])
def test_it_is_the_model_of_transformers_with_its_own_loss(source) -> None:
    torch.manual_seed(0)
    model, own = ImageTextModel(source), data()
    batch = some(own)
    logits = model(**batch.inputs)
    assert logits.shape == (4, 8, 64)
    loss = own.loss(logits, batch) / own.batch_weight(batch)

    pictures = model.prompts.pictures(batch.inputs["images"].flatten(0, 1))
    ids, mask, _ = model.prompts(**batch.inputs)
    more: dict[str, Any] = {"pixel_values": pictures}
    if source is QWEN:
        more = model.prompts.patches(pictures)
        more["mm_token_type_ids"] = (ids == 60).int()
    labels = torch.full_like(ids, UNSAID)
    labels[:, -8:] = batch.target
    theirs = model.model(input_ids=ids, attention_mask=mask.long(), labels=labels, **more)
    torch.testing.assert_close(loss, theirs.loss)
    torch.testing.assert_close(logits, theirs.logits[:, -8:])


def test_the_answer_follows_from_picture_and_question_together() -> None:
    batch = some(data(samples=64), 64)
    colours = (batch.inputs["images"][:, 0, :, 0, 0] > 0).long() @ torch.tensor([1, 2, 4])
    question, answer = batch.inputs["tokens"].split(4, dim=1)
    assert torch.equal(answer, 3 + (question - 3 + colours[:, None]) % 8)
    assert torch.equal(batch.target[:, 4:], answer)
    assert (batch.target[:, :4] == UNSAID).all()
    assert len(colours.unique()) == 8


def test_no_word_of_an_answer_looks_at_a_later_one() -> None:
    model, inputs = ImageTextModel(PALIGEMMA).eval(), dict(some(data()).inputs)
    with torch.no_grad():
        before = model(**inputs)
        other = model(**{**inputs, "tokens": inputs["tokens"].index_fill(1, torch.tensor([7]), 3)})
    torch.testing.assert_close(other[:, :7], before[:, :7])
    assert not torch.equal(other[:, 7], before[:, 7])


def test_samples_are_the_same_every_time_and_no_split_has_another_s() -> None:
    own = data()
    draw = torch.Generator()
    first = own.item("train", 3, draw).inputs["tokens"]
    assert torch.equal(first, own.item("train", 3, draw).inputs["tokens"])
    assert not torch.equal(first, own.item("val", 3, draw).inputs["tokens"])
    assert own.fingerprint() != data(tokens=10).fingerprint()
    example, batch = own.example("train", 4), some(own)
    assert {n: v.shape for n, v in example.inputs.items()} == {
        n: v.shape for n, v in batch.inputs.items()
    }
    assert example.target.shape == batch.target.shape


def test_the_figures_are_means_over_the_words_that_were_to_be_said() -> None:
    own = data()
    batch = some(own)
    right = torch.full((4, 8, 64), -20.0)
    right.scatter_(2, batch.inputs["tokens"].roll(-1, dims=1).unsqueeze(2), 20.0)
    said = own.accumulator()
    said.update(right, batch)
    assert said.compute() == pytest.approx({"loss": 0.0, "accuracy": 1.0}, abs=1e-6)
    said.update(torch.zeros(4, 8, 64), batch)
    assert said.compute()["loss"] == pytest.approx(math.log(64) / 2)
    with pytest.raises(ModelError, match="expected logits"):
        own.loss(torch.zeros(4, 7, 64), batch)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": LLAVA, "dtype": "half8"}, "model.dtype=half8"),
        ({"source": "nowhere"}, "model.source: no config"),
        ({"source": {"model_type": "llama", **TEXT}}, "model.source"),
    ],
)
def test_what_is_no_such_model_is_refused_in_a_line(arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        ImageTextModel(**arguments)


def test_a_folder_s_weights_are_read(tmp_path) -> None:
    torch.manual_seed(1)
    first = ImageTextModel(LLAVA)
    first.model.save_pretrained(tmp_path)
    read = ImageTextModel(str(tmp_path))
    read.load_pretrained()
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, read.state_dict()[name]), name


SMALL = (
    "experiment=llava", "data.pixels=56", "data.tokens=16", "trainer.device=auto",
    *(f"model.source.text_config.{line}" for line in (
        "hidden_size=128", "intermediate_size=344", "num_hidden_layers=2", "num_attention_heads=4",
        "num_key_value_heads=4", "vocab_size=512", "pad_token_id=2",
    )),
    *(f"model.source.vision_config.{line}" for line in (
        "hidden_size=64", "intermediate_size=256", "num_hidden_layers=2", "num_attention_heads=4",
        "image_size=56", "projection_dim=32",
    )),
    "model.source.image_token_index=500",
)  # fmt: skip

UNUSED = ("vision_tower.encoder.layers.1.", "post_layernorm")
"""LLaVA looks at what goes into the tower's last layer, which gets no gradient."""


def test_what_a_frozen_part_saves_is_in_its_plan(composed) -> None:
    parts = {}
    for trained in ("null", "['*multi_modal_projector*']"):
        settings = validated(composed(*SMALL, f"trainer.trainable={trained}"))
        planner = Planner(settings, build(settings, "data"), "cuda", evaluation=False)
        parts[trained], model = planner.plan().by_category, planner.model()
        moved = [
            weight
            for name, weight in model.named_parameters()
            if weight.requires_grad and not any(part in name for part in UNUSED)
        ]
        moments = 2 * sum(weight.nbytes for weight in moved)
        # Of the weights' own type, in blocks of 512 bytes, and a count for each.
        blocks = 3 * 512 * len(moved)
        assert moments <= parts[trained]["optimizer_state"] <= moments + blocks
    whole, projector = parts.values()
    assert whole["parameters"] == projector["parameters"]
    assert projector["gradients"] < whole["gradients"] / 10
