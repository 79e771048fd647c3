"""Imports one agent's handler as a worker would, in a process of its own: `validate --handlers`.

    python -m orchestrator.operate.try_handler AGENT < dump-of-the-topology

Prints "ok", or one JSON line [problem, hint, traceback] and exits with REFUSED. What user code prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys

#: Exit code of a handler that does not load, told in words.
REFUSED = 78


def main() -> int:
    # imported here: the parent imports this module for REFUSED alone
    from orchestrator.errors import HandlerLoadError
    from orchestrator.topology import restore
    from orchestrator.worker.handlers import load

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    topology = restore(sys.stdin.buffer.read())
    try:
        load(topology, topology.agents[sys.argv[1]])
    except HandlerLoadError as error:
        answer.write(json.dumps([error.message, error.hint or "", error.traceback or ""]) + "\n")
        answer.flush()
        return REFUSED
    answer.write("ok\n")
    answer.flush()
    return 0


if __name__ == "__main__":
    # threads that the module started must not keep this process
    code = main()
    sys.stderr.flush()
    os._exit(code)
