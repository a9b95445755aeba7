"""Archives and pickles: a flipped bit is found, little memory is asked for, nothing but tensors and values is made."""

import collections
import io
import pickle
import random
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from signal_reid.checkpoints import CheckpointError
from signal_reid.checkpoints.reading import load_objects, read
from signal_reid.checkpoints.unpickling import MOST_STEPS

WEIGHT = torch.arange(12.0).view(3, 4)


def saved(objects, **options):
    buffer = io.BytesIO()
    torch.save(objects, buffer, **options)
    return buffer.getvalue()


def can_be_saved(dtype):
    try:
        return bool(saved(torch.ones(2).to(dtype)))
    except KeyError:
        return False


UNSIGNED = tuple(filter(can_be_saved, [torch.uint16]))  # torch 2.4 cannot write it


def rewritten(content, change=lambda name, old: old, **options):
    """An archive with each record as `change` makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def pickled(*parts):
    """An archive of `torch.save` whose pickle is these opcodes, with one storage of 4 numbers."""
    program = b"\x80\x02" + b"".join(parts) + b"."
    return rewritten(saved(torch.zeros(4)), lambda name, old: program if name.endswith("/data.pkl") else old)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor(offset, size, stride):
    """Opcodes of a tensor in the archive's one storage."""
    sizes, strides = (b"(" + b"".join(map(number, part)) + b"t" for part in (size, stride))
    return REBUILD + b"(" + STORAGE + number(offset) + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR"


