"""The command ``shoal``. Imports little, so that ``shoal --help`` is quick: commands import what they need."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import shoal
from shoal.errors import ShoalError, UsageError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 128 + signal.SIGINT

CommandLineMistake: type[Exception] = typer.BadParameter.__mro__[1]
"""Unknown options and values of the wrong type; Typer has no public name for this base class."""

app = typer.Typer(
    name="shoal", rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoal {shoal.__version__}")
        raise typer.Exit


OPTION_OF = {
    "host_maddrs": "--host, --port",
    "announce_maddrs": "--announce",
    "initial_peers": "--initial-peers",
    "identity_path": "--identity",
    "bootstrap_timeout": "--bootstrap-timeout",
}
"""What the parameters of :class:`shoal.DHT` are called on the command line."""


@app.callback(invoke_without_command=True)
def shoal_command(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Average PyTorch tensors between machines that come, go and fail."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    peers: Annotated[int, typer.Option(help="Training processes to start, 2 to 8.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of training and averaging.")] = 100,
    output: Annotated[Path, typer.Option(help="Where to write the plot (PNG).")] = Path("shoal-demo.png"),
    host: Annotated[str, typer.Option(help="IP address to listen on.")] = "127.0.0.1",
    join: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Take part in the demo of another terminal.")
    ] = None,
) -> None:
    """Train a swarm on this machine and kill a peer.

    Several processes train on handwritten digits, each on other ones. One is killed and replaced. At the end
    their accuracy is compared with that of each process alone and of central training.
    """
    from shoal.cli.demo.command import join_demo, run_demo

    console = Console()
    if join is None:
        status = run_demo(peers=peers, rounds=rounds, output=output, host=host, console=console)
    else:
        status = join_demo(address=join, output=output, host=host, console=console)
    raise typer.Exit(status)


@app.command()
def peer(
    host: Annotated[
        str, typer.Option(help="IP address to listen on; 0.0.0.0 for every interface.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0: any free one.")] = 0,
    identity: Annotated[
        Path | None, typer.Option(help="File with the peer's key, created if missing; keeps the address.")
    ] = None,
    initial_peers: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="A peer of the DHT to join; may be repeated.")
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(metavar="ADDRESS", help="Where others can dial this peer, if not where it listens."),
    ] = None,
    bootstrap_timeout: Annotated[
        float, typer.Option(help="Seconds for which the initial peers are retried.")
    ] = 15.0,
    interval: Annotated[float, typer.Option(help="Seconds between the lines on peers and keys.")] = 30.0,
) -> None:
    """Run a peer through which others find each other.

    Ctrl+C or SIGTERM stops it.
    """
    from shoal.cli.peer import run_peer

    status = run_peer(
        host=host,
        port=port,
        identity=identity,
        initial_peers=initial_peers or [],
        announce=announce or [],
        bootstrap_timeout=bootstrap_timeout,
        interval=interval,
        console=Console(),
    )
    raise typer.Exit(status)


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Records of peers: shoal.Optimizer(record=...).")
    ],
    output: Annotated[Path, typer.Option(help="Where to write the picture (PNG).")] = Path("shoal-run.png"),
) -> None:
    """Draw the record of a training run.

    The picture has the loss, the peers and the seconds of each epoch. Several records are drawn over each other.
    """
    from shoal.cli.plot import draw_runs

    typer.echo(draw_runs(runs, output))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; whatever goes wrong is one line on the standard error."""
    if "SHOAL_LOGLEVEL" not in os.environ:
        logging.getLogger("shoal").setLevel(logging.WARNING)
    try:
        status = app(args=arguments, standalone_mode=False)
    except CommandLineMistake as error:
        return _complain(str(getattr(error, "format_message", error.__str__)()), EXIT_USAGE)
    except UsageError as error:
        return _complain(_in_options(str(error)), EXIT_USAGE)
    except ShoalError as error:
        return _complain(str(error), EXIT_FAILURE)
    except OSError as error:
        return _complain(f"{error.filename or 'the system'}: {error.strerror or error}", EXIT_FAILURE)
    except (KeyboardInterrupt, typer.Abort):
        return _complain("interrupted", EXIT_INTERRUPTED)
    return status if isinstance(status, int) else 0


def main() -> None:
    """The entry point of the command."""
    sys.exit(run())


def _in_options(text: str) -> str:
    """A message of the library, with the option in place of the parameter that it names first."""
    return re.sub(r"^\w+", lambda name: OPTION_OF.get(name[0], name[0]), text)


def _complain(text: str, status: int) -> int:
    typer.echo(f"shoal: {' '.join(text.split())}", err=True)
    return status


if __name__ == "__main__":
    main()
