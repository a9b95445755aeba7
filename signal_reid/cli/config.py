"""Commands that look at configurations: `config show`, `config convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from signal_reid.cli.app import Overrides, console
from signal_reid.config import dump_config, load_config
from signal_reid.runtime.files import write_atomically


def show(
    config: Annotated[str, typer.Argument(help="A published name or a YAML file.")], overrides: Overrides = None
) -> None:
    """Print a configuration, resolved, as YAML."""
    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


def convert(
    source: Annotated[Path, typer.Argument(help="A YAML file of the authors'.")],
    output: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the authors' configuration in our naming."""
    write_atomically(output, dump_config(load_config(source, overrides or [])).encode())
    console.print(f"{source} converted to {output}")
