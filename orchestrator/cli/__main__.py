"""The entry point: `orchestrator`, and `python -m orchestrator.cli`.

What comes before the imports: Ctrl-C ends it quietly then, too, and the three standard streams are there.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Runs the command line; see cli.main. Exit code 130 when interrupted."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us: no file or socket of ours may get its number
            free = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(free, True)
            setattr(sys, name, os.fdopen(free, mode))
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored: whoever started us wants that
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # the commands and what they import: a good tenth of a second, in which an exception would print its traceback
    from orchestrator.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
