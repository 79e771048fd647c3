"""The command `orchestrator`: puts the families of commands together and turns every error into words. Started by
`__main__`.

Exit codes: 0 done, 1 failed or refused, 2 usage, 3 changes are pending (--exit-code), 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import Annotated

import typer

from orchestrator.cli import apply, author, console, dlq, doctor, events, workers
from orchestrator.errors import OrchestratorError

app = typer.Typer(
    name="orchestrator",
    help="One YAML file runs a team of event-driven agents on NATS JetStream, Apache Kafka or Redis Streams.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        # slow to import, and needed here alone
        from importlib.metadata import version

        console.data(f"orchestrator {version('orchestrator')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="ORCHESTRATOR_DEBUG", help="Print the traceback of an unexpected error.")
    ] = False,
) -> None:
    """Options of every command."""
    if debug:
        os.environ["ORCHESTRATOR_DEBUG"] = "1"


for family in (author, apply, workers, events, doctor):
    family.register(app)
app.add_typer(dlq.app, name="dlq")


def main() -> None:
    """Never prints a traceback unless --debug asks for it."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # what is no text there is told with its place, or shown as \\u….
            stream.reconfigure(errors=errors)
    try:
        app(prog_name="orchestrator")
    except OrchestratorError as error:
        console.complain(error)
        sys.exit(1)
    except BrokenPipeError:
        # the reader of our output went away (`| head`): nothing is wrong, and nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("ORCHESTRATOR_DEBUG"):
            traceback.print_exc()
        console.complain(_explained(error))
        sys.exit(1)


def _explained(error: Exception) -> OrchestratorError:
    """In words what no command foresaw: the machine's refusals, and mistakes of ours."""
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except FileNotFoundError:
            return OrchestratorError("the folder that you are in was deleted", hint="go to another: cd …")
    if isinstance(error, OSError) and error.strerror and not isinstance(error, (ConnectionError, TimeoutError)):
        where = f" ({error.filename})" if error.filename else ""
        return OrchestratorError(
            f"the system refuses: {error.strerror}{where}",
            hint="is there room, and may you write there? .orchestrator/ beside the topology must be a folder of yours",
        )
    return OrchestratorError(
        f"unexpected {type(error).__name__}: {error}",
        hint="this is a mistake in orchestrator: run it again with --debug first "
        "(orchestrator --debug …) and report what it prints",
    )
