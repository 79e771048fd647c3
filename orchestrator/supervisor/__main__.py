"""A detached supervisor: the topology's dump on stdin, everything that it says in .orchestrator/logs/.

    python -m orchestrator.supervisor < dump

Started by `apply -d` (supervisor/detached.py).
"""

from __future__ import annotations

import asyncio
import os
import sys

from orchestrator.brokers.embedded import serving
from orchestrator.errors import OrchestratorError
from orchestrator.supervisor.logs import LogSink
from orchestrator.supervisor.supervisor import Supervisor
from orchestrator.topology import restore
from orchestrator.topology.model import Topology


async def run(topology: Topology) -> int:
    """Runs until it is stopped, with the embedded server (if the topology has one) around it."""
    topology.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    output = LogSink(folder=topology.state_dir / "logs")
    output.use(topology)
    try:
        async with serving(topology):
            return await Supervisor(topology, output=output).run()
    except OrchestratorError as error:
        output.say("error", "", error.message)
        print(topology.redact(error.message), file=sys.stderr)
        if error.hint:
            print(topology.redact(error.hint), file=sys.stderr)
        return 1
    finally:
        output.close()


def main() -> int:
    """Leaves the terminal's session, so that closing it ends nothing."""
    os.setsid()
    topology = restore(sys.stdin.buffer.read())
    os.chdir(topology.root)
    return asyncio.run(run(topology))


if __name__ == "__main__":
    sys.exit(main())
