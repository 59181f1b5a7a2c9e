from __future__ import annotations

import pytest

from expt.reports.figures.claims import Claim, claim_of, claimed, plot_claims

SETTINGS = {"model.embed_dim": 64, "model.patch_sizes": [1, 2], "model.cross": False}
TEXTS = {"model.embed_dim": "64", "model.patch_sizes": "[1, 2]", "model.cross": "False"}
LITE = Claim("lite", "6 GB", "< 4.0", SETTINGS)
FULL = Claim("full", "about 30GB (OOM)", "< 3.5", {})


def test_a_claim_is_about_runs_with_its_preset_and_settings(record) -> None:
    run = record("a", 1.0, preset="lite", settings=TEXTS)
    assert claim_of(run, [FULL, LITE]) is LITE
    wider = record("b", 1.0, preset="lite", settings=TEXTS | {"model.embed_dim": "96"})
    assert claim_of(wider, [FULL, LITE]) is None
    assert claim_of(record("c", 1.0, preset="minimal", settings=TEXTS), [FULL, LITE]) is None
    assert claim_of(record("d", 1.0, preset="lite"), [LITE]) is None, "its settings are not known"


@pytest.mark.parametrize(
    ("words", "count"),
    [("6 GB", 6 * 10**9), ("about 30GB (OOM)", 30 * 10**9), ("1.5 GiB", 3 * 2**29), ("?", None)],
)
def test_a_claimed_peak_in_bytes(words, count) -> None:
    assert Claim("lite", words, "", {}).peak_bytes == count


def test_runs_are_gathered_by_claim(record, tmp_path) -> None:
    runs = [
        record("a", 1.0, preset="lite", settings=TEXTS),
        record("b", 2.0, preset="full"),
        record("c", 3.0, preset="lite", settings=TEXTS),
    ]
    found = claimed(runs, [FULL, LITE])
    assert [(c.claim.preset, [r.name for r in c.records]) for c in found] == [
        ("full", ["b"]),
        ("lite", ["a", "c"]),
    ]
    assert len(plot_claims(found, tmp_path)) == 2
    assert plot_claims([], tmp_path) == []
