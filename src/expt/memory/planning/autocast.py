"""CUDA's autocast rules on tensors that live on the CPU, for a plan made without a GPU.

CPU autocast has other lists than CUDA's: on CUDA, normalisation, softmax, losses, powers and
sums run in fp32 even from bf16 inputs, so that fp32 copies are kept for the backward pass.
Source of the list: torch's documentation, "CUDA Ops that can autocast to float32", and
AT_FORALL_FP32 in ATen/autocast_mode.h (torch 2.13), which has some more.
Attention is traced as the kernel that will run: on CUDA dropout stays inside the fused kernel,
which keeps a seed; the CPU's kernel would fall back to materialised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from expt.memory.planning.cuda_names import cuda_idle
from expt.memory.planning.function_rules import FunctionRules, Rule
from expt.memory.planning.unwatched import unwatched_rules

FP32_NAMES = (
    "__pow__", "__rdiv__", "__rpow__", "acos", "asin", "binary_cross_entropy_with_logits", "cdist",
    "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum",
    "dist", "erfinv", "exp", "expm1", "frobenius_norm", "group_norm", "hinge_embedding_loss",
    "huber_loss", "interpolate", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2",
    "log_softmax", "logsumexp", "margin_ranking_loss", "matrix_norm", "mse_loss",
    "multi_margin_loss", "multilabel_margin_loss", "nll_loss", "norm", "normalize", "nuclear_norm",
    "pdist", "poisson_nll_loss", "pow", "prod", "reciprocal", "renorm", "rms_norm", "rsqrt", "sinh",
    "smooth_l1_loss", "soft_margin_loss", "softmax", "softmin", "softplus", "sum", "tan",
    "triplet_margin_loss", "upsample", "vector_norm",
)  # fmt: skip


def _fp32_functions() -> set[Any]:
    places = (torch, F, Tensor, torch.linalg, torch._C._nn, torch._C._VariableFunctions)
    found = {getattr(place, name, None) for place in places for name in FP32_NAMES}
    return found - {None}


def casting(rules: Mapping[Callable[..., Any], Rule]) -> dict[Callable[..., Any], Rule]:
    """Return rules, and with them one for every function of CUDA's fp32 list.

    The inputs of these are cast to fp32 while autocast is on.
    """
    cast = {func: _casting(rules.get(func, _call)) for func in _fp32_functions()}
    return {**rules, **cast}


def _casting(rule: Rule) -> Rule:
    def call(func: Any, args: Any, kwargs: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return rule(func, args, kwargs)
        with torch.autocast("cpu", enabled=False):
            return rule(func, tree_map(_to_fp32, args), tree_map(_to_fp32, kwargs))

    return call


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _to_fp32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


@contextmanager
def target_rules(target: str) -> Iterator[None]:
    """Trace inside as on `target` ("cuda" or "cpu")."""
    rules, cuda = unwatched_rules(target), None
    idle: AbstractContextManager[None] = nullcontext()
    if target == "cuda":
        from expt.memory.planning.cuda_kernels import attention_rules, dropout_rules

        rules = casting({**rules, **dropout_rules(), **attention_rules()})
        idle = cuda_idle()  # the code may have an autocast region of its own
        cuda = torch.device("cpu")
    with idle, FunctionRules(rules, cuda):
        yield


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Return the autocast region of a forward pass in fp32, bf16 or fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32")
