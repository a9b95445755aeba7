"""The operators and the drop-ins need torch and numpy, and nothing else of what the package requires."""

import importlib.metadata as metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import signal_reid

PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if path] + [sys.argv[1]]

import torch
from signal_reid import ops

of_ours = {name.split(".")[1] for name in sys.modules if name.startswith("signal_reid.")}
assert of_ours == {"ops"}, of_ours
x = torch.randn(2, 3, 6, 8, requires_grad=True)
ops.gramian_contrastive_loss(ops.mean_tokens(x), 0.07).backward()
assert x.grad.isfinite().all()

from signal_reid import drop_in

of_ours = {name.split(".")[1] for name in sys.modules if name.startswith("signal_reid.")}
assert of_ours == {"ops", "drop_in", "methods"}, of_ours
patches = torch.randn(3, 2, 64, 16, requires_grad=True)
modules = drop_in.Select_Interactive_Module(16, k=3), drop_in.AlignmentM(16, 8, 8)
losses = modules[1](*patches, stage="together_CLS_Patch")
(modules[0](*patches, *torch.randn(3, 2, 16)).sum() + sum(losses)).backward()
assert patches.grad.isfinite().all()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def closure(*names):
    """These distributions, and whatever they require here."""
    found, wanted = {}, list(names)
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        for requirement in found[name].requires or []:
            if "extra ==" not in requirement:
                wanted.append(re.match(r"[\w.-]+", requirement)[0])
    return found


@pytest.fixture
def torch_and_numpy_alone(tmp_path):
    """A directory that holds links to them, to what they require, and to this package."""
    distributions = closure("torch", "numpy")
    assert not {"pydantic", "pillow", "pyyaml", "typer", "rich", "safetensors"} & distributions.keys()
    for found in distributions.values():  # they need not lie in one folder
        for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__", "bin"}:
            if not (tmp_path / top).exists():
                (tmp_path / top).symlink_to(Path(found.locate_file(top)))
    (tmp_path / "signal_reid").symlink_to(Path(signal_reid.__file__).parent)
    return tmp_path


def test_operators_and_drop_ins_run_with_torch_and_numpy_alone(torch_and_numpy_alone):
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", PROGRAM, str(torch_and_numpy_alone)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split())
    assert {"torch", "signal_reid"} <= imported
    assert not imported & {"pydantic", "PIL", "yaml", "typer", "rich", "safetensors", "jinja2", "matplotlib"}
