"""The model inside the wrappers that training puts around it."""

from torch import nn

from signal_reid.methods.base import Method


def unwrap(model: nn.Module) -> Method:
    """The `Method` inside DistributedDataParallel, DataParallel or torch.compile.

    Raises:
        TypeError: there is none.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Method):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, Method):
        raise TypeError(f"model must be a method's model (signal_reid.build_model), got {type(model).__name__}")
    return inner
