"""Which videos there are, and to which part each belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from expt.errors import DataError
from expt.jobs.clips.listing import (
    Division,
    Video,
    classes_of,
    folder,
    interleaved,
    read_folders,
    read_list,
)

DIVISION = Division()


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return root


def test_parts_and_classes_are_folders(tmp_path):
    touch(
        tmp_path, "train/a/1.mp4", "train/b/2.avi", "valid/a/3.mp4", "test/b/4.MP4",
        "train/a/notes.txt", ".hidden/x.mp4",
    )  # fmt: skip
    found = read_folders(tmp_path, DIVISION)
    assert [(v.split, v.label, v.path.name) for v in found] == [
        ("test", "b", "4.MP4"), ("train", "a", "1.mp4"), ("train", "b", "2.avi"),
        ("val", "a", "3.mp4"),
    ]  # fmt: skip


def test_without_parts_groups_are_divided_and_stay_together(tmp_path):
    touch(tmp_path, *(f"{'ab'[n % 2]}/person{n // 4:02d}_{n}.mp4" for n in range(80)))
    division = Division(0.2, 0.2, r"(person\d+)")
    found = read_folders(tmp_path, division)
    parts = {split: {v.group for v in found if v.split == split} for split in ("train", "val")}
    parts["test"] = {v.group for v in found if v.split == "test"}
    assert [len(parts[split]) for split in ("train", "val", "test")] == [12, 4, 4]
    assert not parts["train"] & parts["val"] and not parts["train"] & parts["test"]
    assert read_folders(tmp_path, division) == found


def test_a_missing_validation_part_is_cut_from_training(tmp_path):
    touch(tmp_path, *(f"train/{c}/{n}.mp4" for c in "ab" for n in range(10)), "test/a/x.mp4")
    found = read_folders(tmp_path, DIVISION)
    assert {v.path.name for v in found if v.split == "test"} == {"x.mp4"}
    assert sum(v.split == "val" for v in found) == 4  # two of each class


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no folder for a class in it"),
        (["a/1.mp4", "b/notes.txt"], "class b has no clips"),
        (["val/a/1.mp4", "val/b/2.mp4"], "has the parts val and no train"),
    ],
)
def test_what_is_missing_is_said(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        read_folders(tmp_path, DIVISION)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="there is no such folder"):
        folder(tmp_path / "absent")
    touch(tmp_path, "file.mp4")
    with pytest.raises(DataError, match="is a file; give the folder"):
        folder(tmp_path / "file.mp4")


def test_lists_of_paths_and_labels(tmp_path):
    touch(tmp_path, "with space/1.mp4", "2.mp4", "3.mp4", "4.mp4")
    (tmp_path / "train.txt").write_text("# a comment\nwith space/1.mp4 0\n2.mp4,1\n\n")
    (tmp_path / "val.txt").write_text("3.mp4 1\n")
    (tmp_path / "test.txt").write_text("4.mp4 0\n")
    lists = {"train": "train.txt", "val": "val.txt", "test": "test.txt"}
    found = read_list(tmp_path, lists, DIVISION)
    assert [(v.split, v.label) for v in found] == [
        ("train", "0"), ("train", "1"), ("val", "1"), ("test", "0"),
    ]  # fmt: skip


def test_a_list_that_names_files_that_are_not_there(tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"{n}.mp4 0\n" for n in range(7)))
    with pytest.raises(DataError, match=r"0.mp4 \(line 1 of train.txt\).* and 2 more"):
        read_list(tmp_path, {"train": "train.txt"}, DIVISION)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"alone.mp4\n", "line 1: 'alone.mp4' has no label"), (b"\xff\xfe\x00", "no text in UTF-8")],
)
def test_a_list_that_is_none(tmp_path, content, message):
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_list(tmp_path, {"train": "train.txt"}, DIVISION)


def test_an_absent_list(tmp_path):
    with pytest.raises(DataError, match=r"there is no list gone.txt"):
        read_list(tmp_path, {"train": "gone.txt"}, DIVISION)


def video(label: str, split: str, number: int = 0) -> Video:
    return Video(Path(f"{label}{number}.mp4"), label, f"{label}{number}", split)  # type: ignore[arg-type]


def test_classes_are_in_the_order_of_their_names_or_numbers():
    every = [video(label, split) for label in ("10", "9") for split in ("train", "val", "test")]
    assert classes_of(every, "here") == ["9", "10"]


@pytest.mark.parametrize(
    ("videos", "message"),
    [
        ([video("a", "train"), video("a", "val"), video("a", "test")], "only one class, a"),
        ([video("a", "train"), video("b", "train"), video("a", "val")], "no clip for the test"),
        (
            [video("a", "train"), video("b", "train"), video("a", "val"), video("bb", "test")],
            "class bb is in the test part and not in the training part",
        ),
    ],
)
def test_classes_that_cannot_be_learned(videos, message):
    with pytest.raises(DataError, match=message):
        classes_of(videos, "here")


def test_classes_take_turns():
    order = interleaved([video("a", "val", n) for n in range(5)] + [video("b", "val", 9)])
    assert {v.label for v in order[:2]} == {"a", "b"}
    assert len(order) == 6


def test_a_pattern_without_a_group_is_said(tmp_path):
    with pytest.raises(DataError, match=r"finds no group in x.mp4"):
        Division(group_pattern=r"(s\d)").group(tmp_path / "x.mp4", tmp_path)


def test_parts_do_not_depend_on_where_the_folder_is(tmp_path, monkeypatch):
    for place in ("one", "two/deeper"):
        touch(tmp_path / place, *(f"{'ab'[n % 2]}/{n}.mp4" for n in range(40)))
    found = [
        [(v.path.name, v.split) for v in read_folders(root, DIVISION)]
        for root in (tmp_path / "one", tmp_path / "two/deeper")
    ]
    monkeypatch.chdir(tmp_path)
    found.append([(v.path.name, v.split) for v in read_folders(Path("one"), DIVISION)])
    assert found[0] == found[1] == found[2]


def test_every_class_is_in_every_part_even_with_three_videos_each(tmp_path):
    touch(tmp_path, *(f"{c}/{c}{n}.mp4" for c in "abc" for n in range(3)))
    found = read_folders(tmp_path, DIVISION)
    for split in ("train", "val", "test"):
        assert {v.label for v in found if v.split == split} == {"a", "b", "c"}


def test_groups_in_two_given_parts_are_refused(tmp_path):
    touch(tmp_path, "train/a/p1_x.mp4", "train/b/p2_x.mp4", "test/a/p1_y.mp4", "val/b/p3_x.mp4")
    with pytest.raises(DataError, match="1 groups are in more than one part: p1"):
        read_folders(tmp_path, Division(group_pattern=r"(p\d)"))


def test_a_file_in_two_lists_is_refused(tmp_path):
    touch(tmp_path, "1.mp4", "2.mp4")
    (tmp_path / "train.txt").write_text("1.mp4 0\n2.mp4 1\n")
    (tmp_path / "val.txt").write_text("2.mp4 1\n")
    with pytest.raises(DataError, match=r"2.mp4 is named twice, also in line 2 of train.txt"):
        read_list(tmp_path, {"train": "train.txt", "val": "val.txt"}, DIVISION)


def test_names_of_a_list_may_hold_what_separates(tmp_path):
    touch(tmp_path, "b, 0.mp4", "a 0.mp4", "c.mp4")
    content = "b, 0.mp4 close\na 0.mp4,open door\nc.mp4 open\n"
    (tmp_path / "train.txt").write_text(content, encoding="utf-8-sig")
    found = read_list(tmp_path, {"train": "train.txt"}, DIVISION)
    assert [(v.path.name, v.label) for v in found] == [
        ("b, 0.mp4", "close"), ("a 0.mp4", "open door"), ("c.mp4", "open"),
    ]  # fmt: skip
