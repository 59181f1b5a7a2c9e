"""Memory traps of models that look at images: what each part against them saves.

    python benchmarks/traps.py [--again] [--only SECTION]

Sections: `small`, a training step of a small model, predicted and measured on the CPU by
`torch.profiler`'s allocation events; `real`, the same at the size of CLIP ViT-L/14-336, predicted
for CUDA in bf16; `grouping`, padding on a generated spread of sizes. Rows already in the result
file are kept unless `--again`. Needs `transformers`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from common import load, markdown, provenance, source_line, stamped, store
from planned_steps import state
from prediction import profiled_peak
from torch import Tensor, nn
from trap_models import (
    REAL,
    SMALL,
    Case,
    Sizes,
    at_once,
    at_resolution,
    convolved,
    crossed,
    in_chunks,
    loss,
    one_by_one,
    tiled,
)

from expt.jobs.vision.grouping import GroupedBySize, wasted
from expt.jobs.vision.resolution import largest_that_fits, multiples, tile_grid

NAME = "traps"
GIB, MIB = 2**30, 2**20
WARM_UP = 2
"""Steps before the one that is measured."""
SPREAD = (((224, 336), 0.70), ((336, 768), 0.25), ((768, 1024), 0.05))
"""Bounds of a square image's side in px, uniform between them, and the share of images."""
SAMPLES, BATCH, SCALE = 10_000, 16, 8
"""Of the spread; the small model's images are smaller by `SCALE`."""
Rows = Mapping[str, Callable[[], dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="a section")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"small": {}, "real": {}, "grouping": {}, **load(NAME)}
    for section, rows in {"small": small(), "real": real(), "grouping": grouping()}.items():
        if arguments.only not in ("", section):
            continue
        for name, measure in rows.items():
            if name in record[section] and not arguments.again:
                continue
            row = record[section][name] = stamped(measure())
            print(f"{section}: {name}: {row}", flush=True)
            record["made"] = provenance()
            store(NAME, record, tables(record))


def pairs(sizes: Sizes) -> dict[str, tuple[Case, Case, Case | None]]:
    """Return by name what is compared: before, after, and what `after` must equal, if anything."""
    worked = one_by_one(sizes)
    chunk = sizes.chunk
    frozen, trained = at_once(sizes, False), at_once(sizes, True)
    plain = crossed(sizes, "plain")
    loops = one_by_one(sizes, trained=False)
    shared = one_by_one(sizes, "shared", chunk)
    return {
        "images in chunks, frozen tower": (frozen, in_chunks(sizes, False), frozen),
        "images in chunks, trained tower": (trained, in_chunks(sizes, True), trained),
        "cross-attention, shared keys and values": (
            plain, crossed(sizes, "shared"), crossed(sizes, "tied"),
        ),
        f"cross-attention, rank {sizes.rank}": (plain, crossed(sizes, "low rank"), None),
        "cross-attention, gated": (plain, crossed(sizes, "gated"), None),
        "worked example, trained tower: in chunks": (
            worked, one_by_one(sizes, chunk=chunk), worked,
        ),
        "worked example, trained tower: and shared keys and values": (worked, shared, None),
        f"worked example, trained tower: and rank {sizes.rank} instead": (
            worked, one_by_one(sizes, "low rank", chunk), None,
        ),
        "worked example, frozen tower: in chunks": (
            loops, one_by_one(sizes, chunk=chunk, trained=False), loops,
        ),
        "worked example, frozen tower: and shared keys and values": (
            loops, one_by_one(sizes, "shared", chunk, False), None,
        ),
    }  # fmt: skip


