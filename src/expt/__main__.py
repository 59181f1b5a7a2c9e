"""`python -m expt` and the console script `expt`."""

from __future__ import annotations

import sys

from expt.config.command_line import run_command


def main() -> None:
    """Run the command line of this process and exit with its code."""
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
