import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from signal_reid.data import Batch
from signal_reid.evaluation import FeatureSet, extract_features, load_features, save_features
from signal_reid.runtime.errors import InputError


class MeanColour(nn.Module):
    """The mean of each modality and channel, plus the camera; remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(6, 6, bias=False)
        nn.init.eye_(self.linear.weight)
        self.modes = []

    def forward(self, images, cameras):
        self.modes.append((self.training, self.dropout.training, torch.is_inference_mode_enabled()))
        return self.linear(self.dropout(images.mean(dim=(-2, -1)).flatten(1))) + cameras[:, None]


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (5, 2, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels, cameras, scenes = torch.arange(5) // 2, torch.arange(5) % 2, torch.arange(5) + 7
    rows = [slice(0, 3), slice(3, 5)]
    return [Batch(images[r], labels[r], cameras[r], scenes[r], torch.arange(5)[r]) for r in rows]


def prepare(images):
    return images.float() / 255


def extract(model, batches, **arguments):
    return extract_features(model, batches, **{"device": "cpu", "precision": "fp32", "prepare": prepare, **arguments})


def test_features_come_in_the_loaders_order_with_their_attributes(batches):
    result = extract(MeanColour(), batches)
    images = torch.cat([batch.images for batch in batches])
    expected = prepare(images).mean(dim=(-2, -1)).flatten(1) + torch.tensor([[0.0], [1], [0], [1], [0]])
    torch.testing.assert_close(result.features, expected)
    assert result.identities.tolist() == [0, 0, 1, 1, 2]
    assert result.cameras.tolist() == [0, 1, 0, 1, 0]
    assert result.scenes.tolist() == [7, 8, 9, 10, 11]


def test_batches_without_scenes_give_a_set_without_scenes(batches):
    batches = [batch._replace(scenes=torch.full_like(batch.labels, -1)) for batch in batches]
    assert extract(MeanColour(), batches).scenes is None


def test_the_model_runs_in_evaluation_mode_and_gets_each_modules_mode_back(batches):
    model = MeanColour().train()
    model.linear.eval()
    extract(model, batches)
    assert model.modes == [(False, False, True)] * 2
    assert (model.training, model.dropout.training, model.linear.training) == (True, True, False)


def test_a_failing_model_gets_its_mode_back(batches):
    model = MeanColour().train()
    with pytest.raises(ZeroDivisionError):
        extract(model, batches, prepare=lambda images: 1 / 0)
    assert model.training


def test_features_may_enter_autograd(batches):
    features = extract(MeanColour(), batches).features
    (features * nn.Parameter(torch.ones(6))).sum().backward()


def test_features_stay_in_the_precision_of_the_model(batches):
    exact, result = (extract(MeanColour(), batches, precision=name).features for name in ("fp32", "bf16"))
    assert (exact.dtype, result.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(exact, result.float(), rtol=1e-2, atol=1e-2)


def test_progress_is_told_of_each_batch(batches):
    done = []
    extract(MeanColour(), batches, progress=done.append)
    assert done == [3, 2]


def test_an_unknown_precision_is_refused(batches):
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'fp8'"):
        extract(MeanColour(), batches, precision="fp8")


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="loader must yield at least one batch, got none"):
        extract(MeanColour(), [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_feature_that_is_not_finite_is_named_by_its_index(bad):
    features = torch.zeros(4, 3)
    features[2, 1] = bad
    with pytest.raises(
        ValueError, match="features must be finite, got NaN or infinity in 1 of 4, the first at index 2"
    ):
        FeatureSet(features, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def test_finite_features_whose_sum_overflows_are_accepted():
    FeatureSet(torch.full((1, 3), 3e38), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.zeros(3)}, r"features must be .* \(n, d\), .*, got torch.float32 of shape \(3,\)"),
        ({"features": torch.zeros(3, 2, dtype=torch.int64)}, "features must be a floating point tensor"),
        ({"features": torch.zeros(3, 0)}, r"features must be .* \(n, d\), d at least 1"),
        ({"identities": torch.zeros(2, dtype=torch.int64)}, r"identities must be int64 of shape \(3,\)"),
        ({"cameras": torch.zeros(3)}, "cameras must be int64 .* got torch.float32"),
        ({"scenes": torch.zeros(3, 1, dtype=torch.int64)}, r"scenes must be int64 .* of shape \(3, 1\)"),
        ({"cameras": torch.zeros(3, dtype=torch.int64, device="meta")}, r"cameras must be on the features' device"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, message):
    parts = {name: torch.zeros(3, dtype=torch.int64) for name in ("identities", "cameras", "scenes")}
    with pytest.raises(ValueError, match=message):
        FeatureSet(**{"features": torch.zeros(3, 2), **parts, **changes})


@pytest.mark.parametrize("scenes", [None, [5, 6]])
def test_a_saved_set_loads_as_it_was(tmp_path, make_set, scenes):
    saved = make_set([[1.0, 2], [3, 4]], [7, 8], [0, 1], scenes)
    save_features(tmp_path / "query.safetensors", saved, ["0001_ä.jpg", "b"])
    loaded, names = load_features(tmp_path / "query.safetensors")
    assert names == ["0001_ä.jpg", "b"]
    assert torch.equal(loaded.features, saved.features)
    assert torch.equal(loaded.identities, saved.identities)
    assert torch.equal(loaded.cameras, saved.cameras)
    assert (loaded.scenes is None) if scenes is None else torch.equal(loaded.scenes, saved.scenes)


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path, make_set):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    save_features(path, make_set([[1.0]], [1], [1]), ["a"])
    assert load_features(path)[1] == ["a"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, make_set, monkeypatch):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_features(path, make_set([[1.0]], [1], [1]), ["a"])
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_missing_directory_is_named(tmp_path, make_set):
    with pytest.raises(FileNotFoundError, match=r"no directory .*nowhere"):
        save_features(tmp_path / "nowhere" / "a.safetensors", make_set([[1.0]], [1], [1]), ["a"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"features: no file .*a\.safetensors"):
        load_features(tmp_path / "a.safetensors")


def test_another_ending_is_refused(tmp_path, make_set):
    with pytest.raises(ValueError, match=r"named \*.safetensors, got a.npz"):
        save_features(tmp_path / "a.npz", make_set([[1.0]], [1], [1]), ["a"])


def test_another_number_of_names_is_refused(tmp_path, make_set):
    with pytest.raises(ValueError, match=r"names must be one for each feature \(1\), got 2"):
        save_features(tmp_path / "a.safetensors", make_set([[1.0]], [1], [1]), ["a", "b"])


def test_a_file_of_something_else_is_refused(tmp_path):
    for content in ("garbage", {"weight": torch.zeros(2)}, {"names": torch.zeros(2, dtype=torch.uint8)}):
        path = tmp_path / "a.safetensors"
        path.write_text(content) if isinstance(content, str) else save_file(content, path)
        with pytest.raises(ValueError, match=r"a.safetensors: not a feature file written by"):
            load_features(path)


def as_bytes(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.mark.parametrize(
    "change",
    [
        {"features": torch.zeros(())},
        {"features": torch.zeros(3, 0)},
        {"features": torch.full((3, 2), float("nan"))},
        {"features": torch.ones(3, 2).to(torch.float8_e4m3fn)},
        {"identities": torch.zeros(2, dtype=torch.int64)},
        {"cameras": torch.zeros(3)},
        {"names": torch.tensor(1, dtype=torch.uint8)},
        {"names": torch.zeros(4, dtype=torch.bfloat16)},
        *({"names": text} for text in (b"3", b"[1,2,3]", b'["a"]', b"{", b"\xff", b"[" * 100_000)),
        {"more": torch.zeros(3)},
    ],
)
def test_a_feature_file_of_another_structure_is_named(change, tmp_path):
    path, three = tmp_path / "features.safetensors", torch.arange(3)
    whole = {"features": torch.ones(3, 2), "identities": three, "cameras": three.clone()}
    whole["names"] = as_bytes(b'["a", "b", "c"]')
    changed = {name: as_bytes(value) if isinstance(value, bytes) else value for name, value in change.items()}
    save_file(whole | changed, path)
    with pytest.raises(InputError, match=r"features\.safetensors: not a feature file") as caught:
        load_features(path)
    assert str(caught.value).isprintable()


def test_a_damaged_feature_file_is_named(tmp_path):
    path, three = tmp_path / "features.safetensors", torch.arange(3)
    save_features(path, FeatureSet(torch.ones(3, 2), three, three), ["a", "b", "c"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"features\.safetensors: damaged, it does not have the checksum"):
        load_features(path)


@pytest.mark.parametrize("name", ["caf\udce9.jpg", "a\nb.jpg", "\x1b[2J.jpg", "\u732b.jpg"])
def test_names_of_any_characters_come_back(name, tmp_path):
    path, one = tmp_path / "features.safetensors", torch.zeros(1, dtype=torch.int64)
    save_features(path, FeatureSet(torch.ones(1, 2), one, one), [name])
    assert load_features(path)[1] == [name]
