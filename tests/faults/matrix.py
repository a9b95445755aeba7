"""Prints the fault matrix: what becomes of every operation under every fault.

    PYTHONPATH=. python tests/faults/matrix.py [--quick] [--only WORD]... [--seed 0] [--tries 4] [--kills 50]

A cell says how its tries came out: `done` (as if nothing had been), `refused` (one line and exit code 2) or `ended` (by
the signal). After each try the files are whole, the next command works, and what comes of it, with the losses and
weights of a resumed training, equals an undisturbed run. Exit code 1 where a cell did not survive; what happened there
follows the table.
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from cell import Cell, Undisturbed
from faults import FAULTS
from operations import OPERATIONS, PACKED, SIZES, SYNTHESIZE, Operation, write_config

QUICK = {
    "kill -9": "data synthesize",
    "SIGTERM": "data synthesize",
    "SIGINT": "data pack",
    "full disk": "data pack",
    "read-only": "data synthesize",
    "vanishing directory": "data pack",
    "vanishing image": "data pack",
    "truncated image": "data pack",
    "too few descriptors": "data pack",
    "out of memory": "data pack",
    "damaged packed file": "data pack",
    "two at once": "data synthesize",
    "two hosts": "data synthesize",
    "clock backwards": "data pack",
}
"""The cells of `--quick`, of operations that need no training; tests of their own strike trainings in the suite."""

NEEDS_MOUNTS = ("full disk", "read-only", "small shared memory", "two hosts")
DRAWS = ("report", "show")
"""Operations that take seconds, most of them for pictures: they are tried less often."""
EPOCHS_OF_HALF = 1


def prepare(folder: Path, operations: list[Operation]) -> tuple[Path, dict[str, Undisturbed]]:
    """What stages are made of, and what every operation does undisturbed."""
    template = folder / "template"
    (template / "out").mkdir(parents=True)
    write_config(template / "config.yml")
    _run([*SYNTHESIZE, "data", *SIZES], template)
    _run(["data", "pack", "--config", "config.yml"], template)
    if any(operation.name not in ("data pack", "data synthesize") for operation in operations):
        _train(template)
    assert (template / PACKED).is_file()
    return template, {operation.name: _measure(operation, folder, template) for operation in operations}


def _train(template: Path) -> None:
    """A run that was ended after its first checkpoint, and the same one when it was finished."""
    _run(["train", "--config", "config.yml"], template, _stop_after_half)
    shutil.copytree(template / "out/run", template / "half")
    _run(["train", "--resume", "out/run"], template)
    shutil.move(template / "out/run", template / "finished")
    show = ["show", "tokens", "--weights", "finished/last.safetensors", "--output", "out/a.png"]
    _run(show, template)


def _run(arguments: list[str], directory: Path, change: Callable[[], None] | None = None) -> None:
    """Run a command that must work, and import here what it imported, so that no later fork has to."""
    errors, names = directory / "errors", directory / "modules"

    def begin() -> None:
        atexit.register(lambda: names.write_text("\n".join(sys.modules)))
        if change is not None:
            change()

    end = machine.start(arguments, directory, errors, begin).wait()
    if end.code:
        raise RuntimeError(f"{arguments}: {end}")
    for name in names.read_text().split():
        try:
            importlib.import_module(name)
        except Exception:  # parts of packages that are there only while something runs
            continue
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread"
    errors.unlink()


def _stop_after_half() -> None:
    """End the training, with exit code 0, where it has written its first checkpoint and part of the next epoch."""
    from signal_reid.training import loop

    train_epoch = loop.train_epoch

    def train_or_stop(training, epoch, *others):
        train_epoch(training, epoch, *others)
        if epoch > EPOCHS_OF_HALF:
            sys.exit(0)

    loop.train_epoch = train_or_stop


def _files(directory: Path) -> dict[tuple[Path, int, int], int]:
    """Bytes, in whole pages, of all that lies in a directory, by what another of the same name would differ in."""
    found = {path: path.stat() for path in directory.rglob("*")}
    return {(path, about.st_ino, about.st_mtime_ns): -(-about.st_size // 4096) * 4096 for path, about in found.items()}


def _measure(operation: Operation, folder: Path, template: Path) -> Undisturbed:
    cell = Cell(
        operation, template, folder / "usual", folder / "errors", Undisturbed(None, 0, 0), random.Random(0), tries=0
    )
    cell.set_stage()
    before, started = _files(cell.stage / "out"), time.monotonic()
    end = cell.start().wait()
    seconds = time.monotonic() - started
    if end.code:
        raise RuntimeError(f"{operation.name}: {end}")
    cell.check_files()
    written = sum(size for file, size in _files(cell.stage / "out").items() if file not in before)
    return Undisturbed(operation.result(cell.stage), seconds, written)


def run_cell(name: str, cell: Cell) -> tuple[str, str]:
    """The outcome of a cell for the table, and what is to be said of it below."""
    strike, applies = FAULTS[name]
    if not applies(cell):
        return "-", ""
    started = time.monotonic()
    try:
        strike(cell)
    except BaseException as error:
        kept = "" if isinstance(error, AssertionError) else traceback.format_exc()
        return "FAILED", f"{name}, {cell.operation.name}: {error}\n{kept}"
    seconds = time.monotonic() - started
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(cell.outcomes.items())), f"{seconds:.1f}"


def run_all(cells: list[tuple[str, Cell]], folder: Path, processes: int) -> dict[tuple[str, str], tuple[str, str]]:
    """Run cells in processes of their own, so many at a time."""
    waiting, working, results = list(cells), {}, {}
    while waiting or working:
        while waiting and len(working) < processes:
            name, cell = waiting.pop(0)
            place = folder / f"{name}-{cell.operation.name}".replace(" ", "-")
            cell.stage, cell.errors = place / "stage", place / "errors"
            cell.stage.mkdir(parents=True)

            def work(name: str = name, cell: Cell = cell, place: Path = place) -> int:
                torch.set_num_threads(1)
                (place / "result").write_text(json.dumps(run_cell(name, cell)))
                return 0

            working[machine.fork(work, place / "said")] = (name, cell, place)
        pid, _ = os.wait()
        if pid in working:
            name, cell, place = working.pop(pid)
            result = place / "result"
            failed = ("FAILED", f"{name}, {cell.operation.name}: {(place / 'said').read_text()}")
            results[name, cell.operation.name] = tuple(json.loads(result.read_text())) if result.exists() else failed
            print(f"{name}, {cell.operation.name}: {'; '.join(results[name, cell.operation.name])} s", file=sys.stderr)
            shutil.rmtree(place, ignore_errors=True)
    return results


def table(results: dict[tuple[str, str], tuple[str, str]]) -> str:
    """The matrix in Markdown: a row for each fault, a column for each operation."""
    columns = [operation.name for operation in OPERATIONS if any(operation.name == key[1] for key in results)]
    lines = [f"| fault | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in FAULTS:
        if any(name == key[0] for key in results):
            lines.append(f"| {name} | {' | '.join(results.get((name, column), ('',))[0] for column in columns)} |")
    return "\n".join(lines)


def choose(arguments: argparse.Namespace, template: Path, usual: dict[str, Undisturbed]) -> list[tuple[str, Cell]]:
    """The cells that are asked for, the longest first."""
    cells = []
    for operation in (operation for operation in OPERATIONS if operation.name in usual):
        for name in FAULTS:
            label = f"{name} {operation.name}"
            if arguments.quick and QUICK.get(name) != operation.name:
                continue
            if arguments.only and not any(word in label for word in arguments.only):
                continue
            tries = 1 if arguments.quick else arguments.tries
            if name == "kill -9" and operation.name in ("train", "resume") and not arguments.quick:
                tries = -(-arguments.kills // 4)  # in half of them the next kill strikes what goes on from the last
            tries = max(1, tries // 2) if operation.name in DRAWS else tries
            draw = random.Random(zlib.crc32(label.encode()) + arguments.seed)
            cells.append(
                (name, Cell(operation, template, template, template, usual[operation.name], draw, tries=tries))
            )
    return sorted(cells, key=lambda cell: -cell[1].tries * cell[1].usual.seconds)


def main() -> None:
    """Run the cells and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one operation for each fault, struck once")
    parser.add_argument("--only", action="append", help="cells whose fault and operation contain this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=4)
    parser.add_argument("--kills", type=int, default=50, help="of trainings, by SIGKILL")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())  # what a TemporaryDirectory removes at the end, every forked process removes
    try:
        chosen = [operation for operation in OPERATIONS if not arguments.quick or operation.name in QUICK.values()]
        template, usual = prepare(folder, chosen)
        cells = choose(arguments, template, usual)
        if not machine.may_mount():
            print(f"no mounts and namespaces here: {', '.join(NEEDS_MOUNTS)} are not tried", file=sys.stderr)
            cells = [(name, cell) for name, cell in cells if name not in NEEDS_MOUNTS]
        results = run_all(cells, folder, arguments.processes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(results))
    failures = [said for outcome, said in results.values() if outcome == "FAILED"]
    print(f"\n{len(results)} cells, {len(failures)} not survived, {time.monotonic() - started:.0f} s")
    print("\n".join(failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
