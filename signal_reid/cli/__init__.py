"""The program `signal-reid`: every command is a function of one of this package's files, and is added here."""

from __future__ import annotations

import io
import sys
import threading
import warnings

from PIL.Image import DecompressionBombWarning

from signal_reid.cli import ablate, config, data, evaluate, index, info, report, show, train
from signal_reid.cli.app import TRACEBACK, begin, choices, config_program, data_program, index_program, program
from signal_reid.cli.errors import end_of_thread, explained_end, stopped_by_signal
from signal_reid.runtime.distributed import ALONE

program.callback()(begin)
program.command()(train.demo)
program.command()(train.train)
program.command(name="eval")(evaluate.evaluate)
program.command()(evaluate.extract)
program.command()(evaluate.export)
program.command()(show.show)
program.command()(report.report)
program.command()(ablate.ablate)
program.command()(info.info)
data_program.command()(data.check)
data_program.command()(data.synthesize)
data_program.command()(data.pack)
data_program.command()(data.manifest)
data_program.command()(data.split)
config_program.command()(config.show)
config_program.command()(config.explain)
config_program.command()(config.convert)
index_program.command()(index.build)
index_program.command()(index.add)
index_program.command()(index.info)
index_program.command()(index.calibrate)
index_program.command()(index.search)
program.add_typer(index_program, name="index")
program.add_typer(data_program, name="data")
program.add_typer(config_program, name="config")


def main() -> None:
    """Run the program; what a user can mend is one line on the standard error and exit code 2, see `errors`."""
    arguments = [argument for argument in sys.argv[1:] if argument != TRACEBACK]  # it may stand anywhere
    choices.traceback = TRACEBACK in sys.argv[1:]
    threading.excepthook = end_of_thread
    warnings.filterwarnings("ignore", category=DecompressionBombWarning)  # too large an image is an error of ours
    for stream in (sys.stdout, sys.stderr):  # a locale that cannot show a name does not end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def run() -> None:
        with explained_end(ALONE):
            program(args=arguments)

    stopped_by_signal(run)
