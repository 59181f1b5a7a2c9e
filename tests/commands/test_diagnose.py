"""`task=diagnose` from its command line: the answer, the file, and every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LOG = "".join(
    f"Step {step}: {memory} GB\n"
    for step, memory in ((100, 18.2), (300, 19.0), (500, 20.1), (700, 21.8), (900, 24.2))
)


def diagnose(expt, *arguments: str) -> tuple[int, str, str]:
    return expt("task=diagnose", "hydra.run.dir=run", *arguments, small=False)


def test_the_answer_is_printed_and_written(expt, home: Path) -> None:
    (home / "train.log").write_text(LOG + "Step 1000: OOM\n")
    code, out, err = diagnose(expt, "diagnose.log=train.log")
    assert code == 0, err
    assert "train.log: leak" in out
    assert "accelerating" in out
    assert "what to do" in out
    written = json.loads((home / "run/diagnosis.json").read_text())
    assert written["kind"] == "leak"
    assert "from step 100 to 900" in written["cause"]
    assert "graph" in written["advice"][0]
    assert written["evidence"]
    assert written["log"] == "train.log"


def test_what_is_not_out_of_memory_is_an_answer_too(expt, home: Path) -> None:
    (home / "e.txt").write_text("OutOfResources: out of resource: shared memory, Required: 1")
    code, out, _ = diagnose(expt, "diagnose.log=e.txt")
    assert code == 0
    assert "not_oom" in out
    assert json.loads((home / "run/diagnosis.json").read_text())["kind"] == "not_oom"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["diagnose.log is not set", "diagnose.log=train.log"]),
        (("diagnose.log=",), ["diagnose.log is not set"]),
        (("diagnose.log=none.log",), ["diagnose.log=none.log", "no such file"]),
        (("diagnose.log=folder",), ["diagnose.log=folder", "is a folder"]),
        (("diagnose.log=empty.log",), ["empty.log is empty"]),
        (("diagnose.log=weights.pt",), ["weights.pt is not text"]),
        (("diagnose.log=random.bin",), ["random.bin is not text"]),
        (("diagnose.lgo=x",), ["lgo", "log"]),
    ],
)
def test_a_mistake_is_one_clear_message(expt, home: Path, arguments, words) -> None:
    (home / "folder").mkdir()
    (home / "empty.log").write_text(" \n")
    (home / "weights.pt").write_bytes(b"PK\x03\x04\x00\x00\x08")
    (home / "random.bin").write_bytes(bytes(range(128, 256)) * 4)
    code, _, err = diagnose(expt, *arguments)
    assert code == 2
    assert "Traceback" not in err
    message = err[err.index("error:") :]
    for word in words:
        assert word in message
    assert not (home / "run").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_other_encodings_are_read(expt, home: Path, monkeypatch, encoding: str) -> None:
    from expt.commands import diagnose as module

    (home / "train.log").write_bytes(f"# Läuft\r\n{LOG}Step 1000: OOM\r\n".encode(encoding))
    code, out, err = diagnose(expt, "diagnose.log=train.log")
    assert code == 0, err
    assert "train.log: leak" in out
    assert "from step 100 to 900" in out.replace("\n", " ")
    monkeypatch.setattr(module, "MOST_BYTES", 61 if "16" in encoding else 31)
    assert "train.log: oom" in diagnose(expt, "diagnose.log=train.log")[1]


def test_of_a_long_log_the_end_is_read(expt, home: Path, monkeypatch) -> None:
    from expt.commands import diagnose as module

    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    filler = "x" * 30 + "\n"
    for first in ("CUDA out of memory.\n", "[rank0]: CUDA out of memory.\n"):
        (home / "long.log").write_text(first + filler * 100)
        code, out, _ = diagnose(expt, "diagnose.log=long.log")
        assert code == 0
        assert "long.log is long" in out
        assert "not_oom" in out


def test_a_long_table_keeps_its_head_and_a_long_list_is_read_whole(
    expt, home: Path, monkeypatch
) -> None:
    from expt.commands import diagnose as module

    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    rows = [(at, 10_000 + 100 * at) for at in range(200)]
    lines = "".join(f"2026/01/01 00:00:{at % 60:02d}, 0, {used} MiB\n" for at, used in rows)
    (home / "smi.csv").write_text("timestamp, index, memory.used [MiB]\n" + lines)
    assert "smi.csv: leak" in diagnose(expt, "diagnose.log=smi.csv")[1]
    records = [{"step": at, "memory_mb": used} for at, used in rows]
    (home / "list.json").write_text(json.dumps(records))
    assert "from step 0 to 199" in diagnose(expt, "diagnose.log=list.json")[1]
    monkeypatch.setattr(module, "MOST_JSON_BYTES", 2000)
    (home / "list.json").write_text("[" + ",\n".join(map(json.dumps, records)) + "]")
    assert "list.json: leak" in diagnose(expt, "diagnose.log=list.json")[1]
