"""How right for CUDA: plans against published measurements of others' training runs on cards.

    python benchmarks/published_gpu.py [--rows FILE] [--json FILE] [--again]

Nobody here had a card; 105 runs of 13 models that others measured and published are in
`benchmarks/data`. Models from torchvision and of an older transformers are planned in an
environment of their own under ``outputs/``, which is made on the first run from the packages that
are installed here and two more; torch is this environment's. Rows that are planned already, by
this commit's planner, are kept unless `--again`. With `--rows`, rows of the same format are
planned instead, of any of the 24 models in `published_models.py`; with `--json`, results go to
that file, and tables in Markdown beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import ROOT, load, provenance, stamped, store
from published_tables import tables

from expt.files import write_json, write_text

NAME = "published_gpu"
ROWS = ROOT / "benchmarks/data/published_gpu_rows.json"
ENVIRONMENT = ROOT / "outputs/published_gpu_environment"
PACKAGES = (("--no-deps", "torchvision"), ("transformers==4.51.3",))
"""What the environment has beside this one's packages, a call of pip each. Of torchvision only its
Python models are used, so that any release will do."""
SECONDS = 900
"""For all that pip does."""
KEY = ("model", "optimizer", "batch", "gpu", "total_gpu_memory", "zero_grad_mode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="runs in the format of the data")
    parser.add_argument("--json", type=Path, help="where results go, instead of the stored ones")
    parser.add_argument("--again", action="store_true", help="plan anew what is planned already")
    arguments = parser.parse_args()
    rows = json.loads(arguments.rows.read_text(encoding="utf-8"))
    own = arguments.json is None and arguments.rows == ROWS
    record = load(NAME) if own else _read(arguments.json)
    made = provenance()
    known = {} if arguments.again else _known(record, made)
    found: list[dict[str, Any]] = []
    missing = {key(row): row for row in rows if key(row) not in known}  # some were run twice
    new = planned_rows(list(missing.values()))
    for row in rows:
        if key(row) not in known:
            known[key(row)] = next(new)
        found.append({**row, **known[key(row)]})
        print(line(found[-1]), flush=True)
        record = {"rows": found, "made": made}
        if not own and arguments.json is not None:
            write_json(arguments.json, record)
    summary, page = tables(record, NAME)
    print(f"\n{summary}\n{page}")
    if own:
        store(NAME, record, f"{summary}\n{page}")
    elif arguments.json is not None:
        write_text(arguments.json.with_suffix(".md"), f"{summary}\n{page}")


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a run from others."""
    return tuple(row.get(name) for name in KEY)


def _read(file: Path | None) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {} if file is None else json.loads(file.read_text("utf-8"))
        return found
    except FileNotFoundError:
        return {}


def _known(record: Mapping[str, Any], made: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """Return what was planned at this very commit, by run."""
    return {
        key(row): {name: row[name] for name in (*PLANNED, "date", "commit")}
        for row in record.get("rows", ())
        if row.get("commit") == made["commit"] and not made["uncommitted_changes"]
        if "predicted_reserved_bytes" in row
    }


PLANNED = (
    "predicted_reserved_bytes", "interval_bytes", "runs_out", "least_fitting_bytes", "peak_bytes",
    "method", "seconds",
)  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """Return what is printed of a run."""
    name = f"{row['model']} {row['optimizer']} {row['batch']} {row['gpu']}"
    if "failed" in row:
        return f"{name}: not planned: {row['failed']}"
    count = row["predicted_reserved_bytes"]
    if row["real_oom"]:
        return f"{name}: ran out, predicted {'so' if row['runs_out'] else 'NOT so'}"
    error = 100 * (count / row["ground"] - 1)
    return f"{name}: {count / 2**20:.0f} MiB, {error:+.2f} %, {row['seconds']:.1f} s"


def planned_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what is predicted for each row, by a process in the environment of its own."""
    if not rows:
        return
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    program = [python_of_environment(), str(ROOT / "benchmarks/published_plans.py")]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for row in rows:
            process.stdin.write(json.dumps(row) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            yield stamped(json.loads(answer) if answer else {"failed": "the process ended"})
        process.stdin.close()


def python_of_environment() -> str:
    """Return the interpreter of the environment, which is made if it is not there.

    Raises:
        SystemExit: pip cannot install what it needs.

    """
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = ENVIRONMENT / "ready"
    if ready.exists():
        return str(python)
    print(f"making {ENVIRONMENT.relative_to(ROOT)}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
    places = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=True)
    # Own packages come first; torch and all the rest are those of the environment that runs this.
    write_text(Path(own.stdout.strip()) / "parent.pth", "\n".join(places) + "\n")
    for package in PACKAGES:
        install = [str(python), "-m", "pip", "install", "--quiet", *package]
        done = subprocess.run(install, capture_output=True, text=True, check=False, timeout=SECONDS)
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise SystemExit(f"pip cannot install {package[-1]}: {words}")
    write_text(ready, "")
    return str(python)


if __name__ == "__main__":
    main()
