"""The package is built as docs/architecture.md says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"runtime"},
    {"ops", "figures"},
    {"config"},
    {"backbones"},
    {"upstream"},
    {"methods"},
    {"checkpoints", "data"},
    {"evaluation"},
    {"search"},
    {"training"},
    {"report"},
    {"demo", "program"},
    {"ablation"},
    {"cli", "drop_in"},
)
"""What may import only what stands before it, and itself."""
BY_NAME = {
    ("config/types.py", "methods"),
    ("config/types.py", "backbones"),
    ("config/published.py", "methods"),
    ("config/schema.py", "data"),
    ("config/loading.py", "upstream"),  # their configuration keys, which import nothing
}
"""Registries that the configuration asks by name, inside functions, and the authors' keys."""


def imported(path):
    """The rooms of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "signal_reid":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("signal_reid."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("signal_reid."))


def test_imports_point_one_way():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    against = set()
    for path in sorted((ROOT / "signal_reid").rglob("*.py")):
        name = path.relative_to(ROOT / "signal_reid")
        room = name.parts[0].removesuffix(".py")
        for other in imported(path):
            if room in floor and other in floor and other != room and floor[other] >= floor[room]:
                against.add((name.as_posix(), other))
    assert against == BY_NAME


def test_nothing_outside_its_folder_names_a_part_of_signal():
    parts = re.compile(
        r"global_alignment|local_alignment|selective_interaction|interaction_head|k_intra|\b(gam|lam|sim)\b"
    )
    allowed = ("methods/signal/", "upstream/", "drop_in.py", "ops/")
    for path in sorted((ROOT / "signal_reid").rglob("*")):
        name = path.relative_to(ROOT / "signal_reid").as_posix()
        if path.suffix in (".py", ".j2") and not name.startswith(allowed):
            assert parts.findall(path.read_text()) == [], name


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_files_that_the_documentation_names_exist(page):
    named = re.findall(r"`([a-z_]+/[\w./-]+)`", page.read_text())
    invented = (
        "NAME",
        "BACKEND",
        "mean_token",
        "patches.py",
        "runs/",
        "clip_vit/",
        *(
            ("modeling/", "engine/", "utils/", "zablation/", "configs/") if page.stem == "migrating" else ()
        ),  # the authors'
    )  # what a reader is to add, or a part
    roots = (ROOT, ROOT / "signal_reid", ROOT / "tests")
    missing = [
        name
        for name in named
        if not any(part in name for part in invented) and not any((root / name).exists() for root in roots)
    ]
    assert missing == []


def test_no_function_is_too_long_to_be_seen_whole():
    for path in sorted((ROOT / "signal_reid").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 62, f"{path.name}: {node.name}"


def test_docstrings_begin_with_what_the_thing_is():
    """The tests themselves are left out."""
    paths = [path for folder in ("signal_reid", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
    for path in sorted([*paths, ROOT / "setup.py"]):
        for statement in ast.walk(ast.parse(path.read_text())):
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                text = str(statement.value.value).lstrip()
                assert not re.match(r"Of\b|Those\b", text), f"{path.name}:{statement.lineno}: {text[:60]}"
