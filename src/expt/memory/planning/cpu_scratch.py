"""What CPU kernels allocate inside themselves, where no dispatch mode can see it.

Seen in `torch.profiler`'s allocation events with torch 2.13 and oneDNN on x86-64, and computed
here from shapes:

- operands of an elementwise operator whose type is not the common one are copied (CUDA's kernels
  convert on the fly);
- convolutions copy inputs, weights and outputs into oneDNN's blocked layout and back;
- the backward pass of fused attention copies a gradient that does not lie as [B, L, H, D];
- LSTM layers keep a workspace, and reorder weights and gradients in the backward pass;
- half-precision weight gradients are summed in fp32.

Matrix products also pack parts of an operand, a few hundred KiB, which is not modelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
CASTS = (aten._to_copy.default, aten.copy_.default)
PRODUCTS = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
"""Matrix products, and the position of their first operand."""
SAMPLED_STEPS = 16
Found = tuple[str, int] | None


GLOO_COPIES = {"c10d::_allgather_base_": 0, "c10d::_reduce_scatter_base_": 1}
"""Arguments that gloo makes a copy of while it sends (ProcessGroupGloo.cpp)."""


def cpu_scratch(func: Any, args: tuple[Any, ...], result: Any) -> Found:
    """Return (name, bytes) of what `func` holds inside at its highest point, or None."""
    if func is aten.convolution.default:
        return "convolution layout", _convolution(args[0], args[1], result)
    if func is aten.convolution_backward.default:
        return "convolution layout", _convolution_backward(args[0], args[1], args[2], args[10])
    if func is aten.mkldnn_rnn_layer_backward.default:
        return "LSTM layout", _lstm_backward(args[0], args[1], args[2])
    if func is aten.mm.default and args[0].layout is torch.strided is args[1].layout:
        return _product(args[0], args[1]) or operand_copies(func, args, result)
    if func in PRODUCTS:
        return operand_copies(func, args, result)
    if func is ATTENTION_BACKWARD:
        gradient = args[0].transpose(1, 2)
        return None if gradient.is_contiguous() else ("attention layout", _bytes(gradient))
    if func.namespace == "c10d" and (place := GLOO_COPIES.get(func.name())) is not None:
        return "gloo's copy", _bytes(args[place])
    if torch.Tag.pointwise in getattr(func, "tags", ()):
        count = _promotion(func, args, result)
        return ("type promotion", count) if count else None
    return None


def operand_copies(func: Any, args: tuple[Any, ...], result: Any) -> Found:
    """Operands of a matrix product that lie neither by rows nor by columns are copied.

    cuBLAS gets such copies too (`prepare_matrix_for_cublas`), so that this holds for CUDA.
    """
    if func not in PRODUCTS:
        return None
    operands = [value for value in args[PRODUCTS[func] :][:2] if isinstance(value, Tensor)]
    if any(operand.layout is not torch.strided for operand in operands):
        return None
    count = sum(_bytes(operand) for operand in operands if not _by_rows_or_columns(operand))
    return ("copied operands", count) if count else None


def _by_rows_or_columns(matrix: Tensor) -> bool:
    rows, columns = matrix.shape[-2:]
    down, across = matrix.stride()[-2:]
    return (across == 1 and down >= max(1, columns)) or (down == 1 and across >= max(1, rows))


def _convolution(inputs: Tensor, weight: Tensor, output: Tensor) -> int:
    """Blocked input, weight and output; the input's copy is gone when the output is put back."""
    return max(_bytes(inputs) + _bytes(weight), _bytes(output))


def _convolution_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> int:
    """Blocked gradient and input for the weights' part; three copies of the input's gradient."""
    for_weight = _bytes(gradient) + _bytes(inputs)
    return max(for_weight, 2 * _bytes(inputs) if wanted[0] else 0) + _bytes(weight)


def _product(left: Tensor, right: Tensor) -> Found:
    """Half-precision products that are summed over many rows are summed in fp32."""
    rows, inner = left.shape
    columns = right.shape[1]
    if left.dtype is torch.float32 or inner <= max(rows, columns):
        return None
    return "fp32 sums", rows * columns * torch.float32.itemsize


def _lstm_backward(inputs: Tensor, weight_input: Tensor, weight_hidden: Tensor) -> int:
    """Weights and their gradients in oneDNN's layout, and the gates of every step in fp32."""
    steps, batch = inputs.shape[:2]
    gates = steps * batch * weight_input.shape[0] * torch.float32.itemsize
    return 2 * (_bytes(weight_input) + _bytes(weight_hidden)) + gates


def whole_result(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Give `binary_cross_entropy` the storage of its result on the CPU.

    The kernel reduces the losses of all elements in place, so that the mean keeps their storage.
    """
    if func is not aten.binary_cross_entropy.default or result.dim() or not is_fake(result):
        return result
    return torch.empty_like(args[0]).view(-1)[0] if args[0].numel() else result


def lstm_workspace(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Give oneDNN's LSTM layer the workspace it keeps for backward; fake tensors leave it empty.

    Its size is linear in the number of steps but for rounding to pages; it is asked of the real
    kernel on one step and on as many as there are, up to `SAMPLED_STEPS`.
    """
    if func is not aten.mkldnn_rnn_layer.default or not args[15] or result[3].numel():
        return result
    steps = args[0].shape[0]
    sampled = min(steps, SAMPLED_STEPS)
    with no_dispatch():
        one, many = (_workspace_bytes(args, count) for count in (1, sampled))
    count = many + (steps - sampled) * (many - one) // max(sampled - 1, 1)
    return (*result[:3], torch.empty(count, dtype=torch.uint8))


def _workspace_bytes(args: tuple[Any, ...], steps: int) -> int:
    """Run the layer on `steps` steps of zeros and return its workspace's bytes."""
    inputs, *states = args[:7]
    reverse, batch_sizes = args[7:9]
    done = aten.mkldnn_rnn_layer.default(
        torch.zeros((steps, *inputs.shape[1:]), dtype=inputs.dtype),
        *(torch.zeros(state.shape, dtype=state.dtype) for state in states),
        reverse,
        batch_sizes[:steps],
        *args[9:],
    )
    return int(done[3].numel())


def _promotion(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes of copies of operands whose type is not the computation's."""
    first = 1 if func in (aten.where.self, aten.where.ScalarSelf) else 0
    tensors = [value for value in tree_iter(args[first:]) if isinstance(value, Tensor)]
    operands = [tensor for tensor in tensors if tensor.dim() > 0]
    if func in CASTS or len({tensor.dtype for tensor in operands}) < 2:
        return 0
    common = operands[0].dtype
    for tensor in operands[1:]:
        common = torch.promote_types(common, tensor.dtype)
    return sum(
        tensor.numel() * common.itemsize for tensor in operands if tensor.dtype is not common
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
