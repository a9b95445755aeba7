"""Content and trees of values with random damage, which every kind of fuzzer draws from."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable

from signal_reid.runtime.errors import UserError

Try = Callable[[random.Random], None]
"""One try of a fuzzer, with the numbers that it draws; what it raises is judged by `refused_or`."""

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**27, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1)
WORDS = (
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b"-",
    b'"',
    b"\\",
    b":",
    b"*",
    b"&a ",
    b"!!",
    b"<<: ",
    b"\n",
    b"9" * 50,
    b"(",
    b"t",
    b"R",
    b"b",
    b"r",
)
SETTINGS = ["model.backbone.layers=1", "model.backbone.width=48", "model.backbone.heads=3", "model.k_intra=20"]
SETTINGS += ["model.backbone.patch_size=8", "model.backbone.stride=8", "model.backbone.output_dim=32"]
SETTINGS += ["data.image_size=[64,64]", "data.batch_size=8", "data.instances=2", "data.workers=0"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content with one to four bits flipped, places overwritten, cut out, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at : at + 8] = struct.pack("<q", draw.choice(NUMBERS))[: draw.choice((1, 2, 4, 8))]
        elif how == 2:
            del data[at : at + draw.choice((1, 2, 8, 100, len(data)))]
        elif how == 3:
            data[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 1, 30, 3000))
        elif how == 4:
            start = draw.randrange(len(data) + 1)
            data[at:at] = data[start : start + draw.choice((1, 8, 50, 500))]
        elif at < len(data):
            data[at] = draw.randrange(256)
    return bytes(data)


def with_value(tree: object, draw: random.Random, more: tuple[object, ...] = ()) -> object:
    """A tree of lists and dictionaries with one of its values replaced, dropped or moved elsewhere.

    Args:
        tree: what a file holds.
        draw: which value becomes what.
        more: values that this kind of file can hold beside those of JSON.
    """
    tree = copy.deepcopy(tree)
    places = [(None, None)]
    pending = [tree]
    while pending:
        item = pending.pop()
        entries = (
            list(item.items()) if isinstance(item, dict) else list(enumerate(item)) if isinstance(item, list) else []
        )
        places += [(item, key) for key, _ in entries]
        pending += [value for _, value in entries]
    holder, key = draw.choice(places)
    value = draw.choice(
        (None, True, *NUMBERS, 0.5, float("nan"), -1e300, 10**400, "", "x", "\udcff", [], {}, [[]], {"a": {}}, *more)
    )
    if holder is None:
        return value
    if draw.random() < 0.2:
        del holder[key]
    elif draw.random() < 0.2:
        other, place = draw.choice(places[1:])
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = value
    return tree


def refused_or(use: Callable[[], object]) -> None:
    """Let errors that a user can mend pass."""
    try:
        use()
    except (UserError, FileNotFoundError) as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            raise AssertionError(f"an error is one line of bounded length: {str(error)[:3000]!r}") from error
