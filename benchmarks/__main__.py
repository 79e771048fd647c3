"""`python -m benchmarks --broker nats`: interleaved rounds, medians, ratios; then latency, start-up and memory."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import figures
from benchmarks.contenders import Round
from benchmarks.workload import inputs
from tests.servers.fresh import fresh_server

NAMES = {"ours": "orchestrator", "hand": "hand-written loop", "fs": "FastStream"}


def compare(console: Console, broker: str, url: str, folder: Path, args: argparse.Namespace) -> None:
    for work in args.work:
        rates: dict[str, list[float]] = {name: [] for name in NAMES}
        for run in range(args.rounds + 1):  # round 0 warms the server up and does not count
            for contender in NAMES:
                count = args.events // 5 if contender == "fs" else args.events
                round_ = Round(
                    broker,
                    url,
                    folder / f"{work}-{run}",
                    run=args.work.index(work) * 100 + run,
                    work=work,
                    events=count,
                    in_flight=args.in_flight,
                )
                rate = round_.play(contender, inputs(count))
                if rate is not None and run:
                    rates[contender].append(rate)
        console.print(table(work, rates, args))


def table(work: str, rates: dict[str, list[float]], args: argparse.Namespace) -> Table:
    found = Table(
        title=f"{work}, {args.in_flight} in flight, median of {args.rounds} interleaved rounds", title_justify="left"
    )
    for column in ("", "events/s", "min", "max", "ours is"):
        found.add_column(column, justify="left" if not column else "right")
    ours = statistics.median(rates["ours"]) if rates["ours"] else None
    for contender, values in rates.items():
        if not values:
            found.add_row(NAMES[contender], "did not finish", "", "", "")
            continue
        middle = statistics.median(values)
        ratio = f"{ours / middle:.2f}×" if ours and contender != "ours" else ""
        found.add_row(NAMES[contender], f"{middle:,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}", ratio)
    return found


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--broker", choices=["nats", "kafka", "redis"], default="nats")
    parser.add_argument("--events", type=int, default=20_000, help="for each contender and round (FastStream: a fifth)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--work", nargs="*", choices=["pipeline", "ack"], default=["pipeline", "ack"])
    parser.add_argument("--no-figures", action="store_true", help="leave out latency, start-up and memory")
    args = parser.parse_args()
    console = Console(width=110)
    with scratch() as folder, fresh_server(args.broker, fast=True) as server:
        compare(console, args.broker, server.url, folder, args)
        if not args.no_figures:
            figures.show(console, args.broker, server.url, folder)


if __name__ == "__main__":
    main()
