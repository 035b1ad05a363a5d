"""The command line: one command a file in `commands/`, found by its name; each imports what it needs when it runs."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from edgellm import __version__
from edgellm.errors import EdgeError

COMMANDS = Path(__file__).parent / "commands"

DEBUG = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")


class Commands(click.Group):
    """The commands of the folder; a module `x` or `x_` has the command `x` in its attribute `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(path.stem.rstrip("_") for path in COMMANDS.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        stem = name if (COMMANDS / f"{name}.py").exists() else f"{name}_"
        command: click.Command = import_module(f"edgellm.commands.{stem}").command
        if DEBUG not in command.params:
            command.params.append(DEBUG)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message} Commands: {', '.join(self.list_commands(ctx))}.", ctx) from None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgellm")
def cli() -> None:
    """Run language models on this machine.

    MODEL is the name of a known model (edgellm list), a .edge or .gguf file, or a Hugging Face folder.
    """


cli.params.append(DEBUG)


def main() -> None:
    """Run a command; errors are one sentence on stderr and an exit code by class, see edgellm.errors."""
    debug = "--debug" in sys.argv
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EdgeError as error:
        if debug:
            raise
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of a pipe, `head` for one, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if debug:
            raise
        click.echo(f"Error: {error.filename or 'the system'}: {error.strerror or error}", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
