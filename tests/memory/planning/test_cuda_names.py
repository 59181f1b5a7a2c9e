"""Code that names a card is planned without one."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expt.memory import plan
from expt.memory.planning.cuda_names import cuda_names


class Net(nn.Module):
    """What is found in training scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).cuda()
        self.register_buffer("table", torch.ones(8, device=torch.device("cuda", 0)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = self.layer(x.cuda(non_blocking=True))
        torch.cuda.synchronize()
        return y.to("cuda:0") + torch.zeros(8, device="cuda") + self.table.to(torch.device("cuda"))


def step(model, optimizer, batch) -> None:
    scaler = batch.pin_memory().to("cuda")
    model(scaler).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


class Name(StrEnum):
    GPU = "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", Name.GPU, np.str_("cuda")])
def test_a_name_of_any_kind_of_text_means_the_other_device(name) -> None:
    with cuda_names():
        assert torch.ones(2).to(name).device.type == "cpu"


@pytest.mark.parametrize("own", [False, True])
def test_a_script_that_names_cuda_is_traced(own) -> None:
    planned = plan(
        lambda: Net().to("cuda"),
        lambda: torch.randn(4, 8).cuda(),
        lambda weights: torch.optim.SGD(weights, lr=0.1),
        None if own else lambda model, batch: model(batch).sum(),
        target="cuda",
        step_fn=step if own else None,
    )
    assert planned.method == "trace", planned.notes
    assert planned.peak_bytes > 0


def test_afterwards_everything_is_as_before() -> None:
    before = torch.amp.autocast_mode.autocast.__init__, torch.cuda.synchronize
    with cuda_names():
        assert torch.ones(2, device="cuda").device.type == "cpu"
        assert torch.einsum("ij,jk->ik", torch.ones(2, 2), torch.ones(2, 2)).shape == (2, 2)
    assert (torch.amp.autocast_mode.autocast.__init__, torch.cuda.synchronize) == before
