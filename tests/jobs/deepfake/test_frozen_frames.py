"""A frozen network over frames: what it makes of clips is kept, and training is the same."""

from __future__ import annotations

import json

LINES = (
    "experiment=deepfake", "memory=minimal", "debug=smoke", "tracking=none", "loader.num_workers=0",
    "trainer.progress=false", "trainer.device=cpu", "trainer.epochs=2", "trainer.max_steps=4",
    "trainer.trainable=['over_time.*','of_*']", "memory.batch_norm=frozen", "data.frames=4",
    "memory.plan=false", "memory.precision=fp32", "data.batch_size=4",
)  # fmt: skip


def train(expt, home, *lines: str, to: str) -> tuple[int, str, list[float]]:
    code, out, err = expt(*LINES, *lines, f"hydra.run.dir={to}", small=False)
    history = home / to / "history.json"
    rows = json.loads(history.read_text()) if history.exists() else []
    return code, out + err, [row["loss"] for row in rows]


def test_training_on_kept_frames_is_training_live(expt, home) -> None:
    code, said, live = train(expt, home, "data.augmentation=false", to="live")
    assert code == 0, said
    own = ("data.augmentation=false", "memory.feature_cache=vision")
    code, said, cached = train(expt, home, *own, to="cached")
    assert code == 0, said
    assert len(live) > 0
    assert all(abs(a - b) <= 1e-6 * abs(a) for a, b in zip(live, cached, strict=True))


def test_clips_that_are_cropped_by_chance_are_refused(expt, home) -> None:
    code, said, _ = train(expt, home, "memory.feature_cache=vision", to="run")
    assert code == 2
    assert "changes its inputs by chance (augments)" in said
