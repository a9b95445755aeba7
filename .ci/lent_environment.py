"""Makes an environment that holds what a machine with a GPU is expected to have and nothing else, without a download.

python .ci/lent_environment.py DIRECTORY

DIRECTORY/bin/python finds the packages of `PACKAGES` and what they require. Those of `WHEELS` lie in DIRECTORY/wheels
for PYTHONPATH, as unpacked wheels do. Both are links to what is installed for the interpreter that runs this.
"""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from venv import EnvBuilder

from packaging.requirements import Requirement

PACKAGES = (
    *("torch", "triton", "numpy", "pillow", "pyyaml", "typer", "rich", "safetensors", "jinja2", "matplotlib"),
    *("hypothesis", "pytest", "ninja", "pybind11", "setuptools", "pip"),
)
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_requirements(names: tuple[str, ...]) -> set[str]:
    """These distributions and what they require here, without extras and without what comes as wheels."""
    found: set[str] = set()
    left = [normalized(name) for name in names]
    while left:
        name = left.pop()
        if name not in found and name not in WHEELS:
            found.add(name)
            requirements = map(Requirement, distribution(name).requires or [])
            wanted = (r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""}))
            left += [normalized(requirement.name) for requirement in wanted]
    return found


def link(names: set[str], directory: Path) -> None:
    """Link what each distribution has in its site-packages."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (directory / top).exists():
                (directory / top).symlink_to(Path(str(installed.locate_file(top))).resolve())


def answer(python: Path, code: str) -> str:
    """What this code prints in another interpreter, which heeds no variables of the environment."""
    return subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout


def site_packages(python: Path) -> Path:
    return Path(answer(python, "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def distributions(python: Path) -> dict[str, str]:
    """The versions of what another interpreter has, by name."""
    listing = "import importlib.metadata as m; print(*(f'{d.name}/{d.version}' for d in m.distributions()))"
    there = [entry.split("/") for entry in answer(python, listing).split()]
    return {normalized(name): version for name, version in there}


def main(directory: Path) -> None:
    EnvBuilder(with_pip=False, symlinks=True).create(directory)
    python = directory / "bin" / "python"
    wanted = with_requirements(PACKAGES)
    link(wanted, site_packages(python))
    link(set(WHEELS), directory / "wheels")
    there = distributions(python).keys()
    if there != wanted:
        sys.exit(f"lent_environment: {', '.join(sorted(there ^ wanted))} should not differ")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
