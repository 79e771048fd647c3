"""How user code is found, and how its parameters are told apart."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator import AgentEvent, Context, SyncContext
from orchestrator.errors import HandlerLoadError, PayloadError
from orchestrator.topology.model import Agent, Handler, Topology
from orchestrator.worker import handlers
from orchestrator.worker.handlers import bind, load

EVENT = AgentEvent(event_type="t", payload={"n": 1})
CTX: Any = object()


class Number(BaseModel):
    n: int


async def usual(event: AgentEvent, ctx: Context) -> None: ...
async def reverse(ctx: Context, event: AgentEvent) -> tuple[Any, ...]:
    return event, ctx


def by_place(a, b):  # type: ignore[no-untyped-def]
    return a, b


def by_name(ctx, event):  # type: ignore[no-untyped-def]
    return event, ctx


def only_model(number: Number) -> Number:
    return number


def mixed(number: Number, ctx: SyncContext, event: AgentEvent) -> tuple[Any, ...]:
    return event, ctx, number


def raw(payload: dict[str, Any], limit: int = 3) -> Any:
    return payload


def test_the_usual_shape_is_called_without_a_wrapper() -> None:
    assert bind(usual, "a") is usual


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (by_place, (EVENT, CTX)),
        (by_name, (EVENT, CTX)),
        (only_model, Number(n=1)),
        (mixed, (EVENT, CTX, Number(n=1))),
        (lambda event: event, EVENT),
    ],
)
def test_parameters_are_told_apart(function: Any, expected: Any) -> None:
    assert bind(function, "a")(EVENT, CTX) == expected


async def test_in_any_order() -> None:
    assert await bind(reverse, "a")(EVENT, CTX) == (EVENT, CTX)


def test_a_payload_that_is_not_the_model_is_a_payload_error() -> None:
    with pytest.raises(PayloadError, match="n: Field required"):
        bind(only_model, "a")(AgentEvent(event_type="t"), CTX)


def twice(event: AgentEvent, other: AgentEvent) -> None: ...
def unknown(event: AgentEvent, ctx: Context, depth: int) -> None: ...
def keyword(event: AgentEvent, *, depth: int) -> None: ...


@pytest.mark.parametrize(("function", "word"), [(twice, "twice"), (unknown, "depth"), (keyword, "depth")])
def test_a_shape_that_cannot_be_called_says_how_to_write_it(function: Any, word: str) -> None:
    with pytest.raises(HandlerLoadError, match=word) as caught:
        bind(function, "a")
    assert "event: AgentEvent" in str(caught.value.hint)


# --- loading --------------------------------------------------------------------------------------------------


@pytest.fixture
def imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def loading(root: Path, call: str, kind: str = "python") -> Any:
    agent = Agent("a", "", Handler(kind, call), (), ())
    return load(Topology("t", "", root, (), {}, {}, {"a": agent}), agent)


@pytest.mark.usefixtures("imports")
def test_modules_beside_the_topology_come_first_also_in_a_second_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial_handlers.py").write_text(f"def handle(event): return {name!r}\n")
    found = [loading(tmp_path / name, "trial_handlers:handle") for name in ("one", "two", "one")]
    assert [f.call(EVENT, CTX) for f in found] == ["one", "two", "one"]
    assert found[0].threaded


@pytest.mark.usefixtures("imports")
def test_methods_objects_and_lifespan(tmp_path: Path) -> None:
    (tmp_path / "trial_objects.py").write_text(
        "class Agent:\n"
        "    async def handle(self, event, ctx): ...\n"
        "    async def __call__(self, event): return 'called'\n"
        "agent = Agent()\n"
        "async def lifespan(ctx): yield\n"
    )
    assert not loading(tmp_path, "trial_objects:agent.handle").threaded
    found = loading(tmp_path, "trial_objects:agent")
    assert not found.threaded
    assert found.lifespan is not None


@pytest.mark.usefixtures("imports")
def test_an_error_shows_the_users_own_frames_only(tmp_path: Path) -> None:
    (tmp_path / "trial_broken.py").write_text("def deep():\n    return 1 / 0\n\ndeep()\n")
    with pytest.raises(HandlerLoadError, match="ZeroDivisionError") as caught:
        loading(tmp_path, "trial_broken:handle")
    trace = caught.value.traceback
    assert trace is not None
    assert "trial_broken.py" in trace
    assert "in deep" in trace
    assert "importlib" not in trace
    assert "handlers.py" not in trace


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        ("trial_none:handle", "python", "trial_none"),
        ("json:dumps_", "python", "dumps_"),
        ("trial:x", "perl", "perl"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, call: str, kind: str, word: str) -> None:
    with pytest.raises(HandlerLoadError, match=word) as caught:
        loading(tmp_path, call, kind)
    assert caught.value.hint


@pytest.mark.usefixtures("imports")
def test_a_module_named_like_one_of_pythons_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "queue.py").write_text("def handle(event): ...\n")
    with pytest.raises(HandlerLoadError, match=r"queue\.py"):
        loading(tmp_path, "queue:handle")


def test_an_external_agent_has_no_handler() -> None:
    agent = replace(Agent("a", "", None, (), ()), external=True)
    with pytest.raises(HandlerLoadError, match="external"):
        load(Topology("t", "", Path(), (), {}, {}, {"a": agent}), agent)


# --- annotations that are text, optional, or hidden -------------------------------------------------------------

LAZY = """
from __future__ import annotations
import functools
from typing import TYPE_CHECKING, Annotated, Any, Optional
from pydantic import BaseModel
if TYPE_CHECKING:
    from orchestrator import Context
    from elsewhere import Hidden

