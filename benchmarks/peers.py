"""The field's models and ours: test error against peak memory, each trained for the same CPU time.

    python benchmarks/peers.py --minutes N [--only ROW …] [--data metr_la_29|pems_bay] [--again]

Measures first what a step of each model costs (predicted and measured peak, CPU time of one
thread), and runs what needs no training. N minutes then go to the rows (a model and a seed) that
are not finished, one after the other, each going on where the last call left it; a row is finished
after `peers_rows.MINUTES` of CPU time, or when its own settings end it before. The winners of
searches inside a budget are searched for first, for `SEARCH_MINUTES`. `--only` names models, or
rows like "STID seed 0", and their order. Two calls may work side by side: a row that another call
works on is passed over. For PEMS-BAY, EXPT_PEMS_BAY names the user's file.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import ROOT, last_words, load, provenance, stamped, store
from peers_rows import (
    DATA,
    MINUTES,
    PEERS,
    SEARCH,
    SEARCH_MINUTES,
    Peer,
    data_settings,
    measured_cost,
    steps_that_fit,
)
from peers_slices import drop_state, keep_state, restore_state, run_slice, what_it_said
from peers_tables import plot, tables

from expt.locks import Lock
from expt.result import load_result
from expt.search.winner import settings_of

NAME = "peers"
LEAST_SECONDS = 30.0
"""A slice that is shorter would mostly start."""
METRICS = ("val/mae", "test/mae", "test/mae_15min", "test/mae_30min", "test/mae_60min")
COMMON = ("trainer.device=cpu", "trainer.compile=off")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=0.0, help="of the clock, for training")
    parser.add_argument("--only", nargs="+", default=[], help="a model, or MODEL seed N")
    parser.add_argument("--data", choices=DATA, default=DATA[0])
    parser.add_argument("--again", action="store_true", help="measure costs anew")
    parser.add_argument("--cost", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost:
        print(json.dumps(measured_cost(json.loads(arguments.cost))))
        return
    table = Comparison(arguments.data)
    chosen = [row for only in arguments.only or [""] for row in rows() if named(row, only)]
    for only in arguments.only:
        if not any(named(row, only) for row in chosen):
            parser.error(f"--only {only!r} is no row; {', '.join(PEERS)} are the models")
    for name in dict.fromkeys(name for name, _ in chosen):
        table.measure_cost(name, arguments.again)
    until = time.monotonic() + 60 * arguments.minutes
    for name, seed in chosen:
        while not table.finished(name, seed):
            if PEERS[name].trained and until - time.monotonic() < LEAST_SECONDS:
                break
            if not table.go_on_alone(name, seed, until):
                break


def rows() -> Iterator[tuple[str, int]]:
    """Yield models and seeds, the first seed of all of them first."""
    for seed in range(max(len(peer.seeds) for peer in PEERS.values())):
        for name, peer in PEERS.items():
            if seed < len(peer.seeds):
                yield name, peer.seeds[seed]


def named(row: tuple[str, int], only: str) -> bool:
    """Tell whether `--only` names a row; nothing names them all."""
    return only in ("", row[0], row_name(*row))


def row_name(name: str, seed: int) -> str:
    return f"{name} seed {seed}"


class Comparison:
    """The result file of one series, and what is done to its rows."""

    def __init__(self, data: str) -> None:
        self.data = data
        self.folder = ROOT / "outputs" / NAME / data
        self.read()

    def read(self) -> None:
        """Take over what is stored: other calls store too."""
        self.record: dict[str, Any] = {"costs": {}, "searches": {}, "rows": {}, **load(NAME)}
        for part in ("costs", "searches", "rows"):
            self.record[part].setdefault(self.data, {})

    def part(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.record[name][self.data]
        return found

    def put(self, part: str, key: str, value: Mapping[str, Any]) -> None:
        """Store one entry, with all that other calls have stored by now."""
        lock = self.lock("results")
        lock.acquire(wait=True)
        try:
            self.read()
            self.part(part)[key] = stamped(value)
            self.record["made"] = provenance()
            store(NAME, self.record, tables(self.record))
            plot(self.record)
        finally:
            lock.release()

    def lock(self, name: str) -> Lock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return Lock(self.folder.parent / f"{name}.lock")

    def settings(self, name: str) -> list[str] | None:
        """Return a model's settings; None while its search has not been done."""
        peer = PEERS[name]
        found = [*data_settings(self.data), *peer.settings]
        if peer.budget is None:
            return found
        winner = self.part("searches").get(name, {}).get("winner")
        return None if winner is None else [*found, *winner]

    def measure_cost(self, name: str, again: bool = False) -> None:
        """Measure a model's step in a process of its own, unless that was done."""
        settings = self.settings(name)
        if settings is None or (name in self.part("costs") and not again):
            return
        done = subprocess.run(
            [sys.executable, __file__, "--cost", json.dumps([*settings, *COMMON])],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            print(f"{name}: not measured: {last_words(done.stderr)}", flush=True)
            return
        cost = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {cost}", flush=True)
        self.put("costs", name, cost)

    def finished(self, name: str, seed: int) -> bool:
        return bool(self.part("rows").get(row_name(name, seed), {}).get("finished"))

    def go_on_alone(self, name: str, seed: int, until: float) -> bool:
        """Do as `go_on` does, unless another call works on the row or on the search before it."""
        searching = self.settings(name) is None
        lock = self.lock(self.state_name(name if searching else row_name(name, seed)))
        if not lock.acquire():
            print(f"{row_name(name, seed)}: another call works on it", flush=True)
            return False
        try:
            return self.go_on(name, seed, until)
        finally:
            lock.release()

    def go_on(self, name: str, seed: int, until: float) -> bool:
        """Give a row a slice; tell whether another one may be given to it.

        Raises:
            KeyboardInterrupt: whoever runs this wants it to end; all is saved.

        """
        self.read()
        if self.settings(name) is None:
            return self.search(name, PEERS[name], until)
        folder = self.folder / slug(row_name(name, seed))
        known = self.state_name(row_name(name, seed))
        restored = restore_state(known, folder)
        found = self.part("rows").get(row_name(name, seed), {"slices": 0})
        if found["slices"] and not restored:
            print(f"{row_name(name, seed)}: its state is lost, and it begins anew", flush=True)
        if not found["slices"] or not restored:
            self.measure_cost(name, again=True)  # how many steps fit is up to today's machine
            if name not in self.part("costs"):
                return False
            found = {
                "model": name, "seed": seed, "cpu_seconds": 0.0, "slices": 0, "finished": False,
                "steps_planned": steps_that_fit(self.part("costs")[name]),
            }  # fmt: skip
        command = self.training(name, seed, found["steps_planned"], folder)
        left = 60 * MINUTES - found["cpu_seconds"]
        taken = run_slice(command, folder, left, until if PEERS[name].trained else float("inf"))
        if not taken.went_well:
            print(f"{row_name(name, seed)}: failed: {what_it_said(folder)}", flush=True)
            return False
        found["cpu_seconds"] += taken.cpu_seconds
        found["slices"] += 1
        if found["cpu_seconds"] >= 60 * MINUTES and not self.ended(folder):
            # Its time is up: what is left is to validate the epoch under way, and to test the best.
            run_slice([*command, "trainer.time_limit_seconds=0.001"], folder, float("inf"), 1e99)
        self.note(found, folder)
        committed = self.data == DATA[0] and not found["finished"]  # others name a user's file
        found["state_kept"] = committed and keep_state(known, folder)
        if found["finished"]:
            drop_state(known)
        print(f"{row_name(name, seed)}: {found}", flush=True)
        self.put("rows", row_name(name, seed), found)
        if taken.interrupted:
            raise KeyboardInterrupt
        return True

    def training(self, name: str, seed: int, steps: int, folder: Path) -> list[str]:
        settings = self.settings(name)
        assert settings is not None
        return [
            *settings, *COMMON, f"trainer.max_steps={steps}", f"trainer.seed={seed}",
            "trainer.resume=true", "trainer.progress=false", "memory.plan=false", "tracking=none",
            f"hydra.run.dir='{folder}'",
        ]  # fmt: skip

    def ended(self, folder: Path) -> bool:
        result = load_result(folder)
        return result is not None and result.status == "completed"

    def note(self, found: dict[str, Any], folder: Path) -> None:
        """Take over what a run has reached; test figures are there once it is finished."""
        result = load_result(folder)
        if result is None:  # it was stopped before its first step
            return
        found["finished"] = result.status == "completed"
        found.update(
            epochs=result.epochs,
            steps=result.steps,
            stop_reason=result.stop_reason,
            metrics={name: result.metrics.get(name) for name in METRICS},
        )

    def search(self, name: str, peer: Peer, until: float) -> bool:
        """Give a search a slice; its winner is known when the time is up or all trials are done."""
        found = self.part("searches").setdefault(name, {"cpu_seconds": 0.0, "slices": 0})
        folder = self.folder / slug(name)
        study = folder / "study.db"
        if found["slices"] and not study.exists():
            print(f"{name}: its study is lost, and it begins anew", flush=True)
            found.update(cpu_seconds=0.0, slices=0)
        command = [
            "-m", *SEARCH, *peer.settings, *data_settings(self.data), *COMMON,
            f"memory.budget={peer.budget}", f"search.study={slug(name)}",
            f"search.storage='sqlite:///{study}'", f"hydra.sweep.dir='{folder}'",
            "search.test_winner=false", "trainer.progress=false", "tracking=none",
        ]  # fmt: skip
        taken = run_slice(command, folder, 60 * SEARCH_MINUTES - found["cpu_seconds"], until)
        if not taken.went_well:
            print(f"{name}: the search failed: {what_it_said(folder)}", flush=True)
            return False
        found["cpu_seconds"] += taken.cpu_seconds
        found["slices"] += 1
        if not (folder / "sweep.json").exists():  # it was stopped before it began
            return False
        summary = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        found.update(trials=summary["finished"], budget_bytes=summary["budget_bytes"])
        done = taken.exit_code == 0 or found["cpu_seconds"] >= 60 * SEARCH_MINUTES
        if done and summary["best"] is None:
            print(f"{name}: nothing fits", flush=True)
            return False
        if done:
            found["winner"] = [
                f"{key}={json.dumps(value).replace(' ', '')}"
                for key, value in settings_of(summary["best"]).items()
            ]
            found["val/mae"] = summary["best"]["val/mae"]
        print(f"{name}: {found}", flush=True)
        self.put("searches", name, found)
        if taken.interrupted:
            raise KeyboardInterrupt
        return True

    def state_name(self, row: str) -> str:
        return f"{self.data}-{slug(row)}"


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
