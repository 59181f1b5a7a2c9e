"""The models on clips: shapes, sizes as published, and that they learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from expt.errors import ModelError
from expt.jobs.deepfake.sequence import FrameSequence
from expt.jobs.video.r3d import R3D
from expt.memory.techniques.repeated_blocks import repeated_blocks

B, T, P = 4, 4, 32
MODELS: dict[str, Callable[[], nn.Module]] = {
    "r3d18": partial(R3D, num_classes=2, depth=18, width=8),
    "r3d50": partial(R3D, num_classes=2, depth=50, width=8, stem_pool=True),
    "keypoints": partial(
        R3D, num_classes=2, depth=18, width=8, num_keypoints=3, keypoint_values=2, keypoint_width=8
    ),
    "gru": partial(FrameSequence, num_frames=T, depth=18, width=8, head_width=16),
    "transformer": partial(
        FrameSequence, num_frames=T, depth=50, width=8, head="transformer", head_width=16
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def inputs(name: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    clip = torch.randint(256, (B, 3, T, P, P), generator=draw, dtype=torch.uint8)
    points = {"keypoints": torch.randn(B, T, 3, 2, generator=draw)} if name == "keypoints" else {}
    return {"clip": clip, **points}


@every_model
def test_logits_have_the_right_shape_and_bytes_are_normalised(name):
    model = MODELS[name]().eval()
    given = inputs(name)
    logits = model(**given)
    assert logits.shape == ((B, 1 + T) if "FrameSequence" in repr(type(model)) else (B, 2))
    floating = {**given, "clip": (given["clip"].float() - 114.75) / 57.375}
    assert torch.allclose(model(**floating), logits, atol=1e-5)


@every_model
def test_every_weight_gets_a_gradient(name):
    model = MODELS[name]()
    model(**inputs(name)).square().sum().backward()
    assert [n for n, weight in model.named_parameters() if weight.grad is None] == []


@every_model
def test_it_learns_a_batch_by_heart(name):
    torch.manual_seed(0)
    model, given = MODELS[name](), inputs(name)
    label = torch.arange(B) % 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        logits = model(**given)
        loss = nn.functional.cross_entropy(
            torch.stack([-logits[:, 0], logits[:, 0]], 1) if logits.shape[1] != 2 else logits, label
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


@pytest.mark.parametrize(("depth", "parameters", "blocks"), [(18, 33.2, 8), (50, 46.4, 16)])
def test_it_is_as_large_as_published(depth, parameters, blocks):
    with torch.device("meta"):
        model = R3D(num_classes=101, depth=depth)
    assert sum(w.numel() for w in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.1)
    assert len(repeated_blocks(model)) == blocks


@pytest.mark.parametrize(("depth", "parameters"), [(18, 11.2), (50, 23.5)])
def test_the_network_over_frames_is_a_resnet(depth, parameters):
    with torch.device("meta"):
        model = FrameSequence(num_frames=16, depth=depth)
    own = sum(w.numel() for w in model.frame.parameters())
    assert own / 1e6 == pytest.approx(parameters, abs=0.1)


def test_a_backbone_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
    )
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    model = FrameSequence(num_frames=T, backbone=str(tmp_path), head_width=16)
    before = next(model.frame.parameters()).clone()
    model.load_pretrained()
    assert not torch.equal(before, next(model.frame.parameters()))
    assert model(**inputs("gru")).shape == (B, 1 + T)
    with pytest.raises(ModelError, match="takes pictures of 3 channels; the data's clips have 5"):
        FrameSequence(num_frames=T, backbone=str(tmp_path), num_channels=5)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (R3D, {"depth": 20}, "model.depth=20 is no depth"),
        (R3D, {"stem_stride": [2, 2]}, "must be three numbers"),
        (FrameSequence, {"head": "lstm"}, "must be gru or transformer"),
        (FrameSequence, {"head": "transformer", "head_width": 10}, "cannot be divided"),
        (FrameSequence, {"backbone": "microsoft/resnet-50"}, "Nothing is downloaded"),
    ],
)
def test_impossible_arguments_are_said(model, arguments, message):
    (problem,) = model.problems(arguments)
    assert message in problem
