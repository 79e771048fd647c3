"""The entry point: `orchestrator`, and `python -m orchestrator.cli`. Ctrl-C ends it quietly while it imports, too."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command line; see cli.main. Exit code 130 when interrupted."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored: whoever started us wants that
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # the commands and what they import: a good tenth of a second, in which an exception would print its traceback
    from orchestrator.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
