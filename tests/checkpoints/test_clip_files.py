"""The same CLIP in every naming and container gives the same backbone."""

import json

import pytest
import safetensors.torch
import torch

from signal_reid import checkpoints
from signal_reid.backbones.clip_vit import resize_position_embedding
from signal_reid.checkpoints import CheckpointError


def half(state):
    return {name: value.half() for name, value in state.items()}


def openai_archive(path, clip, foreign):
    foreign.scripted(half(clip)).save(str(path / "clip.pt"))
    return path / "clip.pt"


def openai_state_dict(path, clip, foreign):
    extra = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77), "vocab_size": torch.tensor(100)}
    torch.save(half(clip) | extra, path / "clip.pt")
    return path / "clip.pt"


def vision_tower_alone(path, clip, foreign):
    tower = {name: value for name, value in clip.items() if name.startswith("visual.")}
    torch.save(tower, path / "visual.pt")
    return path / "visual.pt"


def vision_tower_without_prefix(path, clip, foreign):
    return {name.removeprefix("visual."): value for name, value in clip.items() if name.startswith("visual.")}


def open_clip_safetensors(path, clip, foreign):
    safetensors.torch.save_file(clip, path / "open_clip_model.safetensors")
    return path / "open_clip_model.safetensors"


def open_clip_training_checkpoint(path, clip, foreign):
    state = {f"module.{name}": value for name, value in clip.items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, path / "epoch_3.pt")
    return path / "epoch_3.pt"


def hugging_face_safetensors(path, clip, foreign):
    safetensors.torch.save_file(foreign.to_hugging_face(clip), path / "model.safetensors", {"format": "pt"})
    return path / "model.safetensors"


def hugging_face_pickle(path, clip, foreign):
    torch.save(foreign.to_hugging_face(half(clip)), path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    return path / "pytorch_model.bin"


def hugging_face_directory_of_shards(path, clip, foreign):
    state = foreign.to_hugging_face(clip)
    names = sorted(state)
    files = {name: f"model-{1 + index % 2}-of-2.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        safetensors.torch.save_file({name: state[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


SOURCES = [
    openai_archive,
    openai_state_dict,
    vision_tower_alone,
    vision_tower_without_prefix,
    open_clip_safetensors,
    open_clip_training_checkpoint,
    hugging_face_safetensors,
    hugging_face_pickle,
    hugging_face_directory_of_shards,
]


@pytest.mark.parametrize("write", SOURCES, ids=lambda write: write.__name__)
def test_every_naming_gives_the_same_backbone(write, tmp_path, clip_state, foreign, make_model):
    model = make_model(seed=1)
    report = checkpoints.load(model, write(tmp_path, clip_state, foreign))

    backbone = model.backbone
    block = "visual.transformer.resblocks.1."
    assert torch.equal(backbone.blocks[1].attention.qkv.weight, clip_state[f"{block}attn.in_proj_weight"])
    assert torch.equal(backbone.blocks[1].mlp.contract.bias, clip_state[f"{block}mlp.c_proj.bias"])
    assert torch.equal(backbone.projection, clip_state["visual.proj"])

    expected = make_model(seed=1)
    checkpoints.load(expected, clip_state)
    images = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        assert torch.equal(backbone(images), expected.backbone(images))
    assert report.loaded == len(backbone.state_dict()) - 1
    assert report.initialised[0] == "backbone.camera_embedding"


def test_position_embedding_is_resized_in_full_precision(clip_state, make_model):
    model = make_model()
    report = checkpoints.load(model, half(clip_state))
    expected = resize_position_embedding(clip_state["visual.positional_embedding"], (16, 8))
    assert torch.equal(model.backbone.position_embedding, expected)
    assert "position embedding resized from 4 x 4 to 16 x 8 patches" in report.summary()


def test_equal_grid_is_taken_as_it_is(foreign, make_model):
    clip = foreign.random_state(foreign.clip_shapes(tokens=64))
    model = make_model("data.image_size=[64,64]")
    report = checkpoints.load(model, clip)
    assert torch.equal(model.backbone.position_embedding, clip["visual.positional_embedding"])
    assert not any("resized" in note for note in report.notes)


def test_square_of_as_many_patches_is_still_resized(foreign, make_model):
    clip = foreign.random_state(foreign.clip_shapes(tokens=64))
    model = make_model("data.image_size=[128,32]", "model.local_alignment=false")
    report = checkpoints.load(model, clip)
    assert report.notes[0] == "position embedding resized from 8 x 8 to 16 x 4 patches"


def test_report_lists_what_kept_its_initial_values(clip_state, make_model, copy_of):
    model = make_model()
    before = copy_of(model)
    report = checkpoints.load(model, clip_state)
    assert report.initialised == (
        "backbone.camera_embedding",
        "heads",
        "selective_interaction",
        "interaction_head",
        "global_alignment",
        "local_alignment",
    )
    untouched = [name for name in before if not name.startswith("backbone.") or "camera" in name]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in untouched)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"patch": 16}, r"patch size 16 \(8 in the model\)"),
        ({"width": 96, "layers": 3}, r"layers 3 \(2 in the model\), width 96 \(48 in the model\)"),
        ({"output": 64}, r"output dim 64 \(32 in the model\)"),
    ],
)
def test_clip_of_another_size_is_refused_by_its_dimensions(size, message, foreign, make_model):
    with pytest.raises(CheckpointError, match=f"another size: {message}"):
        checkpoints.load(make_model(), foreign.random_state(foreign.clip_shapes(**size)))


