"""Names that earlier versions had, for `_target_`s in users' YAML, runs and studies.

A target is mapped when a configuration is judged, and a line says what to write instead. Python
code that imports an old module gets an error that names the new one (`hint`).
"""

from __future__ import annotations

from typing import Any

MODULES = {
    "expt.models.alternating": "expt.jobs.traffic.alternating",
    "expt.models.phase1": "expt.jobs.traffic.phase1",
    "expt.models.stid": "expt.jobs.traffic.stid",
    "expt.models.embedding": "expt.jobs.traffic.embedding",
    "expt.models.attention": "expt.jobs.attention",
    "expt.models.attention_kernels": "expt.jobs.attention",
    "expt.data.traffic": "expt.jobs.traffic.data",
    "expt.data.series": "expt.jobs.traffic.series",
    "expt.data.masked_errors": "expt.jobs.traffic.metrics",
    "expt.data.reading": "expt.jobs.traffic.reading",
    "expt.data.windows": "expt.jobs.traffic.windows",
    "expt.data.tables": "expt.jobs.traffic.tables",
    "expt.data.hdf5": "expt.jobs.traffic.hdf5",
    "expt.data.source": "expt.jobs.traffic.source",
    "expt.data.adjacency": "expt.jobs.traffic.adjacency",
    "expt.data.arrays": "expt.jobs.traffic.arrays",
    "expt.data.array_pickle": "expt.jobs.traffic.array_pickle",
    "expt.optim.eight_bit": "expt.memory.techniques.eight_bit",
    "expt.protocols": "expt.job",
    "expt.results": "expt.result",
}
"""What a module was called, and is called now."""
_told: set[str] = set()


def current(target: str) -> str:
    """Return the name that ``package.module.Name`` has now."""
    module, _, name = target.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else target


def with_current_targets(node: Any) -> Any:
    """Return a (nested) node with every `_target_` as it is now; say each old name once."""
    if isinstance(node, list):
        return [with_current_targets(value) for value in node]
    if not isinstance(node, dict):
        return node
    found = {key: with_current_targets(value) for key, value in node.items()}
    target = found.get("_target_")
    if isinstance(target, str) and current(target) != target:
        found["_target_"] = current(target)
        if target not in _told:
            _told.add(target)
            print(f"note: {target} is {found['_target_']} now; the new name is used", flush=True)
    return found


def hint(module: str | None) -> str:
    """Return where to find a module that is not there any more; empty if it never was."""
    new = MODULES.get(module or "")
    if new is None:
        new = next((MODULES[old] for old in MODULES if old.startswith(f"{module}.")), None)
        return "" if new is None else f" (its modules have moved, for example to {new})"
    return f" (it is {new} now)"