@pytest.fixture
def refused(tmp_path):
    """The one line with which a file of this content is refused."""

    def load(content):
        path = tmp_path / "file.pt"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_objects(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return message

    return load


@pytest.fixture
def loaded(tmp_path):
    """What a file of this content holds."""

    def load(content):
        (tmp_path / "file.pt").write_bytes(content)
        return load_objects(tmp_path / "file.pt")

    return load


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_those_that_pytorch_reads(legacy, loaded):
    shared = torch.arange(10.0)
    objects = {
        "model": nn.BatchNorm1d(3).state_dict(),  # an OrderedDict with attributes
        "views": [shared[2:5], shared.view(2, 5).T, shared[:0], shared[3]],
        "types": {str(dtype): torch.ones(3, 2).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8)},
        "more types": [torch.ones(2).to(dtype) for dtype in (*UNSIGNED, torch.float8_e4m3fn, torch.bool)],
        "parameter": nn.Parameter(WEIGHT),
        "values": (1, -1, 2**40, -(2**70), 0.5, float("inf"), None, True, False, "text \u20ac", [], {}, ()),
        "size": WEIGHT.shape,
    }
    given = loaded(saved(objects, _use_new_zipfile_serialization=not legacy))
    flat, tree = torch.utils._pytree.tree_flatten(objects | {"model": dict(objects["model"]), "size": (3, 4)})
    read_flat, read_tree = torch.utils._pytree.tree_flatten(given)
    assert read_tree == tree
    for ours, theirs in zip(read_flat, flat, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
            assert torch.equal(ours.float(), theirs.float())
        else:
            assert ours == theirs


@pytest.mark.parametrize(
    "scalar", [np.float64(0.8), np.float32(0.5), np.int64(-3), np.bool_(True), np.uint8(7), np.float16(2)]
)
def test_a_numpy_scalar_beside_tensors_is_a_plain_number(scalar, loaded, tmp_path):
    for objects in ({"state_dict": {"a.weight": WEIGHT}, "rank1": scalar}, {"a.weight": WEIGHT, "rank1": scalar}):
        read_number = loaded(saved(objects))["rank1"]
        assert type(read_number) in (float, int, bool)
        assert read_number == scalar.item()
        state = read(tmp_path / "file.pt").state
        assert list(state) == ["a.weight"]
        assert torch.equal(state["a.weight"], WEIGHT)


def test_a_numpy_scalar_of_an_older_numpy_is_a_plain_number(loaded):
    old = lambda name, content: content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # noqa: E731
    assert loaded(rewritten(saved({"rank1": np.float64(0.8)}), old)) == {"rank1": 0.8}


@pytest.mark.parametrize(
    "array", [np.arange(3), np.str_("text"), np.datetime64("2024-01-01"), collections.Counter("a")]
)
def test_other_objects_are_refused(array, refused):
    refused(saved({"a": WEIGHT, "b": array}))


def flipped(content, bit):
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def test_a_flipped_bit_never_changes_what_is_read(tmp_path):
    path, objects = tmp_path / "file.pt", {"a": torch.arange(300.0), "epoch": 3}
    content = saved(objects)
    found = 0
    for bit in random.Random(0).sample(range(8 * len(content)), 400):
        path.write_bytes(flipped(content, bit))
        try:
            given = load_objects(path)
        except CheckpointError:
            found += 1
            continue
        assert given["epoch"] == 3  # the bit lies in what pads the archive, or in a date
        assert torch.equal(given["a"], objects["a"])
    assert found > 200


def test_a_bit_flipped_in_a_record_that_is_not_read_is_found(refused):
    content = saved({"a": WEIGHT})
    for record in ("version", "serialization_id"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            name = next(name for name in archive.namelist() if name.endswith(record))
            value = archive.read(name)
        place = content.index(value, content.index(name.encode()) + len(name))
        assert "Bad CRC-32" in refused(flipped(content, 8 * place))


def test_compressed_records_are_refused(refused):
    # 1 MiB of zeros in 1 KiB; checkpoints are never compressed
    bomb = rewritten(saved({"a": torch.zeros(2**18)}), compression=zipfile.ZIP_DEFLATED)
    assert "compressed that no checkpoint compresses" in refused(bomb)


def test_records_that_claim_more_than_the_file_has_are_refused(refused):
    content = bytearray(saved({"a": torch.zeros(64)}))
    place = content.rindex(b"PK\x01\x02")
    for entry in range(content.count(b"PK\x01\x02")):
        place = content.index(b"PK\x01\x02", 0 if not entry else place + 1)
        struct.pack_into("<II", content, place + 20, 2**30, 2**30)
    assert "claim" in refused(bytes(content))


def test_a_record_may_not_be_named_twice(refused):
    buffer = io.BytesIO(saved({"a": torch.zeros(64)}))
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(next(name for name in archive.namelist() if name.endswith("/data.pkl")), b"\x80\x02}.")
    assert "records, of" in refused(buffer.getvalue())


PROGRAMS = {
    "tensor beyond its storage": (tensor(1, [4], [1]), "a tensor of 4 elements in a storage of 4"),
    "stride beyond its storage": (tensor(0, [2], [4]), "a tensor of 2 elements"),
    "expanded to 2^30 rows": (tensor(0, [2**30, 4], [0, 1]), "elements in a storage of 4"),
    "sizes whose product overflows": (tensor(0, [2**61, 2**61], [0, 0]), "elements in a storage of 4"),
    "negative offset": (tensor(-1, [1], [1]), "whose shape is damaged"),
    "negative size": (tensor(0, [-1], [1]), "whose shape is damaged"),
    "stride missing": (tensor(0, [2, 2], [1]), "whose shape is damaged"),
    "set_ on a tensor": (tensor(0, [1], [1]) + b"(" + number(2**31) + b"tb", "sets attributes of a Tensor"),
    "storage of another size": (STORAGE.replace(b"K\x04", b"K\x05"), "a storage of 5 numbers in a record of 16 bytes"),
    "a call of a number": (b"K\x01)R", "it calls a int"),
    "a call of a function": (b"cbuiltins\neval\n", "holds the Python object builtins.eval"),
    "attributes of a function": (b"ctorch\n_utils\n", "holds the Python object torch._utils"),
    "a class of ours": (b"csignal_reid.checkpoints.unpickling\nModule\n)\x81", "holds the Python object signal_reid"),
    "an instance": (b"ccollections\nOrderedDict\n)\x81", "makes an object"),
    "a numpy object": (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR", "not a number"),
    "text that ends early": (b"X\xff\xff\xff\x7fabc", "ends early"),
    "an empty stack": (b"R", "damaged"),
    "no end": (b"0" * 9, "opcode 48"),
    "too many steps": (b"N" * (MOST_STEPS + 1), "longer than"),
    "a tensor of a numpy scalar": (b"cnumpy._core.multiarray\nscalar\nNNNNR", "damaged"),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_crafted_pickle_is_refused_before_it_costs_anything(program, refused):
    parts, reason = PROGRAMS[program]
    assert reason in refused(pickled(parts))


def test_a_memo_of_two_to_the_27_costs_nothing(loaded, archive_of_a_script, tmp_path):
    memo = b"r" + struct.pack("<I", 2**27)
    assert loaded(pickled(b"}", memo)) == {}
    program = b"\x80\x02c__torch__\nA\n)\x81}" + memo + b"b."
    (tmp_path / "script.pt").write_bytes(
        rewritten(archive_of_a_script, lambda name, old: program if name.endswith("/data.pkl") else old)
    )
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read(tmp_path / "script.pt")


@pytest.fixture
def archive_of_a_script(foreign):
    return foreign.scripted({"visual.a.weight": WEIGHT}).save_to_buffer()


def test_storages_of_a_legacy_file_may_not_claim_more_than_it_has(refused):
    content = saved({"a": torch.zeros(100)}, _use_new_zipfile_serialization=False)
    assert "claim" in refused(content.replace(b"KdN", b"J\xff\xff\xff\x7fN"))


def test_a_legacy_file_of_another_pickle_is_refused(refused):
    assert "a pickle that torch.save did not write" in refused(pickle.dumps({"a": 1}, protocol=2))
