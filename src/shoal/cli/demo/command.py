"""``shoal demo`` and ``shoal demo --join``: checks everything first, then runs the supervisor and shows the outcome."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from shoal.cli.addresses import complete_address, listen_address
from shoal.cli.demo import settings as limits
from shoal.cli.demo.board import Board
from shoal.cli.demo.data import RESERVE_PARTS, require_demo_packages
from shoal.cli.demo.history import Outcome
from shoal.cli.demo.plot import write_plot
from shoal.cli.demo.protocol import Assignment, Part
from shoal.cli.demo.settings import Settings
from shoal.cli.demo.supervisor import DemoFailed, Supervisor
from shoal.cli.demo.table import make_view, render_outcome
from shoal.cli.invocation import command_line
from shoal.cli.pictures import check_output
from shoal.dht.dht import DHT
from shoal.errors import InvalidValueError
from shoal.p2p.identity import PeerID

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def run_demo(*, peers: int, rounds: int, output: Path, host: str, console: Console) -> int:
    """Start a swarm on this machine; returns the exit status.

    :raises UsageError: an argument is not allowed, or a package is missing; nothing was started then
    :raises ShoalError: the demo could not go on; everything that it started has ended
    """
    _check_range("--peers", peers, limits.MIN_PEERS, limits.MAX_PEERS)
    _check_range("--rounds", rounds, limits.MIN_ROUNDS, limits.MAX_ROUNDS)
    check_output(output)
    listen = listen_address(host, 0)
    require_demo_packages()
    with DHT(start=True, host_maddrs=[listen]) as dht:
        settings = Settings(f"demo-{dht.peer_id}", peers=peers, rounds=rounds)
        board = Board(dht)
        board.publish_settings(settings)
        addresses = tuple(str(address) for address in dht.get_visible_maddrs())
        console.print("Join from another terminal with", markup=False)
        line = command_line("demo", "--join", addresses[0])
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
        assignments = [
            Assignment(f"peer {index + 1}", settings, Part(index), addresses, host, seed=index)
            for index in range(peers)
        ]
        replacement = Assignment(
            f"peer {peers + 1}", settings, Part(peers - 1), addresses, host, seed=peers, newcomer=True
        )
        return _supervise(settings, board, assignments, replacement, output, console)


def join_demo(*, address: str, output: Path, host: str, console: Console) -> int:
    """Take part in the swarm that another terminal has started; returns the exit status.

    :raises UsageError: an argument is not allowed, a package is missing, or no demo runs there
    :raises ShoalError: the demo cannot be reached, or could not go on
    """
    founder = complete_address("--join", address)
    check_output(output)
    listen = listen_address(host, 0)
    require_demo_packages()
    with DHT([founder], start=True, host_maddrs=[listen]) as dht:
        board = Board(dht)
        settings = board.read_settings(PeerID.from_base58(str(founder.peer_id)))
        part = _choose_part(board, settings)
        addresses = (str(founder), *(str(own) for own in dht.get_visible_maddrs()))
        seed = random.SystemRandom().getrandbits(32)
        assignment = Assignment(
            f"guest {part.index + 1}", settings, part, addresses, host, seed, newcomer=True
        )
        return _supervise(settings, board, [assignment], None, output, console)


def _choose_part(board: Board, settings: Settings) -> Part:
    """A part of the reserve that nobody has; any of them if there is none."""
    statuses = board.read_statuses(settings.prefix)
    taken = {status.part.index for status in statuses if status.part.reserve}
    free = [index for index in range(RESERVE_PARTS) if index not in taken]
    return Part(free[0] if free else random.SystemRandom().randrange(RESERVE_PARTS), reserve=True)


def _supervise(
    settings: Settings,
    board: Board,
    assignments: Sequence[Assignment],
    replacement: Assignment | None,
    output: Path,
    console: Console,
) -> int:
    with make_view(console) as view:
        supervisor = Supervisor(settings, board, view, assignments, replacement)
        try:
            outcome = asyncio.run(_run_until_terminated(supervisor))
        except KeyboardInterrupt:
            view.tell("interrupted: all peers of this terminal have left the swarm")
            return INTERRUPTED
    if outcome is None:
        console.print("terminated: all peers of this terminal have left the swarm", markup=False)
        return TERMINATED
    return _conclude(supervisor, outcome, output, console)


async def _run_until_terminated(supervisor: Supervisor) -> Outcome | None:
    """Run the demo; SIGTERM ends it as Ctrl+C does. Returns None then."""
    running = asyncio.ensure_future(supervisor.run())
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        running.cancel()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await running
    except asyncio.CancelledError:
        if not terminated:
            raise
        return None
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def _conclude(supervisor: Supervisor, outcome: Outcome, output: Path, console: Console) -> int:
    console.print(render_outcome(outcome))
    try:
        write_plot(supervisor.history, output)
    except OSError as error:
        raise DemoFailed(f"the plot could not be written: {error}") from error
    console.print(f"plot: {output.absolute()}", markup=False, highlight=False, soft_wrap=True)
    failure = outcome.explain_failure()
    lag = (outcome.central - outcome.swarm_mean) * 100
    verdict = (
        f"The swarm is {lag:.1f} points below central training"
        if lag > 0
        else "The swarm is as good as central training"
    )
    console.print(f"{verdict}, in {supervisor.history.seconds():.0f} s.", markup=False, highlight=False)
    if failure is not None:
        raise DemoFailed(failure)
    return 0


def _check_range(option: str, value: int, minimum: int, maximum: int) -> None:
    if not minimum <= value <= maximum:
        raise InvalidValueError(f"{option} must be {minimum} to {maximum}, got {value}")
