"""The effective topology as YAML that means the same when it is loaded again. Secrets are redacted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from orchestrator.topology import spec
from orchestrator.topology.brokers import EMBEDDED
from orchestrator.topology.model import Agent, Broker, Channel, RetryPolicy, Subscription, Topology
from orchestrator.topology.units import duration_text, size_text


def show(topology: Topology) -> str:
    """YAML text; every default filled in, every policy inline."""
    return yaml.dump(document(topology), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def document(topology: Topology) -> dict[str, Any]:
    """What the YAML text says."""
    metadata = {"name": topology.name, "description": topology.description}
    sections: dict[str, Any] = {
        "apiVersion": "orchestrator/v1",
        "kind": "Topology",
        "metadata": _some(metadata),
        "brokers": {n: _broker(b) for n, b in topology.brokers.items() if b != EMBEDDED},
        "channels": {n: _channel(c) for n, c in topology.channels.items()},
        "agents": {n: _agent(a) for n, a in topology.agents.items()},
    }
    clean: dict[str, Any] = _redacted(_some(sections), topology)
    return clean


def _some(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Without what says nothing."""
    return {k: v for k, v in entry.items() if v is not None and v not in ("", {}, [])}


def _broker(broker: Broker) -> dict[str, Any]:
    def parts(value: Any) -> dict[str, Any]:
        return {} if value is None else _some({name: getattr(value, name) for name in value.__slots__})

    entry = {"url": broker.url, "prefix": broker.prefix, "auth": parts(broker.auth), "tls": parts(broker.tls)}
    return _some({**entry, "cluster_id": broker.cluster_id, "client": dict(broker.client)})


def _channel(channel: Channel) -> dict[str, Any]:
    kept = channel.retention
    retention = {
        "max_age": None if kept.max_age is None else duration_text(kept.max_age),
        "max_events": kept.max_events,
        "max_bytes": None if kept.max_bytes is None else size_text(kept.max_bytes),
    }
    return _some(
        {
            "broker": None if channel.broker == EMBEDDED.name else channel.broker,
            "events": list(channel.events),
            "mode": str(channel.mode),
            "address": channel.address,
            "retention": _some(retention),
            "overflow": str(channel.overflow),
            "partitions": channel.partitions,
            "key": channel.key if channel.key_required else None,
            "replication": channel.replication,
            "dedup_window": duration_text(channel.dedup_window),
            "schemas": dict(channel.schemas),
            "codec": channel.codec,
            "protect": channel.protect or None,
            "external": channel.external or None,
        }
    )


def _retry(policy: RetryPolicy) -> dict[str, Any]:
    how: dict[str, Any] = {
        "backoff": policy.backoff,
        "initial_delay": duration_text(policy.initial_delay),
        "multiplier": policy.multiplier,
    }
    if policy.delays:
        how = {"delays": [duration_text(d) for d in policy.delays]}
    return _some(
        {
            "max_attempts": policy.max_attempts,
            **how,
            "max_delay": duration_text(policy.max_delay),
            "jitter": policy.jitter,
            "give_up_after": duration_text(policy.give_up_after),
            "give_up_on": list(policy.give_up_on),
        }
    )


def _subscribe(subscription: Subscription) -> dict[str, Any]:
    start = subscription.start
    return _some(
        {
            "events": list(subscription.events),
            "channel": subscription.channel,
            "start": start if isinstance(start, str) else start.isoformat(),
            "filter": {k: list(v) for k, v in subscription.filter.items()},
            "include_targeted": subscription.include_targeted or None,
        }
    )


def _agent(agent: Agent) -> dict[str, Any]:
    groups = sorted({s.group for s in agent.subscriptions})
    published: dict[str, list[str]] = {}
    for publication in agent.publish:
        published.setdefault(publication.channel, []).append(publication.event_type)
    entry = {
        "description": agent.description,
        "subscribe": [_subscribe(s) for s in agent.subscriptions],
        "publish": [{"events": events, "channel": channel} for channel, events in published.items()],
        "group": groups[0] if len(groups) == 1 else None,
    }
    if agent.external:
        return _some({"external": True, **entry, "env": dict(agent.env), "config": dict(agent.config)})
    restart = agent.restart
    return _some(
        {
            "handler": {"kind": agent.handler.kind, "call": agent.handler.call} if agent.handler else None,
            **entry,
            "replicas": agent.replicas,
            "concurrency": agent.concurrency,
            "timeout": duration_text(agent.timeout),
            "drain_timeout": duration_text(agent.drain_timeout),
            "retry": _retry(agent.retry),
            "on_exhausted": str(agent.on_exhausted),
            "dead_letter": agent.dead_letter,
            "propagate": list(agent.propagate),
            "env": dict(agent.env),
            "config": dict(agent.config),
            "restart": {
                "initial_delay": duration_text(restart.initial_delay),
                "max_delay": duration_text(restart.max_delay),
                "healthy_after": duration_text(restart.healthy_after),
            },
        }
    )


def _redacted(value: Any, topology: Topology) -> Any:
    if isinstance(value, str):
        clean = topology.redact(value)
        templated = "{{" in clean or "{%" in clean
        return f"{{% raw %}}{clean}{{% endraw %}}" if templated else clean
    if isinstance(value, (int, float)) and not isinstance(value, bool) and str(value) in topology.secrets:
        return "***"
    if isinstance(value, Mapping):
        return {k if k in _KEYS else _redacted(k, topology): _redacted(v, topology) for k, v in value.items()}
    return [_redacted(v, topology) for v in value] if isinstance(value, (list, tuple)) else value


#: Keys of this format: never redacted, even when somebody's password is `password`.
_KEYS = frozenset(
    key
    for kind in vars(spec).values()
    if isinstance(kind, type) and issubclass(kind, spec.Spec)
    for key in kind.model_fields
)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 core reads as a number, beside what YAML 1.1 does; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver(
    "tag:orchestrator,core-number",
    re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?\.(inf|nan).*)$"),
    list("-+.0123456789"),
)
