"""Memory techniques from the configuration to a run."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from expt.config.schema import MemoryConfig, Preset
from expt.config.validate import validated
from expt.errors import ConfigError
from expt.memory.techniques.techniques import Techniques
from expt.result import load_result
from expt.run.build import assemble, build, smaller_sizes, techniques_of
from expt.training.average import NoAverage
from expt.training.checkpoint import Progress, load_last, save_last
from expt.training.device import make_fabric

WINDOW = ("memory.attention_kernel=sliding_window", "memory.attention_window=4")
IN_BACKWARD = ("memory.optimizer_in_backward=true", "trainer.gradient_clip_norm=null")


def test_every_technique_is_a_setting_with_the_same_default():
    assert techniques_of(MemoryConfig()) == Techniques()
    assert {part.name for part in fields(Techniques)} <= {p.name for p in fields(MemoryConfig)}


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (["memory.activation_checkpointing=true"], "activation_checkpointing", True),
        (["memory.activation_checkpointing=3"], "activation_checkpointing", 3),
        (["memory.activation_checkpointing=selective"], "activation_checkpointing", "selective"),
        (["memory.attention_kernel=math"], "attention_kernel", "math"),
        (WINDOW, "attention_window", 4),
        (
            ["memory.attention_kernel=top_k", "memory.attention_top_k=5"],
            "attention_top_k",
            5,
        ),
        (["memory.saved_tensor_offload=true"], "saved_tensor_offload", True),
        (["memory.weight_offload=true"], "weight_offload", True),
        (IN_BACKWARD, "optimizer_in_backward", True),
        (["memory.forward_chunks=4"], "forward_chunks", 4),
    ],
)
def test_a_setting_becomes_a_technique(composed, given, name, value):
    settings = validated(composed(*given))
    assert getattr(techniques_of(settings.memory), name) == value


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["memory.activation_checkpointing=1"],
            ["1", "true, false, selective, nested", "from 2 up"],
        ),
        (["memory.activation_checkpointing=-2"], ["-2", "from 2 up"]),
        (["memory.activation_checkpointing=1.5"], ["1.5", "from 2 up"]),
        (["memory.activation_checkpointing=null"], ["None", "from 2 up"]),
        (["memory.activation_checkpointing=selectiv"], ["did you mean 'selective'"]),
        (["memory.attention_kernel=fussed"], ["'fussed'", "did you mean 'fused'"]),
        (["memory.attention_kernel=flash"], ["'flash'", "sliding_window"]),
        (["memory.attention_kernel=sliding_window"], ["needs memory.attention_window"]),
        (["memory.attention_kernel=top_k"], ["needs memory.attention_top_k"]),
        ([*WINDOW, "memory.attention_top_k=3"], ["memory.attention_top_k=3 does nothing"]),
        ([WINDOW[0], "memory.attention_window=0"], ["memory.attention_window", "at least 1"]),
        (["memory.attention_window=3"], ["does nothing unless", "sliding_window"]),
        (["memory.forward_chunks=0"], ["memory.forward_chunks must be at least 1"]),
        (["memory.forward_chunks=65"], ["forward_chunks=65", "data.eval_batch_size=64"]),
        (["memory.forward_chunks_in_training=true"], ["does nothing", "forward_chunks=1"]),
        (["memory.optimizer_in_backward=true"], ["trainer.gradient_clip_norm=5.0", "=null"]),
        ([*IN_BACKWARD, "memory.gradient_accumulation=2"], ["gradient_accumulation=2"]),
        ([*IN_BACKWARD, "memory.precision=fp16"], ["fp16", "bf16"]),
        (["memory.saved_tensor_offload=true", "trainer.device=cpu"], ["cpu", "nothing to gain"]),
        (["memory.weight_offload=true", "trainer.device=cpu"], ["cpu", "them there already"]),
        (["optimizer=adamw_foreach", "+optimizer.fused=true"], ["optimizer:", "foreach", "fused"]),
    ],
)
def test_a_wrong_value_or_combination_is_one_problem_with_its_reason(composed, given, words):
    with pytest.raises(ConfigError) as refused:
        validated(composed(*given))
    assert len(refused.value.problems) == 1
    for word in words:
        assert word in refused.value.problems[0]


def test_all_of_them_come_in_one_message(composed):
    given = ("memory.activation_checkpointing=1", "memory.attention_kernel=x", *IN_BACKWARD)
    with pytest.raises(ConfigError) as refused:
        validated(composed(*given, "memory.precision=fp16", "memory.gradient_accumulation=2"))
    assert len(refused.value.problems) == 4


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["memory.attention_kernel=math", "model=stid"], ["memory.attention_kernel=math", "STID"]),
        (["memory.activation_checkpointing=9"], ["has 2 blocks"]),
        (["memory.saved_tensor_offload=true"], ["a run on cpu"]),
        (["memory.activation_checkpoint=true"], ["'activation_checkpointing'"]),
        (["memory.offload=true"], ["weight_offload"]),
    ],
)
def test_what_a_run_cannot_have_is_exit_2_and_leaves_nothing(expt, home, given, words):
    code, _, err = expt(*given, "hydra.run.dir=run")
    assert code == 2
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert load_result(home / "run") is None


def test_techniques_change_no_result_of_a_run(expt, home):
    exact = ("model.dropout=0", "trainer.gradient_clip_norm=null")
    techniques = (
        "memory.activation_checkpointing=selective",
        "memory.optimizer_in_backward=true",
        "memory.forward_chunks=2",
    )
    for name, given in {"plain": (), "all": techniques}.items():
        code, _, err = expt(*exact, *given, f"hydra.run.dir={name}")
        assert code == 0, err
    plain, changed = load_result(home / "plain"), load_result(home / "all")
    assert changed.metrics == pytest.approx(plain.metrics, rel=1e-5)
    assert changed.memory["peak_allocated_bytes"] < plain.memory["peak_allocated_bytes"]


def assembled(composed, *given):
    """Return model, optimizer, Fabric and one batch of a small configuration, seed 0."""
    small = ("memory.preset=minimal", "data.batch_size=2", "model.dropout=0")
    settings = validated(composed(*small, *given))
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    fabric.seed_everything(0, verbose=False)
    data = build(settings, "data")
    model, optimizer = assemble(settings, fabric, data)
    return model, optimizer, fabric, data.gather("train", torch.arange(2))


def test_a_kernel_reaches_the_model(composed):
    forecasts = {}
    for name, given in {
        "plain": (),
        "math": ("memory.attention_kernel=math",),
        "window": WINDOW,
        "top_k": ("memory.attention_kernel=top_k", "memory.attention_top_k=5"),
    }.items():
        model, _, _, batch = assembled(composed, *given)
        forecasts[name] = model(**batch.inputs)
    torch.testing.assert_close(forecasts["math"], forecasts["plain"])
    for name in ("window", "top_k"):
        assert not torch.allclose(forecasts[name], forecasts["plain"], atol=1e-4)


@pytest.mark.parametrize("first", [IN_BACKWARD, ()])
def test_a_checkpoint_of_one_way_to_step_goes_on_with_the_other(composed, home, first):
    def step(model, optimizer, fabric, batch, in_backward=False):
        loss = model(**batch.inputs).square().mean()
        fabric.backward(loss)
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert bool(gradients) is not in_backward
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    whole = assembled(composed)
    expected = [step(*whole) for _ in range(4)]
    begun = assembled(composed, *first)
    losses = [step(*begun, in_backward=bool(first)) for _ in range(2)]
    save_last(home, begun[2], begun[0], begun[1], NoAverage(), Progress(step=2))
    resumed = assembled(composed, *(() if first else IN_BACKWARD))
    assert load_last(home, resumed[2], resumed[0], resumed[1], NoAverage()).step == 2
    losses += [step(*resumed, in_backward=not first) for _ in range(2)]
    assert losses == expected


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        (Preset.full, "a smaller preset (memory=lite or memory=minimal)"),
        (None, "a smaller preset (memory=minimal)"),
        (Preset.minimal, "a smaller model than memory=minimal"),
    ],
)
def test_a_smaller_size_is_one_that_there_is(preset, words) -> None:
    assert smaller_sizes(MemoryConfig(preset=preset)) == words
