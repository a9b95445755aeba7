"""Backbones by name, fetched with huggingface_hub only when `hub:` asks for it."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path, PurePosixPath

from signal_reid.checkpoints.errors import CheckpointError
from signal_reid.checkpoints.reading import DIRECTORY_FILES

PREFIX = "hub:"
CONFIGURATIONS = ("config.json", "open_clip_config.json")
_REFERENCE = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([\w./-]+))?")


def is_reference(weights: str) -> bool:
    """Whether `weights` names a repository on the hub rather than a file."""
    return weights.startswith(PREFIX)


def is_at_hand(weights: str) -> bool:
    """Whether weights, a path or a reference to the hub, can be read without fetching them."""
    match = _REFERENCE.fullmatch(weights)
    if match is None:
        return Path(weights).exists()
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return any(isinstance(try_to_load_from_cache(match[1], name), str) for name in _files(match[2]))


def fetch(reference: str) -> Path:
    """Fetch one file of a repository into huggingface_hub's cache, or find it there.

    Args:
        reference: `hub:OWNER/NAME`, which takes the first of the usual files that the repository holds, or
            `hub:OWNER/NAME:FILE`.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: a malformed reference, no huggingface_hub, no such repository or file, or no connection.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise CheckpointError(f"a backbone on the hub reads hub:OWNER/NAME or hub:OWNER/NAME:FILE, got {reference!r}")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError
    except ImportError:
        raise CheckpointError(f"{reference} needs huggingface_hub: pip install 'signal-reid[hub]'") from None
    names, absent = _files(match[2]), ""
    for name in names:
        try:
            path = Path(hf_hub_download(match[1], name))
        except EntryNotFoundError as error:
            absent = absent or _line(error)
            continue
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{reference} cannot be fetched: {_line(error)}") from None
        for configuration in CONFIGURATIONS:  # beside it: says which activation it was trained with
            with contextlib.suppress(EntryNotFoundError, OSError, ValueError):
                hf_hub_download(match[1], str(PurePosixPath(name).with_name(configuration)))
        return path
    raise CheckpointError(f"{reference} holds no {' or '.join(names)} that can be fetched: {absent}")


def _files(named: str | None) -> tuple[str, ...]:
    """The file that a reference names, or those that a repository usually holds."""
    # the shards of an index are files of their own, so an index alone is of no use
    return (named,) if named else tuple(name for name in DIRECTORY_FILES if not name.endswith(".index.json"))


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
