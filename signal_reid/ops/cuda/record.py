"""What the build says about the native core: setup.py writes `_build.json` into the package, with or without a core.

setup.py loads this file by its path, so it needs nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

NAME = "_build.json"
DISTRIBUTION = "signal-reid"


@dataclass(frozen=True)
class Record:
    """One build of the package.

    Attributes:
        core: SHA-256 of the compiled core; empty where there is none.
        reason: why there is no core, in plain words; empty where there is one.
        sources: `digest_of_sources` of the csrc that was compiled.
        architectures: those that the core has machine code for, such as "86".
        known: those that nvcc would have compiled for.
        nvcc: its version, such as "13.0".
        site: the site-packages of the editable installation that the core belongs to; empty where it belongs to none.
    """

    core: str = ""
    reason: str = ""
    sources: str = ""
    architectures: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    nvcc: str = ""
    site: str = ""


def write(record: Record, package: Path) -> None:
    """Write the record of a build into the package's directory."""
    (package / NAME).write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def read(package: Path) -> Record | None:
    """The record in a package's directory; None where there is none, or none that this version understands."""
    try:
        values = json.loads((package / NAME).read_text(encoding="utf-8"))
        found: dict[str, Any] = {field.name: values[field.name] for field in fields(Record)}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    lists = ("architectures", "known")
    if not all(isinstance(value, list if name in lists else str) for name, value in found.items()):
        return None
    values = {name: tuple(value) if name in lists else value for name, value in found.items()}
    return Record(**values)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_of_sources(csrc: Path) -> str:
    """SHA-256 of the names and contents of what is compiled, in hexadecimal digits."""
    sources = [path for path in sorted(csrc.iterdir()) if path.suffix in (".cpp", ".cu", ".cuh", ".h")]
    return hashlib.sha256("\n".join(f"{path.name} {digest(path)}" for path in sources).encode()).hexdigest()


def reason_against(core: Path, record: Record | None) -> str | None:
    """Why a compiled core must not be used, in plain words; None when it may.

    A core that no record describes is one that somebody put there, and may be used. In an installation the core and
    its record come and go together; only in a checkout can one outlive the other, or the sources that it was built of.
    """
    checkout = core.parent.parent
    csrc = checkout / "csrc"
    if record is None or not csrc.is_dir() or record.core != digest(core):
        return None
    if record.site and not is_installed_editably(checkout, [None, record.site]):
        return (
            f"the native core {core} is left over from an editable installation that is gone; "
            "install again (pip install -e .), or delete that file"
        )
    if record.sources != digest_of_sources(csrc):
        again = "SIGNAL_REID_BUILD_CUDA=1 pip install -e ." if record.site else "python setup.py build_ext --inplace"
        return f"the native core was compiled from other sources than {csrc} holds now; build it again ({again})"
    return None


def is_installed_editably(checkout: Path, places: Iterable[str | None]) -> bool:
    """Whether one of these directories (None: all that Python imports from) holds an editable installation of it."""
    for place in places:
        folders = sys.path if place is None else [place]
        for found in importlib.metadata.distributions(name=DISTRIBUTION, path=folders):
            try:
                origin = json.loads(found.read_text("direct_url.json") or "{}")
                editable = origin.get("dir_info", {}).get("editable", False)
                folder = Path(unquote(urlsplit(origin["url"]).path))
            except (ValueError, KeyError, AttributeError):
                continue
            if editable and folder.resolve() == checkout.resolve():
                return True
    return False
