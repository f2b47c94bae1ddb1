"""Speaks the workers' side of the protocol, and neither trains nor averages.

The assignment's seed says how it behaves, see the constants.
"""

from __future__ import annotations

import sys
import threading
import time

from shoal.cli.demo import protocol
from shoal.cli.demo.protocol import State, Status

WELL, CRASHES_AT_ONCE, CRASHES_LATER, BABBLES, STANDS_STILL, DOES_NOT_STOP = range(6)
SECONDS_PER_ROUND = 0.02


def main() -> None:
    lines = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    assignment = protocol.decode_assignment(lines.readline())
    begin, hold, stop = threading.Event(), threading.Event(), threading.Event()
    events = {protocol.Begin(): begin, protocol.Hold(): hold, protocol.Stop(): stop}

    def listen() -> None:
        for line in lines:
            events[protocol.decode_command(line)].set()
            if stop.is_set() and assignment.seed != DOES_NOT_STOP:
                sys.stdout.flush()
                import os

                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    behave(assignment, begin, hold)


def send(report: protocol.Report) -> None:
    sys.stdout.buffer.write(protocol.encode(report))
    sys.stdout.buffer.flush()


def behave(assignment: protocol.Assignment, begin: threading.Event, hold: threading.Event) -> None:
    if assignment.seed == CRASHES_AT_ONCE:
        sys.exit("the worker crashed at once")
    status = Status(assignment.name, "id of " + assignment.name, assignment.part, (1, 2), State.READY)
    send(protocol.Loaded(status.classes, 10))
    if assignment.newcomer:
        begin.wait()
    send(protocol.Ready(status))
    begin.wait()
    if assignment.newcomer:
        send(replace(status, state=State.CATCHING_UP))
    if assignment.seed in (STANDS_STILL, DOES_NOT_STOP):
        threading.Event().wait()
    rounds = assignment.settings.rounds
    for round_ in range(1, rounds + 1):
        time.sleep(SECONDS_PER_ROUND)
        if hold.is_set():
            send(protocol.Holding(round_ - 1, 3))
            threading.Event().wait()
        if assignment.seed == CRASHES_LATER and round_ == 3:
            sys.exit("the worker crashed later")
        if assignment.seed == BABBLES and round_ == 3:
            print("some words", flush=True)
        send(replace(status, state=State.TRAINING, round=round_, accuracy=round_ / rounds))
    send(replace(status, state=State.FINISHED, round=rounds, accuracy=1.0))
    send(protocol.Finished(1.0, rounds))


def replace(status: Status, **changes: object) -> Status:
    import msgspec

    return msgspec.structs.replace(status, **changes)


if __name__ == "__main__":
    main()
