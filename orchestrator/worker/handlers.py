"""Finds the user's code and says how to call it. Each handler kind registers one loader in KINDS.

A loader returns a Loaded: `call(event, ctx)` runs the handler for one event, in the loop when it is async and in a
thread when `threaded`. A payload model is validated inside that call, so what is wrong with it is the event's fault.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, CO_VARARGS, CO_VARKEYWORDS
from pathlib import Path
from types import FunctionType, MethodType, ModuleType, NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from orchestrator.errors import HandlerLoadError, PayloadError
from orchestrator.event import AgentEvent
from orchestrator.topology.model import Agent, Topology
from orchestrator.worker.context import AgentContext, Context, SyncContext

_OURS = (str(Path(__file__).resolve().parent.parent), str(Path(importlib.__file__).parent), "<frozen importlib")
_CONTEXT_TYPES = ("AgentEvent", "AgentContext", "Context", "SyncContext")
_NAMES = {"event": "event", "ctx": "ctx", "context": "ctx", "payload": "payload"}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A handler ready to be called. `call` returns an awaitable, or the result itself when `threaded`."""

    call: Callable[[AgentEvent, Any], Any]
    threaded: bool = False
    lifespan: Callable[[AgentContext], AbstractAsyncContextManager[Any]] | None = None


def load(topology: Topology, agent: Agent) -> Loaded:
    """The handler of `agent`. Raises HandlerLoadError with the user module's own traceback."""
    if agent.handler is None:
        raise HandlerLoadError(f"agent {agent.name!r} is external: nothing of it runs here")
    if (loader := KINDS.get(agent.handler.kind)) is None:
        raise HandlerLoadError(
            f"agent {agent.name!r}: there is no handler kind {agent.handler.kind!r}",
            hint=f"kinds are: {', '.join(KINDS)}",
        )
    return loader(topology, agent)


def load_python(topology: Topology, agent: Agent) -> Loaded:
    """`module:function`, resolved beside the topology file first."""
    assert agent.handler is not None
    module_name, _, path = agent.handler.call.partition(":")
    module = import_beside(topology.root, module_name, agent.name)
    function: Any = module
    for name in path.split("."):
        function = getattr(function, name, None)
    if not callable(function):
        public = sorted(n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__)
        raise HandlerLoadError(
            f"agent {agent.name!r}: {module_name} has no function {path!r} ({module.__file__})",
            hint=f"it has: {', '.join(public) or 'no functions'}",
        )
    _callable(function, agent.name)
    return Loaded(
        bind(function, agent.name), threaded=not _is_async(function), lifespan=getattr(module, "lifespan", None)
    )


KINDS: dict[str, Callable[[Topology, Agent], Loaded]] = {"python": load_python}


def import_beside(root: Path, name: str, agent: str) -> ModuleType:
    """Imports module `name` with `root` first on the path. Raises HandlerLoadError."""
    place = str(root)
    if not sys.path or sys.path[0] != place:
        sys.path.insert(0, place)
        sys.path_importer_cache.pop(place, None)  # files may have come since somebody looked there
    _forget_namesake(root, name.partition(".")[0], agent)
    try:
        return importlib.import_module(name)
    except BaseException as error:  # user code: sys.exit() at module level too
        if isinstance(error, KeyboardInterrupt):
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == name
        raise HandlerLoadError(
            f"agent {agent!r}: the handler module {name!r} cannot be imported: {type(error).__name__}: {error}",
            hint=f"handlers are looked for in {root} first, then among installed packages" if missing else None,
            traceback=user_traceback(error),
        ) from error


def _forget_namesake(root: Path, top: str, agent: str) -> None:
    """A module of the same name from another folder (another topology in this process) gives way to ours."""
    if (there := sys.modules.get(top)) is None:
        return
    ours = next((p for p in (root / f"{top}.py", root / top / "__init__.py") if p.exists()), None)
    if ours is None:
        return
    if top in sys.stdlib_module_names:
        raise HandlerLoadError(
            f"agent {agent!r}: {ours.name} has the name of a module of Python itself", hint="rename it"
        )
    if Path(getattr(there, "__file__", None) or "").resolve() != ours.resolve():
        for loaded in [m for m in sys.modules if m == top or m.startswith(f"{top}.")]:
            del sys.modules[loaded]