def test_clip_with_a_resnet_is_refused(make_model):
    resnet = {"visual.conv1.weight": torch.zeros(32, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(4, 4, 1, 1)}
    with pytest.raises(CheckpointError, match="is a ResNet, the model needs its vision transformer"):
        checkpoints.load(make_model(), resnet)


def test_grid_that_is_not_square_is_refused(clip_state, make_model):
    clip = clip_state | {"visual.positional_embedding": torch.zeros(1 + 15, 48)}
    with pytest.raises(CheckpointError, match="1 \\+ n \\* n rows, got 16"):
        checkpoints.load(make_model(), clip)


def test_missing_entries_go_by_the_names_of_the_file(clip_state, foreign, make_model):
    state = foreign.to_hugging_face(clip_state)
    del state["visual_projection.weight"], state["vision_model.encoder.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(CheckpointError, match="2 missing") as caught:
        checkpoints.load(make_model(), state)
    message = str(caught.value)
    assert "visual_projection.weight" in message
    assert "vision_model.encoder.layers.1.self_attn.q_proj.bias" in message


def test_entry_of_another_model_is_unexpected(clip_state, make_model):
    with pytest.raises(CheckpointError, match=r"1 unexpected \(adapter.weight\)"):
        checkpoints.load(make_model(), clip_state | {"adapter.weight": torch.zeros(3)})


def test_backbone_is_loaded_from_a_path(clip_state, foreign, make_model, tmp_path):
    model = make_model()
    report = checkpoints.load_backbone(model, str(open_clip_safetensors(tmp_path, clip_state, foreign)))
    assert torch.equal(model.backbone.projection, clip_state["visual.proj"])
    assert report.format == "clip"


def test_backbone_is_loaded_from_a_signal_checkpoint(make_model, copy_of, tmp_path):
    source, model = make_model(seed=1), make_model("model.heads=per_modality", seed=2)
    checkpoints.export(source, tmp_path / "signal.safetensors")
    before = copy_of(model)
    report = checkpoints.load_backbone(model, str(tmp_path / "signal.safetensors"))
    state = source.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, (state if name.startswith("backbone.") else before)[name])
    assert "only the backbone" in report.summary()


CONFIGURATIONS = {
    "quick": ("config.json", {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}, None),
    "vision model alone": ("config.json", {"hidden_act": "quick_gelu"}, None),
    "not said, which means quick": ("config.json", {"vision_config": {}}, None),
    "plain": ("config.json", {"vision_config": {"hidden_act": "gelu"}}, r"config\.json .*: hidden_act is 'gelu', .*"),
    "plain alone": ("config.json", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "damaged": ("config.json", [1], r"config\.json: damaged, not the configuration of a model"),
    "open_clip, quick": ("open_clip_config.json", {"model_cfg": {"quick_gelu": True}}, None),
    "open_clip, plain": ("open_clip_config.json", {"model_cfg": {"embed_dim": 512}}, "trained with plain GELU"),
}


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_the_configuration_beside_the_weights_says_which_gelu_they_were_trained_with(
    kind, tmp_path, clip_state, foreign, make_model
):
    name, described, problem = CONFIGURATIONS[kind]
    write = hugging_face_safetensors if name == "config.json" else open_clip_safetensors
    write(tmp_path, clip_state, foreign)
    (tmp_path / name).write_text(json.dumps(described))
    model = make_model()
    if problem is None:
        assert not any("QuickGELU" in note for note in checkpoints.load(model, tmp_path).notes)
        return
    with pytest.raises(CheckpointError, match=problem):
        checkpoints.load(model, tmp_path)


@pytest.mark.parametrize("write", [hugging_face_safetensors, open_clip_safetensors, vision_tower_without_prefix])
def test_what_nobody_can_tell_of_the_weights_is_said(write, tmp_path, clip_state, foreign, make_model):
    notes = checkpoints.load(make_model(), write(tmp_path, clip_state, foreign)).notes
    assert sum("trained with QuickGELU" in note for note in notes) == 1


def test_openais_own_file_is_known_to_be_quickgelus(tmp_path, clip_state, foreign, make_model):
    notes = checkpoints.load(make_model(), openai_state_dict(tmp_path, clip_state, foreign)).notes
    assert not any("QuickGELU" in note for note in notes)
