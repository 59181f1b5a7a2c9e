"""One folder for one study: it holds the lock that keeps its workers from doing a trial twice.

A database is reached from anywhere, and a worker that was started in another directory, or on a
machine that does not share this one, would find the study but neither the lock nor the trials.
So the folder and the study carry the same token, and a worker without it is refused.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from optuna.study import Study

from expt.errors import ConfigError
from expt.files import write_text
from expt.sweep.reservation import identity

TOKEN_NAME, ATTRIBUTE = "study.token", "expt.folder"


def claim(study: Study, folder: Path) -> None:
    """Make `folder` the study's, or check that it is; to be called under the folder's lock.

    A folder that was removed on this machine may be begun anew.

    Raises:
        ConfigError: the study's folder is another one.

    """
    known = study.user_attrs.get(ATTRIBUTE)
    host = identity()["host"]
    path = folder / TOKEN_NAME
    token = path.read_text(encoding="utf-8").strip() if path.exists() else None
    if known is not None and token == known["token"]:
        return
    if known is not None and (known["host"] != host or Path(known["path"]).exists()):
        raise ConfigError(
            f"the study {study.study_name} is kept in {known['path']} on {known['host']}, and "
            f"this is {folder}: workers of one study share one folder. Give "
            f"hydra.sweep.dir=FOLDER as it is seen from here, or, if it is gone, another "
            f"search.study={study.study_name}_2"
        )
    token = uuid.uuid4().hex
    write_text(path, f"{token}\n")
    study.set_user_attr(ATTRIBUTE, {"token": token, "path": str(folder), "host": host})
