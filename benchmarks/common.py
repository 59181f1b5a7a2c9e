"""What every benchmark has in common: where results go, and what is said about how they came."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from expt.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs/results.md"
COMMIT = "EXPT_COMMIT"
"""Names the commit of a copy without its history."""
ABSOLUTE = re.compile(r"(?<![\w./])/(?:[\w.+@~-]+/)*([\w.+@~-]+)/?")
"""A path from the root of the file system, and its last part."""


def provenance(gpu: str | None = None) -> dict[str, Any]:
    """Return date, commit, command, hardware and versions; with `gpu`, the card is not asked."""
    import torch

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
            )
        except OSError:  # a machine without git
            return ""
        return done.stdout.strip()

    hardware = {"cpu": _cpu_name(), "cores": cores(), "machine": platform.machine()}
    if gpu is not None:
        hardware["gpu"] = gpu
    elif torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD") or os.environ.get(COMMIT, "unknown"),
        "uncommitted_changes": bool(git("status", "--porcelain", "--", "src", "conf")),
        "command": shlex.join(
            ["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(without_places, sys.argv[1:])]
        ),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def stamped(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with its own date, commit and processor: others of its file may have others."""
    made = provenance()
    processor = made["hardware"]["cpu"]
    return {**row, "date": made["date"], "commit": made["commit"], "processor": processor}


def without_places(value: Any) -> Any:
    """Return a row with the names of files where paths of this machine stood."""
    if isinstance(value, str):
        return ABSOLUTE.sub(r"\1", value.replace(f"{ROOT}/", ""))
    if isinstance(value, Mapping):
        return {key: without_places(one) for key, one in value.items()}
    return [without_places(one) for one in value] if isinstance(value, list | tuple) else value


def last_words(stderr: str) -> str:
    """Return what a program that failed said last, for a row."""
    lines = stderr.strip().splitlines() or ["no message"]
    return str(without_places(lines[-1]))[:300]


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def load(name: str) -> dict[str, Any]:
    """Return a stored result, or an empty one."""
    try:
        stored: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        return stored
    except FileNotFoundError:
        return {}


def kept(name: str, again: bool) -> bool:
    """Tell whether a result that is stored stays as it is, and say so."""
    stays = bool(load(name)) and not again
    if stays:
        print(f"{name} is measured already; --again measures it anew")
    return stays


def measure_sections(
    name: str,
    record: dict[str, Any],
    sections: Mapping[str, Callable[[], Mapping[str, Callable[[], dict[str, Any]]]]],
    summary: Callable[[Mapping[str, Any]], str],
    again: bool,
    only: str,
) -> None:
    """Measure the rows of sections that are not in `record` yet; store after each."""
    for section, rows in sections.items():
        if only not in ("", section):
            continue
        found = record[section] = dict(record[section])
        for row, measure in rows().items():
            if row in found and not again:
                continue
            try:
                found[row] = stamped(measure())
            except Exception as error:  # another row may still be measured
                print(f"{section}: {row}: not measured: {error}", flush=True)
                continue
            print(f"{section}: {row}: {found[row]}", flush=True)
            record["made"] = provenance()
            store(name, record, summary(record))


