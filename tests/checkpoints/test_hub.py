"""The hub is asked only when a backbone is named by `hub:`."""

import sys
from types import ModuleType

import pytest
import safetensors.torch

from signal_reid import checkpoints
from signal_reid.checkpoints import CheckpointError
from signal_reid.checkpoints.hub import CONFIGURATIONS, is_at_hand


class EntryNotFoundError(Exception):
    pass


class Hub(ModuleType):
    """Stands in for huggingface_hub: one repository in a directory."""

    def __init__(self, directory):
        super().__init__("huggingface_hub")
        self.directory, self.asked = directory, []
        self.utils = ModuleType("huggingface_hub.utils")
        self.utils.EntryNotFoundError = EntryNotFoundError

    def try_to_load_from_cache(self, repo_id, filename):
        there = repo_id == "someone/clip" and (self.directory / filename).exists()
        return str(self.directory / filename) if there else None

    def hf_hub_download(self, repo_id, filename):
        self.asked.append((repo_id, filename))
        if repo_id != "someone/clip":
            raise OSError("\n401 Client Error.\nRepository not found")
        if not (self.directory / filename).exists():
            raise EntryNotFoundError("404 Client Error. Entry not found")
        return str(self.directory / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", hub.utils)
    return hub


def test_backbone_is_fetched_by_name(hub, tmp_path, clip_state, make_model, capsys):
    safetensors.torch.save_file(clip_state, tmp_path / "open_clip_model.safetensors")
    model = make_model()
    report = checkpoints.load_backbone(model, "hub:someone/clip")
    assert bool((model.backbone.projection == clip_state["visual.proj"]).all())
    assert report.source.endswith("open_clip_model.safetensors")
    weights, configurations = ["model.safetensors", "open_clip_model.safetensors"], list(CONFIGURATIONS)
    assert [file for _, file in hub.asked] == [*weights, *configurations]
    assert capsys.readouterr() == ("", "")


def test_named_file_is_fetched_alone(hub, tmp_path, clip_state, make_model):
    (tmp_path / "sub").mkdir()
    safetensors.torch.save_file(clip_state, tmp_path / "sub" / "vision.safetensors")
    checkpoints.load_backbone(make_model(), "hub:someone/clip:sub/vision.safetensors")
    names = ("vision.safetensors", *CONFIGURATIONS)
    assert hub.asked == [("someone/clip", f"sub/{name}") for name in names]


def test_the_configuration_beside_a_fetched_file_is_believed(hub, tmp_path, clip_state, make_model):
    safetensors.torch.save_file(clip_state, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 512}}')
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json beside it says: no quick_gelu"):
        checkpoints.load_backbone(make_model(), "hub:someone/clip")


def test_path_does_not_ask_the_hub(hub, tmp_path, clip_state, make_model):
    safetensors.torch.save_file(clip_state, tmp_path / "clip.safetensors")
    checkpoints.load_backbone(make_model(), str(tmp_path / "clip.safetensors"))
    with pytest.raises(FileNotFoundError):
        checkpoints.load_backbone(make_model(), "someone/clip")
    assert hub.asked == []


def test_repository_without_weights_is_named(hub, make_model):
    with pytest.raises(CheckpointError, match=r"hub:someone/clip holds no model\.safetensors or .*: 404 Client Error"):
        checkpoints.load_backbone(make_model(), "hub:someone/clip")


def test_refused_connection_is_one_line(hub, make_model):
    with pytest.raises(CheckpointError, match=r"^hub:no/body cannot be fetched: 401 Client Error\.$"):
        checkpoints.load_backbone(make_model(), "hub:no/body")


@pytest.mark.parametrize("reference", ["hub:", "hub:clip", "hub:a/b/c", "hub:a/b:", "hub:a b/c"])
def test_malformed_reference_says_how_it_reads(reference, hub, make_model):
    with pytest.raises(CheckpointError, match="reads hub:OWNER/NAME or hub:OWNER/NAME:FILE, got"):
        checkpoints.load_backbone(make_model(), reference)
    assert hub.asked == []


def test_without_huggingface_hub_the_extra_is_named(make_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs huggingface_hub: pip install 'signal-reid\[hub\]'"):
        checkpoints.load_backbone(make_model(), "hub:someone/clip")


def test_what_is_at_hand_is_told_without_asking_the_hub(hub, tmp_path):
    (tmp_path / "open_clip_model.safetensors").touch()
    assert is_at_hand("hub:someone/clip")
    assert is_at_hand("hub:someone/clip:open_clip_model.safetensors")
    assert is_at_hand(str(tmp_path / "open_clip_model.safetensors"))
    others = ("hub:someone/clip:vision.safetensors", "hub:nobody/clip", "hub:malformed", str(tmp_path / "none.pt"))
    assert [weights for weights in others if is_at_hand(weights)] == []
    assert hub.asked == []
