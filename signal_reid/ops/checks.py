"""Argument checks that the operators share; every message names the argument, what was given and what is allowed."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless it is a tensor, and ValueError unless its values lie in memory one by one."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {value.layout}")


def check_dtype(name: str, dtype: object) -> None:
    """Raise ValueError unless it is one of the floating dtypes that the operators take."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, got {shown(dtype)}")


def check_floating(name: str, tensor: Tensor, dimensions: str, ndim: int) -> None:
    """Raise an error unless it is a tensor of `ndim` dimensions and of a floating dtype that the operators take."""
    check_tensor(name, tensor)
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must be {dimensions}, got shape {tuple(tensor.shape)}")
    check_dtype(name, tensor.dtype)


def check_same(name: str, tensor: Tensor, like_name: str, like: Tensor, shape: tuple[int, ...]) -> None:
    """Raise an error unless it is a tensor of this shape, and of the dtype and device of `like`."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} to go with {like_name}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise ValueError(f"{name} must have the dtype of {like_name} ({like.dtype}), got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name} ({like.device}), got {tensor.device}")


def check_whole(name: str, value: object) -> None:
    """Raise TypeError unless it is a whole number; those of numpy and of dynamic shapes are."""
    if type(value) is not int and (isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless it is a real number; those of numpy and of dynamic shapes are."""
    if type(value) is not float and (isinstance(value, (bool, Tensor)) or not hasattr(value, "__float__")):
        raise TypeError(f"{name} must be a number, got {shown(value)}")


def check_grid(grid_size: object, tokens: int, least: int) -> None:
    """Raise an error unless these are rows and columns, each at least `least`, of so many tokens."""
    if not isinstance(grid_size, (tuple, list)) or len(grid_size) != 2:
        raise TypeError(f"grid_size must be two whole numbers (H, W), got {shown(grid_size)}")
    for size in grid_size:
        check_whole("each of grid_size", size)
    if grid_size[0] * grid_size[1] != tokens or min(grid_size) < least:
        raise ValueError(f"grid_size must multiply to the number of tokens ({tokens}), got {shown(grid_size)}")


def shown(value: object) -> str:
    """What was given, on one line of bounded length."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_range(name: str, value: int, upper: int, upper_name: str) -> None:
    """Raise an error unless it is a whole number and 1 <= value <= upper."""
    check_whole(name, value)
    if not 1 <= value <= upper:
        raise ValueError(f"{name} must be in 1..{upper} ({upper_name}), got {value}")


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether a call on these tensors has to be recorded for a backward."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # half the time of `any`
            if tensor.requires_grad:
                return True
    return False


def in_transform() -> bool:
    """Whether a transform of torch.func is at work, or forward-mode differentiation.

    They see through PyTorch's own operators alone. Without this question `torch.func.vmap` would drop the gradients of
    ours and `torch.func.jvp` their tangents, silently. Private to PyTorch: both names, as it has no public ones.
    """
    if torch.compiler.is_compiling():  # which applies the transforms itself
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def formula_wanted() -> bool:
    """Whether an operator is to be its formula in plain PyTorch: to the compiler, which merges it with its neighbours,
    and to transforms."""
    return torch.compiler.is_compiling() or in_transform()


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation passes through this tensor."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def known_value(number: Tensor | float) -> float | None:
    """The number, or that of a scalar tensor on a CPU.

    None where reading it would wait for a GPU, and where there is none to read: on `meta`, in what is compiled or
    exported, and in a transform.
    """
    if not isinstance(number, Tensor):
        return float(number)
    plain = type(number) in (Tensor, torch.nn.Parameter) and number.device.type == "cpu"
    return number.item() if plain and not formula_wanted() else None


def refuse_second_derivative(op: str, *grads: Tensor | None) -> None:
    """Raise RuntimeError in a backward that is itself differentiated, with `create_graph=True` or in forward mode."""
    forward_mode = forward_ad._current_level >= 0 and any(grad is not None and has_tangent(grad) for grad in grads)
    if torch.is_grad_enabled() or forward_mode:
        raise RuntimeError(f"{op} is not differentiable twice, with create_graph=True or in forward mode")
