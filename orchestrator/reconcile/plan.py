"""The plan as data (walk "apply", third step): what would be done, why, and which data that touches.

Made by reconcile.planner, printed by reconcile.render, carried out by reconcile.executor. No I/O.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from orchestrator.brokers.base import Desired, Observed, ResourceId, Setting
from orchestrator.errors import PlanError
from orchestrator.topology.model import Mark

#: Version of the JSON form, of `-o json` and of plan files alike.
PLAN_VERSION = 1
_LARGEST = 2**26  # bytes of a plan file: far more than one takes


class Action(StrEnum):
    """What is done with one resource. REFUSE stops the whole plan; KEEP is only reported."""

    CREATE = "create"
    UPDATE = "update"
    REPLACE = "replace"
    DELETE = "delete"
    REFUSE = "refuse"
    KEEP = "keep"

    @property
    def pending(self) -> bool:
        """Whether carrying it out changes a broker."""
        return self not in (Action.REFUSE, Action.KEEP)


@dataclass(frozen=True, slots=True)
class Change:
    """One setting, in the broker's own terms, before and after."""

    setting: str
    old: Setting
    new: Setting


@dataclass(frozen=True, slots=True)
class Operation:
    """One step on one resource.

    `cause` says why in one sentence, `mark` where the file asks for it. `events` and `bytes` are what the resource
    holds now; `loses` names what would be lost. `needs` is the name to give to --allow-loss (empty: nothing to name).
    `hint` says what to do about a REFUSE or KEEP. `desired` and `observed` are for the executor and are not written
    to a plan file; `version` is the observed one and is.
    """

    action: Action
    resource: ResourceId
    cause: str
    mark: Mark | None = None
    changes: tuple[Change, ...] = ()
    events: int = 0
    bytes: int = 0
    exact: bool = True
    loses: str = ""
    needs: str = ""
    hint: str = ""
    version: str = ""
    desired: Desired | None = field(default=None, compare=False)
    observed: Observed | None = field(default=None, compare=False)

    def same_step(self, other: Operation) -> bool:
        """Whether both would do the same to the same state of the same resource; event counts may differ."""
        mine = (self.action, self.resource, self.changes, self.version)
        return mine == (other.action, other.resource, other.changes, other.version)


@dataclass(frozen=True, slots=True)
class WorkerStep:
    """What a running supervisor would do with one agent: start, update or stop its workers."""

    action: str
    agent: str
    cause: str
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class BrokerInfo:
    """One broker as the plan's head shows it; `url` without credentials."""

    name: str
    kind: str
    url: str
    cluster_id: str = ""

    @property
    def embedded(self) -> bool:
        return self.url == "embedded"


