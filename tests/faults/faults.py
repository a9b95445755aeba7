"""The faults: each strikes an operation several times, and checks after each that it was survived."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import machine
import torch
from cell import Cell, NotSurvivedError
from operations import PACKED
from safetensors import safe_open

from signal_reid.runtime import tensor_files
from signal_reid.training.interruption import REQUEUE
from signal_reid.training.step import TrainingStep

Fault = Callable[[Cell], None]
FAULTS: dict[str, tuple[Fault, Callable[[Cell], bool]]] = {}
FULL = ("No space left", "shared memory", "File too large")


def fault(name: str, applies: Callable[[Cell], bool] = lambda cell: True) -> Callable[[Fault], Fault]:
    """Put a fault into the matrix."""

    def add(strike: Fault) -> Fault:
        FAULTS[name] = (strike, applies)
        return strike

    return add


def strike_at_random(cell: Cell, number: int, ended: tuple[int, ...], may_be_left: bool) -> None:
    """Send a signal at a random moment; then the files are whole, and the next command goes on."""
    cell.set_stage()
    running = cell.start()
    time.sleep(cell.moment())
    running.tell(number)
    cell.judge(running.wait(), ended=ended)
    cell.check_files(may_be_left=may_be_left)
    cell.recover()


@fault("kill -9")
def killed(cell: Cell) -> None:
    """Half of the kills strike a run that goes on from the one before, as on a cluster's worst night."""
    for _ in range(max(1, cell.tries)):
        strike_at_random(cell, signal.SIGKILL, (-9,), may_be_left=True)
    cell.set_stage()
    for _ in range(cell.tries):
        if cell.operation.is_done(cell.stage):
            break
        running = cell.start(arguments=cell.operation.next_command(cell.stage))
        time.sleep(cell.moment())
        running.tell(signal.SIGKILL)
        cell.judge(running.wait(), ended=(-9,))
        cell.check_files(may_be_left=True)
    cell.recover()


@fault("SIGTERM")
def terminated(cell: Cell) -> None:
    """Of a scheduler that wants the machine back; a training saves first, within its epoch."""
    for _ in range(cell.tries):
        strike_at_random(cell, signal.SIGTERM, (143, -15, REQUEUE), may_be_left=False)


@fault("SIGINT")
def interrupted(cell: Cell) -> None:
    """Of Ctrl-C."""
    for _ in range(cell.tries):
        strike_at_random(cell, signal.SIGINT, (130, -2), may_be_left=False)


@fault("full disk")
def disk_is_full(cell: Cell) -> None:
    """The disk has less room than the outputs need."""
    machine.enter(machine.NEW_MOUNTS)
    out = cell.stage / "out"
    out.mkdir(parents=True, exist_ok=True)
    machine.mount_disk(out, 2**28)
    for number in range(cell.tries):
        cell.set_stage()
        room = os.statvfs(out)
        used = (room.f_blocks - room.f_bfree) * room.f_frsize
        share = number / cell.tries + cell.draw.uniform(0, 1 / cell.tries)
        pages = int(share * cell.usual.size) // 4096  # whole ones, as a disk is given: a page more would be room
        machine.mount_disk(out, used + 4096 * pages, again=True)
        cell.judge(cell.start().wait(), words=FULL)
        cell.check_files()
        machine.mount_disk(out, 2**28, again=True)
        cell.recover()
    machine.unmount(out)


@fault("read-only")
def disk_is_read_only(cell: Cell) -> None:
    """Nothing may be written, from the start or from some moment on."""
    machine.enter(machine.NEW_MOUNTS)
    out = cell.stage / "out"
    for number in range(max(2, cell.tries)):
        cell.set_stage()
        if number == 0:
            machine.set_read_only(out, True)
            running = cell.start()
        else:
            machine.set_read_only(out, False)
            running = cell.start()
            time.sleep(cell.moment())
            with suppress(OSError):  # busy while a file is open for writing
                machine.set_read_only(out, True)
        outcome = cell.judge(running.wait(), words=("Read-only", "already holds", "cannot write"))
        if number == 0 and outcome == "done":
            raise NotSurvivedError("it says that it wrote to a disk that cannot be written to")
        cell.check_files(may_be_left=True)  # what cannot be removed stays
        machine.set_read_only(out, False)
        cell.recover()
        machine.unmount(out)


