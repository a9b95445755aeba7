"""Training states that are damaged, restored and gone on with."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from damage import SETTINGS, Try, with_value

import signal_reid
from signal_reid.training import make_optimizer, training_state

TENSORS = (torch.ones(3), torch.tensor(2), torch.tensor(0.5), torch.ones(0))
"""Values that a training state can hold in place of numbers, text and lists."""


def states(folder: Path) -> Try:
    """Training states, restored and gone on with."""
    config = signal_reid.load_config("rgbnt201", SETTINGS)
    model = signal_reid.build_model(config, 4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    path, scaler = folder / "checkpoint.pt", torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = make_optimizer(model, config.optimizer)
    optimizer.step()
    progress = {"epoch": 1, "step": 1, "best_mAP": 0.1, "best_epoch": 1}
    training_state.save_training_state(path, model=model, optimizer=optimizer, scaler=scaler, progress=progress)
    whole = training_state.load_training_state(path)

    def once(draw: random.Random) -> None:
        parts = {**whole, "optimizer": with_tensor(whole["optimizer"], draw)} if draw.random() < 0.7 else whole
        parts = {
            **parts,
            **{
                name: with_value(parts[name], draw, TENSORS)
                for name in ("progress", "rng", "scaler")
                if draw.random() < 0.2
            },
        }
        content = {"format": training_state.FORMAT, "version": 1, **parts}
        if draw.random() < 0.1:
            content[draw.choice(list(content))] = draw.choice((None, 2, "x", [], {}, *TENSORS))
        torch.save(content, path)
        state = training_state.load_training_state(path)
        fresh = make_optimizer(model, config.optimizer)
        training_state.restore_training_state(state, model=model, optimizer=fresh, scaler=scaler)
        training_state.restore_rng(state["rng"])
        fresh.step()
        torch.randn(700)

    return once


def with_tensor(optimizer: dict, draw: random.Random) -> dict:
    """The state of an optimizer with one of its tensors in another shape, dtype or place, or another value changed."""
    if draw.random() < 0.3:
        return with_value(optimizer, draw, TENSORS)
    state = {index: dict(entries) for index, entries in optimizer["state"].items()}
    index = draw.choice(list(state))
    name = draw.choice(list(state[index]))
    value = state[index][name]
    shape = draw.choice(((), (0,), (1,), value.shape, value.shape[::-1], (*value.shape, 1), (value.numel(),)))
    dtype = draw.choice((torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64))
    changed = torch.zeros(shape).to(dtype)
    if changed.ndim and draw.random() < 0.3:
        changed = (
            torch.zeros(1, dtype=dtype).expand(shape)
            if changed.numel()
            else changed.mT
            if changed.ndim > 1
            else changed
        )
    state[index][name] = changed
    return {**optimizer, "state": state}
