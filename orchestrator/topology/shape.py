"""Third step of loading: nodes -> spec models, entry by entry and field by field.

A value that is wrong is reported and dropped, then the entry is checked again without it, so that one mistake hides
no other. What was dropped is remembered: meaning says nothing about it a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.topology import spec
from orchestrator.topology.diagnostics import Problems, listing
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Broken, List, Map, Node, Scalar, is_null, plain

S = TypeVar("S", bound=spec.Spec)

_NESTED: dict[str, type[spec.Spec]] = {
    "auth": spec.AuthSpec,
    "tls": spec.TlsSpec,
    "retention": spec.RetentionSpec,
    "retry": spec.RetrySpec,
    "restart": spec.RestartSpec,
    "subscribe": spec.SubscribeSpec,
    "publish": spec.PublishSpec,
    "handler": spec.PythonHandlerSpec,
}

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list: [a, b]",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}

#: Keys that people bring from Compose, Kubernetes or another broker, and what they are called here.
_FOREIGN = {
    "attempts": "max_attempts",
    "retries": "max_attempts",
    "max_retries": "max_attempts",
    "topic": "address",
    "stream": "address",
    "subjects": "events",
    "environment": "env",
    "command": "handler",
    "subscribes": "subscribe",
    "dlq": "dead_letter",
    "max_msgs": "max_events",
    "scale": "replicas",
}


@dataclass(slots=True)
class Entry(Generic[S]):
    """One named entry that has its shape. `dropped` are the keys that were given and are not to be trusted."""

    name: str
    key: Scalar
    node: Map
    spec: S
    whole: Map  # as it stands in the file; `node` is what was good of it
    dropped: set[str] = field(default_factory=set)

    def at(self, *path: str | int) -> Node:
        """The node at `path` below this entry, or the nearest one above it; the entry's key for no path."""
        node: Node = self.node
        found: Node = self.key
        for part in path:
            if isinstance(node, Map) and isinstance(part, str) and part in node.entries:
                node = node.entries[part][1]
            elif isinstance(node, List) and isinstance(part, int) and part < len(node.items):
                node = node.items[part]
            else:
                break
            found = node
        return found

    def given(self, key: str) -> bool:
        """Whether the file says it, rightly or wrongly."""
        return key in self.dropped or (key in self.node.entries and not is_null(self.node.get(key)))


def check(model: type[S], name: str, key: Scalar, node: Map, problems: Problems) -> Entry[S]:
    """One entry against its model. Always returns an entry; what was wrong is reported and left out."""
    dropped: set[str] = set()
    tree = _copy(node, dropped)
    while True:
        try:
            return Entry(name, key, tree, model.model_validate(plain(tree)), node, dropped)
        except ValidationError as error:
            for fault in [_locate(model, tree, key, f) for f in error.errors(include_url=False)]:
                _report(fault, problems)
                dropped.add(fault.top)
                _remove(fault)


def _copy(node: Map, dropped: set[str]) -> Map:
    """A tree to take wrong values out of, without those that were reported already."""
    out = Map(node.source, node.line, node.column)
    for key, value in node:
        kept, whole = _pruned(value)
        if not whole:
            dropped.add(key.text)
        if kept is not None:
            out.put(key, kept)
    return out


def _pruned(node: Node) -> tuple[Node | None, bool]:
    if isinstance(node, Broken):
        return None, False
    if isinstance(node, Scalar):
        return node, True
    whole = True
    out: Map | List
    if isinstance(node, Map):
        out = Map(node.source, node.line, node.column)
        for key, value in node:
            kept, sound = _pruned(value)
            whole = whole and sound
            if kept is not None:
                out.put(key, kept)
        return out, whole
    assert isinstance(node, List)
    out = List(node.source, node.line, node.column)
    for item in node.items:
        kept, sound = _pruned(item)
        whole = whole and sound
        if kept is not None:
            out.append(kept)
    return out, whole


@dataclass(slots=True)
class _Fault:
    """One complaint of pydantic, tied to the tree: the value, what holds it, and the model it was held against."""

    details: ErrorDetails
    model: type[spec.Spec]
    top: str  # key of the entry that it lies under
    path: str
    node: Node  # the value, or the mapping that lacks a key
    key: Scalar | None  # the key that names the value
    parent: Map | List | None = None