def user_traceback(error: BaseException) -> str:
    """The traceback as text, without the frames of this package and of the import machinery."""
    seen = traceback.TracebackException.from_exception(error)
    at: traceback.TracebackException | None = seen
    while at is not None:
        at.stack = traceback.StackSummary.from_list([frame for frame in at.stack if not _is_ours(frame.filename)])
        at = at.__cause__ or at.__context__
    return "".join(seen.format())


def _is_ours(filename: str) -> bool:
    return filename.startswith(_OURS)


def _plain(function: Any) -> FunctionType | None:
    """The function itself, when its code object says all about it: it, or the method's, was written with `def` and
    bears no attribute, as a decorator leaves them (`__wrapped__`, `__signature__`, ...). Most handlers are plain, and
    to ask `inspect` about one writes to much memory that workers share otherwise."""
    inner = function.__func__ if type(function) is MethodType else function
    return inner if type(inner) is FunctionType and not inner.__dict__ else None


def _is_async(function: Any) -> bool:
    if (plain := _plain(function)) is not None:
        return bool(plain.__code__.co_flags & CO_COROUTINE)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  an object with an async __call__ is a handler too
    )


def _is_generator(function: Any) -> bool:
    if (plain := _plain(function)) is not None:
        return bool(plain.__code__.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR))
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)


def _callable(function: Any, agent: str) -> None:
    """Raises HandlerLoadError for what could be called but would handle nothing: the event would be settled."""
    if isinstance(function, type):
        raise HandlerLoadError(
            f"agent {agent!r}: {_name(function)} is a class", hint="name an object of it, or one of its methods"
        )
    if _is_generator(function):
        raise HandlerLoadError(f"agent {agent!r}: {_name(function)} is a generator: it has a `yield`", hint=_SHAPE)


def bind(function: Callable[..., Any], agent: str) -> Callable[[AgentEvent, Any], Any]:
    """A call(event, ctx) for a function whose parameters may be the event, the context and a payload model, in any
    order, told apart by annotation, then by name, then by place. Raises HandlerLoadError."""
    kinds = [_kind(parameter, place, function) for place, parameter in enumerate(_parameters(function, agent))]
    for kind in ("event", "ctx"):
        if kinds.count(kind) > 1:
            raise HandlerLoadError(f"agent {agent!r}: {_name(function)} takes the {kind} twice", hint=_SHAPE)
    match kinds:
        case ["event", "ctx"]:
            return function
        case ["ctx", "event"]:
            return lambda event, ctx: function(ctx, event)
        case ["event"]:
            return lambda event, ctx: function(event)

    def call(event: AgentEvent, ctx: Any) -> Any:
        return function(*[_argument(kind, event, ctx) for kind in kinds])

    return call


_SHAPE = "write it as: async def handler(event: AgentEvent, ctx: Context)"


def _parameters(function: Callable[..., Any], agent: str) -> list[tuple[str, Any]]:
    """(name, annotation) of the parameters that have to be filled."""
    if (plain := _plain(function)) is not None and (names := _names(plain, bound=plain is not function)) is not None:
        given = plain.__annotations__
        return [(name, _annotation(given.get(name, inspect.Parameter.empty), function)) for name in names]
    found = []
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise HandlerLoadError(f"agent {agent!r}: {_name(function)} cannot be called: {error}", hint=_SHAPE) from error
    anything, skipped = False, ""
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL or parameter.kind is parameter.VAR_KEYWORD:
            anything |= parameter.kind is parameter.VAR_POSITIONAL
            continue
        annotation = _annotation(parameter.annotation, function)
        if parameter.default is not parameter.empty and not _is_ours_to_fill(parameter.name, annotation):
            skipped = parameter.name
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty:
                raise HandlerLoadError(
                    f"agent {agent!r}: {_name(function)} needs {parameter.name!r} by keyword", hint=_SHAPE
                )
            continue
        if skipped:
            raise HandlerLoadError(
                f"agent {agent!r}: {_name(function)} has {parameter.name!r} behind {skipped!r}, which is left out",
                hint=f"put {skipped!r} last",
            )
        found.append((parameter.name, annotation))
    if anything and not found:  # a decorator that hides what it wraps
        return [("event", inspect.Parameter.empty), ("ctx", inspect.Parameter.empty)]
    return found


