from __future__ import annotations

from dataclasses import replace

import pytest

from expt.memory.recovery.ladder import (
    LADDER,
    PLANNED_LADDER,
    Situation,
    adapt,
    changes,
    descend,
)
from expt.memory.techniques.techniques import Techniques

PLAIN = Techniques()
GPU = Situation(8, "cuda")


def halvings(peak: int, floor: int):
    """Predict a peak of which the part above `floor` goes with the micro-batch."""
    return lambda techniques: (
        floor
        + (peak - floor)
        // techniques.gradient_accumulation
        // (4 if techniques.activation_checkpointing else 1)
    )


def test_the_order_down_to_the_last_rung():
    now, taken, micro_batch = Techniques(attention_kernel="math"), [], 8
    while True:
        move = descend(now, Situation(micro_batch, "cuda"))
        if move.techniques is None:
            break
        micro_batch //= move.techniques.gradient_accumulation // now.gradient_accumulation
        now = move.techniques
        taken.append(move.rung)
    halved = ["halve_micro_batch"] * 3
    down = ["fused_attention", *halved, "activation_checkpointing"]
    assert taken == [*down, "saved_tensor_offload", "weight_offload"]
    assert now == Techniques(8, True, "fused", saved_tensor_offload=True, weight_offload=True)
    assert [skipped.rung for skipped in move.skipped] == [rung.name for rung in LADDER]


@pytest.mark.parametrize(
    ("techniques", "situation", "rung", "word"),
    [
        (PLAIN, GPU, "fused_attention", "null"),
        (replace(PLAIN, attention_kernel="fused"), GPU, "fused_attention", "already"),
        (replace(PLAIN, attention_kernel="top_k"), GPU, "fused_attention", "something else"),
        (PLAIN, Situation(1, "cuda"), "halve_micro_batch", "single sample"),
        (replace(PLAIN, optimizer_in_backward=True), GPU, "halve_micro_batch", "in_backward"),
        (Techniques(8, True), Situation(1, "cuda"), "activation_checkpointing", "already"),
        (Techniques(8, True), Situation(1, "cuda"), "lighter_optimizer", "adafactor"),
        (Techniques(8, True), Situation(1, "cpu"), "saved_tensor_offload", "cpu"),
        (Techniques(8, True), Situation(1, "cpu"), "weight_offload", "cpu"),
    ],
)
def test_a_rung_that_does_not_apply_says_why(techniques, situation, rung, word):
    reasons = {one.rung: one.reason for one in descend(techniques, situation).skipped}
    assert word in reasons[rung]


def test_partial_checkpointing_can_still_go_further():
    for mode in (2, "selective"):
        move = descend(Techniques(1, mode), Situation(1, "cpu"))
        assert (move.rung, move.techniques.activation_checkpointing) == (
            "activation_checkpointing",
            True,
        )


def test_a_rung_predicted_not_to_help_is_skipped_with_the_figures():
    move = descend(PLAIN, GPU, lambda t: 2**30 if not t.activation_checkpointing else 2**29)
    assert move.rung == "activation_checkpointing"
    assert "1.00 GiB instead of 1.00 GiB" in move.skipped[1].reason
    assert descend(PLAIN, GPU, lambda t: None).rung == "halve_micro_batch"


def test_a_rung_that_the_model_refuses_is_skipped_with_its_words():
    refuse = lambda t: "no blocks" if t.activation_checkpointing else None  # noqa: E731
    move = descend(PLAIN, Situation(1, "cuda"), refuse=refuse)
    assert move.rung == "saved_tensor_offload"
    assert ("activation_checkpointing", "no blocks") in [(s.rung, s.reason) for s in move.skipped]


def test_adapting_takes_as_many_rungs_as_it_needs():
    found, moves = adapt(PLAIN, 8, 300, halvings(1000, 100), "cpu")
    assert found == Techniques(8)  # 100 + 900 / 8
    assert [move.rung for move in moves] == ["halve_micro_batch"] * 3
    assert adapt(PLAIN, 8, 1000, halvings(1000, 100)) == (PLAIN, [])


def test_adapting_goes_on_with_the_next_rung_at_the_floor():
    found, moves = adapt(PLAIN, 3, 200, halvings(1000, 100), "cpu")
    assert found == Techniques(3, True), "no more parts than there are samples"
    assert [move.rung for move in moves] == [
        "halve_micro_batch",
        "halve_micro_batch",
        "activation_checkpointing",
    ]


@pytest.mark.parametrize(("samples", "evaluated"), [(12, 48), (24, 12), (1, 1), (17, 3)])
def test_adapting_ends_with_single_samples(samples, evaluated):
    """More parts or slices than samples are refused by the settings."""
    moves = adapt(
        PLAIN, samples, 0, lambda t: 10**6 // t.gradient_accumulation + 10**6 // t.forward_chunks,
        "cpu", ladder=PLANNED_LADDER, evaluated=evaluated,
    )[1]  # fmt: skip
    reached = [move.techniques for move in moves if move.techniques is not None]
    assert max((one.gradient_accumulation for one in reached), default=1) == samples
    assert max((one.forward_chunks for one in reached), default=1) == evaluated


def test_adapting_says_why_nothing_fits():
    found, moves = adapt(PLAIN, 2, 50, halvings(1000, 100), "cpu")
    assert found is None
    assert moves[-1].techniques is None
    assert len(moves[-1].skipped) == len(LADDER)


def test_an_unknown_peak_cannot_be_adapted_to():
    assert adapt(PLAIN, 8, 300, lambda t: None) == (None, [])


def test_a_rung_whose_peak_is_unknown_is_passed_over_before_a_run():
    """A model may break under one technique as it is traced, and fit with another."""

    def predict(techniques):
        if techniques.activation_checkpointing:
            return None
        return 1000 - 600 * techniques.saved_tensor_offload

    found, moves = adapt(PLAIN, 1, 500, predict)
    assert changes(PLAIN, found) == {"saved_tensor_offload": True}
    reasons = {one.rung: one.reason for one in moves[0].skipped}
    assert reasons["activation_checkpointing"] == "its peak cannot be predicted"


def test_what_changed():
    assert changes(PLAIN, Techniques(2, True)) == {
        "gradient_accumulation": 2,
        "activation_checkpointing": True,
    }
    assert changes(PLAIN, PLAIN) == {}
