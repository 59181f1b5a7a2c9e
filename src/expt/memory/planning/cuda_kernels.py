"""What CUDA's kernels keep and return that the CPU's do not, for a plan made without a GPU.

- Dropout keeps a mask of one byte an element (`native_dropout`), where the CPU keeps its noise in
  the type of the input.
- Fused attention returns its output laid out as [batch, length, heads, width], whatever the query's
  layout, which spares the copy that usually follows; the memory-efficient kernel, which takes fp32,
  rounds the length of its log-sum-exp up to 32. Source: ATen/native/transformers/cuda/attention.cu
  and torch's meta kernels of the same operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from expt.memory.planning.function_rules import Rule

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ALIGNED_QUERIES = 32
"""The memory-efficient kernel's log-sum-exp has a multiple of these."""
DROPOUT = F.dropout
DROPOUT_AT = 10
"""Its position in the arguments of F.multi_head_attention_forward, where nn passes it."""
RENAMED = {"train": "training"}
"""Arguments of `torch.dropout` that `F.dropout` calls by another name."""


def dropout_rules() -> dict[Callable[..., Any], Rule]:
    """Return rules that trace dropout as CUDA's kernel, which keeps a mask of one byte."""

    def drop_out(func: Any, args: Any, kwargs: Any) -> Any:
        return fused_dropout(*args, **{RENAMED.get(key, key): v for key, v in kwargs.items()})

    return {DROPOUT: drop_out, torch.dropout: drop_out}


def fused_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop out as `F.dropout`, with CUDA's fused kernel where CUDA would take it."""
    if not training or inplace or not 0 < p < 1 or not input.numel():
        return DROPOUT(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def attention_rules() -> dict[Callable[..., Any], Rule]:
    """Return rules that trace attention as a fused kernel, whose dropout keeps no mask."""
    return {
        F.scaled_dot_product_attention: _attend,
        F.multi_head_attention_forward: _attend_with_heads,
    }


def _attend(func: Any, args: Any, kwargs: Any) -> Any:
    if len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    return func(*args, **{name: value for name, value in kwargs.items() if name != "dropout_p"})


def _attend_with_heads(func: Any, args: Any, kwargs: Any) -> Any:
    """Call the Python function, of which a mode does not see what it calls."""
    if not kwargs.get("need_weights", True):
        args = (*args[:DROPOUT_AT], 0.0, *args[DROPOUT_AT + 1 :])
    with patch.object(F, "dropout", fused_dropout):
        return func(*args, **kwargs)


def attention_results(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Give the output of fused attention the layout that it has on CUDA."""
    if func is not ATTENTION or not is_fake(result[0]):
        return result
    query, out, sums = args[0], result[0], result[1]
    batch, heads, length, width = out.shape
    output = out.new_empty_strided(out.shape, (length * heads * width, width, heads * width, 1))
    if query.dtype is torch.float32:
        length = -(-length // ALIGNED_QUERIES) * ALIGNED_QUERIES
    return (output, sums.new_empty((batch, heads, length)), *result[2:])
