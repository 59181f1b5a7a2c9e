from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from expt.errors import ConfigError
from expt.memory.techniques.eight_bit import AdamW8bit


def test_its_absence_is_one_line_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("bitsandbytes")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"pip install 'expt\[optim\]'") as refused:
        AdamW8bit(nn.Linear(2, 2).parameters())
    assert "\n" not in str(refused.value)


def test_it_trains_like_adamw_with_a_quarter_of_the_state() -> None:
    pytest.importorskip("bitsandbytes")
    finals, state_bytes = [], []
    for kind in (AdamW8bit, torch.optim.AdamW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
        optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.0)
        x = torch.randn(32, 64)
        for _ in range(60):
            loss = (model(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append(float(loss.detach()))
        moments = optimizer.state[model[0].weight].values()
        state_bytes.append(sum(m.nbytes for m in moments if isinstance(m, torch.Tensor)))
    assert finals[0] == pytest.approx(finals[1], rel=0.2)
    assert finals[0] < 0.2
    assert state_bytes[0] < 0.4 * state_bytes[1]
