"""Who runs what when several processes share the tests (`pytest -n`): half of them take tests on Kafka too, and first.

Each process starts a server of a kind for itself when a test asks for it, so a test may stop it. A Kafka is a JVM: one
for each process would be more than a small machine runs in peace.
"""

from __future__ import annotations

from itertools import chain

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

#: A test on Kafka says so by its folder, file, name or parameter.
KAFKA = ("kafka", "kcat")


class Scheduling(LoadScopeScheduling):
    """One test after the other to whichever process has nothing to do."""

    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        self._for_kafka: set[WorkerController] = set()

    def add_node(self, node: WorkerController) -> None:
        super().add_node(node)
        if 2 * len(self._for_kafka) < len(self.nodes):
            self._for_kafka.add(node)

    def remove_node(self, node: WorkerController) -> str | None:
        self._for_kafka.discard(node)  # when it has crashed, the one that comes instead is for Kafka
        return super().remove_node(node)

    def _split_scope(self, nodeid: str) -> str:
        return nodeid

    def _assign_work_unit(self, node: WorkerController) -> None:
        kafka = (test for test in self.workqueue if _on_kafka(test))
        others = (test for test in self.workqueue if not _on_kafka(test))
        found = next(chain(kafka, others) if node in self._for_kafka else others, None)
        if found is None:
            node.shutdown()
        else:
            self.workqueue.move_to_end(found, last=False)
            super()._assign_work_unit(node)


def _on_kafka(nodeid: str) -> bool:
    return any(word in nodeid for word in KAFKA)
