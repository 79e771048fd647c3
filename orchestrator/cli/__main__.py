"""The entry point: `orchestrator`, and `python -m orchestrator.cli`.

What comes before the imports: Ctrl-C ends it quietly then, too, the three standard streams are there, and other
descriptors that came from whoever started us go no further.
"""

from __future__ import annotations

import contextlib
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
    for descriptor in map(int, os.listdir("/dev/fd")):
        if descriptor > 2:  # a supervisor that outlives us would hold the caller's lock, or keep a pipe of his open
            with contextlib.suppress(OSError):  # that of the listing itself is closed
                os.set_inheritable(descriptor, False)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else it is ignored: whoever started us wants that
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # the commands and what they import: a good tenth of a second, in which an exception would print its traceback
    from orchestrator.cli.main import main as run

    signal.signal(signal.SIGINT, before)
    run()


if __name__ == "__main__":
    main()
