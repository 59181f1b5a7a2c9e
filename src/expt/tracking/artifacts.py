"""Sending one file to a run's artifacts, which may live elsewhere than its metrics."""

from __future__ import annotations

import logging
import os
import time

from expt.tracking.journal import Record
from expt.tracking.store import MlflowStore, RefusedError, RunMissingError, reason

_logger = logging.getLogger(__name__)

PAUSES_SECONDS = (0.5, 2.0, 0.0)
"""The rest after each attempt to store an artifact; as many attempts as there are rests."""


def send_artifact(store: MlflowStore, run_id: str, record: Record) -> None:
    """Store the file that a journal's record names, or say why it is skipped.

    Raises:
        Exception: what the store raised, if it does not answer at all or refuses the record.

    """
    path = record["path"]
    if not os.access(path, os.R_OK):
        _logger.warning("an artifact is skipped: %s is gone or cannot be read", path)
        return
    for pause in PAUSES_SECONDS:
        try:
            store.artifact(run_id, path, record["folder"])
            return
        except (RefusedError, RunMissingError):
            raise
        except Exception as error:
            # Metrics must not wait for where artifacts live.
            if not store.answers(run_id):
                raise
            failure = reason(error)
        time.sleep(pause)
    _logger.warning(
        "the artifact %s cannot be stored (%s), it is skipped; the file stays where it is",
        path,
        failure,
    )
