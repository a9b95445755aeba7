"""Runs a part of the tests with the oldest version of everything that pyproject.toml allows, all of them together.

python .ci/lower_bounds.py DIRECTORY [TESTS...]                by hand: the oldest torch too
python .ci/lower_bounds.py --link-torch DIRECTORY [TESTS...]   in CI: the torch of this interpreter, without a download

DIRECTORY becomes the environment. The oldest torch has only a CUDA build on PyPI, a download of 2.5 GB for which CI has
no time. All the other bounds work beside torch 2.13, the oldest numpy among them, so that CI links to that torch and to
what it requires, except for what is there in its oldest version. The tests run from the checkout, without kernels that
are compiled for the environment. The interpreter is Python 3.11: older ones lack tomllib, newer ones the oldest numpy.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from venv import EnvBuilder

import tomllib
from lent_environment import distributions, link, normalized, site_packages, with_requirements

CHECKOUT = Path(__file__).resolve().parent.parent
TRIED_ELSEWHERE = {
    *("playwright", "axe-playwright-python", "ruff", "mypy", "types-pyyaml"),  # tools, of which the newest judge
    *("setuptools", "pybind11", "ninja", "triton"),  # kernels are neither built nor interpreted here
}
ALL = ("config", "data", "search", "evaluation", "checkpoints", "test_drop_in.py", "ops", "runtime", "methods")
CHOSEN = (
    "test_cli.py",  # typer, rich, and a training with its report: tensorboard, matplotlib, jinja2
    "test_drop_in.py",
    "config",  # pydantic and yaml
    "checkpoints",  # safetensors
    *("data/test_augmentation.py", "data/test_sampler.py"),  # seeds, which numpy makes
    *("data/test_images.py", "data/test_decoding.py", "data/test_bad_files.py"),  # Pillow
    *("data/test_layouts.py", "data/test_checking.py"),
    *("data/test_manifest.py", "report/test_query_files.py"),  # pyarrow
    *("evaluation/test_features.py", "evaluation/test_metrics.py", "evaluation/test_details.py"),
    *("search/test_index.py", "figures", "report/test_page.py", "report/test_charts.py", "test_tables.py"),
)
"""What CI tries: tests in which old versions have failed. Together they use every package of the bounds."""
TOO_SLOW = ("demo_prints", "finished_run_gets", "modalities_missing", "synthesize_and_pack", "says_what_it_costs")
"""Of those, what takes longest and uses nothing that the others do not use."""

FOUND = """
import importlib.metadata, importlib.util, json
versions, modules = [(d.name, d.version) for d in importlib.metadata.distributions()], {}
for module, names in importlib.metadata.packages_distributions().items():
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is not None:
        modules[module] = names, [*(spec.submodule_search_locations or [spec.origin])]
print(json.dumps([versions, modules]))
"""
"""Prints the versions in the order in which an import finds them; by module, its distributions and its places."""


def bounds(skipped: set[str]) -> dict[str, str]:
    """The oldest version by name; an empty one where pyproject.toml has no bound."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    found = [re.match(r"([\w.-]+)(?:>=([\w.]+))?", requirement).groups("") for requirement in wanted]
    return {normalized(name): version for name, version in found if normalized(name) not in skipped}


def same_version(one: str, other: str) -> bool:
    """Whether two versions are the same apart from zeros at the end and a build such as +cpu."""
    one, other = (re.sub(r"(\.0)+$", "", version.partition("+")[0]) for version in (one, other))
    return one == other


def make(environment: Path, oldest: dict[str, str], link_torch: bool) -> None:
    """Install the oldest versions, then link this interpreter's torch and what it requires that is not there yet."""
    EnvBuilder(with_pip=False, symlinks=True).create(environment)
    python = environment / "bin" / "python"
    pins = [f"{name}=={version}" if version else name for name, version in oldest.items()]
    # Compiling what no test imports would take a quarter of the time.
    options = ["--quiet", "--disable-pip-version-check", "--no-compile"]
    options += ["--only-binary=numpy"]  # a Python too new for the oldest numpy is an error, not a long compilation
    if subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *pins]).returncode:
        sys.exit("lower_bounds: the oldest versions cannot be installed together")
    if link_torch:
        linked = with_requirements(("torch",)) - distributions(python).keys()
        link(linked, site_packages(python))
        print("linked:", ", ".join(sorted(linked)))


def variables(environment: Path) -> dict[str, str]:
    """The variables under which everything runs: no program or package of the interpreter that runs this is found."""
    path = os.environ["PATH"].split(os.pathsep)
    path = [str(environment / "bin"), *(folder for folder in path if Path(folder) != Path(sys.executable).parent)]
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    return kept | {"PATH": os.pathsep.join(path), "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}


def check(environment: Path, oldest: dict[str, str]) -> None:
    """Print the versions that the tests will import; end unless they are the oldest and lie in this environment."""
    asked = [environment / "bin" / "python", "-c", FOUND]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=CHECKOUT, env=variables(environment))
    versions, modules = json.loads(done.stdout)
    versions = {normalized(name): version for name, version in reversed(versions)}  # the first is the one that counts
    print("versions:", ", ".join(f"{name} {versions.get(name)}" for name in (oldest | {"torch": ""})), flush=True)
    wrong = [
        f"{name} should be {version or 'there'}, and is {versions.get(name)}"
        for name, version in oldest.items()
        if name not in versions or (version and not same_version(versions[name], version))
    ]
    for module, (names, places) in modules.items():
        outside = [place for place in map(os.path.realpath, places) if not Path(place).is_relative_to(environment)]
        if outside and oldest.keys() & set(map(normalized, names)):
            wrong.append(f"{module} is imported from {outside[0]}")
    if wrong:
        sys.exit(f"lower_bounds: {'; '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link-torch", action="store_true", help="the torch of this interpreter, and the tests of CI")
    parser.add_argument("directory", type=lambda name: Path(name).resolve())
    parser.add_argument("tests", nargs="*", help="instead of those that are chosen here")
    arguments = parser.parse_args()
    if arguments.directory.exists() and any(arguments.directory.iterdir()):
        parser.error(f"{arguments.directory} is not empty")  # pip would replace what its links lead to
    oldest = bounds(TRIED_ELSEWHERE | ({"torch"} if arguments.link_torch else set()))
    make(arguments.directory, oldest, arguments.link_torch)
    check(arguments.directory, oldest)
    tests = arguments.tests or [f"tests/{name}" for name in (CHOSEN if arguments.link_torch else ALL)]
    left_out = ["cuda", "triton", *(TOO_SLOW if arguments.link_torch and not arguments.tests else ())]
    command = [arguments.directory / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "-k", f"not ({' or '.join(left_out)})", *tests]
    sys.exit(subprocess.run(command, cwd=CHECKOUT, env=variables(arguments.directory)).returncode)


if __name__ == "__main__":
    main()
