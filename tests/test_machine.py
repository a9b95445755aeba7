"""Trouble of the machine as its user sees it: one line that names the remedy, and an end instead of a hang.

Each case runs the program, or its loading of batches alone, in a process of its own, whose limits it lowers; most of
them are forked, see `forking.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import signal_reid
from signal_reid.cli import main
from signal_reid.cli.errors import one_line
from signal_reid.config import dump_config
from signal_reid.runtime.troubles import TRAINING_MEMORY, explain

PREPARE = """
import errno, os, resource, signal, sys
import torch
from signal_reid.cli import main
from signal_reid.cli.errors import explained_end
from signal_reid.config import load_config
from signal_reid.data import loading, open_dataset
from signal_reid.runtime.distributed import ALONE

decode = loading.decode
in_worker = lambda: torch.utils.data.get_worker_info() is not None

def take_all_descriptors():
    try:
        while True:
            os.open(os.devnull, os.O_RDONLY)
    except OSError as error:
        assert error.errno == errno.EMFILE

def load_batches(path, *overrides):
    config = load_config(path, overrides)
    with explained_end(ALONE):
        for batch in loading.make_train_loader(config, open_dataset("rgbnt201", config.data.root)):
            pass

def leave_memory(mebibytes):
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


@pytest.fixture
def config(tiny_config, synthetic, tmp_path):
    """The file of a configuration that trains one epoch on the synthetic persons."""
    settings = [f"data.root={synthetic()}", f"output={tmp_path / 'run'}", "schedule.epochs=1"]
    path = tmp_path / "config.yml"
    path.write_text(dump_config(tiny_config("rgbnt201", *settings, "schedule.warmup_epochs=0")))
    return path


