"""Walk "apply", its last step: what an adapter creates, finds, changes and refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.brokers.base import Connection, Desired, Observed
from orchestrator.errors import RefusedError
from orchestrator.reconcile.service import make_plan
from orchestrator.topology.model import Agent, Channel, Retention, Topology

from .rig import Lab, Rig


class One:
    """The connections of a topology with one broker."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, name: str) -> Connection:
        return self._connection


def by_name(found: list[Observed]) -> dict[str, Observed]:
    return {str(one.id): one for one in found}


def wanted(lab: Lab, channel: Channel, topology: Topology | None = None) -> Desired:
    found = lab.desired(topology)
    return next(d for d in found if d.id.kind == "channel" and d.id.name == channel.address)


def changed(lab: Lab, channel: str, **fields: object) -> Topology:
    channels = dict(lab.topology.channels)
    channels[channel] = replace(channels[channel], **fields)  # type: ignore[arg-type]
    return replace(lab.topology, channels=channels)


def without(topology: Topology, *agents: str) -> Topology:
    left: dict[str, Agent] = {name: agent for name, agent in topology.agents.items() if name not in agents}
    return replace(topology, agents=left)


async def test_what_is_created_is_found_and_bears_the_label(rig: Rig) -> None:
    async with rig.lab() as lab:
        desired = lab.desired()
        found = by_name(await lab.connection.observe(desired))
        assert {str(d.id) for d in desired} <= set(found)
        assert {one.owner for one in found.values()} == {lab.topology.name}


async def test_observing_before_creating_finds_nothing(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab:
        assert await lab.connection.observe(lab.desired()) == []


async def test_a_second_plan_is_empty(rig: Rig) -> None:
    async with rig.lab() as lab:
        plan = await make_plan(lab.topology, One(lab.connection))
        assert not plan.operations


async def test_creating_twice_is_harmless(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish()
        before = by_name(await lab.connection.observe(lab.desired()))
        await lab.apply()
        assert by_name(await lab.connection.observe(lab.desired())) == before
        assert await lab.connection.count(lab.channel("tasks")) == 1


async def test_a_change_in_place_keeps_the_events(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish("agent.completed", channel="events")
        topology = changed(lab, "events", retention=Retention(max_age=3600.0))
        desired = wanted(lab, lab.channel("events"), topology)
        observed = by_name(await lab.connection.observe(lab.desired()))[str(desired.id)]
        await lab.connection.update(desired, observed)
        after = by_name(await lab.connection.observe(lab.desired(topology)))[str(desired.id)]
        assert {name: after.settings[name] for name in desired.settings} == dict(desired.settings)
        assert after.version != observed.version
        assert await lab.connection.count(lab.channel("events")) == 1


async def test_creating_over_somebody_elses_resource_must_be_refused(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab:
        address = lab.channel("events").address
        await rig.driver.outside_create(address)
        with pytest.raises(RefusedError):
            await lab.connection.create(wanted(lab, lab.channel("events")))
        found = await lab.connection.observe(lab.desired())
        assert [one.owner for one in found if one.id.name == address] == [None]
        await rig.driver.outside_delete(address)


async def test_somebody_elses_resource_must_not_be_deleted(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab:
        address = lab.channel("events").address
        await rig.driver.outside_create(address)
        (found,) = [o for o in await lab.connection.observe(lab.desired()) if o.id.name == address]
        with pytest.raises(RefusedError):
            await lab.connection.delete(found)
        assert await rig.driver.outside_exists(address)
        await rig.driver.outside_delete(address)


async def test_another_topologys_resources_are_not_seen(rig: Rig) -> None:
    async with rig.lab() as ours, rig.lab() as theirs:
        names = {one.id.name for one in await ours.connection.observe(ours.desired())}
        assert not names & {d.id.name for d in theirs.desired()}


async def test_another_topologys_resource_must_not_be_deleted(rig: Rig) -> None:
    async with rig.lab() as ours, rig.lab() as theirs:
        target = theirs.channel("events")
        (found,) = [o for o in await theirs.connection.observe(theirs.desired()) if o.id.name == target.address]
        with pytest.raises(RefusedError):
            await ours.connection.delete(found)
        assert await rig.driver.outside_exists(target.address)


async def test_what_the_file_names_no_longer_is_still_found(rig: Rig) -> None:
    async with rig.lab() as lab:
        subscription = lab.subscription("watcher")
        smaller = without(lab.topology, "watcher")
        connection = await lab.connect(smaller)
        found = await connection.observe(lab.desired(smaller))
        orphans = {o.id.name for o in found} - {d.id.name for d in lab.desired(smaller)}
        assert any(subscription.group in name for name in orphans)


async def test_the_protect_label_outlives_its_line_in_the_file(rig: Rig) -> None:
    async with rig.lab(events={"protect": True}) as lab:
        address = lab.channel("events").address
        found = await lab.connection.observe([])
        assert [one.protect for one in found if one.id.kind == "channel" and one.id.name == address] == [True]


async def test_a_stale_version_must_not_be_deleted(rig: Rig) -> None:
    async with rig.lab() as lab:
        desired = wanted(lab, lab.channel("events"))
        before = by_name(await lab.connection.observe(lab.desired()))[str(desired.id)]
        newer = wanted(lab, lab.channel("events"), changed(lab, "events", retention=Retention(max_age=7200.0)))
        await lab.connection.update(newer, before)
        with pytest.raises(RefusedError):
            await lab.connection.delete(before)
        assert await rig.driver.outside_exists(desired.id.name)


async def test_a_recreated_resource_must_not_be_deleted_by_an_old_plan(rig: Rig) -> None:
    async with rig.lab() as lab:
        desired = wanted(lab, lab.channel("dead"))
        before = by_name(await lab.connection.observe(lab.desired()))[str(desired.id)]
        await lab.connection.delete(before)
        await lab.connection.create(desired)
        with pytest.raises(RefusedError):
            await lab.connection.delete(before)
        assert await rig.driver.outside_exists(desired.id.name)


async def test_deleting_what_is_gone_is_fine(rig: Rig) -> None:
    async with rig.lab() as lab:
        desired = wanted(lab, lab.channel("dead"))
        observed = by_name(await lab.connection.observe(lab.desired()))[str(desired.id)]
        await lab.connection.delete(observed)
        await lab.connection.delete(observed)
        assert not await rig.driver.outside_exists(desired.id.name)


async def test_a_subscription_is_observed_with_its_unsettled_events(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.publish_many(3)
        group = lab.subscription("worker").group
        found = await lab.connection.observe(lab.desired())
        (events,) = [o.events for o in found if o.id.kind == "subscription" and group in o.id.name]
        assert events == 3


async def test_an_external_channel_is_marked_as_such(rig: Rig) -> None:
    async with rig.lab(apply=False, events={"external": True}) as lab:
        assert wanted(lab, lab.channel("events")).external


async def test_two_connections_agree_on_the_clusters_identity(rig: Rig) -> None:
    async with rig.lab(apply=False) as lab:
        other = await lab.connect()
        assert await lab.connection.cluster_id() == await other.cluster_id() != ""
