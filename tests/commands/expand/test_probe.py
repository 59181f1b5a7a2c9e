from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expt.commands.expand import probe as module
from expt.config.command_nodes import ExpandConfig
from expt.job import Metric
from expt.run.process import Ended


@pytest.mark.parametrize(
    ("stopped", "raised", "status"),
    [
        (False, None, "FAILED"),
        (True, None, "KILLED"),
        (True, KeyboardInterrupt, "KILLED"),
        (False, OSError, "FAILED"),
    ],
)
def test_a_probe_that_was_killed_is_ended_in_the_tracker(
    tmp_path, monkeypatch, stopped, raised, status
) -> None:
    finished: list[str] = []

    def killed(*arguments: object) -> Ended:
        if raised is not None:
            raise raised
        return Ended(-9, 1.0)

    monkeypatch.setattr(module, "run_apart", killed)
    monkeypatch.setattr(module, "close_left_open", lambda *given: finished.append(given[-1]))
    monkeypatch.setattr(module.Prober, "_plan", lambda self, changes: None)
    settings: Any = SimpleNamespace(tracking=None)
    context: Any = SimpleNamespace(run_dir=tmp_path, launch={})
    prober = module.Prober(
        [], settings, context, ExpandConfig(), None, Metric("mae"), stopped=lambda: stopped
    )
    if raised is None:
        prober(0, ())
    else:
        with pytest.raises(raised):
            prober(0, ())
    assert finished == [status]