class Task(BaseModel):
    n: int

def named_payload(payload: Task, ctx: Context): return type(payload).__name__
def optional(task: Optional[Task], ctx: Context = None): return type(task).__name__
def annotated(task: Annotated[Task, "x"]): return type(task).__name__
def defaults(payload: dict[str, Any], depth: int = 3): return type(payload).__name__
partial = functools.partial(named_payload)
class Agent:
    def __call__(self, task: Task): return type(task).__name__
called = Agent()
def decorated(function):
    def wrapper(*args, **kwargs): return function(*args, **kwargs)
    return wrapper
@decorated
def wrapped(event, ctx): return type(event).__name__

def hidden(payload: Hidden): ...
def behind(event, depth: int = 3, ctx: Context = None): ...
def generator(event): yield event
async def agenerator(event): yield event
"""


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("named_payload", "Task"),
        ("optional", "Task"),
        ("annotated", "Task"),
        ("defaults", "dict"),
        ("partial", "Task"),
        ("called", "Task"),
        ("wrapped", "AgentEvent"),
    ],
)
def test_a_model_is_found_however_it_is_written(tmp_path: Path, name: str, expected: str) -> None:
    (tmp_path / "trial_lazy.py").write_text(LAZY)
    assert loading(tmp_path, f"trial_lazy:{name}").call(EVENT, CTX) == expected


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("hidden", "Hidden"),
        ("behind", "depth"),
        ("generator", "yield"),
        ("agenerator", "yield"),
        ("Agent", "class"),
    ],
)
def test_what_would_handle_nothing_is_refused(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / "trial_lazy.py").write_text(LAZY)
    with pytest.raises(HandlerLoadError, match=word):
        loading(tmp_path, f"trial_lazy:{name}")


# --- every kind of callable -------------------------------------------------------------------------------------

KINDS_OF_CALLABLE = """
import functools, inspect
from orchestrator import AgentEvent, Context

def seen(event, ctx):
    return type(event).__name__, ctx is not None

async def coroutine(event, ctx): return seen(event, ctx)
def function(event, ctx): return seen(event, ctx)
def only_positional(event, ctx, /): return seen(event, ctx)
def reversed_(ctx: Context, event: AgentEvent): return seen(event, ctx)
def with_default(event, ctx, depth=3): return seen(event, ctx)
def with_default_context(event, ctx: Context = None): return seen(event, ctx)
def keyword_default(event, ctx, *, depth=3): return seen(event, ctx)
def anything(*args, **kwargs): return seen(*args)
def named_and_anything(event, ctx, *args): return seen(event, ctx)
blambda = lambda event, ctx: seen(event, ctx)