@fault("vanishing directory")
def directory_vanishes(cell: Cell) -> None:
    """The outputs' or the data set's directory is renamed under the operation, and comes back after it."""
    for number in range(2 * cell.tries):
        cell.set_stage()
        there = cell.stage / ("out" if number % 2 else "data")
        running = cell.start()
        time.sleep(cell.moment())
        away = there.rename(cell.stage / "away")
        cell.judge(running.wait())
        if there.exists():  # made again by who makes its directories
            shutil.rmtree(there)
        away.rename(there)
        cell.check_files(may_be_left=True)
        cell.recover()


def images_fail(cell: Cell, break_: Callable[[Path], object]) -> None:
    """Break an image, before or under the operation, and mend it after."""
    for number in range(cell.tries):
        cell.set_stage()
        image = cell.draw.choice(sorted((cell.stage / "data").rglob("*.jpg")))
        kept = shutil.copy2(image, cell.stage / "kept.jpg")
        if number % 2 == 0:
            break_(image)
        running = cell.start()
        if number % 2:
            time.sleep(cell.moment())
            break_(image)
        cell.judge(running.wait(), words=("data/",))
        shutil.move(kept, image)
        cell.check_files()
        cell.recover()


@fault("vanishing image", lambda cell: cell.operation.reads_images)
def image_vanishes(cell: Cell) -> None:
    """An image is removed."""
    images_fail(cell, Path.unlink)


