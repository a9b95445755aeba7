"""Commands that look at configurations: `config show`, `config explain`, `config convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from signal_reid.cli.app import Overrides, console
from signal_reid.config import dump_config, load_config
from signal_reid.runtime.files import write_atomically


def show(
    config: Annotated[str, typer.Argument(help="A published name or a YAML file.")], overrides: Overrides = None
) -> None:
    """Print a configuration, resolved, as YAML."""
    typer.echo(dump_config(load_config(config, overrides or [])), nl=False)


def explain(
    key: Annotated[str, typer.Argument(help="A setting or a section, such as training.precision; none: all.")] = "",
    config: Annotated[str, typer.Option("--config", "-c", help="Whose method and backbone; by default Signal's.")] = "",
) -> None:
    """Say what a setting means, what it may be, and its default."""
    from signal_reid.config.explaining import explain_settings

    names: tuple[str | None, str | None] = (None, None)
    if config:
        model = load_config(config).model
        names = (model.method, model.backbone.name)
    for found in explain_settings(key, *names):
        default = yaml.safe_dump(_plain(found.default), default_flow_style=True).splitlines()[0]
        typer.echo(f"{found.key}\n  {found.meaning}\n  {found.allowed}; default {default}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def convert(
    source: Annotated[Path, typer.Argument(help="A YAML file of the authors'.")],
    output: Annotated[Path, typer.Argument(help="The YAML file to write.")],
    overrides: Overrides = None,
) -> None:
    """Write the authors' configuration in our naming."""
    write_atomically(output, dump_config(load_config(source, overrides or [])).encode())
    console.print(f"{source} converted to {output}")
