"""Which naming a state dict is in: ours, or one that a method or a backbone understands."""

from __future__ import annotations

from collections.abc import Iterable

from signal_reid.backbones.base import FileNaming
from signal_reid.backbones.registry import BACKBONES
from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.reading import Contents
from signal_reid.methods.base import Method
from signal_reid.methods.registry import METHODS

OURS = FileNaming(
    "signal-reid",
    "signal-reid",
    lambda state: any(name.startswith("backbone.") for name in state),
    dict,
    lambda name, entries: (name,),
    from_ours=dict,
)


def namings_of(model: Method) -> tuple[FileNaming, ...]:
    """The namings that files for this model may be in."""
    return (OURS, *type(model).namings, *type(model.backbone).namings)


def all_namings() -> tuple[FileNaming, ...]:
    """The namings that files for any built-in method and backbone may be in."""
    methods = [METHODS.get(name).namings for name in METHODS.built_in_names()]
    backbones = [BACKBONES.get(name).namings for name in BACKBONES.built_in_names()]
    return (OURS, *(naming for namings in (*methods, *backbones) for naming in namings))


def recognise(contents: Contents, namings: Iterable[FileNaming]) -> FileNaming:
    """Find the naming of a state dict.

    Raises:
        CheckpointError: it is none of these, or of one whose file cannot be used; the message says why.
    """
    namings = tuple(namings)
    for naming in namings:
        if naming.recognises(contents.state):
            reason = naming.refusal(contents.state)
            if reason is not None:
                raise CheckpointError(f"{contents.origin}: {reason}")
            return naming
    first = ", ".join(list(contents.state)[:3])
    known = ", ".join(dict.fromkeys(naming.title for naming in namings))
    raise CheckpointError(
        f"{contents.origin}: {len(contents.state)} entries of no supported naming ({known}), beginning with {first}"
    )
