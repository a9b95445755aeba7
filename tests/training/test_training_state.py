"""A resumed run goes on bit for bit, whenever the first one was killed."""

import os
import signal
import sys

import numpy as np
import pytest
import torch

from signal_reid import checkpoints
from signal_reid.checkpoints import CheckpointError
from signal_reid.config import dump_config
from signal_reid.training import make_optimizer, total_loss, training_state


@pytest.fixture
def config(tiny_config):
    return tiny_config("rgbnt201", "model.backbone.layers=2", "data.image_size=[128,64]")


@pytest.fixture
def run(make_model, config):
    """A model with its optimizer and scaler."""

    def make(seed):
        model = make_model(seed=seed).train()
        return model, make_optimizer(model, config.optimizer), torch.amp.GradScaler("cpu", init_scale=64.0)

    return make


def steps(run, config, count):
    model, optimizer, scaler = run
    losses = []
    for _ in range(count):
        images, cameras = torch.randn(4, 3, 3, 128, 64), torch.randint(4, (4,))
        loss = total_loss(model.losses(model.encode(images, cameras), torch.tensor([0, 0, 1, 1])), config)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses


def save(path, run, **changes):
    model, optimizer, scaler = run
    arguments = {"progress": {"epoch": 3, "best": 0.5}} | changes
    training_state.save_training_state(path, model=model, optimizer=optimizer, scaler=scaler, **arguments)


def restore(state, run):
    model, optimizer, scaler = run
    training_state.restore_training_state(state, model=model, optimizer=optimizer, scaler=scaler)


def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(run, config, same, tmp_path):
    first = run(1)
    steps(first, config, 2)
    save(tmp_path / "checkpoint.pt", first)
    expected = steps(first, config, 2)

    second = run(2)
    torch.manual_seed(99)
    state = training_state.load_training_state(tmp_path / "checkpoint.pt")
    restore(state, second)
    training_state.restore_rng(state["rng"])
    assert steps(second, config, 2) == expected
    assert same(second[0].state_dict(), first[0].state_dict())


def test_progress_and_configuration_come_back(run, config, tmp_path):
    progress = {"epoch": 7, "step": 2, "best": 0.803, "history": [1, 2.5, None, "text"], "done": False}
    save(tmp_path / "checkpoint.pt", run(1), progress=progress, config=config)
    state = training_state.load_training_state(tmp_path / "checkpoint.pt")
    assert state["progress"] == progress
    assert state["metadata"]["config"] == dump_config(config)


def test_weights_of_a_training_state_load_into_a_model(run, make_model, same, config, tmp_path):
    first = run(1)
    save(tmp_path / "checkpoint.pt", first, config=config)
    model = make_model(seed=2)
    checkpoints.load(model, tmp_path / "checkpoint.pt")
    assert same(model.state_dict(), first[0].state_dict())
    assert checkpoints.describe(tmp_path / "checkpoint.pt") == ("signal-reid", 8, 4, dump_config(config))


def run_until(event, action):
    """Kill this process at the given line of the writer; returns how many it ran if it never got so far."""
    count = 0

    def trace(frame, kind, argument):
        nonlocal count
        if not frame.f_code.co_filename.endswith("files.py"):
            return None
        count += 1
        if count == event:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_kill_at_any_moment_leaves_a_whole_state(run, tmp_path):
    path, (model, optimizer, scaler) = tmp_path / "checkpoint.pt", run(1)

    def save_step(step):
        with torch.no_grad():
            model.backbone.projection.fill_(step)
        save(path, (model, optimizer, scaler), progress={"step": step})

    lines = run_until(None, lambda: save_step(0))
    survived = []
    for event in sorted({*range(1, lines, lines // 12), *range(lines - 24, lines + 1, 2)}):
        save_step(0)
        child = os.fork()
        if child == 0:
            run_until(event, lambda: save_step(1))
            os._exit(0)
        os.waitpid(child, 0)
        state = training_state.load_training_state(path)
        survived.append(state["progress"]["step"])
        assert bool((state["model"]["backbone.projection"] == survived[-1]).all())
    assert survived == sorted(survived)
    assert {survived[0], survived[-1]} == {0, 1}

    save_step(2)
    assert list(tmp_path.iterdir()) == [path]


def test_what_could_not_be_read_back_is_refused(run, tmp_path):
    with pytest.raises(TypeError, match=r"progress\.best\[1\] must be a number, text or tensor, got float64"):
        save(tmp_path / "checkpoint.pt", run(1), progress={"best": [0.5, np.float64(0.5)]})
    assert list(tmp_path.iterdir()) == []


def test_missing_state_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training state: no file .*checkpoint\.pt"):
        training_state.load_training_state(tmp_path / "checkpoint.pt")


def test_other_files_are_refused(run, make_model, tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoints.export(make_model(), path, naming="authors")
    with pytest.raises(CheckpointError, match="not a training state"):
        training_state.load_training_state(path)
    save(path, run(1))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: truncated, damaged"):
        training_state.load_training_state(path)


def test_state_of_another_version_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("signal_reid.training.training_state.VERSION", 2)
    save(tmp_path / "checkpoint.pt", run(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="of version 2, this signal-reid reads version 1"):
        training_state.load_training_state(tmp_path / "checkpoint.pt")


def test_incomplete_state_is_refused(tmp_path):
    torch.save({"format": "signal-reid training state", "version": 1, "model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="lacks optimizer, scaler, progress, rng, metadata"):
        training_state.load_training_state(tmp_path / "checkpoint.pt")


def test_state_of_another_model_changes_nothing(run, make_model, config, copy_of, same, tmp_path):
    save(tmp_path / "checkpoint.pt", run(1))
    other = make_model(identities=3)
    before = copy_of(other)
    state = training_state.load_training_state(tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match=r"2 entries differ, first heads\.0\.classifier\.weight"):
        restore(state, (other, make_optimizer(other, config.optimizer), None))
    assert same(other.state_dict(), before)


def test_state_of_another_precision_is_refused(run, tmp_path):
    model, optimizer, scaler = run(1)
    save(tmp_path / "scaled.pt", (model, optimizer, scaler))
    save(tmp_path / "plain.pt", (model, optimizer, None))
    with pytest.raises(CheckpointError, match="saved with a gradient scaler, this run is without one"):
        restore(training_state.load_training_state(tmp_path / "scaled.pt"), (model, optimizer, None))
    with pytest.raises(CheckpointError, match="saved without a gradient scaler, this run is with one"):
        restore(training_state.load_training_state(tmp_path / "plain.pt"), (model, optimizer, scaler))


def test_state_of_another_optimizer_is_refused(run, tmp_path):
    model, optimizer, scaler = run(1)
    save(tmp_path / "checkpoint.pt", (model, optimizer, scaler))
    other = torch.optim.Adam(model.parameters())
    with pytest.raises(CheckpointError, match="other parameter groups"):
        restore(training_state.load_training_state(tmp_path / "checkpoint.pt"), (model, other, scaler))
