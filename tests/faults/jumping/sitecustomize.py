"""Found first on PYTHONPATH by the processes of one test: the system's clock, and as many seconds as $CLOCK holds."""

import os
import time

_FILE = os.environ["CLOCK"]
_true = time.time


def _jumping() -> float:
    with open(_FILE) as file:
        return _true() + float(file.read() or 0)


time.time = _jumping
