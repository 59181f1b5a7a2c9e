"""What several processes cannot be combined with is said before anything starts."""

from __future__ import annotations

import pytest

from expt.config.validate import validated
from expt.errors import ConfigError

TWO = "trainer.devices=2"
SHARDED = (TWO, "trainer.strategy=fsdp")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("trainer.strategy=fsdp",), "trainer.devices=1"),
        ((TWO, "trainer.compile=graph"), "a captured or compiled step"),
        ((TWO, "trainer.compile=compile"), "a captured or compiled step"),
        ((TWO, "memory.optimizer_in_backward=true"), "before its gradient is summed"),
        ((TWO, "memory.fallback=preset"), "memory.fallback"),
        ((TWO, "data.batch_size=auto"), "found for one device"),
        ((TWO, "memory.gradient_accumulation=9"), "cuts it into 18 parts"),
        ((TWO, "trainer.device=mps"), "MPS is one device"),
        ((*SHARDED, "trainer.ema_decay=0.9"), "an average of whole weights"),
        ((*SHARDED, "memory.precision=fp16"), "fp16's scaler"),
        ((*SHARDED, "memory.saved_tensor_offload=true"), "copy every block's weights"),
        ((*SHARDED, "memory.forward_chunks=2"), "equally often"),
        ((*SHARDED, "memory.weight_offload=true"), "choose one of the two"),
        ((*SHARDED, "optimizer=sgd"), "no fused SGD"),
        ((*SHARDED, "optimizer=adafactor"), "not known to have the shape"),
        (("trainer.devices=0",), "trainer.devices must be"),
    ],
)
def test_refused(composed, settings, words) -> None:
    with pytest.raises(ConfigError, match=words):
        validated(composed("+memory=lite", *settings))


def test_a_search_gives_every_trial_one_device(composed) -> None:
    with pytest.raises(ConfigError, match="every trial one device"):
        validated(composed("+memory=lite", "search=alternating", TWO))


def test_what_torchrun_started_counts(composed, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert validated(composed("+memory=lite")).trainer.devices == 2
    assert validated(composed("+memory=lite", TWO)).trainer.devices == 2
    with pytest.raises(ConfigError, match="2 processes were started"):
        validated(composed("+memory=lite", "trainer.devices=3"))
    assert validated(composed("+memory=lite", "task=plan")).trainer.devices == 1


def test_more_processes_than_cards(composed, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="there is one here; give trainer"):
        validated(composed("+memory=lite", TWO))
    assert validated(composed("+memory=lite", TWO, "task=plan")).trainer.devices == 2
    assert validated(composed("+memory=lite", TWO, "trainer.device=cpu")).trainer.devices == 2
