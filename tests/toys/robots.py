"""LeRobot folders as small as they can be, of versions 2.1 and 3.0, by the published format."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

FPS = 10
CAMERA = "observation.images.top"
SIDES = (16, 20)
"""Height and width of a picture."""


@dataclass
class Shown:
    """One episode: state [T, S], action [T, A], sentence, pictures uint8 [T, H, W, 3]."""

    state: np.ndarray
    action: np.ndarray
    sentence: str
    pictures: np.ndarray | None = None
    fps: float = FPS


def moving(number: int, steps: int = 12, sizes: tuple[int, int] = (3, 2)) -> Shown:
    """Return an episode whose picture at step t is evenly grey, 10 t + number."""
    draw = np.random.default_rng(number)
    state = draw.normal(size=(steps, sizes[0])).astype(np.float32)
    action = np.cumsum(draw.normal(size=(steps, sizes[1])), axis=0).astype(np.float32)
    grey = (10 * np.arange(steps) + number).astype(np.uint8)
    pictures = np.broadcast_to(grey[:, None, None, None], (steps, *SIDES, 3)).copy()
    return Shown(state, action, ("lift the cup", "turn the key")[number % 2], pictures)


def write_lerobot(
    folder: Path,
    version: str = "v2.1",
    episodes: Sequence[Shown] | None = None,
    pictures: str | None = "video",
    video_fps: int | None = None,
    fps: int = FPS,
) -> Path:
    """Write a folder; `pictures` is ``video``, ``image`` or None. Return it."""
    shown = [moving(number) for number in range(8)] if episodes is None else list(episodes)
    sentences = list(dict.fromkeys(one.sentence for one in shown))
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    _write_info(folder, version, shown, sentences, pictures, fps)
    tables = [
        _table(one, number, sentences, sum(len(s.state) for s in shown[:number]), pictures)
        for number, one in enumerate(shown)
    ]
    write = _write_two if version.startswith("v2") else _write_three
    write(folder, shown, sentences, tables, pictures, video_fps or fps)
    return folder


def _write_info(
    folder: Path,
    version: str,
    shown: Sequence[Shown],
    sentences: list[str],
    pictures: str | None,
    fps: int,
) -> None:
    features: dict[str, Any] = {
        "observation.state": {
            "dtype": "float32",
            "shape": [shown[0].state.shape[1]],
            "names": {"motors": [f"s{n}" for n in range(shown[0].state.shape[1])]},
        },
        "action": {
            "dtype": "float32",
            "shape": [shown[0].action.shape[1]],
            "names": [f"Joint {n}.pos" for n in range(shown[0].action.shape[1])],
        },
        **{
            name: {"dtype": kind, "shape": [1], "names": None}
            for name, kind in (
                ("timestamp", "float32"), ("frame_index", "int64"), ("episode_index", "int64"),
                ("index", "int64"), ("task_index", "int64"),
            )
        },
    }  # fmt: skip
    if pictures is not None:
        features[CAMERA] = {
            "dtype": pictures,
            "shape": [3, *SIDES],
            "names": ["channels", "height", "width"],
        }
    two = version.startswith("v2")
    chunk, file = "chunk-{episode_chunk:03d}", "episode_{episode_index:06d}"
    three = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(shown),
        "total_frames": sum(len(one.state) for one in shown),
        "total_tasks": len(sentences),
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(shown)}"},
        "data_path": f"data/{chunk}/{file}.parquet" if two else f"data/{three}.parquet",
        "video_path": f"videos/{chunk}/{{video_key}}/{file}.mp4"
        if two
        else f"videos/{{video_key}}/{three}.mp4",
        "features": features,
    }
    (folder / "meta/info.json").write_text(json.dumps(info))


def _table(
    one: Shown, number: int, sentences: list[str], first: int, pictures: str | None
) -> pa.Table:
    steps = len(one.state)
    columns: dict[str, Any] = {
        # As LeRobot writes lists of one length; actions are lists of any, which others write.
        "observation.state": pa.array(list(one.state), pa.list_(pa.float32(), one.state.shape[1])),
        "action": pa.array(list(one.action), pa.list_(pa.float32())),
        "timestamp": (np.arange(steps) / one.fps).astype(np.float32),
        "frame_index": np.arange(steps),
        "episode_index": np.full(steps, number),
        "index": first + np.arange(steps),
        "task_index": np.full(steps, sentences.index(one.sentence)),
    }
    if pictures == "image":
        assert one.pictures is not None
        columns[CAMERA] = [{"bytes": _png(p), "path": f"frame-{n}.png"}
                           for n, p in enumerate(one.pictures)]  # fmt: skip
    return pa.table(columns)


def _png(picture: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, "png")
    return content.getvalue()


def _write_two(
    folder: Path,
    shown: Sequence[Shown],
    sentences: list[str],
    tables: list[pa.Table],
    pictures: str | None,
    video_fps: int,
) -> None:
    from videos import write_video

    tasks = [{"task_index": n, "task": text} for n, text in enumerate(sentences)]
    _write_lines(folder / "meta/tasks.jsonl", tasks)
    listed = [
        {"episode_index": n, "tasks": [one.sentence], "length": len(one.state)}
        for n, one in enumerate(shown)
    ]
    _write_lines(folder / "meta/episodes.jsonl", listed)
    for number, (one, table) in enumerate(zip(shown, tables, strict=True)):
        name = f"episode_{number:06d}"
        (folder / "data/chunk-000").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, folder / f"data/chunk-000/{name}.parquet")
        if pictures == "video":
            path = folder / f"videos/chunk-000/{CAMERA}/{name}.mp4"
            write_video(path, one.pictures, rate=video_fps)


def _write_three(
    folder: Path,
    shown: Sequence[Shown],
    sentences: list[str],
    tables: list[pa.Table],
    pictures: str | None,
    video_fps: int,
) -> None:
    """Write all episodes but the last into the first file, and that one into a second."""
    import pandas as pd
    from videos import write_video

    tasks = pd.DataFrame({"task_index": range(len(sentences))}, index=sentences)
    tasks.to_parquet(folder / "meta/tasks.parquet")
    rows, last = [], len(shown) - 1
    ends = np.cumsum([0, *(len(one.state) for one in shown)])
    for number, one in enumerate(shown):
        file = int(number == last)
        first = 0 if file else int(ends[number])
        row = {
            "episode_index": number,
            "tasks": [one.sentence],
            "length": len(one.state),
            "data/chunk_index": 0,
            "data/file_index": file,
            "dataset_from_index": int(ends[number]),
            "dataset_to_index": int(ends[number + 1]),
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            "stats/action/mean": one.action.mean(axis=0).tolist(),
        }
        if pictures == "video":
            row |= {
                f"videos/{CAMERA}/chunk_index": 0,
                f"videos/{CAMERA}/file_index": file,
                f"videos/{CAMERA}/from_timestamp": first / one.fps,
                f"videos/{CAMERA}/to_timestamp": (first + len(one.state)) / one.fps,
            }
        rows.append(row)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet"
    )
    (folder / "data/chunk-000").mkdir(parents=True, exist_ok=True)
    for file, members in enumerate((range(last), [last])):
        table = pa.concat_tables([tables[n] for n in members])
        parquet.write_table(table, folder / f"data/chunk-000/file-{file:03d}.parquet")
        if pictures == "video":
            frames = np.concatenate([shown[n].pictures for n in members])
            path = folder / f"videos/{CAMERA}/chunk-000/file-{file:03d}.mp4"
            write_video(path, frames, rate=video_fps)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
