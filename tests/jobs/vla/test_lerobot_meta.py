"""Fields of ``meta`` that are not what they should be: one line with the file and the line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from robots import moving, write_lerobot

from expt.errors import DataError
from expt.jobs.vla.lerobot import read_lerobot

pytest.importorskip("av")


def refused(folder: Path, said: str) -> None:
    with pytest.raises(DataError, match=re.escape(said)) as caught:
        read_lerobot(folder, 16, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("tasks", {"task": "a"}, "line 2: task_index must be a whole number, 0 or more; there is"),
        ("tasks", {"task_index": 1}, "line 2: task must be a text; there is nothing"),
        ("tasks", [1, "a"], 'line 2 must be an object, not [1, "a"]'),
        ("tasks", "{", "line 2 is no JSON: JSONDecodeError"),
        ("episodes", {"episode_index": 1}, "line 2: length must be a positive whole number; there"),
        ("episodes", {"length": 12}, "line 2: episode_index must be a whole number"),
        ("episodes", {"episode_index": 1, "length": "a"}, 'whole number; there is "a"'),
        ("episodes", {"episode_index": 1, "length": 12, "tasks": "a"}, "must be a list of texts"),
        ("episodes", {"episode_index": True, "length": 12}, "episode_index must be a whole number"),
        ("episodes", None, "line 2 must be an object, not null"),
    ],
)
def test_a_line(tmp_path, name, line, said):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    path = folder / f"meta/{name}.jsonl"
    lines = path.read_text().split("\n")
    lines[1] = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n".join(lines))
    refused(folder, said)
    with pytest.raises(DataError, match=re.escape(f"{path}: line 2")):
        read_lerobot(folder, 16, folder)


def feature(value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda info: info["features"].update({"action": value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (feature("float32"), "feature 'action' must be an object, not \"float32\""),
        (feature({"shape": "a"}), "feature 'action': shape must be a list of positive whole"),
        (feature({"shape": [2], "info": "a"}), "feature 'action': info must be an object"),
        (lambda info: info.update(chunks_size="a"), 'chunks_size must be a positive whole number; '
         'there is "a"'),
        (lambda info: info.update(fps="10"), "fps must be a positive number"),
        (lambda info: info.update(fps=float("inf")), "fps must be a positive number"),
        (lambda info: info.update(data_path=3), "data_path must be a text; there is 3"),
        (lambda info: info.update(data_path="{episode_index.a}"), "is none of version v2.1"),
        (lambda info: info.update(features=[]), "features must be an object"),
    ],
)  # fmt: skip
def test_info(tmp_path, change, said):
    folder = write_lerobot(tmp_path / "robot", "v2.1", pictures=None)
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    refused(folder, said)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("length", "row 1: length must be a positive whole number; there is null"),
        ("episode_index", "row 1: episode_index must be a whole number, 0 or more; there is null"),
        ("data/file_index", "row 1: data/file_index must be a whole number, 0 or more"),
    ],
)
def test_a_row_of_version_3(tmp_path, column, said):
    folder = write_lerobot(tmp_path / "robot", "v3.0", pictures=None)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[1][column] = None
    parquet.write_table(pa.Table.from_pylist(rows), path)
    refused(folder, f"{path}: {said}")


def test_a_video_that_is_nowhere(tmp_path):
    folder = write_lerobot(tmp_path / "robot", "v3.0")
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    name = "videos/observation.images.top/from_timestamp"
    parquet.write_table(parquet.read_table(path).drop_columns([name]), path)
    refused(folder, f"row 0: {name} must be a number of seconds; there is nothing")


def test_a_sentence_may_have_another_kind_of_line_end(tmp_path):
    shown = [moving(number) for number in range(4)]
    for one in shown:
        one.sentence = "lift\u2028the cup"
    folder = write_lerobot(tmp_path / "robot", "v2.1", shown, pictures=None)
    path = folder / "meta/tasks.jsonl"
    path.write_text(json.dumps({"task_index": 0, "task": shown[0].sentence}, ensure_ascii=False))
    assert read_lerobot(folder, 16, tmp_path).episodes[0].sentence == shown[0].sentence
