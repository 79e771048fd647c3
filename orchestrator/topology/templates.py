"""Jinja2 inside scalars and keys: sandboxed, undefined is an error, a lone expression keeps its type.

Second step of loading, on nodes: text with a template goes in, nodes with plain values come out. Compiled templates
are kept by their text, and text without a template never reaches Jinja.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes as ast
from jinja2.exceptions import SecurityError
from jinja2.runtime import StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Broken, List, Map, Node, Scalar, graft, plain, text_of
from orchestrator.topology.source import MAX_DIGITS
from orchestrator.topology.variables import FollowUp, InputError, Inputs

_MOST_ITEMS = 10_000
_LONGEST_TEMPLATE = 20_000
_BUDGET = 300_000  # values that all templates of one topology may yield
_LONGEST = 1_000_000  # characters of one rendered scalar
_LONE = re.compile(r"\s*\{\{[-+]?(.*?)[-+]?\}\}\s*\Z", re.DOTALL)
_SIMPLE = re.compile(r"\{\{(?![-+])([^{}]*)(?<![-+])\}\}")  # {{ an expression without braces }}
_PROGRAMS = (ast.Macro, ast.CallBlock, ast.Include, ast.Import, ast.FromImport, ast.Extends, ast.Block)
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate", "join"})


class _Sandbox(ImmutableSandboxedEnvironment):
    """No private attributes (Jinja's own rule), and nothing that makes a gigabyte out of ten characters."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=text_of)
        for name in ("center", "indent", "format", "wordwrap", "xmlattr", "tojson", "pprint", "attr"):
            self.filters.pop(name, None)
        self.globals = {"range": _range}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if not numbers or (operator != "%" and max(abs(left), abs(right)) > 1e9) or (operator == "**" and right > 64):
            raise SecurityError(f"`{operator}` is for moderate numbers only")
        return super().call_binop(context, operator, left, right)


def _range(*bounds: int) -> range:
    numbers = range(*bounds)
    if len(numbers) > _MOST_ITEMS:
        raise SecurityError(f"range() is limited to {_MOST_ITEMS:,}")
    return numbers


_env = _Sandbox()
_Compiled = Callable[[Mapping[str, Any]], Any]


@lru_cache(maxsize=4096)
def _expression(text: str) -> _Compiled:
    expression = _env.compile_expression(text, undefined_to_none=False)
    return lambda variables: expression(variables)


@lru_cache(maxsize=4096)
def compiled(text: str) -> _Compiled:
    """`text` as a function of its variables. Raises jinja2.TemplateSyntaxError and what the compiler may raise.

    Most templates are text with plain expressions in it: those share their compiled expressions, so that a thousand
    agents with `{{ vars.topic }}-1`, `{{ vars.topic }}-2`, … cost one compilation.
    """
    pieces = _SIMPLE.split(text)
    if not any(mark in piece for piece in pieces[::2] for mark in ("{{", "{%", "{#", "}}")):
        parts = [_expression(piece) if index % 2 else piece for index, piece in enumerate(pieces)]
        if len(pieces) == 3 and not (pieces[0] + pieces[2]).strip():
            return _expression(pieces[1])
        return lambda variables: "".join(p if isinstance(p, str) else text_of(p(variables)) for p in parts)
    if len(text) > _LONGEST_TEMPLATE:
        raise SecurityError(f"it has more than {_LONGEST_TEMPLATE:,} characters")
    tree = _env.parse(text)
    _refuse_programs(tree)
    body = tree.body
    found = _LONE.match(text)
    if found and len(body) == 1 and isinstance(body[0], ast.Output):
        outputs = [n for n in body[0].nodes if not (isinstance(n, ast.TemplateData) and not n.data.strip())]
        if len(outputs) == 1:
            return _expression(found.group(1))
    template = _env.from_string(text)
    return lambda variables: template.render(variables)


def _refuse_programs(tree: ast.Template) -> None:
    """What could run without end in a few characters: macros that call themselves, loops within loops, other files."""
    if next(tree.find_all(_PROGRAMS), None) is not None:
        raise SecurityError("macros, blocks and other files have no place in a value")
    for loop in tree.find_all(ast.For):
        if loop.recursive or any(next(part.find_all(ast.For), None) for part in loop.body):
            raise SecurityError("loops within loops")


class Renderer:
    """Renders the nodes of one topology. Knows how many templates it ran (`runs`), for the tests."""

    def __init__(self, inputs: Inputs, problems: Problems) -> None:
        self.inputs = inputs
        self.problems = problems
        self.runs = 0
        self.failures = 0
        self.spent = 0

    def render(self, node: Node, scope: Mapping[str, Any] | None = None) -> Node:
        """`node` with every template below it filled in; `scope` holds the for_each variables."""
        if not node.templated:
            return node
        if isinstance(node, Scalar):
            return self.scalar(node, scope)
        if isinstance(node, List):
            items = List(node.source, node.line, node.column)
            for item in node.items:
                items.append(self.render(item, scope))
            return items
        if isinstance(node, Map):
            out = Map(node.source, node.line, node.column)
            for key, value in node:
                if (name := self.key(key, scope)) is None:
                    continue
                if name.text in out.entries:
                    self.problems.error("duplicate-key", f"`{name.text}` stands here twice", name)
                    continue
                out.put(name, self.render(value, scope))
            return out
        return node

    def key(self, key: Scalar, scope: Mapping[str, Any] | None = None) -> Scalar | None:
        """A key, filled in; None when it was reported."""
        if not key.templated:
            return key
        rendered = self.scalar(key, scope)
        if isinstance(rendered, Scalar) and rendered.value is not None:
            return rendered
        if not isinstance(rendered, Broken):
            self.problems.error("template", "a key must be text", key, expected="a template that gives text")
        return None

    def scalar(self, node: Scalar, scope: Mapping[str, Any] | None = None) -> Node:
        """One scalar, filled in; Broken when that failed, and why was reported."""
        self.runs += 1
        if self.spent > _BUDGET:
            return Broken(node.source, node.line, node.column)  # said once
        outer, self.inputs.used = self.inputs.used, []
        try:
            value = _plain(compiled(node.text)(self.inputs.names(node, scope)))
        except FollowUp:
            pass  # a variable's default failed, which was reported there
        except InputError as error:
            self.problems.error(error.code, str(error), node, expected=error.expected, suggestion=error.suggestion)
        except jinja2.UndefinedError as error:
            self._undefined(error, node, scope)
        except SecurityError as error:
            self.problems.error("template-unsafe", f"not allowed in a template: {error}", node)
        except jinja2.TemplateSyntaxError as error:
            self.problems.error("template", f"not a valid template: {error.message}", node)
        except Exception as error:  # an expression can raise anything at all; each is a mistake in the file
            self.problems.error("template", f"the template fails: {type(error).__name__}: {error}"[:300], node)
        else:
            self.inputs.derived(value)
            self.spent += _weight(value)
            if self.spent <= _BUDGET:
                return graft(value, node)
            self.problems.error(
                "too-many", "templates yield too many values", node, expected=f"at most {_BUDGET:,} in all"
            )
        finally:
            self.inputs.used = outer + self.inputs.used
        self.failures += 1
        return Broken(node.source, node.line, node.column)

    def default(self, node: Node) -> Any:
        """The value of a variable's default. Raises FollowUp when a template in it failed, which was reported."""
        before = self.failures
        value = plain(self.render(node))
        if self.failures > before:
            raise FollowUp
        return value

    def _undefined(self, error: jinja2.UndefinedError, node: Scalar, scope: Mapping[str, Any] | None) -> None:
        message = error.message or "something is undefined"
        known = ["vars", "env", "secret", *(scope or ())]
        missing = re.match(r"'(\w+)' is undefined", message)
        suggestion = near(missing.group(1), known) if missing else None
        if missing and suggestion is None and missing.group(1) in self.inputs.declared:
            suggestion = f"did you mean `vars.{missing.group(1)}`?"
        self.problems.error("undefined", message, node, expected=", ".join(known), suggestion=suggestion)


def _weight(value: Any) -> int:
    if isinstance(value, (dict, list)):
        return 1 + sum(map(_weight, value.values() if isinstance(value, dict) else value))
    return 1


def _plain(value: Any, depth: int = 0) -> Any:
    """A template's result as data. Raises TypeError for what YAML could not hold."""
    if isinstance(value, Undefined):
        value._fail_with_undefined_error()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= 10**MAX_DIGITS:
            raise ValueError("the result is too large a number")
        return value
    if isinstance(value, str):
        value.encode()  # a lone surrogate cannot be written anywhere
        if len(value) > _LONGEST:
            raise ValueError("the result is too long")
        if "\0" in value:
            raise ValueError("the result holds NUL")
        return str(value)
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("the result is not a finite number")
        return value
    if depth > 16:
        raise ValueError("the result is nested too deep")
    if isinstance(value, Mapping):
        return {str(k): _plain(v, depth + 1) for k, v in islice(value.items(), _MOST_ITEMS)}
    if isinstance(value, (list, tuple, range)) or hasattr(value, "__next__"):
        items = list(islice(value, _MOST_ITEMS + 1))
        if len(items) > _MOST_ITEMS:
            raise ValueError(f"the result has more than {_MOST_ITEMS:,} items")
        return [_plain(item, depth + 1) for item in items]
    raise TypeError(f"the result is a {type(value).__name__}, not text, a number, a list or a mapping")