def _names(plain: FunctionType, bound: bool) -> tuple[str, ...] | None:
    """The names of its parameters, when all of them are given by place and have no default; None when `inspect` has to
    tell. `bound`: the first is given already."""
    code = plain.__code__
    if code.co_flags & (CO_VARARGS | CO_VARKEYWORDS) or code.co_kwonlyargcount or plain.__defaults__:
        return None
    if bound and not code.co_argcount:
        return None
    return code.co_varnames[int(bound) : code.co_argcount]


def _annotation(given: Any, function: Callable[..., Any]) -> Any:
    """The type that is meant: text is looked up for each parameter by itself, because a name that is imported for type
    checkers only must not hide the others; Annotated and Optional are looked through."""
    if isinstance(given, str):
        scope = _scope(function)
        try:
            given = scope[given] if given in scope else eval(given, scope)
        except Exception:  # whatever it says, it names nothing that exists here: names and places decide
            return given
    if isinstance(given, type):
        return given
    if get_origin(given) is Annotated:
        return _annotation(get_args(given)[0], function)
    if get_origin(given) in (Union, UnionType):
        members = [member for member in get_args(given) if member is not NoneType]
        return _annotation(members[0], function) if len(members) == 1 else given
    return dict if get_origin(given) is dict else given


def _scope(function: Callable[..., Any]) -> dict[str, Any]:
    """The names that the text of its annotations may use."""
    if (plain := _plain(function)) is not None:
        return plain.__globals__
    inner: Any = inspect.unwrap(function)
    while hasattr(inner, "func"):  # functools.partial
        inner = inspect.unwrap(inner.func)
    if not hasattr(inner, "__globals__") and not hasattr(inner, "__func__"):
        inner = type(inner).__call__  # an object with a __call__
    inner = inspect.unwrap(getattr(inner, "__func__", inner))
    return getattr(inner, "__globals__", {})


def _is_ours_to_fill(name: str, annotation: Any) -> bool:
    """Whether a parameter that has a default is one of those that we know."""
    if annotation is inspect.Parameter.empty:
        return False
    if name in _NAMES:
        return True
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] in _CONTEXT_TYPES
    return isinstance(annotation, type) and issubclass(annotation, (AgentEvent, AgentContext, BaseModel))


def _kind(parameter: tuple[str, Any], place: int, function: Callable[..., Any]) -> str | type[BaseModel]:
    name, annotation = parameter
    if isinstance(annotation, type):
        if issubclass(annotation, AgentEvent):
            return "event"
        if issubclass(annotation, AgentContext):
            return "ctx"
        if issubclass(annotation, BaseModel):
            return annotation
        if annotation is dict:
            return "payload"
    if isinstance(annotation, str):
        last = annotation.rpartition(".")[2]
        if last in _CONTEXT_TYPES:
            return "event" if last == "AgentEvent" else "ctx"
        if name == "payload":
            raise HandlerLoadError(
                f"{_name(function)}: the type {annotation!r} of {name!r} cannot be found, so it would not be checked",
                hint="import it outside `if TYPE_CHECKING:`",
            )
    if name in _NAMES:
        return _NAMES[name]
    if annotation is inspect.Parameter.empty and place < 2:
        return ("event", "ctx")[place]
    raise HandlerLoadError(
        f"{_name(function)}: what is the parameter {name!r}? It is neither event, context nor a pydantic model",
        hint=_SHAPE,
    )


def _argument(kind: str | type[BaseModel], event: AgentEvent, ctx: Context | SyncContext) -> Any:
    if kind == "event":
        return event
    if kind == "ctx":
        return ctx
    if kind == "payload":
        return event.payload
    assert isinstance(kind, type)
    try:
        return kind.model_validate(event.payload)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        what = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'payload'}: {p['msg']}" for p in problems[:5])
        raise PayloadError(f"the payload of {event.event_type} is no {kind.__name__}: {what}") from None


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", None) or type(function).__name__
