"""Argument checks that the operators share; every message names the argument, what was given and what is allowed."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floating(name: str, tensor: Tensor, dimensions: str, ndim: int) -> None:
    """Raise ValueError unless the tensor has `ndim` dimensions and a floating dtype that the operators take."""
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must be {dimensions}, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has this shape, and the dtype and device of `like`."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to go with {like_name}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")


def check_range(name: str, value: int, upper: int, upper_name: str) -> None:
    """Raise ValueError unless 1 <= value <= upper."""
    if not 1 <= value <= upper:
        raise ValueError(f"{name} must be in 1..{upper} ({upper_name}), got {value}")


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a call on these tensors has to be recorded for a backward."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward that builds a graph of itself (`create_graph=True`)."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} is not differentiable twice; create_graph=True cannot pass through it")