def _locate(model: type[spec.Spec], tree: Map, entry_key: Scalar, details: ErrorDetails) -> _Fault:
    """Follows pydantic's location through the tree; parts that name a branch of a union are no places."""
    node: Node = tree
    parent: Map | List | None = None
    key: Scalar | None = entry_key
    path: list[str] = []
    top = ""
    in_key = details["loc"][-1:] == ("[key]",)
    missing = details["type"] == "missing"
    for part in details["loc"][: -1 if missing or in_key else None]:
        if isinstance(node, Map) and isinstance(part, str) and part in node.entries:
            if details["type"] != "extra_forbidden" or part is not details["loc"][-1]:
                model = _NESTED.get(part, model)
            parent = node
            key, node = node.entries[part]
        elif isinstance(node, List) and isinstance(part, int):
            parent, key, node = node, None, node.items[part]
        else:
            continue
        top = top or str(part)
        path.append(str(part))
    if in_key and key is not None:
        node = key
    return _Fault(details, model, top, ".".join(path), node, key, parent)


def _report(fault: _Fault, problems: Problems) -> None:
    kind = fault.details["type"]
    context = fault.details.get("ctx", {})
    name = f"`{fault.path}`" if fault.path else "this"
    if kind == "extra_forbidden" and fault.key is not None:
        known = list(fault.model.model_fields)
        text = fault.key.text
        hint = f"did you mean `{_FOREIGN[text]}`?" if _FOREIGN.get(text) in known else near(text, known)
        problems.error("unknown-key", f"unknown key `{text}`", fault.key, expected=listing(known, 30), suggestion=hint)
        return
    if kind == "missing":
        wanted = str(fault.details["loc"][-1])
        problems.error("missing-key", f"`{wanted}` is missing", fault.node, expected=f"a key `{wanted}`")
        return
    expected, suggestion = _EXPECTED.get(kind), None
    if kind == "wrong":
        expected, suggestion = str(context["expected"]), str(context["suggestion"]) or None
    elif kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        expected = "one of " + ", ".join(choices)
        suggestion = near(fault.node.text, choices) if isinstance(fault.node, Scalar) else None
    elif kind in ("greater_than_equal", "less_than_equal"):
        expected = f"{'at least' if 'ge' in context else 'at most'} {context.get('ge', context.get('le'))}"
    elif kind in ("union_tag_not_found", "union_tag_invalid"):
        form = next((p for p in reversed(fault.path.split(".")) if p in spec.FORMS), "")
        expected = spec.FORMS[form]
        if isinstance(fault.node, Map) and (said := fault.node.get("kind")) is not None:
            problems.error("value", f"`kind` is {shown(said)}", said, expected=" | ".join(spec.HANDLER_KINDS))
            return
    elif kind == "too_short":
        expected = "at least one item"
    if kind == "string_type" and isinstance(fault.node, Scalar):
        suggestion = f'write it in quotes: "{fault.node.text}"'
    if kind == "list_type" and isinstance(fault.node, Scalar):
        suggestion = f"write a list: [{fault.node.text}]"
    message = f"{name} is {shown(fault.node)}"
    problems.error("value", message, fault.node, expected=expected or fault.details["msg"], suggestion=suggestion)


def _remove(fault: _Fault) -> None:
    if isinstance(fault.parent, Map) and fault.key is not None:
        fault.parent.entries.pop(fault.key.text, None)
    elif isinstance(fault.parent, List):
        fault.parent.items[:] = [item for item in fault.parent.items if item is not fault.node]


def shown(node: Node) -> str:
    """A value in a message: what kind of thing stands there, and which."""
    if isinstance(node, Map):
        return "a mapping" if node.entries else "an empty mapping"
    if isinstance(node, List):
        return "a list" if node.items else "an empty list"
    if not isinstance(node, Scalar) or node.value is None:
        return "empty"
    text = node.text if len(node.text) <= 60 else node.text[:57] + "…"
    if isinstance(node.value, str):
        return f'"{text}"'
    return f"{'true or false' if isinstance(node.value, bool) else 'the number'} {text}".replace("true or false ", "")
