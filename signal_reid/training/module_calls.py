"""How the modules of a model are called inside it, and calling them again by themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class Call(NamedTuple):
    """A module as the model called it."""

    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


@contextmanager
def recording(model: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """How each of the model's modules is called inside, by its name; a container's calls are those of what it holds."""
    calls: dict[str, list[Call]] = defaultdict(list)

    def note(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls[name].append(Call(module, arguments, keywords))

    with watching(model, note):
        yield calls


@contextmanager
def watching(
    model: nn.Module,
    entered: Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], None],
    left: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Tell when one of the model's modules is entered that is not inside another, and when it is left."""
    depth, handles = [0], []

    def before(name: str, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not depth[0]:
            entered(name, module, arguments, keywords)
        depth[0] += 1

    def after(*_: Any) -> None:
        depth[0] -= 1
        if not depth[0]:
            left()

    for name, child in model.named_children():
        for module in _callable(child):
            handles.append(
                module.register_forward_pre_hook(lambda m, a, k, name=name: before(name, m, a, k), with_kwargs=True)
            )
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _callable(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or where it is a container what it holds."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _callable(child)


def replay(calls: Sequence[Call]) -> Callable[[], list[Tensor]]:
    """Call a module as it was called, on leaves in place of its inputs; gives the outputs that need a gradient."""

    def run() -> list[Tensor]:
        outputs: list[Any] = []
        for module, arguments, keywords in calls:
            arguments, keywords = tree_map(_leaf, (arguments, keywords))
            outputs.append(module(*arguments, **keywords))
        return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]

    return run


def _leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
