"""The feature cache of a run: exact, reused, refused; models that were cached are whole again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from expt import load
from expt.result import RunResult, load_result
from expt.training.features import store


@pytest.fixture
def line(toys: Path, home: Path) -> tuple[str, ...]:
    """A run of the toy job with a frozen part."""
    return (
        f"--config-dir={toys / 'conf'}", "data=pictures", "model=deep", "tracking=none",
        "trainer.epochs=2", "trainer.progress=false", "trainer.device=cpu", "loader.num_workers=0",
        "memory.plan=false",
    )  # fmt: skip


@pytest.fixture
def train(expt, line, home):
    """A function that trains with changes, and returns (exit code, what was said, result)."""

    def run(*changes: str, to: str = "run") -> tuple[int, str, RunResult | None]:
        names = {change.partition("=")[0] for change in changes}
        given = [one for one in line if one.partition("=")[0] not in names]
        code, out, err = expt(*given, *changes, f"hydra.run.dir={to}", small=False)
        return code, out + err, load_result(home / to)

    return run


def history(home: Path, to: str) -> list[dict[str, float]]:
    return json.loads((home / to / "history.json").read_text())


def losses(home: Path, to: str) -> list[float]:
    return [row["loss"] for row in history(home, to)]


def trained(home: Path, to: str) -> dict[str, torch.Tensor]:
    stored = torch.load(home / to / "checkpoints/last.pt", weights_only=True)["model"]
    return {name: value for name, value in stored.items() if name.startswith(("head", "blocks.3"))}


def apart(home: Path, one: str, other: str) -> float:
    """Return how far trained weights are apart, relative to their size."""
    first, second = trained(home, one), trained(home, other)
    assert first.keys() == second.keys() and first
    return max(
        float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first
    )


@pytest.mark.parametrize(("mode", "workers"), [("prefix", 0), ("vision", 0), ("prefix", 1)])
def test_training_on_features_is_training_live(train, home, mode: str, workers: int) -> None:
    assert train(to="live")[0] == 0
    code, said, result = train(
        f"memory.feature_cache={mode}", f"loader.num_workers={workers}", to="cached"
    )
    assert code == 0, said
    assert losses(home, "cached") == losses(home, "live")
    assert apart(home, "live", "cached") == 0.0
    live = load_result(home / "live")
    assert result.metrics == live.metrics
    assert result.parameters == live.parameters
    record = result.feature_cache
    assert (record["mode"], record["rows"], record["reused"]) == (mode, 68, False)
    assert record["bytes"] == 68 * 12 * 16 * 4
    assert len(record["epoch_seconds"]) == 2


@pytest.mark.parametrize(("dtype", "most"), [("fp32", 0.0), ("fp16", 1e-3), ("bf16", 1e-2)])
def test_a_narrower_type_costs_rounding_only(train, home, dtype: str, most: float) -> None:
    assert train(to="live")[0] == 0
    code, said, result = train(
        "memory.feature_cache=prefix", f"memory.feature_cache_dtype={dtype}", to="cached"
    )
    assert code == 0, said
    live, cached = losses(home, "live"), losses(home, "cached")
    assert cached == pytest.approx(live, rel=1e-4 if dtype != "bf16" else 1e-3)
    assert (apart(home, "live", "cached") > 0) == (most > 0)
    assert apart(home, "live", "cached") <= most
    assert result.feature_cache["bytes"] == 68 * 12 * 16 * (4 if dtype == "fp32" else 2)


def test_bf16_arithmetic_is_exact_with_features_as_they_are_computed(train, home) -> None:
    assert train("memory.precision=bf16", to="live")[0] == 0
    assert train("memory.precision=bf16", "memory.feature_cache=prefix", to="cached")[0] == 0
    assert losses(home, "cached") == losses(home, "live")
    assert apart(home, "live", "cached") == 0.0


def test_what_was_made_is_read_again_and_pictures_are_not(train, home) -> None:
    import features

    assert train("memory.feature_cache=prefix", to="first")[0] == 0
    features.Pictures.reads = 0
    code, said, result = train("memory.feature_cache=prefix", to="second")
    assert code == 0, said
    assert "found in" in said
    assert result.feature_cache["reused"] is True
    # The guard against other pictures (3 draws and 2 other splits), shapes, and the signature.
    assert features.Pictures.reads <= 10
    assert losses(home, "second") == losses(home, "first")


@pytest.mark.parametrize(
    "change",
    [
        "trainer.seed=1",  # other frozen weights
        "model.frozen=1",
        "memory.precision=bf16",
        "memory.feature_cache_dtype=fp16",
        "data.pixels=13",
        "memory.feature_cache=vision",
    ],
)
def test_another_key_makes_them_again(train, home, change: str) -> None:
    assert train("memory.feature_cache=prefix", "trainer.epochs=1", to="first")[0] == 0
    before = set((home / "outputs/cache/features").iterdir())
    code, said, result = train(
        *({"memory.feature_cache": "memory.feature_cache=prefix"} | {
            change.partition("=")[0]: change
        }).values(),
        "trainer.epochs=1", to="second",
    )  # fmt: skip
    assert code == 0, said
    assert result.feature_cache["reused"] is False
    assert set((home / "outputs/cache/features").iterdir()) > before


def test_batch_sizes_are_no_part_of_the_key(train, home) -> None:
    assert train("memory.feature_cache=prefix", to="first")[0] == 0
    _, _, result = train("memory.feature_cache=prefix", "data.batch_size=4", to="second")
    assert result.feature_cache["reused"] is True


def test_best_weights_build_the_whole_model_and_predict(train, expt, line, home) -> None:
    assert train(to="live")[0] == 0
    assert train("memory.feature_cache=prefix", to="cached")[0] == 0
    stored = torch.load(home / "cached/checkpoints/best.pt", weights_only=True)
    assert not [name for name in stored["model"] if name.startswith(("embed", "blocks.0"))]
    assert "embed.scale" in stored["frozen"]["names"]
    (whole, _), (live, _) = load(home / "cached"), load(home / "live")
    image, noise = torch.randn(2, 12, 12), torch.randn(2)
    assert torch.equal(whole(noise=noise, image=image), live(noise=noise, image=image))
    inputs = json.loads((home / "cached/signature.json").read_text())["inputs"]
    assert "image" in inputs and "prefix" not in inputs
    code, _, err = expt("task=predict", "predict.run=cached", small=False)
    assert code == 0, err


def test_frozen_weights_that_are_others_are_refused(train, home, monkeypatch) -> None:
    assert train("memory.feature_cache=prefix", to="cached")[0] == 0
    import features

    from expt.errors import ConfigError

    monkeypatch.setattr(
        features.Embed, "reset", lambda self: None, raising=False
    )  # the class is the one that the run had
    path = home / "cached/checkpoints/best.pt"
    stored = torch.load(path, weights_only=True)
    stored["recipe"]["seed"] = 5  # as if another base had been read
    torch.save(stored, path)
    with pytest.raises(ConfigError, match="other frozen weights"):
        _ = load(home / "cached").model


@pytest.mark.parametrize("first", ["prefix", "off"])
@pytest.mark.parametrize("frozen", [1, 3])  # less and more than half of all weights
def test_a_run_goes_on_exactly_with_or_without_the_cache(train, home, first, frozen) -> None:
    own = (f"model.frozen={frozen}", "trainer.schedule=constant")
    assert train(*own, "trainer.epochs=3", to="whole")[0] == 0
    assert train(*own, f"memory.feature_cache={first}", to="part")[0] == 0
    other = {"prefix": "off", "off": "prefix"}[first]
    code, said, result = train(
        *own, f"memory.feature_cache={other}", "trainer.epochs=3", "trainer.resume=true", to="part"
    )
    assert code == 0, said
    assert (result.resumed_from_step, result.steps) == (12, 18)
    assert losses(home, "part") == losses(home, "whole")
    assert apart(home, "whole", "part") == 0.0


def test_a_killed_run_goes_on_with_the_rows_that_are_there(train, home, monkeypatch) -> None:
    written: list[int] = []
    write = store.RowWriter.write

    def interrupted(self, numbers, values):
        if len(written) >= 18:
            self.mark()
            raise KeyboardInterrupt
        write(self, numbers, values)
        written.extend(numbers)

    with monkeypatch.context() as patch:
        patch.setattr(store.RowWriter, "write", interrupted)
        assert train("memory.feature_cache=prefix", to="first")[0] == 130
    counted: list[int] = []

    def counting(self, numbers, values):
        counted.extend(numbers)
        write(self, numbers, values)

    monkeypatch.setattr(store.RowWriter, "write", counting)
    code, said, _ = train("memory.feature_cache=prefix", to="second")
    assert code == 0, said
    assert "going on, 18 of 68 rows are there" in said
    assert sorted(counted) == list(range(18, 68))
    assert train(to="live")[0] == 0
    assert losses(home, "second") == losses(home, "live")


def test_a_full_disk_is_one_line_and_training_goes_on_live(train, home, monkeypatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        code, said, result = train("memory.feature_cache=prefix", to="cached")
    assert code == 0, said
    lines = [one for one in said.splitlines() if "No space left on device" in one]
    assert len(lines) == 1 and lines[0].endswith("training goes on live")
    assert not list((home / "outputs/cache/features").glob(".*.part"))
    assert "No space left" in result.feature_cache["live"]
    assert train(to="live")[0] == 0
    assert losses(home, "cached") == losses(home, "live")


def test_too_little_room_is_said_before_anything_is_made(train, home, monkeypatch) -> None:
    monkeypatch.setattr(store, "free_bytes", lambda folder: 1000)
    code, said, result = train("memory.feature_cache=prefix")
    assert code == 0, said
    assert "are needed in" in said and "68 samples" in said
    assert result.feature_cache["rows"] == 0


def test_a_lack_of_memory_makes_smaller_batches_and_then_live(train, home, monkeypatch) -> None:
    import features

    whole = features.Deep.features

    def scarce(limit: int) -> None:
        def lacking(self, mode, image=None, vision=None, prefix=None):
            if mode == "prefix" and len(image) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return whole(self, mode, image, vision, prefix)

        monkeypatch.setattr(features.Deep, "features", lacking)

    scarce(2)
    code, said, result = train("memory.feature_cache=prefix", to="smaller")
    assert code == 0, said
    assert result.feature_cache["rows"] == 68
    assert [event["rung"] for event in result.oom_events] == ["halve_evaluation_batch"] * 2
    scarce(0)
    monkeypatch.setattr(features.Pictures, "fingerprint", lambda self: "others")
    code, said, result = train("memory.feature_cache=prefix", to="none")
    assert code == 0, said
    assert "training goes on live" in said
    assert result.feature_cache["rows"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["memory.feature_cache=last_hidden_state"], "no weight below it (LoRA's are) gets a grad"),
        (["memory.feature_cache=prefx"], "did you mean 'prefix'"),
        (["memory.feature_cache=prefix", "data.augments=true"], "changes its inputs by chance"),
        (
            ["memory.feature_cache=prefix", "data.hidden_augmentation=true"],
            "image of sample 0 of the train part differ from epoch to epoch",
        ),
        (["memory.feature_cache=vision", "model.modes=[prefix]"], "known names: off, prefix"),
        (["memory.feature_cache=prefix", "model.train_all=true"], "embed.linear.weight, …"),
        (
            ["memory.feature_cache=prefix", "model=classifier", "data=blobs"],
            "Classifier does not say what its frozen part makes",
        ),
        (
            ["memory.feature_cache=alternating", "trainer.steps_per_epoch=2"],
            "may leave some out",
        ),
        (["memory.feature_cache_rebuild_interval=1"], "memory.feature_cache_rebuild_interval"),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_cannot_be_cached_is_refused_in_a_line(train, changes, said: str, plan: bool) -> None:
    code, found, _ = train(*changes, f"memory.plan={str(plan).lower()}")
    if "hidden_augmentation" in changes[-1] and plan:
        return  # a plan reads one sample only
    assert code == 2, found
    assert said in found
    assert len(found.strip().splitlines()) == 1


def test_a_sample_that_cannot_be_read_is_passed_over_as_live(train, home) -> None:
    code, said, _ = train("data.broken=3", "memory.feature_cache=prefix", to="fails")
    assert code == 2 and "a broken picture" in said
    own = ("data.broken=3", "loader.on_bad_sample=skip")
    assert train(*own, to="live")[0] == 0
    code, said, result = train(*own, "memory.feature_cache=prefix", to="cached")
    assert code == 0, said
    assert losses(home, "cached") == losses(home, "live")
    assert result.skipped_samples == 1


def test_data_that_reads_everything_gives_the_same(train, home) -> None:
    assert train(to="live")[0] == 0
    own = ("memory.feature_cache=prefix", "data._target_=features.Whole")
    assert train(*own, to="cached")[0] == 0
    assert losses(home, "cached") == losses(home, "live")


ALTERNATING = ("memory.feature_cache=alternating", "memory.feature_cache_rebuild_interval=2")


def test_alternating_epochs_train_below_in_live_ones_only(train, home) -> None:
    below: list[torch.Tensor] = []

    def lower(to: str) -> torch.Tensor:
        path = home / to / "checkpoints/last.pt"
        return torch.load(path, weights_only=True)["model"]["blocks.3.outer.weight"]

    for epochs in (1, 2, 3):
        code, said, result = train(
            *ALTERNATING, "trainer.schedule=constant", f"trainer.epochs={epochs}", to=f"{epochs}"
        )
        assert code == 0, said
        below.append(lower(f"{epochs}"))
    assert "get no gradient" in said
    assert torch.equal(below[0], below[1]) and not torch.equal(below[1], below[2])
    first, second, third = result.feature_cache["staleness"]
    assert 0 < first == second != third
    assert [row["feature_cache/live"] for row in history(home, "3")] == [1.0, 0.0, 1.0]
    # The first epoch is a live one in every respect.
    assert train("trainer.schedule=constant", "trainer.epochs=1", to="live")[0] == 0
    assert losses(home, "1") == losses(home, "live")
    assert apart(home, "1", "live") == 0.0


def test_a_cached_epoch_reads_no_pictures(train, home) -> None:
    import features

    reads = []
    for epochs in (1, 2):
        features.Pictures.reads = 0
        assert train(*ALTERNATING, f"trainer.epochs={epochs}", to=f"{epochs}")[0] == 0
        reads.append(features.Pictures.reads)
    assert reads[1] - reads[0] == 12  # those of the validation, which is live


@pytest.mark.parametrize("stop", [4, 8, 14])  # in the first live epoch, a cached and a live one
def test_alternating_epochs_go_on_exactly(train, home, monkeypatch, stop: int) -> None:
    from expt.training.trainer import Trainer

    own = (*ALTERNATING, "trainer.epochs=4", "trainer.checkpoint_every_steps=2")
    assert train(*own, to="whole")[0] == 0
    step = Trainer.train_step

    def killed(self, samples):
        if self.progress.step == stop + 1:
            raise KeyboardInterrupt
        return step(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", killed)
        assert train(*own, to="part")[0] == 130
    code, said, result = train(*own, "trainer.resume=true", to="part")
    assert code == 0, said
    assert result.resumed_from_step == stop
    assert losses(home, "part") == losses(home, "whole")
    assert apart(home, "part", "whole") == 0.0
    assert result.feature_cache["staleness"] == [
        row["feature_cache/staleness"] for row in history(home, "whole")
    ]


def test_a_run_that_ends_in_its_first_live_epoch_can_be_extended(train, home) -> None:
    own = (*ALTERNATING, "trainer.epochs=2", "trainer.schedule=constant")
    assert train(*own, to="whole")[0] == 0
    code, said, _ = train(*own, "trainer.max_steps=3", to="part")
    assert code == 0, said
    code, said, _ = train(*own, "trainer.resume=true", "trainer.max_steps=100", to="part")
    assert code == 0, said
    assert apart(home, "part", "whole") == 0.0


def test_alternating_with_a_full_disk_is_live(train, home, monkeypatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_write", full)
        code, said, _ = train(*ALTERNATING, to="full")
    assert code == 0, said
    assert said.count("every epoch is live from now on") == 1
    assert train(to="live")[0] == 0
    assert losses(home, "full") == losses(home, "live")


def test_the_largest_batch_is_found_and_confirmed_with_features(expt, line, home) -> None:
    code, out, err = expt(
        *[one for one in line if one != "memory.plan=false"], "task=fit_batch",
        "memory.feature_cache=prefix", "memory.budget=40MiB", "model.width=128", small=False,
    )  # fmt: skip
    assert code == 0, err
    assert "confirmed by two steps inside the budget" in out
    assert not (home / "outputs/cache").exists()
