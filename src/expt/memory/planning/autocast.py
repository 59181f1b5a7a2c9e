"""CUDA's autocast rules on tensors that live on the CPU, for a plan made without a GPU.

CPU autocast has other lists than CUDA's: on CUDA, normalisation, softmax, losses, powers and
sums run in fp32 even from bf16 inputs, so that fp32 copies are kept for the backward pass.
Source of the list: torch's documentation, "CUDA Ops that can autocast to float32", and
AT_FORALL_FP32 in ATen/autocast_mode.h (torch 2.13), which has some more.
Attention is traced as the kernel that will run: on CUDA dropout stays inside the fused kernel,
which keeps a seed; the CPU's kernel would fall back to materialised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from expt.memory.planning.cuda_names import cuda_names
from expt.memory.planning.unwatched import Unwatched

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
DROPOUT = 10
"""Its position in the arguments of F.multi_head_attention_forward, where nn passes it."""


def _fp32_functions() -> set[Any]:
    places = (torch, F, Tensor, torch.linalg, torch._C._nn, torch._C._VariableFunctions)
    found = {getattr(place, name, None) for place in places for name in FP32_NAMES}
    return found - {None}


class CudaCasting(TorchFunctionMode):
    """Casts the inputs of CUDA's fp32 list to fp32 while autocast is on."""

    def __init__(self) -> None:
        super().__init__()
        self._fp32 = _fp32_functions()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func` as CUDA's autocast would."""
        kwargs = kwargs or {}
        if func not in self._fp32 or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*tree_map(_to_fp32, args), **tree_map(_to_fp32, kwargs))


class FusedAttention(TorchFunctionMode):
    """Traces attention as a fused CUDA kernel: its dropout keeps no mask."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, attention without its dropout."""
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            kwargs.pop("dropout_p", None)
        if func is F.multi_head_attention_forward and not kwargs.get("need_weights", True):
            # What it calls is not seen: a mode is off while it handles a call.
            args = (*args[:DROPOUT], 0.0, *args[DROPOUT + 1 :])
        return func(*args, **kwargs)


def _to_fp32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


@contextmanager
def target_rules(target: str) -> Any:
    """Trace inside as on `target` ("cuda" or "cpu")."""
    with ExitStack() as stack:
        if target == "cuda":
            from expt.memory.planning.cuda_kernels import FusedDropout

            stack.enter_context(FusedDropout())
            stack.enter_context(FusedAttention())
            stack.enter_context(CudaCasting())  # the code may have an autocast region of its own
            stack.enter_context(cuda_names())
        stack.enter_context(Unwatched(target))
        yield


def autocast(precision: str) -> AbstractContextManager[Any]:
    """Return the autocast region of a forward pass in fp32, bf16 or fp16."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    return torch.autocast("cpu", dtype=dtype, enabled=precision != "fp32")
