"""Imports one agent's handler, or one codec, as a worker would, in a process of its own: `validate --handlers`.

    python -m orchestrator.operate.try_import (agent NAME | codec MODULE:OBJECT) < dump-of-the-topology

Prints "ok", or one JSON line [problem, hint, traceback] and exits with REFUSED. What user code prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys

#: Exit code of what does not load, told in words.
REFUSED = 78


def main() -> int:
    # imported here: the parent imports this module for REFUSED alone
    from orchestrator.errors import HandlerLoadError
    from orchestrator.topology import restore
    from orchestrator.wire import codec
    from orchestrator.worker.handlers import load, user_traceback

    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    topology = restore(sys.stdin.buffer.read())
    kind, name = sys.argv[1:]
    try:
        if kind == "codec":
            sys.path.insert(0, str(topology.root))
            codec(name)
        else:
            load(topology, topology.agents[name])
    except HandlerLoadError as error:
        traceback = error.traceback or (user_traceback(error.__cause__) if error.__cause__ else "")
        answer.write(json.dumps([error.message, error.hint or "", traceback]) + "\n")
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
