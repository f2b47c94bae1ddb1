from __future__ import annotations

import pytest

from shoal.cli.demo import protocol
from shoal.cli.demo.protocol import Part, State, Status
from shoal.cli.demo.settings import Settings
from shoal.errors import ProtocolViolation

STATUS = Status("peer 1", "12D3", Part(0), (1, 2), State.TRAINING, 5, 4, 0.5, 0.9, 1000, 0.1)


@pytest.mark.parametrize(
    "report",
    [
        STATUS,
        protocol.Loaded((1, 2), 30),
        protocol.Ready(STATUS),
        protocol.Holding(3, 4),
        protocol.Finished(0.9, 9),
    ],
)
def test_reports_survive_the_pipe(report: protocol.Report) -> None:
    line = protocol.encode(report)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert protocol.decode_report(line) == report


@pytest.mark.parametrize("command", [protocol.Begin(), protocol.Hold(), protocol.Stop()])
def test_commands_survive_the_pipe(command: protocol.Command) -> None:
    assert protocol.decode_command(protocol.encode(command)) == command


def test_assignments_survive_the_pipe() -> None:
    assignment = protocol.Assignment(
        "peer 1",
        Settings("demo-x", peers=3),
        Part(1, reserve=True),
        ("/ip4/1.2.3.4/tcp/5",),
        "127.0.0.1",
        7,
        True,
    )
    assert protocol.decode_assignment(protocol.encode(assignment)) == assignment


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"Traceback (most recent call last):\n",
        b'{"type": "finished", "accuracy": 1.5, "rounds_averaged": 1}\n',
        b'{"type": "finished"}\n',
        b'{"type": "nonsense"}\n',
        protocol.encode(protocol.Stop()),
        protocol.encode(STATUS).replace(b"peer 1", b"[bold]"),
        protocol.encode(STATUS).replace(b'"round":5', b'"round":-1'),
    ],
)
def test_what_is_no_report_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="not a report"):
        protocol.decode_report(line)


def test_what_is_no_command_or_assignment_is_refused() -> None:
    with pytest.raises(ProtocolViolation, match="not a command"):
        protocol.decode_command(protocol.encode(STATUS))
    with pytest.raises(ProtocolViolation, match="not an assignment"):
        protocol.decode_assignment(protocol.encode(protocol.Begin()))
