"""What all commands share: the Typer applications, options that several commands take, and the console."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from signal_reid import __version__
from signal_reid.config import ConfigError, published_names
from signal_reid.data.layouts import LAYOUTS
from signal_reid.runtime.allocator import keep_freed_memory
from signal_reid.runtime.console import make_console
from signal_reid.runtime.distributed import launched

program = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Signal (AAAI 2026): multi-modal object re-identification over RGB, near-infrared, thermal or other images.",
)
data_program = typer.Typer(no_args_is_help=True, help="Look after datasets.")
config_program = typer.Typer(no_args_is_help=True, help="Look at configurations.")
index_program = typer.Typer(no_args_is_help=True, help="Search one's own images.")

console = make_console()


@dataclass
class Choices:
    """What was asked of the program itself, whatever the command."""

    traceback: bool = False
    """Show the traceback of every error."""


choices = Choices()
TRACEBACK = "--traceback"

DatasetName = Annotated[str, typer.Argument(metavar="DATASET", help=f"One of {', '.join(LAYOUTS.names())}.")]
ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", help=f"A published name ({', '.join(published_names())}) or a YAML file, the authors' too."
    ),
]
WeightsOption = Annotated[Path, typer.Option("--weights", "-w", help="A checkpoint, ours or the authors'.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, in our naming or the authors'.")
]


def keep_memory(device: torch.device) -> None:
    """Let the program keep what it frees where a CPU works; a library leaves its process's allocator as it is."""
    if device.type == "cpu":
        keep_freed_memory()


WRITING = ("demo", "show", "report", "ablate", "export", "data")
"""Commands that write files and share no work."""


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"signal-reid {__version__}")
        raise typer.Exit


def begin(
    context: typer.Context,
    traceback: Annotated[
        bool, typer.Option(TRACEBACK, help="Show the traceback of an error; before or after any command.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Refuse copies: of several processes each would do all of another command's work, and write the same files."""
    command, (rank, size) = context.invoked_subcommand, launched()
    if size == 1 or command not in WRITING:
        return
    if rank:
        raise typer.Exit(2)
    raise ConfigError(
        f"{command} runs in one process, got WORLD_SIZE={size}; only train, eval, extract and index share work"
    )
