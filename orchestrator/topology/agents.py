"""Meaning of agents: what they read and publish, by which channel, with which policy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.topology import spec
from orchestrator.topology.brokers import stand_in
from orchestrator.topology.channels import Channels, derived
from orchestrator.topology.diagnostics import Problems, listing
from orchestrator.topology.document import Document
from orchestrator.topology.model import (
    Agent,
    Broker,
    Channel,
    Handler,
    Mode,
    OnExhausted,
    Publication,
    Restart,
    RetryPolicy,
    Subscription,
)
from orchestrator.topology.near import near, near_type
from orchestrator.topology.nodes import Node
from orchestrator.topology.routing import Index, intersection, minimal
from orchestrator.topology.shape import Entry


def policy(said: spec.RetrySpec) -> RetryPolicy:
    """A policy with every default filled in."""
    given = said.model_dump(exclude_none=True)
    for name in ("delays", "give_up_on"):
        if name in given:
            given[name] = tuple(given[name])
    return RetryPolicy(**given)


@dataclass(slots=True)
class Agents:
    """Resolves one agent after the other; remembers who reads what from queues, and which groups are taken."""

    document: Document
    topology: str
    brokers: Mapping[str, Broker]
    channels: Channels
    problems: Problems
    policies: dict[str, RetryPolicy] = field(default_factory=dict)
    _readers: dict[str, Index[str]] = field(default_factory=dict)  # queue channel -> its readers' patterns
    _groups: dict[tuple[str, str], str] = field(default_factory=dict)  # (broker, group) -> agent
    _said: set[tuple[int, str]] = field(default_factory=set)  # errors in shared lines are reported once

    def resolve(self) -> dict[str, Agent]:
        """Every agent by name."""
        self.policies = {"standard": RetryPolicy()}
        for name, entry in self.document.retry_policies.items():
            self._policy_conflict(entry)
            self.policies[name] = policy(entry.spec)
        return {name: self._agent(entry) for name, entry in self.document.agents.items()}

    def _policy_conflict(self, entry: Entry[Any], *path: str) -> None:
        said = entry.spec if not path else getattr(entry.spec, path[0])
        if isinstance(said, spec.RetrySpec) and said.delays and said.backoff:
            expected = "either `delays` or `backoff`"
            self._once("conflict", "a policy has `delays` or `backoff`, not both", entry.at(*path, "delays"), expected)

    def _once(
        self, code: str, message: str, at: Node, expected: str | None = None, suggestion: str | None = None
    ) -> None:
        """Many agents inherit one line of `defaults:` or `retry_policies:`; its mistake is one mistake."""
        if (id(at), code) not in self._said:
            self._said.add((id(at), code))
            self.problems.error(code, message, at, expected=expected, suggestion=suggestion)

    def _setting(self, entry: Entry[spec.AgentSpec], name: str) -> tuple[Any, Node]:
        """What the agent, else `defaults.agents`, says, and where. None when neither does, or it was reported.

        An explicit null is an answer too; what runs elsewhere takes no defaults."""
        own = getattr(entry.spec, name)
        defaults = self.document.agent_defaults
        said = name in entry.node.entries or name in entry.dropped
        if said or defaults is None or entry.spec.external:
            return own, entry.at(name)
        return getattr(defaults.spec, name), defaults.at(name)

    def _doubtful(self, entry: Entry[spec.AgentSpec], name: str) -> bool:
        defaults = self.document.agent_defaults
        return name in entry.dropped or (defaults is not None and name in defaults.dropped) or self._defaults_lost()

    def _defaults_lost(self) -> bool:
        return "defaults" in self.document.unreadable or "agents" in self.document.unreadable

    def _agent(self, entry: Entry[spec.AgentSpec]) -> Agent:
        said = entry.spec
        external = bool(said.external)

        def pick(name: str, otherwise: Any) -> Any:
            found = self._setting(entry, name)[0]
            return otherwise if found is None else found

        restart = pick("restart", None)
        subscriptions = self._subscriptions(entry)
        on_exhausted, dead_letter = self._exhausted(entry, bool(subscriptions) and not external)
        for subscription in subscriptions:
            if subscription.channel == dead_letter:
                self.problems.error(
                    "dead-letter-loop",
                    f"`{entry.name}` reads the channel that takes its own dead letters",
                    entry.at("subscribe"),
                    expected="another dead_letter channel, or on_exhausted: pause | drop",
                )
        return Agent(
            name=entry.name,
            description=said.description or "",
            handler=self._handler(entry, external),
            subscriptions=subscriptions,
            publish=tuple(self._publications(entry)),
            replicas=pick("replicas", 1),
            concurrency=pick("concurrency", 8),
            timeout=pick("timeout", 300.0),
            drain_timeout=pick("drain_timeout", 30.0),
            retry=self._retry(entry),
            on_exhausted=on_exhausted,
            dead_letter=dead_letter,
            propagate=tuple(pick("propagate", ())),
            env=pick("env", {}),
            config=pick("config", {}),
            restart=Restart(**restart.model_dump(exclude_none=True)) if restart else Restart(),
            external=external,
        )

    def _handler(self, entry: Entry[spec.AgentSpec], external: bool) -> Handler | None:
        if external:
            if entry.spec.handler is not None:
                message = "an external agent runs elsewhere and has no handler"
                self.problems.error("conflict", message, entry.at("handler"), expected="`external` or `handler`")
            return None
        said, at = self._setting(entry, "handler")
        call = said if isinstance(said, str) else getattr(said, "call", None)
        if call is not None:
            return Handler(kind="python", call=call)
        if not self._doubtful(entry, "handler"):
            where = entry.key if said is None else at
            expected = "handler: module:function, or external: true"
            message = f"`{entry.name}` has no handler" if said is None else "the handler has no `call`"
            self.problems.error("missing-key", message, where, expected=expected)
        return None

    def _retry(self, entry: Entry[spec.AgentSpec]) -> RetryPolicy:
        said, at = self._setting(entry, "retry")
        if isinstance(said, spec.RetrySpec):
            if entry.spec.retry is not None:
                self._policy_conflict(entry, "retry")
            return policy(said)
        if said is not None and said not in self.policies and not self.document.excused("retry_policies", said):
            known = list(self.policies)
            message = f"there is no retry policy `{said}`"
            self._once("unknown-policy", message, at, f"{listing(known)}, or a policy inline", near(said, known))
        return self.policies.get(said or "standard", self.policies["standard"])

    def _exhausted(self, entry: Entry[spec.AgentSpec], handles: bool) -> tuple[OnExhausted, str | None]:
        how, _ = self._setting(entry, "on_exhausted")
        name, at = self._setting(entry, "dead_letter")
        on_exhausted = OnExhausted(how or "dead_letter")
        if name is None:
            if (
                handles
                and on_exhausted is OnExhausted.DEAD_LETTER
                and not self._doubtful(entry, "dead_letter")
                and not self._doubtful(entry, "on_exhausted")
            ):
                self.problems.error(
                    "no-dead-letter",
                    f"`{entry.name}` has nowhere to put what it cannot handle",
                    entry.key,
                    expected="dead_letter: <a log channel>, or on_exhausted: pause | drop",
                )
            return on_exhausted, None
        channel = self._channel(name, at)
        if channel is not None and channel.mode is not Mode.LOG:
            self._once("dead-letter-mode", f"the channel `{name}` is a queue", at, "a channel with mode: log")
        return on_exhausted, name

    def _channel(self, name: str, at: Node) -> Channel | None:
        found = self.channels.found.get(name)
        if found is None and not self.document.excused("channels", name):
            known = list(self.document.channels)
            expected = listing(known) or "a name from `channels:`"
            self._once("unknown-channel", f"there is no channel `{name}`", at, expected, near(name, known))
        return found

    # --- what it reads ------------------------------------------------------------------------------------------

    def _subscriptions(self, entry: Entry[spec.AgentSpec]) -> tuple[Subscription, ...]:
        parts: dict[str, list[tuple[str, spec.SubscribeSpec, Node]]] = {}
        for said, at in _items(entry, "subscribe"):
            long = said if isinstance(said, spec.SubscribeSpec) else spec.SubscribeSpec.model_construct(events=[said])
            for pattern, channel in self._places(long.events, long.channel, entry, at, reading=True):
                self._queue_rules(long, channel, at)
                parts.setdefault(channel.name, []).append((pattern, long, at))
        return tuple(self._subscription(entry, name, found) for name, found in parts.items())

    def _subscription(
        self, entry: Entry[spec.AgentSpec], name: str, parts: list[tuple[str, spec.SubscribeSpec, Node]]
    ) -> Subscription:
        channel = self.channels.found[name]
        first = parts[0][1]
        for _, other, at in parts[1:]:
            if (other.start, other.filter, other.include_targeted) != (
                first.start,
                first.filter,
                first.include_targeted,
            ):
                self.problems.error(
                    "conflict",
                    f"`{entry.name}` reads the channel `{name}` twice with different settings",
                    at,
                    expected="one start, filter and include_targeted for each channel",
                )
                break
        events = minimal(pattern for pattern, _, _ in parts)
        self._filters(entry, channel, events)
        if channel.mode is Mode.QUEUE:
            self._queue_readers(entry, channel, {pattern: at for pattern, _, at in parts})
        return Subscription(
            agent=entry.name,
            channel=name,
            broker=channel.broker,
            group=self._group(entry, channel),
            events=events,
            start=first.start or "earliest",
            filter={k: tuple(v) if isinstance(v, list) else (v,) for k, v in (first.filter or {}).items()},
            include_targeted=bool(first.include_targeted),
        )

    def _filters(self, entry: Entry[spec.AgentSpec], channel: Channel, events: tuple[str, ...]) -> None:
        """NATS refuses a consumer whose filters overlap; what one covers is left out already."""
        if self.brokers.get(channel.broker, stand_in("")).kind != "nats":
            return
        index: Index[None] = Index()
        for pattern in events:
            for other, _ in index.overlapping(pattern):
                message = f"`{other}` and `{pattern}` of one subscription share event types, which nats refuses"
                self._once("overlap", message, entry.at("subscribe"), "patterns that share nothing, or a wider one")
            index.add(pattern, None)

    def _queue_rules(self, said: spec.SubscribeSpec, channel: Channel, at: Node) -> None:
        if channel.mode is Mode.QUEUE:
            if said.start not in (None, "earliest"):
                self.problems.warning(
                    "queue-start", "`start` has no effect in a queue: what waits in it is handled", at
                )
            for key in ("filter", "include_targeted"):
                if getattr(said, key):
                    message = f"`{key}` has no place in a queue: what one reader passes over nobody else would get"
                    self._once(f"queue-{key.replace('_', '-')}", message, at, "a channel with mode: log")

    def _queue_readers(self, entry: Entry[spec.AgentSpec], channel: Channel, patterns: Mapping[str, Node]) -> None:
        readers = self._readers.setdefault(channel.name, Index())
        for pattern, at in patterns.items():
            for other, owner in readers.overlapping(pattern):
                if owner != entry.name:
                    where = self.document.agents[owner].at("subscribe").mark
                    what = f"`{pattern}`" if pattern == other else f"`{pattern}` (and `{other}`)"
                    self.problems.error(
                        "queue-readers",
                        f"`{owner}` ({where}) and `{entry.name}` both read {what} from the queue `{channel.name}`",
                        at,
                        expected="one reading agent for each type in a queue, or mode: log",
                    )
                    break
            readers.add(pattern, entry.name)

    def _group(self, entry: Entry[spec.AgentSpec], channel: Channel) -> str:
        broker = self.brokers.get(channel.broker) or stand_in(channel.broker)
        group = entry.spec.group or derived(self.topology, broker, entry.name)
        at = entry.at("group") if entry.spec.group else entry.key
        if broker.kind == "nats" and any(c in group for c in ".*>/\\"):
            self._once("group", f'"{group}" cannot be a durable name on nats', at, "no dots, slashes, * or >")
        owner = self._groups.setdefault((broker.name, group), entry.name)
        if owner != entry.name:
            message = f"`{owner}` and `{entry.name}` have the same group {group}: each would get only a share"
            self._once("group", message, at, "a group of its own for each agent")
        return group

    # --- what it publishes --------------------------------------------------------------------------------------

    def _publications(self, entry: Entry[spec.AgentSpec]) -> Iterator[Publication]:
        seen: set[Publication] = set()
        for said, at in _items(entry, "publish"):
            long = said if isinstance(said, spec.PublishSpec) else spec.PublishSpec.model_construct(events=[said])
            for pattern, channel in self._places(long.events, long.channel, entry, at, reading=False):
                publication = Publication(pattern, channel.name)
                if publication not in seen:
                    seen.add(publication)
                    yield publication

    # --- which channel ------------------------------------------------------------------------------------------

    def _places(
        self, events: list[str] | None, name: str | None, entry: Entry[spec.AgentSpec], at: Node, *, reading: bool
    ) -> Iterator[tuple[str, Channel]]:
        """(pattern, channel) for each part of an entry of `subscribe` or `publish`."""
        if name is not None:
            channel = self._channel(name, at)
            if channel is not None:
                for pattern in self._within(channel, events, at, reading):
                    yield pattern, channel
            return
        if events is None:
            if not entry.dropped & {"subscribe", "publish"}:
                self._once(
                    "missing-key", "neither `events` nor `channel` is given", at, "events: [type], or channel: name"
                )
            return
        for pattern in events:
            routes = sorted(
                {
                    (both, owner)
                    for own, owner in self.channels.routes.overlapping(pattern)
                    if (both := intersection(own, pattern))
                }
            )
            if not routes:
                self._unrouted(pattern, at)
            for both, owner in routes:
                yield both, self.channels.found[owner]

    def _within(self, channel: Channel, events: list[str] | None, at: Node, reading: bool) -> list[str]:
        if not channel.events:
            if not reading and not channel.external:
                self._once("unrouted", f"the channel `{channel.name}` takes no events", at, "a channel with `events:`")
                return []
            return events or [">"]
        if events is None:
            return list(channel.events)
        out = []
        for pattern in events:
            shared = [both for own in channel.events if (both := intersection(own, pattern))]
            if not shared and "events" not in self.document.channels[channel.name].dropped:
                message = f"the channel `{channel.name}` does not take `{pattern}`"
                self._once("unrouted", message, at, listing(channel.events), near_type(pattern, channel.events))
            out += shared
        return out

    def _unrouted(self, pattern: str, at: Node) -> None:
        if self.channels.doubtful(pattern):
            return
        every = self.channels.patterns()
        external = [owner for _, owner in self.channels.outside.overlapping(pattern)]
        if external:
            hint = f"name the external channel: {{events: [{pattern}], channel: {external[0]}}}"
            self._once("unrouted", f"no channel of this topology takes `{pattern}`", at, None, hint)
            return
        self._once(
            "unrouted",
            f"no channel takes `{pattern}`",
            at,
            f"a type that a channel lists in `events:` ({listing(every) or 'there is none'})",
            near_type(pattern, every),
        )


def _items(entry: Entry[spec.AgentSpec], key: str) -> Iterator[tuple[Any, Node]]:
    for index, item in enumerate(getattr(entry.spec, key) or []):
        yield item, entry.at(key, index)