@dataclass(frozen=True, slots=True)
class Plan:
    """All operations in the order in which they are carried out."""

    topology: str
    revision: str
    brokers: tuple[BrokerInfo, ...] = ()
    operations: tuple[Operation, ...] = ()
    workers: tuple[WorkerStep, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what the brokers of this topology cannot promise
    prune: bool = False
    allow_loss: tuple[str, ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()  # names of allow_loss that fit nothing here, each with what was meant
    secrets: tuple[str, ...] = field(default=(), compare=False, repr=False)  # redacted in every output

    @property
    def pending(self) -> list[Operation]:
        """The operations that change a broker."""
        return [o for o in self.operations if o.action.pending]

    @property
    def refused(self) -> list[Operation]:
        """While there is one, nothing of the plan is carried out."""
        return [o for o in self.operations if o.action is Action.REFUSE]

    @property
    def empty(self) -> bool:
        """Nothing to do and nothing refused; kept orphans and warnings do not count."""
        return not self.pending and not self.refused and not self.workers

    def redact(self, text: str) -> str:
        """`text` with every secret value replaced by ***."""
        for secret in self.secrets:
            if secret:
                text = text.replace(secret, "***")
        return text

    def to_json(self) -> dict[str, Any]:
        """The versioned form, secrets redacted."""
        data = {
            "version": PLAN_VERSION,
            "topology": self.topology,
            "revision": self.revision,
            "pending": bool(self.pending or self.workers),
            "refused": bool(self.refused),
            "prune": self.prune,
            "allow_loss": list(self.allow_loss),
            "brokers": [
                {"name": b.name, "kind": b.kind, "url": b.url, "cluster_id": b.cluster_id, "embedded": b.embedded}
                for b in self.brokers
            ],
            "operations": [_operation_json(o) for o in self.operations],
            "workers": [
                {"action": w.action, "agent": w.agent, "cause": w.cause, "where": _mark_json(w.mark)}
                for w in self.workers
            ],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }
        redacted: dict[str, Any] = _redact_values(data, self.redact)
        return redacted

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Reads what to_json wrote. Raises PlanError when it is no plan of this version."""
        if data.get("version") != PLAN_VERSION:
            raise PlanError(
                f"this plan has version {data.get('version')!r}; this orchestrator reads version {PLAN_VERSION}",
                hint="make it again: orchestrator plan --out FILE",
            )
        try:
            return cls(
                topology=data["topology"],
                revision=data["revision"],
                brokers=tuple(BrokerInfo(b["name"], b["kind"], b["url"], b["cluster_id"]) for b in data["brokers"]),
                operations=tuple(_operation(o) for o in data["operations"]),
                workers=tuple(
                    WorkerStep(w["action"], w["agent"], w["cause"], _mark(w["where"])) for w in data["workers"]
                ),
                warnings=tuple(data["warnings"]),
                notes=tuple(data["notes"]),
                prune=data["prune"],
                allow_loss=tuple(data["allow_loss"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"not a plan file: {type(error).__name__}: {error}", hint="make it again: orchestrator plan --out FILE"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the plan file. Raises PlanError when the place cannot be written."""
        try:
            path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise PlanError(
                f"cannot write the plan to {path}: {error.strerror}", hint="choose another place for --out"
            ) from None

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads a plan file. Raises PlanError when it is missing or no plan."""
        again = "make it again: orchestrator plan --out FILE"
        try:
            with path.open("rb") as file:
                text = file.read(_LARGEST + 1)  # bounded: a device has no end
        except OSError as error:
            reason = f"cannot read the plan {path}: {error.strerror}"
            raise PlanError(reason, hint="make it: orchestrator plan --out FILE") from None
        if len(text) > _LARGEST:
            raise PlanError(f"{path} is not a plan file: it is too large", hint=again)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not a plan file: {error}", hint=again) from None
        if not isinstance(data, dict):
            raise PlanError(f"{path} is not a plan file", hint=again)
        return cls.from_json(data)


def refuse(base: Operation, cause: str, *, hint: str) -> Operation:
    """`base`, not to be carried out."""
    return replace(base, action=Action.REFUSE, cause=cause, hint=hint)


def inside(resource: ResourceId, channel: ResourceId) -> bool:
    """Whether `resource` is a subscription of `channel`."""
    return resource.broker == channel.broker and resource.name.startswith(f"{channel.name}/")


def holding(item: Observed | Operation) -> str:
    """What a resource holds, in words: "about 1,204 events (3.1 MiB)"."""
    many = f"{item.events:,} event{'' if item.events == 1 else 's'}"
    return f"{'' if item.exact else 'up to '}{many}" + (f" ({size(item.bytes)})" if item.bytes else "")


def size(count: int) -> str:
    """Bytes in the largest binary unit that keeps the figure at 1 or more."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def stale_reasons(saved: Plan, fresh: Plan) -> list[str]:
    """Why `saved` may no longer be carried out, given what a new look at file and brokers yields; empty: it may."""
    if saved.topology != fresh.topology:
        return [f"it was made for topology {saved.topology}, this is {fresh.topology}"]
    if saved.revision != fresh.revision:
        return [f"the topology has changed since (revision {saved.revision}, now {fresh.revision})"]
    before = {o.resource: o for o in saved.operations}
    now = {o.resource: o for o in fresh.operations}
    reasons = [f"{r} no longer needs {before[r].action}" for r in before if r not in now]
    reasons += [f"{r} now needs {now[r].action}, which was not planned" for r in now if r not in before]
    reasons += [
        f"{r} was changed on the broker since"
        if before[r].action is now[r].action
        else f"{r} needs {now[r].action} instead of {before[r].action}"
        for r in before
        if r in now and not before[r].same_step(now[r])
    ]
    return reasons


def _operation_json(operation: Operation) -> dict[str, Any]:
    return {
        "action": operation.action.value,
        "broker": operation.resource.broker,
        "kind": operation.resource.kind,
        "name": operation.resource.name,
        "cause": operation.cause,
        "where": _mark_json(operation.mark),
        "changes": [{"setting": c.setting, "old": _plain(c.old), "new": _plain(c.new)} for c in operation.changes],
        "events": operation.events,
        "bytes": operation.bytes,
        "exact": operation.exact,
        "loses": operation.loses,
        "needs": operation.needs,
        "hint": operation.hint,
        "observed_version": operation.version,
    }


def _operation(data: Mapping[str, Any]) -> Operation:
    return Operation(
        action=Action(data["action"]),
        resource=ResourceId(data["broker"], data["kind"], data["name"]),
        cause=data["cause"],
        mark=_mark(data["where"]),
        changes=tuple(Change(c["setting"], _setting(c["old"]), _setting(c["new"])) for c in data["changes"]),
        events=data["events"],
        bytes=data["bytes"],
        exact=data["exact"],
        loses=data["loses"],
        needs=data["needs"],
        hint=data["hint"],
        version=data["observed_version"],
    )


def _mark_json(mark: Mark | None) -> dict[str, Any] | None:
    return None if mark is None else {"file": mark.file, "line": mark.line, "column": mark.column}


def _mark(data: Mapping[str, Any] | None) -> Mark | None:
    return None if data is None else Mark(data["file"], data["line"], data["column"])


def _plain(value: Setting) -> object:
    return list(value) if isinstance(value, tuple) else value


def _setting(value: Any) -> Setting:
    return tuple(value) if isinstance(value, list) else value


def _redact_values(value: Any, redact: Any) -> Any:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redact_values(item, redact) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_redact_values(item, redact) for item in value]
    return value
