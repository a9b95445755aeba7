"""Signal (AAAI 2026): selective interaction and global-local alignment on a shared backbone.

Its modules stand alone: importing one of them, as `signal_reid.drop_in` does, loads nothing of the rest.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "METHOD":
        from signal_reid.methods.signal.model import Signal

        return Signal
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
