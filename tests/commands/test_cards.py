"""`task=cards`: what is recommended follows from the predicted peaks, in the stated order."""

from __future__ import annotations

import json

import pytest

from expt.commands.allocate.allocator import Allocator
from expt.commands.allocate.several import _sharded
from expt.commands.allocate.variants import Variants
from expt.commands.cards import card_row
from expt.config.validate import validated
from expt.memory.planning.predict import Plan
from expt.run.batch_size import Limit
from expt.units import GIB

TINY = ("task=cards", "model.embed_dim=16", "data.eval_batch_size=4", "hydra.run.dir=run")


@pytest.fixture
def recommend(composed, monkeypatch):
    """Recommend with peaks made up from precision, checkpointing and micro-batch, in GiB."""

    def of(card: float, *overrides: str):
        lines = ["data.batch_size=32", "model.embed_dim=16", *overrides]
        settings = validated(composed(*lines))
        calls: list[tuple] = []

        def made_up(self, techniques=None, precision=None):
            techniques, memory = techniques or self.now, self.settings.memory
            size = 32 // techniques.gradient_accumulation
            share = (0.5 if memory.precision.value in ("auto", "bf16") else 1.0) * (
                0.25 if techniques.activation_checkpointing else 1.0
            )
            calls.append((size, memory.precision, techniques))
            peak = int((1 + size * share) * GIB)
            return Plan("cuda", peak, peak, (0, None), "forward", {}, {}, {}, "trace", 0.0)

        monkeypatch.setattr("expt.run.planner.Planner.plan", made_up)
        monkeypatch.setattr("expt.commands.allocate.allocator.emergency", lambda *_: ())
        row = card_row(Allocator(Variants(lines, "cuda"), settings), card, 0.6)
        assert row["micro_batch"] * row["gradient_accumulation"] == 32
        return row

    return of


@pytest.mark.parametrize(
    ("card", "overrides", "expected"),
    [
        (24, [], (32, "bf16", False)),  # all of it at once: 17 GiB
        (12, [], (16, "bf16", False)),  # then smaller micro-batches: 9 GiB
        (2.6, [], (1, "bf16", False)),
        (1.9, [], (1, "bf16", True)),  # then checkpointing: 1.125 GiB
        (80, ["memory.precision=fp32"], (32, "fp32", False)),
        (2.4, ["memory.precision=fp32"], (1, "bf16", False)),  # costs no arithmetic
        (1.9, ["memory.precision=fp32"], (1, "bf16", True)),
    ],
)
def test_the_order_of_what_is_given_up(recommend, card, overrides, expected):
    row = recommend(card, *overrides)
    assert row["fits"]
    got = (row["micro_batch"], row["precision"], row["activation_checkpointing"])
    assert got == expected


def test_what_does_not_fit_says_by_how_much(recommend):
    row = recommend(1.0)
    assert not row["fits"]
    assert row["excess_bytes"] == pytest.approx((1.125 * 1.05 - 0.4) * GIB, rel=1e-6)


@pytest.fixture
def failing(composed, monkeypatch):
    """Return an allocator whose plans raise where `unfit` says so, else take 1 GiB."""

    def of(unfit, *overrides: str) -> Allocator:
        lines = ["data.batch_size=32", "model.embed_dim=16", *overrides]

        def made_up(self, techniques=None, precision=None):
            if unfit(self.settings):
                raise RuntimeError("expected scalar type Float but found BFloat16")
            return Plan("cuda", GIB, GIB, (0, None), "forward", {}, {}, {}, "trace", 0.0)

        monkeypatch.setattr("expt.run.planner.Planner.plan", made_up)
        return Allocator(Variants(lines, "cuda"), validated(composed(*lines)))

    return of


def test_a_way_whose_plan_fails_is_none_unless_it_is_the_configured_one(failing):
    limit = Limit(GIB // 2, 1.0)

    def bf16(settings):
        return settings.memory.precision.value == "bf16"

    found = failing(bf16, "memory.precision=fp32").largest(limit)
    assert "memory.precision=bf16" not in found.way and not found.fits
    with pytest.raises(RuntimeError, match="BFloat16"):
        failing(bf16, "memory.precision=bf16").largest(limit)


def test_a_sharded_plan_that_fails_is_refused_in_its_place(failing):
    allocator = failing(lambda settings: settings.trainer.sharded)
    row = _sharded(allocator, Limit(GIB, 1.0), 2)
    assert row == {"refused": "RuntimeError: expected scalar type Float but found BFloat16"}


def test_the_table_is_printed_and_written(expt, home):
    code, out, err = expt(*TINY, "cards.sizes_gib=[24,0.62,8]")
    assert code == 0, err
    written = json.loads((home / "run/cards.json").read_text())
    rows = {row["card_gib"]: row for row in written["cards"]}
    assert list(rows) == [0.62, 8, 24]
    assert rows[8]["fits"] and rows[24]["fits"]
    assert rows[8]["gradient_accumulation"] == 1
    assert rows[8]["peak_bytes"] <= rows[8]["limit_bytes"]
    assert not rows[0.62]["fits"]
    table = (home / "run/cards.md").read_text()
    assert f"| 24 GiB | 23.40 GiB | {written['batch_size']} x 1 | bf16 | no |" in table
    assert "NO, by" in table
    assert "0.6 GiB for the CUDA" in table
    assert "24 GiB" in out


def test_a_model_without_blocks_is_not_checkpointed(expt, home):
    assert expt(*TINY, "model=stid", "model.embed_dim=8", "cards.sizes_gib=[8]")[0] == 0


@pytest.mark.parametrize("sizes", ["[]", "[0.5]", "[8,-1]"])
def test_impossible_cards_are_refused(expt, home, sizes):
    code, _, err = expt(*TINY, f"cards.sizes_gib={sizes}")
    assert code == 2
    assert "cards.sizes_gib" in err
