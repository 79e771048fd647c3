"""Lines on their way to people."""

from __future__ import annotations

import io
import json
import stat

import pytest

from orchestrator.supervisor import logfiles
from orchestrator.supervisor.logfiles import recent
from orchestrator.supervisor.logs import LogSink, Painter
from tests.supervisor.rig import agent, topology

LINE = b'{"ts": "2026-01-02T03:04:05Z", "level": "warning", "agent": "x", "slot": 9, "event": "slow", "took": 3}'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def team(tmp_path):
    return topology(tmp_path, agent(), agent("writing"), secrets=('pa"ss', "hunter2", ""))


def test_text_for_people_json_for_programs(team):
    text, data = io.StringIO(), io.StringIO()
    for stream, form in ((text, "text"), (data, "json")):
        sink = LogSink(stream=stream, form=form)
        sink.use(team)
        sink.line("research", 0, LINE)
        sink.line("research", 1, b"plain words")
        sink.line("research", 1, b'{"not": "a log record"}')
        sink.line("research", 1, b"{broken")
        sink.say("info", "research", "research.0 is ready")
    lines = text.getvalue().splitlines()
    assert lines[0] == "research.0 | 03:04:05 warning slow took=3"
    assert lines[1].endswith(" plain words")
    assert lines[2].endswith(' {"not": "a log record"}')
    records = [json.loads(line) for line in data.getvalue().splitlines()]
    assert [(r["agent"], r["slot"]) for r in records] == [("research", 0), *[("research", 1)] * 3, ("supervisor", None)]
    assert records[0]["took"] == 3
    assert records[3]["event"] == "{broken"


def test_a_traceback_is_shown_line_by_line():
    record = {"ts": "", "agent": "a", "slot": 0, "event": "failed", "traceback": "Trace:\n  File x\nError\n", "n": 1}
    shown = Painter(color=False).paint(record).splitlines()
    assert [line.split("|")[1].strip() for line in shown] == ["failed n=1", "Trace:", "File x", "Error"]
    assert all(line.startswith("a.0        |") for line in shown)


@pytest.mark.parametrize(
    ("stream", "no_color", "colored"), [(Terminal(), "", True), (Terminal(), "1", False), (io.StringIO(), "", False)]
)
def test_color_only_where_it_is_wanted(stream, no_color, colored, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    LogSink(stream=stream).line("research", 0, LINE)
    assert ("\x1b[" in stream.getvalue()) is colored


def test_agents_have_colors_of_their_own():
    painter = Painter(color=True)
    one, two = (painter.paint({"agent": name, "slot": 0, "event": "x", "ts": ""}) for name in ("a", "b"))
    assert one[:5] != two[:5]


def test_secrets_never_get_through(team, tmp_path):
    stream = io.StringIO()
    sink = LogSink(folder=tmp_path / "logs", stream=stream, form="json")
    sink.use(team)
    sink.line("research", 0, b"the password is hunter2")
    sink.line("research", 0, json.dumps({"ts": "", "event": 'pa"ss', "deep": {"p": 'x pa"ss'}}).encode())
    sink.say("error", "", 'cannot log in with pa"ss')
    sink.close()
    for text in (stream.getvalue(), *(path.read_text() for path in (tmp_path / "logs").iterdir())):
        assert "hunter2" not in text
        assert "pa" + '"ss' not in text
        assert 'pa\\"ss' not in text
        assert "***" in text


def test_an_edit_that_does_not_converge_leaves_the_old_secrets_redacted(team, tmp_path):
    stream = io.StringIO()
    sink = LogSink(stream=stream)
    sink.use(team)
    sink.use(topology(tmp_path, agent(), secrets=("swordfish",)))
    sink.line("research", 0, b"old worker: hunter2, new worker: swordfish")
    assert stream.getvalue().endswith(" old worker: ***, new worker: ***\n")


def test_files_rotate_and_are_read_back_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(logfiles, "SIZE", 2000)
    sink = LogSink(folder=tmp_path)
    for number in range(200):
        sink.line("research", 0, json.dumps({"ts": f"{number:04}", "event": str(number)}).encode())
        sink.line("writing", 0, json.dumps({"ts": f"{number:04}.5", "event": f"w{number}"}).encode())
    assert sorted(path.name for path in tmp_path.glob("research*")) == [
        "research.log",
        *(f"research.log.{n}" for n in (1, 2, 3)),
    ]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.iterdir())
    assert [r["event"] for r in sink.recent(["research"], 40)] == [str(n) for n in range(160, 200)]
    assert [r["event"] for r in sink.recent([], 3)] == ["w198", "199", "w199"]
    assert sink.recent([], 0) == []
    sink.close()
    with (tmp_path / "research.log").open("ab") as file:
        file.write(b'{"cut sho')
    assert recent(tmp_path, ["research"], 2)[-1]["event"] == "199"


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(logfiles, "_OPEN", 3)
    sink = LogSink(folder=tmp_path)
    for _ in range(2):
        for number in range(9):
            sink.line(f"a{number}", 0, b"x")
    assert len(sink._files._open) == 3
    assert [len(path.read_text().splitlines()) for path in tmp_path.iterdir()] == [2] * 9
    sink.close()


def test_a_reader_that_went_away_does_not_stop_the_workers(tmp_path):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    sink = LogSink(folder=tmp_path, stream=Closed())
    sink.line("research", 0, b"one")
    sink.line("research", 0, b"two")
    assert len(sink.recent([], 9)) == 2
    sink.close()