def run_sections(
    name: str,
    sections: Mapping[str, tuple[Callable[[], Any], Callable[[Mapping[str, Any]], str]]],
    about: str,
) -> None:
    """Measure what the command line names, and write the tables.

    Args:
        name: of the result file.
        sections: of each, what returns its rows, and what makes its table.
        about: what the program is for.

    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--only", default="", help="a section")
    arguments = parser.parse_args()
    record: dict[str, Any] = {**{section: {} for section in sections}, **load(name)}
    rows = {section: found for section, (found, _) in sections.items()}
    summary = partial(summary_of, name, sections)
    measure_sections(name, record, rows, summary, arguments.again, arguments.only)


def summary_of(
    name: str,
    sections: Mapping[str, tuple[Callable[[], Any], Callable[[Mapping[str, Any]], str]]],
    record: Mapping[str, Any],
) -> str:
    """Return the tables of the sections that there is anything of, and where they are from."""
    parts = [table(record[section]) for section, (_, table) in sections.items() if record[section]]
    return "\n".join([*parts, source_line(record, name)])


def store(name: str, result: Mapping[str, Any], tables: str, more: str = "") -> None:
    """Write ``results/NAME.json`` and ``.md``, and put the tables, not `more`, into the page."""
    write_json(RESULTS / f"{name}.json", dict(result))
    write_text(RESULTS / f"{name}.md", f"{tables}\n{more}" if more else tables)
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if begin in text:
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        write_text(PAGE, f"{before}{begin}\n{tables.strip()}\n{end}{after}")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def source_line(result: Mapping[str, Any], name: str) -> str:
    """Say where a table's figures come from: every commit and processor, if there are several."""
    made = result["made"]
    every = [made["commit"], *_named(result, "commit")]
    commits = list(dict.fromkeys(commit[:10] for commit in every))
    named = f"commit {commits[0]}" if len(commits) == 1 else f"commits {', '.join(commits)}"
    hardware = made["hardware"]
    cores = "1 core" if hardware["cores"] == 1 else f"{hardware['cores']} cores"
    processors = dict.fromkeys([hardware["cpu"], *_named(result, "processor")])
    device = hardware.get("gpu") or f"{cores}, {' and '.join(processors)}"
    return (
        f"From `benchmarks/results/{name}.json` ({made['date']}, {named}, "
        f"{device}, torch {made['torch']}): `{made['command']}`.\n"
    )


def _named(value: Any, wanted: str) -> Iterator[str]:
    """Yield what stands under a name, at any depth."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            if name == wanted:
                yield str(one)
            else:
                yield from _named(one, wanted)


def settings_for(*overrides: str) -> Any:
    """Return the checked settings of a configuration, as a run would get them."""
    from hydra import compose, initialize_config_dir

    from expt.config.compose import conf_dir, register
    from expt.config.validate import validated

    register()
    with initialize_config_dir(str(conf_dir())):
        return validated(compose("config", overrides=list(overrides)))


def run_expt(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run `python -m expt` in a process of its own; return what it printed.

    Raises:
        RuntimeError: it failed; the message is its last line.

    """
    done = subprocess.run(
        [sys.executable, "-m", "expt", "tracking=none", "trainer.progress=false", *arguments],
        cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {last_words(done.stderr)}")
    return done.stdout


def make_trainer(*overrides: str, **recovery: Any) -> Any:
    """Return a `Trainer` for a configuration, whose `train_step` can be called by itself.

    `recovery` has further arguments of `expt.memory.recovery.recovery.Recovery`.
    """
    from expt.memory.measuring.meter import meter_for
    from expt.memory.recovery.recovery import Recovery
    from expt.run.build import assemble, build, techniques_of
    from expt.tracking.tracker import NullTracker
    from expt.training.batches import place
    from expt.training.device import make_fabric
    from expt.training.display import SilentDisplay
    from expt.training.interruption import Interruption
    from expt.training.profiler import StepProfiler
    from expt.training.trainer import Trainer

    settings = settings_for(*overrides)
    fabric = make_fabric(settings.trainer.device, settings.memory.precision)
    fabric.seed_everything(settings.trainer.seed, verbose=False)
    data = build(settings, "data")
    place(data, fabric.device)
    model, optimizer = assemble(settings, fabric, data)
    return Trainer(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        data=data,
        settings=settings.trainer,
        loader=settings.loader,
        recovery=Recovery(techniques_of(settings.memory), fabric.device, **recovery),
        meter=meter_for(fabric.device),
        tracker=NullTracker(),
        display=SilentDisplay(),
        interruption=Interruption(),
        profiler=StepProfiler(),
        run_dir=ROOT / "outputs" / "benchmarks",
    )


def do_step(trainer: Any, samples: Any) -> Any:
    """Do one step as the loop does it, recovery included; return its loss and weight."""
    undo = not trainer.steps.replays(samples)
    return trainer.recovery.step(trainer.steps.run, samples, len(samples), undo)