@fault("truncated image", lambda cell: cell.operation.reads_images)
def image_is_truncated(cell: Cell) -> None:
    """An image loses its second half."""
    images_fail(cell, lambda path: os.truncate(path, path.stat().st_size // 2))


@fault("worker killed", lambda cell: cell.operation.reads_images and cell.operation.name != "data pack")
def worker_is_killed(cell: Cell) -> None:
    """A data-loading process dies."""
    for _ in range(cell.tries):
        cell.set_stage()
        running = cell.start(settings=("data.workers=1", "evaluation.batch_size=2"))
        while running.is_running() and not running.children():
            time.sleep(0.001)
        time.sleep(cell.draw.uniform(0, 0.05))
        for child in running.children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        cell.judge(running.wait(), words=("data-loading worker died", "data-loading worker ended"))
        cell.check_files()
        cell.recover()


def too_little(cell: Cell, limits: list[Callable[[], None]], *words: str, settings: tuple[str, ...] = ()) -> None:
    """Lower a limit of the process, by more and by less."""
    for limit in limits:
        cell.set_stage()
        cell.judge(cell.start(limit, settings).wait(), words=words)
        cell.check_files()
        cell.recover()


@fault("too few descriptors")
def descriptors_run_out(cell: Cell) -> None:
    """Few files may be open."""
    numbers = sorted(cell.draw.sample(range(1, 24), cell.tries))
    limits = [partial(machine.limit_descriptors, number) for number in numbers]
    too_little(cell, limits, "too many open files", settings=("data.workers=1",))


@fault("out of memory")
def memory_runs_out(cell: Cell) -> None:
    """Little memory may be mapped."""
    sizes = [int(2 ** cell.draw.uniform(23, 28)) for _ in range(cell.tries)]  # a command asks for 40 MiB first
    too_little(cell, [partial(machine.limit_memory, size) for size in sorted(sizes)], "out of memory")


@fault("small shared memory", lambda cell: cell.operation.reads_images and cell.operation.name != "data pack")
def shared_memory_runs_out(cell: Cell) -> None:
    """A container's /dev/shm holds no batch."""
    machine.enter(machine.NEW_MOUNTS)
    shared = Path("/dev/shm")
    machine.mount_disk(shared, 2**16)
    cell.set_stage()
    cell.judge(cell.start(settings=("data.workers=1",)).wait(), words=("shared memory",))
    cell.check_files()
    machine.mount_disk(shared, 2**28, again=True)
    cell.recover()


def damage(cell: Cell, path: Path, number: int) -> None:
    """Flip a bit, cut short, empty or overwrite."""
    content = bytearray(path.read_bytes())
    at = cell.draw.randrange(len(content))
    if number % 4 == 0:
        content[at] ^= 1 << cell.draw.randrange(8)
    elif number % 4 == 1:
        del content[at:]
    elif number % 4 == 2:
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:
        content.clear()
    path.write_bytes(content)


def damaged_file(cell: Cell, name: str, settings: tuple[str, ...] = (), mend: bool = True, exact: bool = True) -> None:
    """Damage a file that is read; it is named, or changes nothing."""
    for number in range(max(4, cell.tries)):
        cell.set_stage()
        path = cell.stage / name
        kept = shutil.copy2(path, cell.stage / "kept")
        damage(cell, path, number)
        outcome = cell.judge(cell.start(settings=settings).wait(), words=(path.name,))
        if outcome == "done" and exact:
            cell.check_result()
        if mend and path.exists():
            shutil.move(kept, path)
        if outcome == "refused" or exact:
            cell.recover()


@fault("damaged checkpoint", lambda cell: cell.operation.reads_weights is not None)
def checkpoint_is_damaged(cell: Cell) -> None:
    """Bits of the weights or of the training state have changed."""
    if cell.operation.name == "resume":  # the file is written again by the run that it is damaged under
        damaged_file(cell, str(cell.operation.reads_weights), mend=True)
    else:
        damaged_file(cell, str(cell.operation.reads_weights))


@fault("damaged packed file", lambda cell: cell.operation.reads_images)
def packed_file_is_damaged(cell: Cell) -> None:
    """Bits of the decoded images or of their index have changed; packing again mends it."""
    if cell.operation.name != "data pack":
        damaged_file(cell, PACKED, ("data.cache=packed",))
        return
    for number in range(max(4, cell.tries)):
        cell.set_stage()
        shutil.copy2(cell.stage / PACKED, cell.stage / "out/images.packed")
        damage(cell, cell.stage / "out/images.packed", number)
        cell.recover()
        cell.outcomes["done"] += 1


@fault("damaged metrics", lambda cell: cell.operation.name in ("resume", "report"))
def metrics_are_damaged(cell: Cell) -> None:
    """Rows of the metrics cannot be read: training goes on without them, and reaches the same weights."""
    for number in range(max(4, cell.tries)):
        cell.set_stage()
        damage(cell, cell.stage / "out/run/metrics.jsonl", number)
        outcome = cell.judge(cell.start().wait(), words=("metrics.jsonl",))
        result, usual = cell.operation.result(cell.stage), cell.usual.result
        if cell.operation.name == "resume" and (outcome != "done" or result[2:] != usual[2:]):
            raise NotSurvivedError(f"{outcome}: the weights differ from those of an undisturbed training")
        if cell.operation.name == "resume":  # which has left out what was damaged
            cell.check_files()


@fault("two at once")
def two_at_once(cell: Cell) -> None:
    """The same is asked for twice at a time."""
    for _ in range(cell.tries):
        cell.set_stage()
        both = [cell.start(), cell.start()]
        ends = [running.wait() for running in both]
        _check_one_of_two(cell, ends)
        cell.check_files()
        cell.check_result()


def _check_one_of_two(cell: Cell, ends: list[machine.End]) -> None:
    errors = "".join(end.errors for end in ends)
    if "Traceback" in errors or not {end.code for end in ends} <= {0, 2} or all(end.code for end in ends):
        raise NotSurvivedError(" | ".join(map(str, ends)))
    for end in ends:
        cell.outcomes["done" if end.code == 0 else "refused"] += 1


@fault("two hosts")
def two_hosts(cell: Cell) -> None:
    """Two hosts that share the disk and nothing else do the same; then one dies, and the other goes on."""
    for _ in range(cell.tries):
        cell.set_stage()
        both = [start_on_host(cell, name) for name in ("one", "two")]
        _check_one_of_two(cell, [running.wait() for running in both])
        cell.check_files()
        cell.check_result()
        cell.set_stage()
        dying = start_on_host(cell, "one")
        time.sleep(cell.moment())
        dying.tell(signal.SIGKILL)
        cell.judge(dying.wait(), ended=(-9,))
        cell.check_files(may_be_left=True)
        if not cell.operation.is_done(cell.stage):
            end = start_on_host(cell, "two", cell.operation.next_command(cell.stage)).wait()
            if end.code:
                raise NotSurvivedError(f"the other host cannot go on: {end}")
        cell.check_files(may_be_left=True)  # nobody else can know whether its owner still works
        cell.check_result()


def start_on_host(cell: Cell, name: str, arguments: list[str] | None = None) -> machine.Running:
    """Start the operation under a host name, among processes and at mounts of its own.

    Process numbers are the same on every such host. Its end, by a kill as well, is that of all its processes.
    """

    def host() -> int:
        machine.enter(machine.NEW_MOUNTS | machine.NEW_HOST_NAME | machine.NEW_PROCESSES)
        first = os.fork()
        if first:
            return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when its parent dies
        machine.mount_processes()
        machine.set_host_name(name)
        os._exit(cell.start(arguments=arguments).wait().code)

    started = time.monotonic()
    alive, held = os.pipe()
    pid = machine.fork(host, cell.errors)
    os.close(held)
    return machine.Running(pid, cell.errors, started, alive)


@fault("clock backwards")
def clock_runs_backwards(cell: Cell) -> None:
    """What is read lies in the future, and every look at the clock is an hour before the last."""
    for _ in range(max(1, cell.tries // 2)):
        cell.set_stage()
        inputs = [path for path in cell.stage.rglob("*") if cell.operation.name != "data pack" or path.suffix != ".jpg"]
        for path in inputs:
            os.utime(path, (4e9, 4e9))
        cell.judge(cell.start(_turn_back_the_clock).wait())
        cell.check_files()
        cell.check_result()


def _turn_back_the_clock() -> None:
    now = [time.time_ns()]

    def earlier() -> int:
        now[0] -= 3600 * 10**9
        return now[0]

    local = time.localtime
    time.time_ns, time.time = earlier, lambda: earlier() / 1e9
    time.localtime = lambda seconds=None: local(earlier() / 1e9 if seconds is None else seconds)


@fault("diverging loss", lambda cell: cell.operation.name == "train" or cell.operation.reads_weights is not None)
def loss_diverges(cell: Cell) -> None:
    """The loss of some step is not finite, or the weights are not numbers."""
    for _ in range(cell.tries):
        cell.set_stage()
        if cell.operation.name in ("train", "resume"):
            outcome = cell.judge(cell.start(partial(_diverge, cell.draw.randrange(1, 5))).wait(), words=("diverged",))
            if outcome != "refused":
                raise NotSurvivedError("the training did not notice")
        else:
            path = cell.stage / str(cell.operation.reads_weights)
            kept = shutil.copy2(path, cell.stage / "kept")
            _fill_with_nan(path)
            cell.judge(cell.start().wait())
            shutil.move(kept, path)
        cell.check_files()
        cell.recover()


def _diverge(step: int) -> None:
    forward, steps = TrainingStep.forward, [0]

    def diverging(self: TrainingStep, *given: object) -> dict[str, torch.Tensor]:
        losses = forward(self, *given)
        steps[0] += 1
        return {name: loss * (float("nan") if steps[0] >= step else 1) for name, loss in losses.items()}

    TrainingStep.forward = diverging


def _fill_with_nan(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "crc32"}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for value in state.values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    path.write_bytes(tensor_files.serialise(state, metadata))
