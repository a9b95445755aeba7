"""Files that are no checkpoints end in one line, and nothing that a file holds is ever run."""

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile

import pytest
import safetensors.torch
import torch
from torch import nn

from signal_reid import checkpoints
from signal_reid.checkpoints import CheckpointError
from signal_reid.checkpoints.reading import read
from signal_reid.upstream.parameters import ours_to_authors


class Trap:
    """Unpickling it would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Holder(nn.Module):
    """Modules with attributes of every scripted kind, beside their tensors."""

    sizes: list[int]
    scales: list[float]
    table: dict[str, int]

    def __init__(self, layers):
        super().__init__()
        self.layers = layers
        self.sizes, self.scales, self.table = [1, 2], [0.5], {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def refused(tmp_path):
    """The one-line message with which a file of this content is refused."""

    def load(content):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message.removeprefix(f"{path}: ")

    return load


def saved(objects, **options):
    buffer = io.BytesIO()
    torch.save(objects, buffer, **options)
    return buffer.getvalue()


def repacked(archive, replace):
    """A zip archive with some of its records replaced."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, replace.get(name.split("/", 1)[1], old.read(name)))
    return buffer.getvalue()


@pytest.fixture
def archive(foreign):
    state = {"visual.a.weight": torch.arange(6.0).view(2, 3).T, "b": torch.zeros(0)}
    return foreign.scripted(state).save_to_buffer()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.pth"):
        read(tmp_path / "nowhere.pth")


def test_directory_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors, "):
        read(tmp_path)


def test_empty_file(refused):
    assert refused(b"") == "the file is empty"


