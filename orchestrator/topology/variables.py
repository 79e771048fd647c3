"""What templates may ask for: `vars`, `env(name[, default])`, `secret('env:NAME' | 'file:PATH')`.

Secret values are remembered here, so that every output can be redacted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.topology.near import near
from orchestrator.topology.nodes import Node, Scalar

_MOST_BYTES = 1024 * 1024
_MISSING = object()


class InputError(Exception):
    """A variable, environment entry or secret that is not there."""

    def __init__(self, code: str, message: str, *, expected: str | None = None, suggestion: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.expected = expected
        self.suggestion = suggestion


class FollowUp(Exception):
    """A value cannot be had because of a mistake that was reported already."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One entry of `variables:`. `default` is None when the variable must be set."""

    name: str
    default: Node | None
    description: str


@dataclass(slots=True)
class Inputs:
    """Everything that flows into a topology from outside its files."""

    declared: dict[str, Declared] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)  # --set over --vars
    secrets: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # secret files that were read
    evaluate: Callable[[Node], Any] | None = None  # renders a default; set by the loader
    used: list[str] = field(default_factory=list)  # secret texts that went into the template being rendered
    _values: dict[str, Any] = field(default_factory=dict)
    _pending: set[str] = field(default_factory=set)  # defaults being evaluated
    _failed: set[str] = field(default_factory=set)
    _tainted: set[str] = field(default_factory=set)  # variables whose default holds a secret

    def names(self, node: Scalar, scope: Mapping[str, Any] | None) -> dict[str, Any]:
        """The variables of one template."""

        def secret(reference: object) -> str:
            return self.secret(reference, node.source.folder)

        return {**(scope or {}), "vars": _Vars(self), "env": _env, "secret": secret}

    def value(self, name: str) -> Any:
        """A variable's value. Raises InputError when it is not declared or not set."""
        if name in self._values:
            if name in self._tainted:
                self.used += leaves(self._values[name])
            return self._values[name]
        if name in self.given:
            return self.given[name]
        entry = self.declared.get(name)
        if entry is None:
            raise InputError(
                "unknown-variable",
                f"there is no variable `{name}`",
                expected="a name from `variables:`" + (f" ({', '.join(self.declared)})" if self.declared else ""),
                suggestion=near(name, self.declared) or f"declare it: variables: {{{name}: {{default: …}}}}",
            )
        if entry.default is None or self.evaluate is None:
            what = f" ({entry.description})" if entry.description else ""
            raise InputError(
                "unset-variable",
                f"the variable `{name}`{what} has no default and was not set",
                suggestion=f"pass --set {name}=…, --vars FILE, or give it a default",
            )
        if name in self._failed:
            raise FollowUp
        if name in self._pending:
            raise InputError("variable-loop", f"the default of `{name}` asks for `{name}` itself")
        self._pending.add(name)
        before = len(self.used)
        try:
            self._values[name] = self.evaluate(entry.default)
        except FollowUp:
            self._failed.add(name)
            raise
        finally:
            self._pending.discard(name)
        if len(self.used) > before:
            self._tainted.add(name)
        return self._values[name]

    def secret(self, reference: object, folder: Path) -> str:
        """The secret that `reference` names; remembered for redaction."""
        kind, _, rest = str(reference).partition(":")
        if kind == "env" and rest:
            value = os.environ.get(rest)
            if value is None:
                raise InputError("secret", f"the environment variable {rest} is not set", suggestion=f"export {rest}=…")
        elif kind == "file" and rest:
            value = self._file(folder / Path(rest).expanduser())
        else:
            raise InputError("secret", "secret() takes 'env:NAME' or 'file:PATH'")
        self.remember(value)
        self.used.append(value)
        return value

    def remember(self, value: str) -> None:
        """From now on `value` is redacted; each long line of a multi-line one too, as logs split lines."""
        for text in (value, *(line.strip() for line in value.splitlines() if len(line.strip()) >= 8)):
            if text and text not in self.secrets:
                self.secrets.append(text)

    def derived(self, value: object) -> None:
        """What a template made of secrets (upper-cased, encoded …) is one too when they no longer show in it."""
        for text in leaves(value) if self.used else ():
            if not any(secret in text for secret in self.used):
                self.remember(text)

    def _file(self, path: Path) -> str:
        try:
            with path.open("rb") as stream:
                data = stream.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise InputError("secret", f"the secret file {path} is too large", expected="at most 1 MiB")
            self.files.append(path)
            return data.decode().rstrip("\r\n")
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None)
            raise InputError("secret", f"cannot read the secret file {path}: {reason or error}") from None


def leaves(value: object) -> list[str]:
    """Every text and number in `value`, as text."""
    found = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, (dict, list)):
            waiting += one.values() if isinstance(one, dict) else one
        elif one is not None and not isinstance(one, bool):
            found.append(str(one))
    return found


class _Vars(Mapping[str, Any]):
    """`vars` in a template: looks a name up when it is used, and says so when it is missing."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __getitem__(self, name: str) -> Any:
        return self._inputs.value(name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._inputs.value(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._inputs.declared)

    def __len__(self) -> int:
        return len(self._inputs.declared)


def _env(name: object, default: Any = _MISSING) -> Any:
    value = os.environ.get(str(name))
    if value is not None:
        return value
    if default is _MISSING:
        raise InputError(
            "unset-env",
            f"the environment variable {name} is not set",
            suggestion=f"export {name}=…, or give a default: env('{name}', '…')",
        )
    return default
