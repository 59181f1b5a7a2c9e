"""CUDA's rules on tensors of the CPU: what runs in fp32, and attention without its mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from expt.memory.planning.autocast import autocast, target_rules
from expt.memory.planning.cuda_kernels import attention_rules
from expt.memory.planning.function_rules import FunctionRules, backward
from expt.memory.techniques.checkpointing import checkpoint_activations


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.layer_norm(x, (8,)),
        lambda x: F.group_norm(x.unsqueeze(0), 1),
        lambda x: x.softmax(dim=-1),
        lambda x: torch.softmax(x, -1),
        lambda x: F.log_softmax(x, -1),
        lambda x: x.pow(2),
        lambda x: x**2,
        lambda x: x.sum(),
        lambda x: torch.exp(x),
        lambda x: x.norm(),
        lambda x: F.mse_loss(x, x),
        lambda x: F.smooth_l1_loss(x, x),
        lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
        lambda x: F.softplus(x),
        lambda x: F.rms_norm(x, (8,)),
        lambda x: torch.logsumexp(x, -1),
        lambda x: F.huber_loss(x, x),
        lambda x: F.interpolate(x[None, None], scale_factor=2),
        lambda x: torch.linalg.vector_norm(x),
        nn.RMSNorm(8),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_cuda_runs_in_fp32_gives_fp32_from_halves(function, dtype) -> None:
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    x = torch.randn(4, 8, dtype=dtype)
    with target_rules("cuda"), autocast(precision):
        assert function(x).dtype is torch.float32
    with target_rules("cuda"):
        assert (x.exp()).dtype is dtype, "outside an autocast region nothing is cast"


@pytest.mark.parametrize(
    "function", [lambda x: x @ x.t(), lambda x: F.linear(x, x), lambda x: torch.relu(x), F.gelu]
)
def test_what_cuda_leaves_in_halves_stays_so(function) -> None:
    with target_rules("cuda"), autocast("bf16"):
        assert function(torch.randn(8, 8, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_on_the_cpu_its_own_rules_hold() -> None:
    with target_rules("cpu"), autocast("bf16"):
        assert F.layer_norm(torch.randn(4, 8).bfloat16(), (8,)).dtype is torch.bfloat16
    with target_rules("cuda"), autocast("fp32"):
        assert F.linear(torch.randn(4, 8), torch.randn(8, 8)).dtype is torch.float32


def kept(function, *inputs: Tensor) -> int:
    """Return the bytes that `function` saves for its backward pass, in new storages."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function(*inputs)
    assert result is not None
    own = {tensor.untyped_storage()._cdata for tensor in inputs}
    return sum(count for key, count in sizes.items() if key not in own)


@pytest.mark.parametrize("positional", [False, True])
def test_attention_with_dropout_keeps_no_mask_on_cuda(positional) -> None:
    q = torch.randn(1, 2, 64, 8, requires_grad=True)

    def attend(x: Tensor) -> Tensor:
        if positional:
            return F.scaled_dot_product_attention(x, x, x, None, 0.5)
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    scores = 2 * 64 * 64 * 4
    assert kept(attend, q) > 2 * scores  # the CPU's: weights and mask
    with FunctionRules(attention_rules()):
        assert kept(attend, q) < scores
    with target_rules("cuda"):
        assert kept(attend, q) < scores


def test_torchs_own_attention_layer_keeps_no_mask_on_cuda_either() -> None:
    x = torch.randn(1, 64, 8, requires_grad=True)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5, batch_first=True)
    scores = 2 * 64 * 64 * 4
    assert kept(layer, x) > 2 * scores
    with target_rules("cuda"):
        assert kept(layer, x) < scores
    asked = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    with target_rules("cuda"):
        assert kept(lambda x: asked(x, x, x)[0], x) > 2 * scores, "weights that are returned"


@pytest.mark.parametrize("function", [torch.prod, lambda x: torch.cumprod(x, 0)])
def test_products_are_cast_before_their_derivative_keeps_anything(function) -> None:
    x = torch.rand(64, 8, dtype=torch.bfloat16, requires_grad=True)
    with target_rules("cuda"), autocast("bf16"):
        # The fp32 copy and, of as many elements or of one, the product.
        assert kept(function, x) in (64 * 8 * 4 + 4, 2 * 64 * 8 * 4)


def test_backward_is_the_engines_own() -> None:
    x = torch.randn(5, requires_grad=True)
    y = torch.randn(5, requires_grad=True)
    backward((x * y).sum())
    backward((x * y).sum())  # gradients add up
    torch.testing.assert_close(x.grad, 2 * y.detach())
    torch.testing.assert_close(y.grad, 2 * x.detach())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


def test_a_checkpointed_block_is_computed_again_under_the_same_rules() -> None:
    # Without them in the backward pass, torch finds other types than in the forward pass.
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Block()
        checkpoint_activations(model, checkpointed)
        x = torch.randn(4, 8)
        with target_rules("cuda"):
            with autocast("bf16"):
                loss = model(x).sum()
            backward(loss)
        gradients.append([weight.grad for weight in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_so_it_is_in_a_loop_of_the_users() -> None:
    model = Block()
    checkpoint_activations(model, True)
    with target_rules("cuda"):
        with autocast("bf16"):
            loss = model(torch.randn(4, 8)).sum()
        loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_region_that_names_cuda_follows_its_rules() -> None:
    x = torch.randn(4, 8)
    with target_rules("cuda"), torch.autocast("cuda", dtype=torch.bfloat16):
        product = x @ x.t()
        assert product.dtype is torch.bfloat16
        assert F.softmax(product, -1).dtype is torch.float32
