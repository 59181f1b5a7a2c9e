"""How the published sets lie on a disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expt.errors import DataError
from expt.jobs.clips.listing import Division, Video
from expt.jobs.deepfake.layouts import celeb_df, dfdc, faceforensics

DIVISION = Division()


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def counted(videos: list[Video]) -> dict[tuple[str | None, str], int]:
    found: dict[tuple[str | None, str], int] = {}
    for video in videos:
        found[video.split, video.label] = found.get((video.split, video.label), 0) + 1
    return found


def write_faceforensics(root: Path) -> None:
    pairs = {"train": [["000", "003"], ["001", "870"]], "val": [["010", "011"]],
             "test": [["020", "021"]]}  # fmt: skip
    for name, listed in pairs.items():
        (root / "splits").mkdir(exist_ok=True, parents=True)
        (root / "splits" / f"{name}.json").write_text(json.dumps(listed))
        for a, b in listed:
            touch(root, *(f"original_sequences/youtube/c23/videos/{n}.mp4" for n in (a, b)))
            for method in ("Deepfakes", "FaceSwap"):
                folder = f"manipulated_sequences/{method}/c23/videos"
                touch(root, f"{folder}/{a}_{b}.mp4", f"{folder}/{b}_{a}.mp4")


def test_faceforensics_with_its_official_parts(tmp_path):
    write_faceforensics(tmp_path)
    found = faceforensics(None, tmp_path, DIVISION)  # type: ignore[arg-type]
    assert counted(found) == {
        ("train", "original"): 4, ("train", "tampered"): 8,
        ("val", "original"): 2, ("val", "tampered"): 4,
        ("test", "original"): 2, ("test", "tampered"): 4,
    }  # fmt: skip


def test_parts_that_name_absent_videos_are_said(tmp_path):
    write_faceforensics(tmp_path)
    (tmp_path / "original_sequences/youtube/c23/videos/870.mp4").unlink()
    with pytest.raises(DataError, match=r"name 1 original videos .* 870 \(splits/train.json\)"):
        faceforensics(None, tmp_path, DIVISION)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "splits/val.json").unlink(), "there is no .*val.json"),
        (lambda root: (root / "splits/val.json").write_text("{"), "is no JSON"),
        (lambda root: (root / "splits/val.json").write_text("[1]"), "must be a list of pairs"),
    ],
)
def test_parts_that_are_none(tmp_path, change, message):
    write_faceforensics(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        faceforensics(None, tmp_path, DIVISION)  # type: ignore[arg-type]


def test_a_folder_that_holds_none_of_them(tmp_path):
    for layout in (faceforensics, celeb_df, dfdc):
        with pytest.raises(DataError, match="holds no"):
            layout(None, tmp_path, DIVISION)  # type: ignore[arg-type]


def test_celeb_df_keeps_persons_apart_and_its_test_list(tmp_path):
    touch(tmp_path, *(f"Celeb-real/id{n}_000{k}.mp4" for n in range(20) for k in range(2)))
    touch(tmp_path, *(f"Celeb-synthesis/id{n}_id{n + 1}_0000.mp4" for n in range(20)))
    touch(tmp_path, *(f"YouTube-real/{n:05d}.mp4" for n in range(10)))
    (tmp_path / "List_of_testing_videos.txt").write_text(
        "1 Celeb-real/id0_0000.mp4\n0 Celeb-synthesis/id0_id1_0000.mp4\n1 YouTube-real/00003.mp4\n"
    )
    found = celeb_df(None, tmp_path, DIVISION)  # type: ignore[arg-type]
    tests = {video.path.name for video in found if video.split == "test"}
    assert tests == {"id0_0000.mp4", "id0_id1_0000.mp4", "00003.mp4"}
    groups = {s: {v.group for v in found if v.split == s} for s in ("train", "val")}
    assert groups["val"] and not groups["train"] & groups["val"]
    (tmp_path / "Celeb-real/id0_0000.mp4").unlink()
    with pytest.raises(DataError, match="names 1 videos that are not there: Celeb-real/id0_0000"):
        celeb_df(None, tmp_path, DIVISION)  # type: ignore[arg-type]


def test_dfdc_keeps_what_was_made_of_one_original_together(tmp_path):
    entries = {}
    for n in range(12):
        entries[f"r{n}.mp4"] = {"label": "REAL", "split": "train"}
        entries[f"f{n}.mp4"] = {"label": "FAKE", "split": "train", "original": f"r{n}.mp4"}
    touch(tmp_path / "part_0", *entries)
    file = tmp_path / "part_0" / "metadata.json"
    file.write_text(json.dumps(entries))
    found = dfdc(None, tmp_path, DIVISION)  # type: ignore[arg-type]
    parts = {video.path.stem: video.split for video in found}
    assert all(parts[f"r{n}"] == parts[f"f{n}"] for n in range(12))
    assert set(parts.values()) == {"train", "val", "test"}
    file.write_text(json.dumps({"gone.mp4": {"label": "FAKE"}}))
    with pytest.raises(DataError, match=r"names 1 videos .* gone.mp4 \(part_0/metadata.json\)"):
        dfdc(None, tmp_path, DIVISION)  # type: ignore[arg-type]
    file.write_text(json.dumps({"r0.mp4": {"label": "real"}}))
    with pytest.raises(DataError, match="neither REAL nor FAKE"):
        dfdc(None, tmp_path, DIVISION)  # type: ignore[arg-type]


def test_faceforensics_of_several_compressions_and_with_masks(tmp_path):
    write_faceforensics(tmp_path)
    touch(tmp_path, "manipulated_sequences/Deepfakes/masks/videos/000_003.mp4")
    assert len(faceforensics(None, tmp_path, DIVISION)) == 24  # type: ignore[arg-type]
    touch(
        tmp_path,
        "manipulated_sequences/Deepfakes/c40/videos/000_003.mp4",
        "original_sequences/youtube/c40/videos/000.mp4",
    )
    with pytest.raises(DataError, match=r"the compressions c23, c40; choose one"):
        faceforensics(None, tmp_path, DIVISION)  # type: ignore[arg-type]
    chosen: Any = SimpleNamespace(compression="c23")
    assert len(faceforensics(chosen, tmp_path, DIVISION)) == 24


def test_dfdc_keeps_an_original_with_what_is_for_the_test(tmp_path):
    entries = {f"r{n}.mp4": {"label": "REAL"} for n in range(8)}
    entries["f0.mp4"] = {"label": "FAKE", "split": "test", "original": "r0.mp4"}
    touch(tmp_path, *entries)
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    parts = {v.path.stem: v.split for v in dfdc(None, tmp_path, DIVISION)}  # type: ignore[arg-type]
    assert parts["f0"] == parts["r0"] == "test"
