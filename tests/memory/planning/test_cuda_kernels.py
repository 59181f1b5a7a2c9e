"""What CUDA's kernels keep: masks of one byte, and attention's output as it lies there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expt.memory import plan
from expt.memory.planning.autocast import target_rules
from expt.memory.planning.cuda_kernels import attention_results, fused_dropout

ELEMENTS = 2**20


def kept(module: nn.Module, target: str) -> int:
    """Return the activations of a module over 4 MiB of fp32."""
    planned = plan(
        lambda: nn.Sequential(nn.Linear(1024, 1024, bias=False), module),
        lambda: torch.randn(1024, 1024),
        lambda weights: torch.optim.SGD(weights, 0.1),
        lambda model, x: model(x).sum(),
        target=target, holds_outputs=False,
    )  # fmt: skip
    return planned.by_category["activations"]


def noted(monkeypatch) -> list[float]:
    """Return the shares that the fused kernel is called with from now on."""
    calls: list[float] = []
    real = torch.native_dropout

    def native(tensor: Tensor, share: float, train: bool) -> tuple[Tensor, Tensor]:
        calls.append(share)
        return real(tensor, share, train)

    monkeypatch.setattr(torch, "native_dropout", native)
    return calls


def test_dropout_keeps_one_byte_an_element_on_cuda() -> None:
    masks = {target: kept(nn.Dropout(0.1), target) for target in ("cuda", "cpu")}
    assert masks["cpu"] - masks["cuda"] == pytest.approx(3 * ELEMENTS, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "fused"),
    [
        ((0.1, True), True),
        ((0.1, False), False),
        ((0.0, True), False),
        ((1.0, True), False),
        ((0.1, True, True), False),  # in place there is no fused kernel
    ],
)
def test_the_fused_kernel_is_taken_where_cuda_takes_it(arguments, fused, monkeypatch) -> None:
    calls = noted(monkeypatch)
    fused_dropout(torch.ones(8), *arguments)
    assert calls == [0.1] * fused


@pytest.mark.parametrize("how", ["F.dropout", "torch.dropout", "renamed", "attention"])
def test_every_way_to_drop_out_is_seen(how, monkeypatch) -> None:
    calls = noted(monkeypatch)
    x = torch.ones(3, 2, 8)
    with target_rules("cuda"):
        if how == "F.dropout":
            F.dropout(x, p=0.5)
        elif how == "torch.dropout":
            torch.dropout(x, 0.5, True)
        elif how == "renamed":
            torch.dropout(input=x, p=0.5, train=True)
        else:  # weights are asked for, so that the kernel is not the fused one
            nn.MultiheadAttention(8, 2, dropout=0.5)(x, x, x, need_weights=True)
    assert calls == [0.5]


@pytest.mark.parametrize(("dtype", "aligned"), [(torch.float32, 64), (torch.bfloat16, 40)])
def test_attention_lies_by_length_on_cuda_whatever_the_query_does(dtype, aligned) -> None:
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with FakeTensorMode():
        q = torch.empty(8, 4, 40, 64, dtype=dtype)
        result = func(q, q, q)
        output, sums = attention_results(func, (q, q, q), result)[:2]
        assert not result[0].transpose(1, 2).is_contiguous()
        assert output.transpose(1, 2).is_contiguous()
        assert (output.shape, output.dtype) == (q.shape, dtype)
        assert (sums.shape, sums.dtype) == ((8, 4, aligned), torch.float32)


def test_real_results_are_left_as_they_are() -> None:
    q = torch.randn(1, 2, 4, 8)
    func = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    result = func(q, q, q)
    assert attention_results(func, (q, q, q), result) is result
    assert attention_results(torch.ops.aten.mm.default, (), result) is result


def test_the_rules_end_with_the_region() -> None:
    before = F.dropout
    with target_rules("cuda"):
        nn.MultiheadAttention(8, 2, dropout=0.5)(*[torch.ones(3, 2, 8)] * 3, need_weights=True)
    assert F.dropout is before