def small() -> Rows:
    """Return what is measured on the CPU, by row."""
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda pair=pair: measured_pair(*pair)  # type: ignore[misc]
        for name, pair in pairs(SMALL).items()
    }
    rows["adaptive resolution, 60 % of the bytes"] = lambda: adapted(SMALL, 112, (56, 112), 0.6)
    rows["tiles of an image of 600 x 450 px, cap 12 to 4"] = lambda: capped(SMALL, 450, 600)
    for name, chosen in (("median", statistics.median_high), ("largest", max)):
        rows[f"grouping, {name} batch"] = lambda chosen=chosen: measured_pair(  # type: ignore[misc]
            *(
                convolved(16, [side // SCALE for side in chosen(sides)])
                for sides in spread_batches()
            ),
            None,
        )
    return rows


def real() -> Rows:
    """Return what is predicted for CUDA, by row."""
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda pair=pair: predicted_pair(*pair[:2], "cuda")  # type: ignore[misc]
        for name, pair in pairs(REAL).items()
    }
    alone = replace(REAL, samples=1)
    rows["adaptive resolution, 60 % of the bytes"] = lambda: adapted(
        alone, 672, (224, 672), 0.6, "cuda"
    )
    rows["tiles of an image of 4000 x 3000 px, cap 12 to 4"] = lambda: capped(
        REAL, 3000, 4000, "cuda"
    )
    for name, chosen in (("median", statistics.median_high), ("largest", max)):
        rows[f"grouping, {name} batch"] = lambda chosen=chosen: predicted_pair(  # type: ignore[misc]
            *(convolved(64, chosen(sides)) for sides in spread_batches()), "cuda"
        )
    return rows


def adapted(
    sizes: Sizes, read: int, bounds: tuple[int, int], share: float, target: str = "cpu"
) -> dict[str, Any]:
    """Compare images as they are read with the largest size that takes a share of the bytes."""
    before = at_resolution(sizes, read, read)
    limit = int(share * predicted(before, target).peak_bytes)
    size = largest_that_fits(
        multiples(sizes.patch, *bounds),
        lambda side: predicted(at_resolution(sizes, read, side), target).peak_bytes,
        limit,
    )
    after = at_resolution(sizes, read, size)
    note = {"detail": f"{read} to {size} px", "limit_bytes": limit}
    if target == "cpu":
        return {**measured_pair(before, after, None), **note}
    return {**predicted_pair(before, after, target), **note}


def capped(sizes: Sizes, height: int, width: int, target: str = "cpu") -> dict[str, Any]:
    """Compare InternVL's cap of 12 tiles with one of 4."""
    counts = [1 + rows * columns for rows, columns in
              (tile_grid(height, width, sizes.image, cap) for cap in (12, 4))]  # fmt: skip
    cases = [tiled(sizes, count) for count in counts]
    note = {"detail": f"{counts[0]} to {counts[1]} images of {sizes.image} px"}
    if target == "cpu":
        return {**measured_pair(*cases, None), **note}
    return {**predicted_pair(*cases, target), **note}


def predicted(case: Case, target: str) -> Any:
    from expt.memory import plan

    return plan(
        case.model, case.batch, adamw, loss, target=target,  # type: ignore[arg-type]
        precision="fp32" if target == "cpu" else "bf16", holds_outputs=False, lengths_vary=False,
    )  # fmt: skip


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def predicted_pair(before: Case, after: Case, target: str) -> dict[str, Any]:
    plans = [predicted(case, target) for case in (before, after)]
    return {
        "predicted_bytes": [plan.peak_bytes for plan in plans],
        "phases": [plan.phase for plan in plans],
        "methods": [plan.method for plan in plans],
    }


def measured_pair(before: Case, after: Case, equal: Case | None) -> dict[str, Any]:
    found = predicted_pair(before, after, "cpu")
    found["measured_bytes"] = [measured(case) for case in (before, after)]
    if equal is not None:
        found |= differences(equal, after)
    return found


def measured(case: Case) -> int:
    """Return the peak of a training step after a few others."""
    torch.manual_seed(0)
    model = case.model()
    optimizer = adamw(list(model.parameters()))

    def step() -> None:
        batch = case.batch()  # held for the whole step, as in a training loop
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    return profiled_peak(step, lambda: state(model, optimizer))


def differences(one: Case, other: Case) -> dict[str, float]:
    """Return how far loss and gradients of two models with the same weights are apart, relative.

    Weights and gradients correspond by name, but for what chunks and a shared projection add.
    """
    torch.manual_seed(0)
    batch = one.batch()
    models = [case.model() for case in (one, other)]
    weights = {plain_name(name): value for name, value in models[0].named_parameters()}
    names = {plain_name(name): value for name, value in models[1].named_parameters()}
    assert weights.keys() == names.keys(), weights.keys() ^ names.keys()
    with torch.no_grad():
        for name, value in names.items():
            value.copy_(weights[name])
    losses = [loss(model, batch) for model in models]
    for value in losses:
        value.backward()
    pairs = [(names[name].grad, value.grad) for name, value in weights.items()]
    assert all((one is None) == (other is None) for one, other in pairs)
    # All together: the bias of keys has no gradient but rounding, which differs by any factor.
    found, expected = (
        torch.cat([grad.flatten() for grad in some if grad is not None])
        for some in zip(*pairs, strict=True)
    )
    return {
        "loss_difference": gap(losses[1].detach(), losses[0].detach()),
        "gradient_difference": gap(found, expected),
    }


def plain_name(name: str) -> str:
    """Return the name of a weight without the parts that a wrapper adds to it."""
    return (
        name.replace("tower.encoder.embeddings", "tower.embeddings")
        .replace("tower.encoder.encoder", "tower.encoder")
        .replace("tower.encoder.p", "tower.p")
        .replace("fused.cross.0.key_value", "fused.keys_values")
    )


def gap(found: Tensor, expected: Tensor) -> float:
    """Return the distance over the size of what is expected."""
    return float((found - expected).norm() / expected.norm())


def spread() -> list[tuple[int, int]]:
    """Return the generated sizes: squares, by `SPREAD`."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor([share for _, share in SPREAD])
    kinds = torch.multinomial(shares, SAMPLES, replacement=True, generator=generator).tolist()
    places = torch.rand(SAMPLES, generator=generator).tolist()
    sides = [low + int(place * (high - low + 1)) for place, kind in zip(places, kinds, strict=True)
             for low, high in (SPREAD[kind][0],)]  # fmt: skip
    return [(side, side) for side in sides]


def batches() -> tuple[list[list[int]], list[list[int]]]:
    """Return the batches of an epoch in random order, and grouped."""
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1))
    return [part.tolist() for part in order.split(BATCH)], list(GroupedBySize(spread(), BATCH))


def spread_batches() -> tuple[list[list[int]], list[list[int]]]:
    """Return the sides in every batch, the largest first, before and after."""
    sizes = spread()
    before, after = (
        [sorted((sizes[index][0] for index in batch), reverse=True) for batch in some]
        for some in batches()
    )
    return before, after


def grouping() -> Rows:
    def waste() -> dict[str, Any]:
        sizes = spread()
        before, after = batches()
        pixels = [
            sum(len(batch) * max(sizes[index][0] for index in batch) ** 2 for batch in some)
            for some in (before, after)
        ]
        return {
            "samples": SAMPLES, "batch_size": BATCH,
            "wasted_percent": [wasted(sizes, before), wasted(sizes, after)], "pixels": pixels,
        }  # fmt: skip

    return {"squares": waste}


def saving(found: list[int]) -> float:
    """Return how much less the second is than the first, in %."""
    return 100 * (1 - found[1] / found[0])


def tables(record: Mapping[str, Any]) -> str:
    """Return the page's tables."""
    parts = []
    if record["small"]:
        parts.append(small_table(record["small"]))
    if record["real"]:
        parts.append(real_table(record["real"]))
    for row in record["grouping"].values():
        before, after = row["wasted_percent"]
        parts.append(
            f"Grouping by size: of {row['samples']:,} square images ({spread_text()}) in batches "
            f"of {row['batch_size']}, {before:.1f} % of all pixels are padding in random order and "
            f"{after:.1f} % grouped: {row['pixels'][0] / row['pixels'][1]:.1f} times fewer pixels "
            "in an epoch.\n"
        )
    return "\n".join([*parts, source_line(record, NAME)])


def small_table(rows: Mapping[str, Any]) -> str:
    points = max(
        abs(saving(row["predicted_bytes"]) - saving(row["measured_bytes"])) for row in rows.values()
    )
    errors = [p / m - 1 for r in rows.values()
              for p, m in zip(r["predicted_bytes"], r["measured_bytes"], strict=True)]  # fmt: skip
    body = [
        (
            titled(name, row),
            " to ".join(f"{count / MIB:.1f}" for count in row["predicted_bytes"]),
            " to ".join(f"{count / MIB:.1f}" for count in row["measured_bytes"]),
            f"{saving(row['predicted_bytes']):.1f} %",
            f"{saving(row['measured_bytes']):.1f} %",
            f"{row['loss_difference']:.0e} / {row['gradient_difference']:.0e}"
            if "loss_difference" in row
            else unlike(name),
        )
        for name, row in rows.items()
    ]
    return (
        "A training step of a small model on the CPU, fp32 (a CLIP tower of "
        f"{SMALL.tower_layers} layers of width {SMALL.width}, {SMALL.samples} samples with "
        f"{SMALL.images} images of {SMALL.image} px, {SMALL.chunk} at a time; {SMALL.layers} "
        f"layers of cross-attention from {SMALL.text} tokens): peak in MiB before and after. "
        f"Predicted and measured savings are at most {points:.1f} points apart, peaks "
        f"{100 * max(map(abs, errors)):.1f} %.\n\n"
    ) + markdown(
        ("part", "predicted", "measured", "saving, predicted", "saving, measured",
         "relative difference of loss / gradients"), body,
    )  # fmt: skip


def real_table(rows: Mapping[str, Any]) -> str:
    body = [
        (
            titled(name, row),
            *(f"{count / GIB:.2f} GiB" for count in row["predicted_bytes"]),
            f"{saving(row['predicted_bytes']):.1f} %",
        )
        for name, row in rows.items()
    ]
    return (
        f"The same at real size, predicted for CUDA in bf16 (CLIP ViT-L/14-336, {REAL.samples} "
        f"samples with {REAL.images} images, {REAL.chunk} at a time; {REAL.layers} layers of "
        f"cross-attention of width {REAL.width} from {REAL.text} tokens; AdamW; convolutions for "
        "grouping); not measured:\n\n"
    ) + markdown(("part", "before", "after", "saving"), body)


def unlike(name: str) -> str:
    """Say why there is no difference to measure."""
    kinds = {"adaptive": "another input", "tiles": "another input", "grouping": "other batches"}
    return next((kind for start, kind in kinds.items() if name.startswith(start)), "another model")


def titled(name: str, row: Mapping[str, Any]) -> str:
    return f"{name} ({row['detail']})" if "detail" in row else name


def spread_text() -> str:
    return ", ".join(f"{100 * share:.0f} % of {low} to {high} px" for (low, high), share in SPREAD)


if __name__ == "__main__":
    main()
