"""An index finds what an fp64 product of every pair finds, whatever it consists of, and every damage of its files."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F

from signal_reid.data.layouts import ImageSource
from signal_reid.runtime.errors import InputError
from signal_reid.search import Description, Entry, Index, calibrate
from signal_reid.search import exact as exact_search
from signal_reid.search import segments as segment_files
from signal_reid.search.exact import Codes, Nearest, exact_scores
from signal_reid.search.segments import Segment


def stored(index):
    """The features as the index keeps them, read by the library of the format."""
    parts = []
    for part in index.description.parts:
        with safetensors.safe_open(index.path / part.file, framework="pt") as file:
            parts.append(file.get_tensor("features").double())
    return torch.cat(parts)


def by_definition(queries, features, top):
    """Rows and scores of the nearest: every pair in fp64, each rounded, sorted; equal scores by row."""
    scores = (F.normalize(queries, dim=1).double() @ features.t()).float()
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :top]
    return order, scores.gather(1, order)


def found(hits):
    return torch.tensor([[hit.row for hit in one] for one in hits]), torch.tensor(
        [[h.score for h in one] for one in hits]
    )


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
@pytest.mark.parametrize("dimension", [24, 23])
@pytest.mark.parametrize("integer", [True, False], ids=["int8", "fp32"])
def test_search_is_exact_in_blocks_and_loaded(make_index, storage, dimension, integer, monkeypatch):
    monkeypatch.setattr(segment_files, "_BLOCK_BYTES", 40 * dimension * 2)
    monkeypatch.setattr(exact_search, "_ENCODED", 9 * dimension)
    if not integer:
        monkeypatch.setattr(exact_search, "_multiplies_integers", lambda dimension: False)
    index, features = make_index(150, 1, 90, dimension=dimension, storage=storage)
    queries = torch.cat([features[:6], torch.randn(20, dimension)])
    rows, scores = by_definition(queries, stored(index), 12)
    assert rows[1, 0] == 1  # and its equal comes next
    assert rows[1, 1] == 240
    for load in (False, True):
        if load:
            index.load()
        got_rows, got_scores = found(index.search(queries, 12))
        assert torch.equal(got_rows, rows)
        assert (got_scores - scores).abs().max() <= 2**-23  # fp64 sums in another order
    assert [hit.name for hit in index.search(queries[:1], 3)[0]] == [f"item {row}" for row in rows[0, :3].tolist()]


def test_the_bound_of_a_code_holds_for_features_that_live_on_few_axes():
    features = torch.zeros(64, 32)
    features[torch.arange(64), torch.arange(64) % 32] = 1
    features[:, 0] += torch.linspace(-1e-4, 1e-4, 64)
    features, query = F.normalize(features, dim=1), F.normalize(1 + 0.01 * torch.randn(1, 32), dim=1)
    codes = Codes(64, 32)
    codes.fill(0, features)
    nearest = Nearest(query, 5)
    codes.search(nearest, 0, features.numpy())
    order = exact_scores(query[0], features).sort(descending=True, stable=True)
    assert torch.equal(nearest.rows[0], order.indices[:5])


def test_an_index_smaller_than_the_list_gives_all_it_has_and_an_empty_one_nothing(make_index, tmp_path):
    index, features = make_index(3)
    assert [len(hits) for hits in index.search(features[:2], 10)] == [3, 3]
    empty = Index.create(tmp_path / "empty", Description("made", ("RGB",), 24))
    assert empty.search(features[:1], 10) == [[]]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (
            torch.zeros(2, 23),
            r"queries must be floating point of shape \(n, 24\), got torch.float32 of shape \(2, 23\)",
        ),
        (torch.full((1, 24), torch.nan), "queries must be finite, got NaN or infinity"),
        (torch.zeros(1, 24, dtype=torch.int64), "queries must be floating point"),
    ],
)
def test_queries_that_cannot_be_searched(make_index, queries, message):
    index, _ = make_index(3)
    with pytest.raises(InputError, match=message):
        index.search(queries)


def test_adding_writes_nothing_again_and_reopening_finds_the_same(make_index):
    index, features = make_index(20)
    first = (index.path / "segment-00000.safetensors").read_bytes()
    index.add([Entry("late", (None,))], [features[:1]])
    assert (index.path / "segment-00000.safetensors").read_bytes() == first
    again = Index(index.path)
    assert len(again) == 21
    hits = again.search(features[:1], 2)[0]
    assert [(hit.row, hit.name, hit.entry.identity) for hit in hits] == [(0, "item 0", 0), (20, "late", -1)]


def test_two_that_opened_an_index_both_add_to_it(make_index):
    index, features = make_index(5)
    other = Index(index.path)
    index.add([Entry("a", (None,))], [features[:1]])
    other.add([Entry("b", (None,))], [features[:1]])
    assert [entry.name for entry in Index(index.path).entries()][5:] == ["a", "b"]


@pytest.mark.parametrize("broken", ["while the features are made", "before the description is replaced"])
def test_an_interrupted_addition_harms_nothing(make_index, broken, monkeypatch):
    index, features = make_index(5)
    before = index.search(features[:2])

    def interrupted(*_):
        raise KeyboardInterrupt

    def parts():
        yield features[:1]
        if broken == "while the features are made":
            raise KeyboardInterrupt
        monkeypatch.setattr("signal_reid.search.index._write", interrupted)

    with pytest.raises(KeyboardInterrupt):
        index.add([Entry("new", (None,))], parts())
    monkeypatch.undo()
    again = Index(index.path)
    again.check()
    assert again.search(features[:2]) == before
    assert not list(index.path.glob("*.tmp"))
    again.add([Entry("new", (None,))], [features[:1]])  # in the place of what was left
    assert Index(index.path).search(features[:1], 2)[0][1].name == "new"


@pytest.mark.parametrize("part", range(7))
@pytest.mark.parametrize("name", ["segment-00000.safetensors", "index.json"])
def test_a_flipped_bit_is_found(make_index, name, part):
    index, features = make_index(30)
    path = index.path / name
    content = bytearray(path.read_bytes())
    place = part * (len(content) - 1) // 6
    content[place] ^= 1 << part
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: (damaged \(.*\); build the index again|an index of version)"):
        Index(index.path).search(features[:1])
    with pytest.raises(InputError, match=name):
        Index(index.path).load()


NAMED = [Entry("a", (None,), 7, 0, "007", "cam1"), Entry("b", (None,), 2**52, 1, "ada", "1"), Entry("c", (None,))]


def test_names_of_identities_and_cameras_are_kept_where_there_are_some(make_index):
    index, features = make_index(4)
    parts = {"__metadata__", "identities", "cameras", "entries", "features", "checksums"}
    header = (index.path / "segment-00000.safetensors").read_bytes()[8:].split(b"}}", 1)[0] + b"}}"
    assert set(json.loads(header)) == parts  # what an earlier version wrote, and reads
    index.add(NAMED, [features[:3]])
    again = Index(index.path)
    *unnamed, seven, ada, unknown = again.entries()
    assert [(entry.identity_shown, entry.camera_shown) for entry in unnamed] == [("0", str(c)) for c in (0, 1, 2, 0)]
    labels = [(entry.identity_shown, entry.camera_shown) for entry in (seven, ada, unknown)]
    assert labels == [("007", "cam1"), ("ada", "1"), ("", "")]
    assert torch.equal(stored(again)[4:], stored(again)[:3])  # which the library of the format reads


def test_the_path_of_an_image_holds_from_any_directory(make_index):
    index, features = make_index(2)
    index.add([Entry("a", (ImageSource(Path("below", "a.jpg")),))], [features[:1]])
    assert list(index.entries())[-1].sources[0].path == Path.cwd() / "below" / "a.jpg"


def test_an_identity_has_the_shortest_of_its_names_in_a_segment(make_index):
    index, features = make_index(2)
    index.add([Entry(name, (None,), 1, 1, name) for name in ("001", "01", "0001")], [features[:1].repeat(3, 1)])
    assert [entry.identity_shown for entry in index.entries()][2:] == ["01", "01", "01"]


@pytest.mark.parametrize("names", [{"0": 3}, 3, [[1, 2]], "cam1"])
def test_names_that_are_none_are_refused_behind_their_checksum(make_index, names, monkeypatch):
    index, features = make_index(2)
    monkeypatch.setattr(segment_files, "_names", lambda _: {"cameras": names})
    index.add([Entry("new", (None,))], [features[:1]])
    with pytest.raises(InputError, match=r"segment-00001.safetensors: damaged \(.*\); build the index again"):
        list(Index(index.path).entries())


def test_every_single_bit_of_a_small_segment_is_guarded(make_index):
    index, features = make_index(2, dimension=2)
    index.add(NAMED[:2], [features])
    path = index.path / "segment-00001.safetensors"
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        with pytest.raises(InputError):
            Index(index.path).check()


NEVER = (
    ("neighbours", 3),
    ("file", "../a"),
    ("file", None),
    ("rows", -1),
)  # indexes --seed 15 and 9000031


def test_a_description_that_was_never_written_is_refused_behind_its_checksum(make_index):
    index, _ = make_index(3)
    path = index.path / "index.json"
    content = json.loads(path.read_text())
    del content["crc32"]
    (part,) = content["parts"]
    wrong = [{"parts": [{**part, name: value}]} for name, value in NEVER]
    wrong += [{"dimension": "x"}, {"storage": "fp8"}, {"fingerprint": 3}, {"modalities": [1]}]
    threshold = {"score": None, "false_accept_rate": 0, "true_accept_rate": 0, "impostor_pairs": 0, "genuine_pairs": 0}
    for change in (*wrong, {"threshold": threshold}):
        crafted = {**content, **change}
        path.write_text(
            json.dumps({**crafted, "crc32": f"{zlib.crc32(json.dumps(crafted, sort_keys=True).encode()):08x}"})
        )
        with pytest.raises(InputError, match=r"index\.json: damaged \(.*\); build the index again"):
            Index(index.path).check()


@pytest.mark.parametrize("header", ["3", "[]", '{"__metadata__": 3}'])  # indexes --seed 54
def test_a_segment_whose_header_is_no_header_is_refused(make_index, header):
    index, _ = make_index(3)
    path = index.path / "segment-00000.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(InputError, match="damaged"):
        Segment(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["__metadata__"].update(block_rows="0"),  # indexes --seed 1180
        lambda header: header["checksums"].update(
            data_offsets=[0, 2**62]
        ),  # indexes --seed 783: read takes memory first
        lambda header: header["features"].update(shape=[2**40, 1]),
        lambda header: header["features"].update(shape=[3, -24]),  # indexes --seed 193
        lambda header: header["entries"].update(dtype=None),
    ],
)
def test_sizes_that_a_segment_does_not_have_are_refused_before_memory_is_taken(make_index, change):
    index, _ = make_index(3)
    path = index.path / "segment-00000.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(InputError, match=r"damaged \((its header says|a number in its header|None)"):
        Segment(path)


@pytest.mark.parametrize("cut", [0, 5, 200, -1])
def test_a_segment_that_was_cut_off_is_found(make_index, cut):
    index, features = make_index(30)
    path = index.path / "segment-00000.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(InputError, match="damaged"):
        Index(index.path).search(features[:1])


def test_a_segment_of_another_index_is_refused(make_index):
    (index, features), (other, _) = make_index(30), make_index(30, dimension=12, name="other")
    (other.path / "segment-00000.safetensors").replace(index.path / "segment-00000.safetensors")
    with pytest.raises(InputError, match=r"it is not the file that index\.json names"):
        Index(index.path).search(features[:1])


def test_what_is_not_there_is_named(make_index, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index in .*nowhere \(there is no index\.json\)"):
        Index(tmp_path / "nowhere")
    index, features = make_index(3)
    (index.path / "segment-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*segment-00000"):
        Index(index.path).search(features[:1])
    with pytest.raises(InputError, match="holds an index already"):
        Index.create(index.path, Description("made", ("RGB",), 24))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(2, 24), "features must be one for each of the 3 items, got 2"),
        (torch.ones(3, 5), r"features must be floating point of shape \(n, 24\)"),
        (torch.full((3, 24), torch.inf), "features must be finite"),
    ],
)
def test_features_that_do_not_fit_leave_the_index_as_it_was(make_index, features, message):
    index, _ = make_index(3)
    with pytest.raises(InputError, match=message):
        index.add([Entry(str(row), (None,)) for row in range(3)], [features])
    assert len(Index(index.path)) == 3


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_faiss_finds_neighbours_which_are_scored_as_ever(make_index, kind):
    pytest.importorskip("faiss")
    index, features = make_index(300, 100, kind=kind)
    rows, scores = by_definition(features[:20], stored(index), 1)
    for load in (False, True):
        if load:
            index.load()
        got_rows, got_scores = found(index.search(features[:20], 1))
        assert torch.equal(got_rows, rows)
        assert (got_scores - scores).abs().max() <= 2**-23
    damaged = index.path / "segment-00001.faiss"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    with pytest.raises(InputError, match=r"segment-00001\.faiss: damaged"):
        Index(index.path).check()


def test_without_faiss_one_line_says_so(make_index, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(InputError, match=r"FAISS is not installed; pip install 'signal-reid\[faiss\]'"):
        make_index(10, kind="flat")


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.2, 0.999])
def test_the_threshold_is_the_lowest_that_keeps_the_rate(rate):
    generator = torch.Generator().manual_seed(3)
    identities = torch.randint(0, 6, (40,), generator=generator)
    features = F.normalize(torch.randn(6, 8, generator=generator)[identities] + torch.randn(40, 8, generator=generator))
    impostors, genuine = [], []
    for i in range(40):
        for j in range(i):
            same = identities[i] == identities[j]
            (genuine if same else impostors).append(float(exact_scores(features[i], features[j : j + 1])))
    threshold = calibrate(features, identities, rate)
    impostors, genuine = np.sort(impostors), np.array(genuine)
    assert (impostors >= threshold.score - 1e-6).mean() >= threshold.false_accept_rate
    assert threshold.false_accept_rate <= rate
    assert threshold.false_accept_rate == pytest.approx((impostors > threshold.score - 1e-7).mean(), abs=2e-3)
    lower = impostors[impostors < threshold.score - 1e-6]
    if len(lower):  # one more would be too many
        assert (impostors >= lower[-1]).mean() > rate
    assert threshold.true_accept_rate == pytest.approx((genuine >= threshold.score).mean(), abs=0.01)
    assert (threshold.impostor_pairs, threshold.genuine_pairs) == (len(impostors), len(genuine))


@pytest.mark.parametrize(
    ("identities", "rate", "message"),
    [
        ([0, 0, 0], 0.1, "0 pairs of different identities and 3 of one"),
        ([0, 1, 2], 0.1, "3 pairs of different identities and 0 of one"),
        ([0, 0, 1], 1.0, r"must be in \[0, 1\), got 1"),
    ],
)
def test_a_threshold_needs_pairs_of_both_kinds(identities, rate, message):
    with pytest.raises(InputError, match=message):
        calibrate(torch.eye(3), torch.tensor(identities), rate)


def test_a_threshold_is_kept_and_decides(make_index):
    index, features = make_index(40)
    threshold = calibrate(*index.labelled(), 0.01)
    index.set_threshold(threshold)
    again = Index(index.path)
    assert again.description.threshold == threshold
    for hit in again.search(features[:1], 40)[0]:
        assert hit.accepted == (hit.score >= threshold.score)


def test_the_description_is_readable(make_index):
    index, _ = make_index(4)
    told = json.loads((index.path / "index.json").read_text())
    assert (told["signal_reid_index"], told["dimension"], told["parts"][0]["rows"]) == (1, 24, 4)
