"""What a topology asks for and its broker does not have (walk "apply", beside the planner). Pure.

Printed as warnings by `validate` and `plan`; errors under --strict.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.brokers.base import Capabilities
from orchestrator.topology.model import Broker, Channel, Overflow, Topology


def lacking(topology: Topology, broker: Broker, has: Capabilities) -> Iterable[tuple[str, tuple[str, ...]]]:
    """A sentence and the YAML path for each setting without effect on `broker`."""
    for channel in topology.channels.values():
        if channel.broker == broker.name and not channel.external:
            for setting, words in _lacks(topology, channel, has):
                yield f"channel {channel.name}: {words} on {has.kind}", ("channels", channel.name, *setting)


def _lacks(topology: Topology, channel: Channel, has: Capabilities) -> Iterable[tuple[tuple[str, ...], str]]:
    if channel.retention.max_events is not None and not has.max_events:
        yield ("retention", "max_events"), "retention.max_events has no effect"
    # overflow: reject is a queue's default: only a bounded or explicit one promises something
    named = ("channels", channel.name, "overflow") in topology.marks
    bounded = channel.retention.max_events is not None or channel.retention.max_bytes is not None
    if channel.overflow is Overflow.REJECT and not has.overflow_reject and (named or bounded):
        yield ("overflow",), "overflow: reject is not enforced"
    if channel.partitions > 1 and not has.partitions:
        yield ("partitions",), "partitions has no meaning"
    if ("channels", channel.name, "dedup_window") in topology.marks and not has.publish_dedup:
        yield ("dedup_window",), "dedup_window holds for each subscription, not at publish,"
