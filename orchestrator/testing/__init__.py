"""A topology in memory, with virtual time: publish, let hours of retries elapse in milliseconds, assert.

    async def test_research():
        async with TopologyTest("topology.yaml") as t:
            await t.publish("task.assigned", {"query": "whales"})
            await t.run_until_idle()
            assert t.published("agent.completed")
            assert not t.dead_letters()

Runtime, policy and wire format are those of production; only the adapter is another one, and the clock. Without an
async test runner use SyncTopologyTest: the same without `async` and `await`.

virtual_time: a running loop that jumps to its next timer · stage: the topology moved to memory, its agents at work
· scenario: what a test calls
"""

from orchestrator.testing.scenario import DeadLetter, SyncTopologyTest, TopologyTest

__all__ = ["DeadLetter", "SyncTopologyTest", "TopologyTest"]
