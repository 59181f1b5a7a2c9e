"""One file per task; `conf/task/NAME.yaml` names the function that runs it."""