@pytest.mark.parametrize("content", [b"x", b"<!DOCTYPE html><html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_text(content, refused):
    assert refused(content).startswith("not a checkpoint")


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_file_of_torch_save(legacy, refused):
    content = saved({"a": torch.randn(1000)}, _use_new_zipfile_serialization=not legacy)
    for length in (30, len(content) // 2, len(content) - 10):
        assert refused(content[:length]).startswith("truncated, damaged, or not a checkpoint")


def test_a_machine_without_memory_is_not_a_damaged_file(monkeypatch, tmp_path):
    def without_memory(error, text):
        def fail(*_, **__):
            raise error(text)

        return fail

    archive, tensors = tmp_path / "a.pt", tmp_path / "a.safetensors"
    torch.save({"a": torch.zeros(2)}, archive)
    safetensors.torch.save_file({"a": torch.zeros(2)}, tensors)
    monkeypatch.setattr("signal_reid.checkpoints.reading._read_zip", without_memory(RuntimeError, "std::bad_alloc"))
    error = "Error while deserializing header: I/O error: Cannot allocate memory (os error 12)"
    monkeypatch.setattr(safetensors, "safe_open", without_memory(safetensors.SafetensorError, error))
    for path in (archive, tensors):
        with pytest.raises(MemoryError):
            read(path)


def test_truncated_safetensors(refused):
    content = safetensors.torch.save({"a": torch.randn(1000)})
    for length in (40, len(content) // 2, len(content) - 1):
        assert refused(content[:length]).startswith("the safetensors file is truncated or damaged")


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_besides_tensors_are_not_run(legacy, refused, tmp_path):
    trap = tmp_path / "sprung"
    message = refused(saved({"a": torch.zeros(1), "b": Trap(trap)}, _use_new_zipfile_serialization=not legacy))
    assert "holds the Python object posix.mkdir besides tensors" in message
    assert not trap.exists()


def test_plain_pickle_is_not_run(refused, tmp_path):
    trap = tmp_path / "sprung"
    refused(pickle.dumps(Trap(trap), protocol=2))
    assert not trap.exists()


def test_archive_of_a_script_is_read_without_torch_jit(archive, tmp_path, monkeypatch):
    (tmp_path / "script.pt").write_bytes(archive)
    monkeypatch.setattr(torch.jit, "load", None)
    state = read(tmp_path / "script.pt").state
    assert torch.equal(state["visual.a.weight"], torch.arange(6.0).view(2, 3).T)
    assert state["b"].shape == (0,)


def test_archive_of_a_script_may_share_and_repeat_storage(tmp_path, foreign):
    whole = torch.arange(8.0)
    foreign.scripted({"first": whole[:4], "second": whole[4:]}).save(str(tmp_path / "script.pt"))
    state = read(tmp_path / "script.pt").state
    assert torch.equal(torch.cat([state["first"], state["second"]]), whole)


def test_archive_of_real_modules_has_the_state_dict_of_the_modules(tmp_path):
    layers = nn.Sequential(nn.Conv2d(3, 4, 2, padding=1), nn.BatchNorm2d(4), nn.LayerNorm(5), nn.Embedding(3, 2))
    holder = Holder(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(holder).save(str(tmp_path / "script.pt"))
    state, expected = read(tmp_path / "script.pt").state, holder.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_objects_in_an_archive_of_a_script_are_not_run(archive, refused, tmp_path):
    trap = tmp_path / "sprung"
    message = refused(repacked(archive, {"data.pkl": pickle.dumps(Trap(trap), protocol=2)}))
    assert "holds the Python object posix.mkdir besides tensors" in message
    assert not trap.exists()


@pytest.mark.parametrize(
    "replace",
    [{"data/0": b"short"}, {"data.pkl": b"garbage"}, {"data.pkl": pickle.dumps(3, protocol=2)}, {"byteorder": b"big"}],
    ids=["storage", "pickle", "no module", "byte order"],
)
def test_damaged_archive_of_a_script(replace, archive, refused):
    assert refused(repacked(archive, replace)).startswith("truncated, damaged, or not a checkpoint")


def test_archive_whose_modules_hold_each_other_ends(archive, tmp_path):
    cycle = b"\x80\x02c__torch__\nA\nq\x00)\x81q\x01}(X\x01\x00\x00\x00mh\x01ub."
    (tmp_path / "cycle.pt").write_bytes(repacked(archive, {"data.pkl": cycle}))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read(tmp_path / "cycle.pt")


def test_numbers_are_not_a_state_dict(refused):
    assert refused(saved([1, 2])) == "not a state dict but list"
    assert refused(saved({})) == "holds no tensors"
    assert refused(saved({"epoch": 3})) == "not a state dict, 'epoch' is int and not a tensor"


def test_unknown_names_list_what_is_supported(make_model):
    with pytest.raises(CheckpointError, match=r"2 entries of no supported naming .* beginning with fc.weight, fc.bias"):
        checkpoints.load(make_model(), {"fc.weight": torch.zeros(1), "fc.bias": torch.zeros(1)})


@pytest.mark.parametrize("text", ["{}", "[1]", "not json", '{"weight_map": 3}'])
def test_broken_index_of_shards(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="not the index of a sharded checkpoint"):
        read(path)


def test_shards_lie_beside_their_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"must lie beside the index, got '\.\./elsewhere"):
        read(path)
    path.write_text(json.dumps({"weight_map": {"a": "x" * 300}}))  # found by fuzzing: longer than a name may be
    with pytest.raises(CheckpointError, match="must lie beside the index, got 'xxx") as caught:
        read(path)
    assert len(str(caught.value)) < len(str(path)) + 200
    path.write_text('{"weight_map": {"a": "absent.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"shard absent\.safetensors is missing"):
        read(path)


def test_an_index_may_not_name_itself_or_another_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {"a": "model.safetensors.index.json"}}')
    with pytest.raises(CheckpointError, match=r"its shard model\.safetensors\.index\.json is an index itself"):
        read(path)


@pytest.mark.parametrize(
    "text", ['{"weight_map": ' + "[" * 100_000, '{"weight_map": {"a": ' + "9" * 5000 + "}}", "\xff"]
)
def test_an_index_of_any_json_is_refused_in_one_line(text, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="not the index of a sharded checkpoint"):
        read(path)


def test_entries_of_any_shape_are_refused_in_one_line(make_model):
    model = make_model()
    for value in (torch.tensor(1.0), torch.zeros(0), torch.zeros(2), torch.zeros(1, 1, 1), torch.zeros(2, 2).cfloat()):
        for naming in ("ours", "authors", "clip", "hugging face"):
            state = entries_of(naming, model, value)
            for use in (checkpoints.describe, lambda state: checkpoints.load(model, state)):
                with contextlib.suppress(CheckpointError):
                    use(state)


def entries_of(naming, model, value):
    """A state dict whose entries are all this value."""
    names = {
        "ours": list(model.state_dict()),
        "authors": list(ours_to_authors(model.state_dict())),
        "clip": ["visual.class_embedding", "visual.positional_embedding", "visual.proj", "visual.conv1.weight"],
        "hugging face": [
            *("visual_projection.weight", "vision_model.embeddings.position_embedding.weight"),
            *(f"vision_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in "qkv"),
        ],
    }
    return dict.fromkeys(names[naming], value)


def test_a_count_of_identities_beyond_the_file_is_refused(tmp_path):
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(
        {"backbone.a": torch.zeros(3, 2)}, path, {"signal_reid": "1", "num_identities": "9" * 12}
    )
    with pytest.raises(CheckpointError, match="says num_identities 999999999999, holds at most 3 rows"):
        checkpoints.describe(path)