@pytest.fixture
def run(forking):
    """The exit code and the error lines of Python code after `PREPARE`; of a start of its own behind a wrapper."""

    def call(code, wrapper=()):
        if not wrapper:
            ended = forking.run(PREPARE + code)
            return ended.returncode, ended.stderr
        done = subprocess.run(
            [*wrapper, sys.executable, "-c", PREPARE + code],
            env={**os.environ, "PYTHONPATH": str(Path(signal_reid.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stderr

    return call


@pytest.fixture
def load_batches(run):
    def call(preparation, config, *overrides, wrapper=()):
        return run(f"{preparation}\nload_batches({str(config)!r}, *{overrides!r})\n", wrapper)

    return call


@pytest.fixture
def run_program(run):
    def call(preparation, *arguments):
        return run(f"{preparation}\nsys.argv[1:] = {[str(argument) for argument in arguments]!r}\nmain()\n")

    return call


def assert_one_line(result, *words):
    code, errors = result
    lines = errors.strip().splitlines()
    assert code == 2, errors
    assert lines[-1].startswith("error: "), errors
    assert "Traceback" not in errors
    assert all(word in lines[-1] for word in words), lines[-1]


def test_a_worker_that_is_killed(load_batches, config):
    kill = "loading.decode = lambda *given: os.kill(os.getpid(), signal.SIGKILL) if in_worker() else decode(*given)"
    assert_one_line(load_batches(kill, config, "data.workers=1"), "data-loading worker died", "data.workers")


@pytest.mark.parametrize("workers", [0, 1])
def test_no_file_descriptors_to_open_images_with(load_batches, config, workers):
    take = """
def decode_without(*given):
    if in_worker() == (WORKERS > 0):
        take_all_descriptors()
    return decode(*given)
loading.decode = decode_without
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
""".replace("WORKERS", str(workers))
    result = load_batches(take, config, f"data.workers={workers}")
    assert_one_line(result, "too many open files", "ulimit -n, now 200", "data.workers")


def test_no_file_descriptors_for_all_workers(load_batches, config):
    take = """
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
take_all_descriptors()
for descriptor in range(180, 200):
    os.close(descriptor)
"""
    assert_one_line(load_batches(take, config, "data.workers=16"), "too many open files", "ulimit -n")


def test_no_file_descriptors_to_hand_a_batch_over_with(load_batches, config):
    take = """
class TakeAll(loading.TripletDataset):
    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        if in_worker():
            take_all_descriptors()
        return batch
loading.TripletDataset = TakeAll
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
"""
    assert_one_line(load_batches(take, config, "data.workers=1"), "too many open files", "ulimit -n")


def test_no_file_descriptors_to_receive_a_batch_with(load_batches, config):
    take = """
iterate = loading.TrainLoader.__iter__
def iterate_without(self):
    for batch in iterate(self):
        take_all_descriptors()
        yield batch
loading.TrainLoader.__iter__ = iterate_without
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
"""
    overrides = ["data.workers=1", "data.batch_size=4"]
    assert_one_line(load_batches(take, config, *overrides), "too many open files", "ulimit -n, now 200")


@pytest.fixture
def small_shared_memory():
    """A command that runs another with a /dev/shm of 1 MiB."""
    script = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    for namespace in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        wrapper = [*namespace, "sh", "-c", script, "sh"]
        if shutil.which("unshare") and subprocess.run([*wrapper, "true"], capture_output=True).returncode == 0:
            return wrapper
    pytest.skip("mounting a small /dev/shm is not permitted here")


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_shared_memory_that_is_too_small(load_batches, config, small_shared_memory, cache):
    settings = [f"data.cache={cache}", "data.workers=2", "data.image_size=[256,256]"]
    result = load_batches("", config, *settings, wrapper=small_shared_memory)
    assert_one_line(result, "shared memory (/dev/shm)", "data.workers=0")


def test_no_memory_to_train_with(run_program, config):
    settings = ["data.image_size=[512,512]", "training.device=cpu", "model.k_intra=20"]
    result = run_program("leave_memory(200)", "train", "--config", config, *settings)
    remedies = ("training.accumulation", "training.gradient_checkpointing", "data.batch_size")
    assert_one_line(result, "out of memory", *remedies)


def test_no_memory_to_evaluate_with(run_program, config, tmp_path):
    settings = signal_reid.load_config(config)
    model = signal_reid.build_model(settings, num_identities=5, num_cameras=2)
    signal_reid.checkpoints.export(model, tmp_path / "weights.safetensors", config=settings)
    short = """
forward = torch.nn.Linear.forward
def forward_without_memory(*given):
    leave_memory(1)
    return forward(*given) + torch.empty(2**40)
torch.nn.Linear.forward = forward_without_memory
"""
    result = run_program(short, "eval", "--weights", tmp_path / "weights.safetensors")
    assert_one_line(result, "out of memory: lower evaluation.batch_size")


@pytest.mark.parametrize(
    ("command", "function", "remedy"),
    [
        (["data", "pack", "--config", "rgbnt201"], "cli.data.pack_dataset", ""),
        (["demo"], "demo.run_demo", f": {TRAINING_MEMORY}"),
        (["ablate", "--config", "rgbnt201"], "ablation.run_ablation", f": {TRAINING_MEMORY}"),
    ],
)
def test_where_memory_runs_out_the_remedy_is_the_command_s_own(run_program, command, function, remedy):
    short = f"""
def without_memory(*_, **__):
    raise MemoryError
import signal_reid.ablation, signal_reid.cli.data, signal_reid.demo
signal_reid.{function} = without_memory
"""
    assert run_program(short, *command) == (2, f"error: out of memory{remedy}\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "out of memory on the GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "on the GPU"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible"), "/dev/shm"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "pid 7, 8, exited unexpectedly"),
        (RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"), "/dev/shm"),
        (RuntimeError("unable to write to file </runs/a.pt>: No space left on device (28)"), None),
        (OSError(12, "Cannot allocate memory"), "out of memory"),
        (OSError("out of memory error when reading image file"), None),  # Pillow says so of damaged files, too
        (RuntimeError("could not create a primitive"), "out of memory"),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), None),
        (RuntimeError("std::bad_alloc"), "out of memory"),
        (SystemError("<function f at 0x7fb3> returned NULL without setting an exception"), "out of memory"),
        (SystemError("bad argument to internal function"), None),
        (RuntimeError("can't start new thread"), "out of memory or of processes (ulimit -u)"),
        (RuntimeError("received 0 items of ancdata"), "too many open files"),
        (RuntimeError("size mismatch"), None),
        (FileNotFoundError(2, "No such file"), None),
    ],
)
def test_what_pytorch_and_the_system_say_is_recognised(error, words):
    line = explain(error)
    assert line is None if words is None else words in line


def test_a_worker_s_death_that_became_another_error_is_told_as_it_is():
    error = AttributeError("no operator")
    error.__cause__ = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    assert one_line(error).startswith("a data-loading worker died (pid 7, is killed by signal: Killed)")
    assert one_line(AttributeError("no operator")) is None


STOP_IN_TRAINING = """
from signal_reid.training import loop
from signal_reid.runtime import files
def stop_while_writing(file):
    file.write(b"half")
    os.kill(os.getpid(), asked)
    signal.pause()
loop.train_epoch = lambda training, *_: files.write_file(training.run.checkpoint, stop_while_writing)
"""


def test_a_training_that_is_interrupted_leaves_nothing_unfinished(run_program, config, tmp_path):
    code, errors = run_program(f"asked = {int(signal.SIGINT)}\n{STOP_IN_TRAINING}", "train", "--config", config)
    assert code == 128 + signal.SIGINT, errors
    assert "Traceback" not in errors
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["config.yml", "metrics.jsonl", "run.log", "tensorboard"]


def test_a_training_that_is_told_to_end_saves_first(run_program, config, tmp_path):
    stop = """
from signal_reid.training.step import TrainingStep
backward = TrainingStep.backward
TrainingStep.backward = lambda *arguments: (os.kill(os.getpid(), signal.SIGTERM), backward(*arguments))
"""
    code, errors = run_program(stop, "train", "--config", config)
    assert code == 75, errors
    assert "stopped by SIGTERM and saved after step 1 of epoch 1" in errors
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_synthesis_that_is_told_to_end_leaves_nothing(run_program, tmp_path):
    stop = (
        "from signal_reid.data import synthetic\nsynthetic.photograph = lambda *_: os.kill(os.getpid(), signal.SIGTERM)"
    )
    code, errors = run_program(stop, "data", "synthesize", "rgbnt201", tmp_path / "data")
    assert code == 143, errors
    assert list(tmp_path.iterdir()) == []


def test_a_second_training_in_one_directory_is_refused(run_program, config, tmp_path):
    hold = f"""
import json
from pathlib import Path
from signal_reid.runtime.ownership import owned
ready, done = os.pipe(), os.pipe()
if os.fork() == 0:
    os.close(done[1])  # so that the end of its parent is its own
    with owned(Path({str(tmp_path / "run")!r}), print):
        os.write(ready[1], b"1")
        os.read(done[0], 1)
    os._exit(0)
os.read(ready[0], 1)
"""
    assert_one_line(run_program(hold, "train", "--config", config), "in use by process")
    assert not (tmp_path / "run" / "config.yml").exists()


def test_a_packed_file_that_is_cut_short_while_it_is_read(load_batches, config):
    cut = """
from signal_reid.data import packing
read = packing.PackedImages.read
def cut_then_read(images, rows):
    if in_worker():
        os.truncate(images.path, 5000)
    return read(images, rows)
packing.PackedImages.read = cut_then_read
"""
    root = Path(signal_reid.load_config(config).data.root)
    packed = config.parent / "data"
    shutil.copytree(root, packed)
    settings = [f"data.root={packed}", "data.cache=packed", "data.workers=1"]
    pack = f"from signal_reid.data import pack\npack('rgbnt201', {str(packed)!r}, load_config({str(config)!r}))\n"
    assert_one_line(load_batches(pack + cut, config, *settings), "cut short", "run `signal-reid data pack` again")


OUTPUTS = [
    ("eval", "--weights", "missing.pt", "--output", "{}/numbers.json"),
    ("extract", "--weights", "missing.pt", "--output", "{}/features.safetensors"),
    ("export", "--weights", "missing.pt", "--output", "{}/weights.safetensors"),
]


@pytest.mark.parametrize("arguments", OUTPUTS, ids=lambda arguments: arguments[0])
def test_an_output_that_cannot_be_written_is_found_before_the_work(arguments, tmp_path, monkeypatch, capsys):
    """Before the weights are missed."""
    monkeypatch.setattr(sys, "argv", ["signal-reid", *(word.format(tmp_path / "nowhere") for word in arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert f"cannot write {tmp_path / 'nowhere'}" in capsys.readouterr().err
