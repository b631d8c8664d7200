"""The `expertmesh` command: which commands there are, and how errors look."""

import importlib
import sys
from importlib.metadata import version as installed_version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from expertmesh.cluster.errors import CheckpointError, ExpertMeshError, InputError

# name: (module:function or group, line of help). A module is imported only when its command runs: help is quick.
COMMANDS = {
    "serve": ("expertmesh.actors.cli.serve:serve", "Serve a checkpoint from expert shards on Ray."),
    "up": ("expertmesh.actors.cli.up:up", "Bring a fleet up on Kubernetes, and wait until it serves."),
    "down": ("expertmesh.actors.cli.down:down", "Take a fleet on Kubernetes down; volumes are kept."),
    "stop": ("expertmesh.actors.cli.stop:stop", "Stop a server that runs on this machine."),
    "generate": ("expertmesh.actors.cli.generate:generate", "Generate text from a prompt, as a client of a server."),
    "status": ("expertmesh.actors.cli.status:status", "Show what a running server is made of."),
    "logs": ("expertmesh.actors.cli.logs:logs", "Show what a server's processes logged, or one request's way."),
    "scale": ("expertmesh.actors.cli.scale:scale", "Have other numbers of shards and workers, while serving."),
    "drain": ("expertmesh.actors.cli.scale:drain", "Take one shard or worker out, while serving."),
    "rebalance": ("expertmesh.actors.cli.placement:rebalance", "Move experts to where their load wants them."),
    "placement": ("expertmesh.actors.cli.placement:placement", "Save or load which shard hosts which expert."),
    "leave": ("expertmesh.actors.cli.leave:leave", "Prepare a node of a Ray cluster for its end."),
    "ops": ("expertmesh.actors.cli.scale:ops", "Show the operations, or one of them."),
    "keys": ("expertmesh.actors.cli.keys:keys", "Create, list and revoke API keys."),
    "bench": ("expertmesh.actors.cli.bench:bench", "Measure a server: `expertmesh bench serve MODEL`."),
    "chaos": ("expertmesh.actors.cli.chaos:chaos", "Break a server on purpose, and show that no request is lost."),
    "plan": ("expertmesh.actors.cli.plan:plan", "Weigh the ways to spread a model over some hardware."),
    "simulate": (
        "expertmesh.actors.cli.simulate:simulate",
        "Run a fleet in virtual time, on recorded or made-up routing.",
    ),
    "trace": ("expertmesh.actors.cli.trace:trace", "Record the routing of live traffic, make some up, show one."),
    "doctor": ("expertmesh.actors.cli.doctor:doctor", "Show what this machine has, and what is missing."),
}

# The base of all complaints about how a command was written; typer keeps its copy of click to itself.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins with a name and a help line until one is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Return the named command, now imported, and its arguments."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, command if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Import the function of a command, or its group of commands, and wrap it for the command line."""
    module_name, function_name = COMMANDS[name][0].split(":")
    function = getattr(importlib.import_module(module_name), function_name)
    if isinstance(function, typer.Typer):
        return typer.main.get_command(function)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(function)
    return typer.main.get_command(single)


def build_app() -> typer.Typer:
    """Return the application with a stand-in for each command."""
    app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    app.callback()(root)
    for name, (_, help_line) in COMMANDS.items():
        app.command(name, help=help_line)(_stand_in)
    return app


def print_version(wanted: bool) -> None:
    """Print the version and stop, if that is wanted."""
    if wanted:
        typer.echo(installed_version("expertmesh"))
        raise typer.Exit


def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=print_version)
    ] = False,
) -> None:
    """Serve Mixture-of-Experts language models from an elastic pool of expert shards.

    Each command has its own --help.
    """


def main() -> None:
    """Run the command line. Errors raised on purpose are one line; exit code 2 for wrong input, else 1."""
    try:
        sys.exit(build_app()(standalone_mode=False) or 0)
    except _UsageError as error:
        message = " ".join(str(error).split())
        if message:  # empty when help was printed in place of a missing command
            sys.stderr.write(f"error: {message}; see --help\n")
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ExpertMeshError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2 if isinstance(error, InputError | CheckpointError) else 1)


def _stand_in() -> None:
    """Never runs: LazyGroup puts the real command in its place."""


if __name__ == "__main__":
    main()
