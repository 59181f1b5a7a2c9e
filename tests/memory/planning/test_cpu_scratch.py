"""What kernels of the CPU hold inside, by formula, against torch.profiler's events."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from expt.memory.planning.cpu_scratch import cpu_scratch, lstm_workspace
from expt.memory.planning.hybrid import HybridFakeMode

aten = torch.ops.aten


def allocations(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the highest sum of allocations during a call, and what is left of it at its end."""
    from torch.profiler import ProfilerActivity, profile

    call()  # what libraries keep from their first call on is not what is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    sums = list(itertools.accumulate(change for _, change in changes))
    assert result is not None
    return max(sums), sums[-1]


def inside(func: Any, *args: Any) -> int:
    """Return the measured bytes inside a call, beyond its result."""
    highest, left = allocations(lambda: func(*args))
    return highest - left


def formula(func: Any, *args: Any) -> int:
    found = cpu_scratch(func, args, func(*args))
    return found[1] if found else 0


def conv(inputs: Tensor, weight: Tensor) -> tuple[Any, ...]:
    spatial = inputs.dim() - 2
    ones, zeros = [1] * spatial, [0] * spatial
    return inputs, weight, None, ones, ones, ones, False, zeros, 1


@pytest.mark.parametrize(
    ("inputs", "weight"),
    [((8, 16, 32, 32), (16, 16, 3, 3)), ((8, 32, 32, 32), (16, 32, 3, 3))],
)
def test_a_convolution_is_laid_out_anew(inputs, weight) -> None:
    args = conv(torch.randn(inputs), torch.randn(weight))
    measured = inside(aten.convolution.default, *args)
    assert measured > 0
    assert formula(aten.convolution.default, *args) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("wanted", [[True, True, False], [False, True, False]])
def test_the_backward_pass_of_a_convolution(wanted) -> None:
    inputs, weight = torch.randn(8, 16, 32, 32), torch.randn(32, 16, 3, 3)
    gradient = torch.randn(8, 32, 32, 32)
    ones, zeros = [1, 1], [0, 0]
    args = (gradient, inputs, weight, None, ones, ones, ones, False, zeros, 1, wanted)
    measured = inside(aten.convolution_backward.default, *args)
    assert formula(aten.convolution_backward.default, *args) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.add.Tensor, (torch.ones(1000), torch.ones(1000, dtype=torch.bfloat16))),
        (aten.mul.Tensor, (torch.ones(1000), torch.ones(1000, dtype=torch.int64))),
        (aten.mul.Tensor, (torch.ones(1000), torch.tensor(2.0, dtype=torch.float64))),
        (aten.add.Tensor, (torch.ones(1000), torch.ones(1000))),
        (
            aten.where.self,
            (torch.ones(1000) > 0, torch.ones(1000), torch.ones(1000, dtype=torch.bfloat16)),
        ),
    ],
)
def test_operands_of_another_type_are_copied(func, args) -> None:
    assert formula(func, *args) == pytest.approx(inside(func, *args), abs=8)  # a scalar's copy


def test_a_cast_copies_nothing_besides_its_result() -> None:
    x = torch.ones(1000)
    assert inside(lambda: x.to(torch.bfloat16)) == 0
    target = torch.ones(1000, dtype=torch.bfloat16)
    assert cpu_scratch(aten.copy_.default, (target, x), target) is None


def test_half_precision_products_over_many_rows_are_summed_in_fp32() -> None:
    left, right = torch.ones(64, 4096).bfloat16(), torch.ones(4096, 64).bfloat16()
    assert formula(aten.mm.default, left, right) == 64 * 64 * 4
    assert formula(aten.mm.default, left.float(), right.float()) == 0
    assert formula(aten.mm.default, right, left) == 0, "summed over few"


def test_the_gradient_of_fused_attention_is_copied_where_it_lies_otherwise() -> None:
    q = torch.randn(2, 4, 64, 8)
    output, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    for gradient in (torch.randn_like(q), torch.randn(2, 64, 4, 8).transpose(1, 2)):
        args = (gradient, q, q, q, output, logsumexp, 0.0, False)
        contiguous = gradient.transpose(1, 2).is_contiguous()
        assert formula(backward, *args) == (0 if contiguous else gradient.nbytes)
    lying = torch.randn_like(q)
    usual = torch.randn(2, 64, 4, 8).transpose(1, 2)
    more = inside(backward, lying, *args[1:]) - inside(backward, usual, *args[1:])
    assert more == lying.nbytes


class Workspaces(TorchDispatchMode):
    """Collects the size of the workspace that LSTM layers keep, as measured and as asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is aten.mkldnn_rnn_layer.default:
            with HybridFakeMode():
                fake = func(*[torch.empty(a.shape) if isinstance(a, Tensor) else a for a in args])
                asked = lstm_workspace(func, args, fake)[3]
            assert lstm_workspace(func, args, result) is result, "a real one has its own"
            self.found.append((result[3].numel(), asked.numel()))
        return result


def test_the_workspace_of_an_lstm_is_what_the_real_kernel_asks_for() -> None:
    layer = nn.LSTM(8, 64, batch_first=True)
    with Workspaces() as mode:
        for steps in (1, 11, 60):
            layer(torch.randn(3, steps, 8))
    assert len(mode.found) == 3
    for measured, asked in mode.found[:2]:
        assert asked == measured > 0
    measured, asked = mode.found[2]
    assert asked == pytest.approx(measured, rel=0.05)  # rounded to pages


def test_an_lstm_is_within_a_few_percent(measured) -> None:
    from expt.memory import plan

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(32, 128, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    def loss(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
        return forward(batch).square().mean()

    def batch() -> Tensor:
        return torch.randn(16, 40, 32)

    planned = plan(First, batch, torch.optim.AdamW, loss, target="cpu")
    peak = measured(First, batch, torch.optim.AdamW, loss)
    assert planned.peak_bytes == pytest.approx(peak, rel=0.05)
    assert peak <= planned.interval_bytes[1]
