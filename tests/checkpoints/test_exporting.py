"""Weights are written whole or not at all, and say what they are."""

import errno
import os
import resource

import pytest
import safetensors
import torch

import signal_reid
from signal_reid import checkpoints


def test_our_file_says_what_it_is(make_model, tiny_config, tmp_path):
    config = tiny_config()
    checkpoints.export(make_model(identities=5), tmp_path / "model.safetensors", config=config)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["signal_reid"] == "1"
    assert metadata["grid_size"] == "16 x 8"
    assert (metadata["num_identities"], metadata["num_cameras"]) == ("5", "4")
    (tmp_path / "config.yml").write_text(metadata["config"])
    assert signal_reid.load_config(tmp_path / "config.yml") == config


def test_file_of_a_later_version_is_refused(make_model, tmp_path, monkeypatch):
    model = make_model()
    monkeypatch.setattr("signal_reid.checkpoints.exporting.VERSION", "2")
    checkpoints.export(model, tmp_path / "model.safetensors")
    with pytest.raises(checkpoints.CheckpointError, match="file version 2, this signal-reid reads version 1"):
        checkpoints.load(model, tmp_path / "model.safetensors")


def test_another_naming_is_refused(make_model, tmp_path):
    with pytest.raises(ValueError, match="naming must be 'ours' or 'authors', got 'theirs'"):
        checkpoints.export(make_model(), tmp_path / "model.pth", naming="theirs")
    assert list(tmp_path.iterdir()) == []


def test_authors_tensors_have_memory_of_their_own(make_model, tmp_path):
    checkpoints.export(make_model(), tmp_path / "model.pth", naming="authors")
    state = torch.load(tmp_path / "model.pth", weights_only=True)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in state.values())


@pytest.mark.parametrize("naming", ["ours", "authors"])
def test_full_disk_leaves_the_old_file_and_nothing_else(naming, make_model, tmp_path):
    model, path = make_model(), tmp_path / "model"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"what was there before is untouched.*model'") as caught:
            checkpoints.export(model, path, naming=naming)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_flush_leaves_the_old_file_and_nothing_else(make_model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.export(make_model(), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_disk_before_it_gets_its_name(make_model, tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("rename"), replace(old, new)))
    checkpoints.export(make_model(), tmp_path / "model.safetensors")
    assert calls == ["flush", "rename", "flush"]


def test_missing_directory_is_named(make_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no directory .*absent"):
        checkpoints.export(make_model(), tmp_path / "absent" / "model.safetensors")


def test_directory_in_the_place_of_the_file_is_named(make_model, tmp_path):
    with pytest.raises(IsADirectoryError, match="it is a directory"):
        checkpoints.export(make_model(), tmp_path)


def test_link_is_followed(make_model, tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "disk" / "model.safetensors")
    checkpoints.export(make_model(), link)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "model.safetensors").is_file()
