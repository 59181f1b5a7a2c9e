from __future__ import annotations

import torch
from torch import Tensor, nn

from expt.memory.techniques.attention_kernel import set_attention_kernel


class Own(nn.Module):
    """A module that takes part without knowing anything of this package."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.attention_kernel = kernel
        self.attention_window: int | None = 7

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_modules_take_part_by_their_attribute() -> None:
    model = nn.Sequential(Own("eager"), nn.Linear(2, 2), nn.Sequential(Own("flash")))
    assert set_attention_kernel(model, "sliding_window", window=3) == 2
    first, _, (second,) = model
    assert (first.attention_kernel, first.attention_window) == ("sliding_window", 3)
    assert second.attention_kernel == "sliding_window"
    assert not hasattr(first, "attention_top_k"), "nothing is added that was not there"


def test_none_gives_back_what_each_had_at_first() -> None:
    model = nn.Sequential(Own("eager"), Own("flash"))
    set_attention_kernel(model, "math")
    set_attention_kernel(model, "fused")
    assert set_attention_kernel(model, None) == 0
    assert [part.attention_kernel for part in model] == ["eager", "flash"]
    assert [part.attention_window for part in model] == [7, 7]
    model[0].attention_kernel = "changed by hand"
    set_attention_kernel(model, None)
    assert model[0].attention_kernel == "changed by hand"


def test_a_model_without_a_choice_has_none() -> None:
    assert set_attention_kernel(nn.Linear(2, 2), "math") == 0
    assert torch.equal(Own("x")(torch.ones(1)), torch.ones(1))
