"""Fixtures that several directories of tests share."""

import copy
import ctypes
import importlib.util
import os
import re
import sys
import zlib
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import signal_reid
from signal_reid import ops
from signal_reid.config import types as config_types
from signal_reid.data.synthetic import synthesize
from signal_reid.ops.backend import BACKENDS, serves
from signal_reid.ops.cuda import core
from signal_reid.training import setup as training_setup
from signal_reid.upstream.parameters import authors_to_ours, ours_to_authors

# Triton decides when it is imported; nothing above imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Test processes share the cores.
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
SEEDS = {"rgbnt201": 201, "msvr310": 310}


LONGEST = (
    "test_sanitized.py",
    "test_golden.py",
    "test_triton.py",
    "test_train_step.py",
    "test_gramian.py",
    "test_distributed.py",
    "test_sharing.py",
)
"""Files that begin first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items):
    """Tests of a GPU are skipped where there is none; a rehearsal runs those that the emulator can stand in for."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    rehearsing = os.environ.get("SIGNAL_REID_REHEARSAL") == "1"
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") and not (rehearsing and item.get_closest_marker("rehearsed")):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def peak_is_measured_once():
    """A training measures the peak of a CPU for a second; the trainings of one process have the same."""
    measured, training_setup.peak_flops = training_setup.peak_flops, cache(training_setup.peak_flops)
    yield
    training_setup.peak_flops = measured


