"""The program `signal-reid`: every command is a function of one of this package's files, and is added here."""

from __future__ import annotations

import threading

from signal_reid.cli import config, data, evaluate, info, train
from signal_reid.cli.app import config_program, data_program, program, refuse_copies
from signal_reid.cli.errors import end_of_thread, one_line_errors
from signal_reid.runtime.distributed import ALONE

program.callback()(refuse_copies)
program.command()(train.demo)
program.command()(train.train)
program.command(name="eval")(evaluate.evaluate)
program.command()(evaluate.extract)
program.command()(train.report)
program.command()(info.info)
data_program.command()(data.check)
data_program.command()(data.synthesize)
data_program.command()(data.pack)
config_program.command()(config.show)
config_program.command()(config.convert)
program.add_typer(data_program, name="data")
program.add_typer(config_program, name="config")


def main() -> None:
    """Run the program; a user's mistake is one line on the standard error and exit code 2."""
    threading.excepthook = end_of_thread
    with one_line_errors(ALONE):
        program()
