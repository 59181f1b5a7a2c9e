"""Values where they are small and known, stated answers where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from expt.memory.planning.hybrid import MAX_REAL_BYTES, HybridFakeMode, is_library

LARGE = MAX_REAL_BYTES // 4 + 1


def fake(mode: HybridFakeMode, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with mode.faking():
        return torch.empty(shape, dtype=dtype)


def test_what_is_small_and_known_runs_for_real() -> None:
    with HybridFakeMode() as mode:
        grid = torch.tensor([2, 3, 4])
        assert grid.tolist() == [2, 3, 4]
        assert (grid * 2).sum().item() == 18
        assert grid[grid > 2].tolist() == [3, 4]
        assert torch.arange(3).repeat_interleave(grid[:3]).numel() == 9
        assert isinstance(torch.zeros(LARGE), FakeTensor)
    assert not mode.questions


def test_known_values_are_looked_at_whatever_they_take() -> None:
    mask = torch.zeros(4 * MAX_REAL_BYTES, dtype=torch.bool)
    mask[:3] = True
    mode = HybridFakeMode()
    x = fake(mode, len(mask))
    with mode:
        assert mask.nonzero().shape == (3, 1)
        assert x[mask].shape == x.masked_select(mask).shape == (3,)
    assert not mode.questions


def test_what_meets_a_fake_tensor_is_fake() -> None:
    mode = HybridFakeMode()
    weight = fake(mode, 3)
    with mode:
        assert isinstance(torch.ones(3) * weight, FakeTensor)
        assert isinstance(torch.ones(LARGE)[:3], FakeTensor)
    assert not mode.questions


def test_small_results_of_fakes_stay_fake() -> None:
    # Their shapes are computed by code that makes small tensors on the way.
    mode = HybridFakeMode()
    inputs, weight, bias = fake(mode, 4, 8), fake(mode, 8, 8), fake(mode, 8)
    with mode:
        for _ in range(2):
            found = torch.nn.functional.gelu(torch.addmm(bias, inputs, weight))
            assert isinstance(found, FakeTensor)
            assert isinstance(torch.nn.functional.layer_norm(found, (8,)), FakeTensor)


def test_a_tensor_from_outside_is_never_written_to() -> None:
    data = torch.zeros(4)
    with HybridFakeMode() as mode:
        data += 1
        made = torch.zeros(4)
        made += 1
        assert made.tolist() == [1, 1, 1, 1]
        assert data.sum().item() == 1.0, "an answer: its values are not known any more"
    assert data.tolist() == [0, 0, 0, 0]
    assert [asked for asked, _ in mode.questions] == ["a number"]


def test_a_real_tensor_that_fakes_were_written_to_stays_the_same_object() -> None:
    mode = HybridFakeMode()
    weight = fake(mode, 4)
    with mode:
        made = torch.zeros(4)
        same = made.add_(weight)
        assert same is made
        assert (made.sum() > 5).item() is False
    assert mode.steered


@pytest.mark.parametrize("answer", [False, True])
def test_questions_get_a_stated_answer_and_are_noted(answer) -> None:
    mode = HybridFakeMode(answer)
    x = fake(mode, 6, 5)
    with mode:
        assert bool(x.sum() > 0) is answer
        assert torch.equal(x, x + 1) is answer
        assert x.mean().item() == 1.0
        assert int(x.argmax().numel()) == 1
        assert x[x[:, 0] > 0].shape == (6, 5), "all rows"
        assert (x > 0).nonzero().shape == (30, 2)
        assert x.masked_select(x > 0).shape == (30,)
        assert torch.unique(x.int()).shape == (30,)
    kinds = {asked for asked, _ in mode.questions}
    assert kinds == {"a boolean", "a number", "which elements"}
    assert all(where.startswith(__file__) for _, where in mode.questions)
    assert mode.steered


def test_a_number_for_the_log_steers_nothing() -> None:
    mode = HybridFakeMode()
    loss = fake(mode, 4)
    with mode:
        assert loss.mean().item() == 1.0
    assert mode.questions and not mode.steered


def test_indices_that_follow_from_fakes_are_made_up_and_valid() -> None:
    mode = HybridFakeMode()
    scores = fake(mode, 64, 4)
    with mode:
        values, experts = scores.topk(2)
        assert isinstance(values, FakeTensor)
        rows = [int((experts == expert).any(1).sum()) for expert in range(4)]
    assert sum(rows) == 128, "two different ones for each"
    assert max(rows) < 64
    assert mode.steered, "these are not a trained model's"


def test_a_sparse_gradient_knows_its_elements() -> None:
    mode = HybridFakeMode()
    with mode.faking():
        weight = torch.empty(100, 8, requires_grad=True)
    with mode:
        rows = torch.tensor([1, 1, 5])
        torch.nn.functional.embedding(rows, weight, sparse=True).sum().backward()
        assert weight.grad is not None
        assert weight.grad.coalesce()._nnz() == 2


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support")
def test_a_product_with_a_sparse_matrix_of_any_layout_has_its_shape() -> None:
    mode = HybridFakeMode()
    dense = torch.eye(5)
    x = fake(mode, 5, 3)
    for matrix in (dense.to_sparse(), dense.to_sparse_csr(), dense.to_sparse_csc()):
        with mode:
            assert (matrix @ x).shape == (5, 3)
            assert (matrix.t() @ x).shape == (5, 3)


def test_an_operator_with_shapes_for_bf16_only_is_traced_in_fp32() -> None:
    mode = HybridFakeMode()
    rows, experts = fake(mode, 64, 16), fake(mode, 2, 16, 8)
    with mode:
        ends = torch.tensor([32, 64], dtype=torch.int32)
        found = torch._grouped_mm(rows, experts, offs=ends)
    assert (found.shape, found.dtype) == ((64, 8), torch.float32)


@pytest.mark.parametrize(
    "made",
    [
        lambda weights: torch.optim.SGD(weights, momentum=0.9, fused=True),
        lambda weights: torch.optim.AdamW(weights, fused=True),
        lambda weights: torch.optim.Adagrad(weights, fused=True),
    ],
)
def test_a_fused_step_takes_no_real_tensors(made, monkeypatch) -> None:
    from torch._subclasses import fake_tensor

    def refuse(mode: object, func: object, *others: object) -> None:
        raise AssertionError(f"{func} ran on real tensors")

    monkeypatch.setattr(fake_tensor, "run_fallback_kernel", refuse)
    mode = HybridFakeMode()
    weight = torch.nn.Parameter(fake(mode, 1000, 300))
    weight.grad = fake(mode, 1000, 300)
    with mode:
        optimizer = made([weight])
        for _ in range(2):
            optimizer.step()
    assert any(isinstance(slot, FakeTensor) for slot in optimizer.state[weight].values())


def test_a_library_is_told_from_the_users_code() -> None:
    assert is_library(torch.__file__)
    assert is_library(functools_file())
    assert not is_library(__file__)


def functools_file() -> str:
    import functools

    return functools.__file__
