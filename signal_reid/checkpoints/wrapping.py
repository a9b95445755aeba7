"""The model inside the wrappers that training puts around it."""

from torch import nn

from signal_reid.methods.signal.model import Signal


def unwrap(model: nn.Module) -> Signal:
    """The `Signal` inside DistributedDataParallel, DataParallel or torch.compile.

    Raises:
        TypeError: there is none.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, Signal):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, Signal):
        raise TypeError(f"model must be a Signal (signal_reid.build_model), got {type(model).__name__}")
    return inner