@pytest.fixture(scope="session")
def simt_build():
    """The module that compiles the native core against the emulator."""
    spec = importlib.util.spec_from_file_location("simt_build", HERE / "simt" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def forking(tmp_path_factory):
    """Starts Python in processes of their own that need not import PyTorch and the program first, see `forking.py`."""
    spec = importlib.util.spec_from_file_location("forking", HERE / "forking.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    forks = module.Forking(tmp_path_factory.mktemp("forked"))
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def emulated_core(simt_build):
    """The native core on host memory; the sanitized build where SIGNAL_REID_SIMT_SANITIZE says so."""
    return simt_build.build_emulated(sanitize=os.environ.get("SIGNAL_REID_SIMT_SANITIZE") == "1")


class Backend:
    """The backend that serves every operator in a test.

    Attributes:
        name: reference, cpu, cuda or triton.
        emulated: whether the CUDA kernels run on the host SIMT emulator.
        interpreted: whether the Triton kernels run in Triton's interpreter.
    """

    def __init__(self, name, emulated_core=None):
        self.name = name
        self.emulated = emulated_core is not None
        self._set_schedule = ctypes.CDLL(emulated_core.__file__).simt_seed if self.emulated else lambda seed: None
        self.interpreted = name == "triton" and not torch.cuda.is_available()
        usual = os.environ.get("SIGNAL_REID_SIMT_EXAMPLES", 12) if self.emulated else 3 if self.interpreted else 60
        self.examples = int(usual)

    def __repr__(self):
        return self.name

    def reseed(self, seed):
        """Seed the random numbers and, on the emulator, the order in which threads run."""
        torch.manual_seed(seed)
        self._set_schedule(seed + 1)

    def for_all(self, check, **strategies):
        """Try a property on as many examples as the backend is quick enough for, each with a seed of its own."""

        slow = [HealthCheck.too_slow]

        @settings(max_examples=self.examples, deadline=None, derandomize=True, suppress_health_check=slow)
        @given(seed=st.integers(0, 99), **strategies)
        def property_holds(seed, **drawn):
            self.reseed(seed)
            check(**drawn)

        property_holds()


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter, which puts its functions in the place of Triton's once, not at every call of a function.

    What it looks for then, in all of `triton.language`, takes nine tenths of its time: `tl.sum` is such a function.
    """
    from triton.runtime import interpreter

    put, seen = interpreter._patch_lang, {}

    def put_once(function):
        module = id(function.__globals__)
        if module not in seen:
            seen[module] = function.__globals__, put(function)  # the first keeps the second's number from reuse
        return type(seen[module][1])()  # a scope in which nothing was changed, where this version of Triton has them

    interpreter._patch_lang = put_once
    yield
    interpreter._patch_lang = put
    for _, scope in reversed(seen.values()):
        if scope is not None:
            scope.restore()


@pytest.fixture(scope="session")
def rounding_interpreter(quick_interpreter):
    """Triton's interpreter, rounding fp32 to bf16 as every GPU does; by itself it truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_and_round(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)

    InterpreterBuilder.cast_impl = cast_and_round
    yield
    InterpreterBuilder.cast_impl = cast


def pytest_generate_tests(metafunc):
    """`backend` is every backend; where the module of tests names its OPERATOR, those that have it."""
    has_its_own = any("backend" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "backend" in metafunc.fixturenames and not has_its_own:
        operator = getattr(metafunc.module, "OPERATOR", None)
        names = [name for name in BACKENDS if operator is None or serves(name, operator)]
        metafunc.parametrize("backend", names, indirect=True)


@pytest.fixture
def backend(request):
    """Serves every operator from each backend in turn: on the GPU where there is one, else emulated or interpreted.

    What `torch.empty` returns starts as NaN or true. Where there is a GPU, tensors are made on it by default; so draw
    random ones after `torch.manual_seed` (done here once with 0) instead of from a generator on the CPU.
    """
    on_gpu = torch.cuda.is_available() and request.param in ("cuda", "triton")
    emulated = request.getfixturevalue("emulated_core") if request.param == "cuda" and not on_gpu else None
    if request.param == "triton" and not on_gpu:
        request.getfixturevalue("rounding_interpreter")
    deterministic = torch.are_deterministic_algorithms_enabled()
    with ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # the interpreter computes in numpy
        if emulated is not None:
            stack.enter_context(core.use(emulated))
        if on_gpu:
            stack.enter_context(torch.device("cuda"))
        stack.enter_context(ops.use_backend(request.param))
        torch.use_deterministic_algorithms(True, warn_only=True)  # PyTorch then fills what torch.empty returns
        chosen = Backend(request.param, emulated)
        chosen.reseed(0)
        yield chosen
        torch.use_deterministic_algorithms(deterministic)


class GoldenCase:
    """A two-layer model with the weights, inputs and measured outputs of the golden recipe."""

    def __init__(self, name: str):
        self.name = name
        self.config = signal_reid.load_config(name, ["model.backbone.layers=2"])
        self.seed = SEEDS[name]
        self.expected = np.load(GOLDEN / f"{name}.npz")
        height, width = self.config.data.image_size
        rs = np.random.RandomState(self.seed)
        images = [rs.standard_normal((8, 3, height, width)).astype(np.float32) for _ in range(3)]
        self.images = torch.from_numpy(np.stack(images, axis=1))
        self.cameras = torch.from_numpy(rs.randint(0, 4, size=8)).long()
        self.labels = torch.arange(8) // 2

    def on(self, device):
        """The same with the inputs on a device."""
        moved = copy.copy(self)
        moved.images, moved.cameras, moved.labels = (x.to(device) for x in (self.images, self.cameras, self.labels))
        return moved

    def model(self):
        model = signal_reid.build_model(self.config, num_identities=8, num_cameras=4)
        model.load_state_dict(authors_to_ours(self.authors_state(model)))
        return model

    def authors_state(self, model):
        shapes = {name: tuple(value.shape) for name, value in ours_to_authors(model.state_dict()).items()}
        return {name: torch.from_numpy(self.value(name, shape)) for name, shape in shapes.items()}

    def value(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        constants = {"running_mean": 0.0, "running_var": 1.0, "contra_temp": 0.07}
        last = name.rsplit(".", 1)[-1]
        if last == "num_batches_tracked":
            return np.array(0)
        if last in constants:
            return np.full(shape, constants[last], np.float32)
        state = np.random.RandomState((zlib.crc32(name.encode()) ^ self.seed) & 0x7FFFFFFF)
        r = state.standard_normal(shape or (1,)).astype(np.float32)
        if len(shape) >= 2 and "positional_embedding" not in name and "cv_embed" not in name:
            fan = shape[0] if name == "clip_vision_encoder.base.proj" else np.prod(shape[1:])
            return r * np.float32(fan**-0.5)
        return 1 + np.float32(0.05) * r if last == "weight" else np.float32(0.05) * r


@pytest.fixture(scope="session", params=sorted(SEEDS))
def golden(request):
    return GoldenCase(request.param)


@pytest.fixture(scope="session")
def golden_directory():
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_config():
    """A model small enough to run in milliseconds, on a grid that the alignment modules accept."""

    def make(name: str = "rgbnt201", *overrides: str):
        small = [
            "model.backbone.layers=1",
            "model.backbone.width=48",
            "model.backbone.heads=3",
            "model.backbone.patch_size=8",
            "model.backbone.stride=8",
            "model.backbone.output_dim=32",
            "model.k_intra=20",
            "data.image_size=[64,64]",
            "data.batch_size=8",
            "data.instances=2",
            "data.workers=0",
        ]
        return signal_reid.load_config(name, [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """Roots of small synthetic data sets by layout, made on first use; read only."""
    made: dict[str, Path] = {}

    def root(name: str = "rgbnt201") -> Path:
        if name not in made:
            made[name] = synthesize(
                name,
                tmp_path_factory.mktemp("synthetic") / name,
                train_identities=5,
                test_identities=3,
                images_per_identity=4,
                cameras=2,
                image_size=None if name == "rgbnt100" else (64, 64),
            )
        return made[name]

    return root


@pytest.fixture
def make_model(tiny_config):
    """A tiny Signal on a grid of 16 x 8 patches."""

    def make(*overrides, identities=8, cameras=4, seed=0):
        config = tiny_config("rgbnt201", "model.backbone.layers=2", "data.image_size=[128,64]", *overrides)
        torch.manual_seed(seed)
        return signal_reid.build_model(config, identities, cameras)

    return make


@pytest.fixture(scope="session")
def copy_of():
    """The values of a model, kept apart from it."""
    return lambda model: {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def same():
    """Whether two state dicts agree in names, types and bits."""

    def compare(one, other):
        return one.keys() == other.keys() and all(
            one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
        )

    return compare


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """Installs what docs/adding.md shows in one of its blocks of Python, as a plug-in called `shown`."""
    registries = []

    def install(registry, attribute):
        page = (HERE.parent / "docs" / "adding.md").read_text()
        (code,) = (
            code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if f"\n   {attribute} = " in code
        )
        (tmp_path / "documented.py").write_text("\n".join(line.removeprefix("   ") for line in code.splitlines()))
        information = tmp_path / "documented-0.1.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: documented\nVersion: 0.1\n")
        (information / "entry_points.txt").write_text(f"[{registry.group}]\nshown = documented:{attribute}\n")
        monkeypatch.syspath_prepend(tmp_path)
        registries.append(registry)
        registry.__dict__.pop("_installed", None)  # what is installed is looked up once

    yield install
    sys.modules.pop("documented", None)
    config_types._narrowed.cache_clear()
    for registry in registries:
        registry.__dict__.pop("_installed", None)
