"""What kernels hold inside, asked of the kernels themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from expt.memory import plan
from expt.memory.measuring.allocations import Allocations
from expt.memory.planning import kernel_memory
from expt.memory.planning.kernel_memory import Call, Kernels, bound, call_of, settle

aten = torch.ops.aten
SGD = partial(torch.optim.SGD, lr=1e-3)


def squares(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).square().mean()


class Channels(nn.Module):
    """A depthwise convolution of an image whose channels come last."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(64, 64, 7, padding=3, groups=64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.permute(0, 3, 1, 2))


def graph(layout: str) -> type[nn.Module]:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            places = torch.randint(500, (2, 20_000), generator=torch.Generator().manual_seed(0))
            matrix = torch.sparse_coo_tensor(places, torch.ones(20_000), (500, 500)).coalesce()
            self.register_buffer("matrix", matrix.to_sparse_csr() if layout == "csr" else matrix)
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.matrix, self.layer(x))

    return Graph


def conv3d() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 3, padding=1))


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(3), nn.LocalResponseNorm(3))


def total(forward: Callable[..., Tensor], batch: Tensor) -> Tensor:
    return forward(batch).sum()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[..., Tensor]]] = {
    "one by one": (lambda: nn.Conv2d(16, 5, 1), (8, 16, 64, 64), squares),
    "three by three": (lambda: nn.Conv2d(32, 16, 3, padding=1), (4, 32, 48, 48), squares),
    "large": (lambda: nn.Conv2d(64, 64, 3, padding=1), (48, 64, 32, 32), squares),
    "depthwise": (Channels, (8, 7, 7, 64), squares),
    "three dimensions": (conv3d, (1, 3, 8, 48, 48), squares),
    "transposed": (lambda: nn.ConvTranspose2d(16, 8, 4, 2, 1), (4, 16, 32, 32), squares),
    "sparse rows": (graph("csr"), (500, 8), squares),
    "sparse places": (graph("coo"), (500, 8), squares),
    "expanded gradient": (lambda: nn.Linear(256, 256, bias=False), (512, 256), total),
    "lstm": (lambda: First(nn.LSTM(16, 64, batch_first=True)), (8, 30, 16), squares),
    "pooling": (pooled, (8, 16, 64, 64), squares),
}


class First(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_plan_has_what_kernels_hold(measured, name: str, threads: int) -> None:
    model, shape, loss = CASES[name]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = model, lambda: torch.randn(shape).requires_grad_(), SGD, loss
        planned = plan(*case, target="cpu")
        peak = measured(*case)
    finally:
        torch.set_num_threads(before)
    assert planned.method == "trace", planned.notes
    assert planned.peak_bytes == pytest.approx(peak, rel=0.01)


def call(func, *args) -> Call:
    found = call_of(func, args, {}, func(*args))
    assert found is not None
    return found


def test_a_kernel_is_asked_once_and_holds_what_the_allocator_says() -> None:
    x = torch.randn(64, 100)
    kernels = Kernels()
    args = (x, 0, False)
    with Allocations() as allocations:
        result = aten.sort.default(*args)
    made = sum(part.nbytes for part in result)
    inside = kernels.inside(call(aten.sort.default, *args))
    assert inside == allocations.highest_bytes - made
    kernels._seconds = 1e9
    assert kernels.inside(call(aten.sort.default, *args)) == inside, "known already"
    assert kernels.inside(call(aten.sort.default, x, 1, False)) is None, "no time is left"


def test_views_and_elementwise_operators_are_not_asked() -> None:
    x = torch.ones(4, 4)
    assert call_of(aten.t.default, (x,), {}, x.t()) is None
    assert call_of(aten.mul.Tensor, (x, x), {}, x * x) is None
    assert call_of(aten.zeros.default, ([3],), {}, torch.zeros(3)) is None


def test_what_would_take_long_is_not_run() -> None:
    large = torch.empty(3000, 3000)
    assert Kernels().inside(call_of(aten._linalg_svd.default, (large,), {}, large)) is None


def test_other_libraries_operators_are_not_run() -> None:
    ran = []

    @torch.library.custom_op("expt_test::waits", mutates_args=())
    def waits(x: Tensor) -> Tensor:
        ran.append(1)
        return x.clone()

    x = torch.ones(3)
    assert call_of(torch.ops.expt_test.waits.default, (x,), {}, x) is None
    assert not ran


def test_only_what_may_decide_the_peak_is_asked(monkeypatch) -> None:
    x = torch.ones(10, 10)
    calls = {n: call(aten.sort.default, x[: n + 2], 0, False) for n in range(2)}
    kernels = Kernels()
    monkeypatch.setattr(kernels, "inside", lambda asked: bound(asked) // 2)
    settled = settle({0: 10**6, 1: 0}, calls, {}, kernels)
    assert set(settled) == {0}
    assert settled[0] == (bound(calls[0]) // 2, "inside aten::sort")


def test_a_formula_takes_the_place_of_a_kernel_that_is_too_large(monkeypatch) -> None:
    monkeypatch.setattr(kernel_memory, "MAX_BYTES", 0)
    x = torch.ones(10, 10)
    calls = {0: call(aten.sort.default, x, 0, False)}
    assert settle({0: 5}, calls, {0: (70, "layout")}, Kernels()) == {0: (70, "layout")}
    assert settle({0: 5}, calls, {}, Kernels())[0][0] == 0
