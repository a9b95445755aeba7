"""The oracle: every operator in plain PyTorch, on any device, in any floating dtype."""


def unavailable_reason() -> None:
    """Plain PyTorch is always available."""