class Agent:
    async def acoroutine(self, event, ctx): return seen(event, ctx)
    def method(self, event, ctx): return seen(event, ctx)
    def swallowing(*args): return seen(*args[1:])
    @classmethod
    def of_class(cls, event, ctx): return seen(event, ctx)
    @staticmethod
    def static(event, ctx): return seen(event, ctx)
    _half = lambda self, extra, event, ctx: seen(event, ctx)
    half = functools.partialmethod(_half, 1)
    def __call__(self, event, ctx): return seen(event, ctx)

class Later:
    async def __call__(self, event, ctx): return seen(event, ctx)

agent = Agent()
later = Later()
def three(extra, event, ctx): return seen(event, ctx)
async def athree(extra, event, ctx): return seen(event, ctx)
partial = functools.partial(three, 1)
apartial = functools.partial(athree, 1)

def decorated(inner):
    @functools.wraps(inner)
    def wrapper(*args): return inner(*args)
    return wrapper
wrapped = decorated(function)
wrapped_reversed = decorated(reversed_)

def signed(a, b): return seen(b, a)
signed.__signature__ = inspect.signature(reversed_)
def labelled(event, ctx): return seen(event, ctx)
labelled.label = "x"
unbound = Agent.method
"""


@pytest.mark.usefixtures("imports")
@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [
        ("coroutine", True),
        ("function", False),
        ("only_positional", False),
        ("reversed_", False),
        ("with_default", False),
        ("with_default_context", False),
        ("keyword_default", False),
        ("anything", False),
        ("named_and_anything", False),
        ("blambda", False),
        ("agent.acoroutine", True),
        ("agent.method", False),
        ("agent.swallowing", False),
        ("agent.half", False),
        ("agent", False),
        ("later", True),
        ("Agent.of_class", False),
        ("Agent.static", False),
        ("partial", False),
        ("apartial", True),
        ("wrapped", False),
        ("wrapped_reversed", False),
        ("signed", False),
        ("labelled", False),
    ],
)
def test_every_kind_of_callable_is_called_as_it_is_written(tmp_path: Path, name: str, asynchronous: bool) -> None:
    (tmp_path / "trial_kinds.py").write_text(KINDS_OF_CALLABLE)
    found = loading(tmp_path, f"trial_kinds:{name}")
    assert found.threaded is not asynchronous
    done = found.call(EVENT, CTX)
    if asynchronous:
        with pytest.raises(StopIteration) as ended:
            done.send(None)
        done = ended.value.value
    assert done == ("AgentEvent", True)


@pytest.mark.usefixtures("imports")
def test_a_method_without_its_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trial_kinds.py").write_text(KINDS_OF_CALLABLE)
    with pytest.raises(HandlerLoadError, match="takes the event twice"):
        loading(tmp_path, "trial_kinds:unbound")


def positional(a: AgentEvent, b: Number, /, c: Context) -> None: ...


class Bound:
    def method(self, event: AgentEvent, ctx: Context) -> None: ...
    def given(*given: Any) -> None: ...


BOUND = Bound()


def marked(event: AgentEvent, ctx: Context) -> None: ...


marked.__signature__ = inspect.signature(only_model)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "function",
    [
        usual,
        reverse,
        by_place,
        only_model,
        mixed,
        raw,
        twice,
        keyword,
        positional,
        BOUND.method,
        BOUND.given,
        marked,
        len,
    ],
)
def test_reading_the_code_object_says_what_inspect_says(function: Any) -> None:
    """The short way is taken for plain functions only, and leads to the same place."""
    plain = handlers._plain(function)
    names = handlers._names(plain, bound=plain is not function) if plain is not None else None
    if names is not None:
        assert list(names) == list(inspect.signature(function).parameters)
    assert (names is None) == (function in (raw, keyword, BOUND.given, marked, len))
