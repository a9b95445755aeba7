"""What may differ between a checkpoint and a model, what may not, and what is said about it."""

import re

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from signal_reid import checkpoints
from signal_reid.checkpoints import CheckpointError


class Wrapper(nn.Module):
    """Stands in for DistributedDataParallel, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.fixture
def refused(copy_of, same):
    """The message of a refused load, once it is certain that the model was left as it was."""

    def load(model, source):
        before = copy_of(model)
        with pytest.raises(CheckpointError) as caught:
            checkpoints.load(model, source)
        assert same(model.state_dict(), before)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return load


def test_our_file_gives_the_same_model(make_model, same, tmp_path):
    source, model = make_model(seed=1), make_model(seed=2)
    checkpoints.export(source, tmp_path / "model.safetensors")
    report = checkpoints.load(model, tmp_path / "model.safetensors")
    assert same(model.state_dict(), source.state_dict())
    assert (report.loaded, report.dropped, report.initialised) == (len(source.state_dict()), (), ())
    assert report.summary().endswith(f"model.safetensors: {report.loaded} entries loaded (signal-reid naming)")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_do_not_matter(prefix, foreign, make_model, same):
    theirs = foreign.random_state(foreign.authors_shapes(128))
    plain, wrapped = make_model(seed=1), make_model(seed=2)
    checkpoints.load(plain, theirs)
    report = checkpoints.load(wrapped, {prefix + name: value for name, value in theirs.items()})
    assert same(plain.state_dict(), wrapped.state_dict())
    assert report.format == "authors"


def test_wrapped_model_is_loaded(make_model, same):
    source, model = make_model(seed=1), make_model(seed=2)
    checkpoints.load(Wrapper(model), source.state_dict())
    assert same(model.state_dict(), source.state_dict())


def test_only_a_signal_can_be_loaded():
    with pytest.raises(TypeError, match=r"must be a method\'s model .* got Linear"):
        checkpoints.load(nn.Linear(2, 2), {})


def test_other_identities_drop_the_classifiers_and_keep_the_feature(make_model):
    source, model = make_model(identities=8, seed=1).eval(), make_model(identities=5, seed=2).eval()
    report = checkpoints.load(model, source.state_dict())
    images, cameras = torch.randn(2, 3, 3, 128, 64), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(model(images, cameras), source(images, cameras))
    names = ("heads.0.classifier.weight", "interaction_head.classifier.weight")
    assert tuple(name for name, _ in report.dropped) == names
    assert report.initialised == names
    assert "8 identities in the file, 5 in the model" in report.summary()
    assert "evaluation does not read them" in report.summary()


def test_other_cameras_drop_the_camera_embedding_and_say_what_that_means(make_model, copy_of):
    source, model = make_model(cameras=6, seed=1), make_model(cameras=4, seed=2)
    before = copy_of(model)["backbone.camera_embedding"]
    report = checkpoints.load(model, source.state_dict())
    assert torch.equal(model.backbone.camera_embedding, before)
    ((name, reason),) = report.dropped
    assert name == "backbone.camera_embedding"
    assert reason.startswith("6 cameras in the file, 4 in the model, whose camera embedding keeps its initial values")
    assert reason.endswith("build the model with 6 cameras")


def test_dropped_entries_go_by_the_names_of_the_file(foreign, make_model):
    report = checkpoints.load(make_model(), foreign.random_state(foreign.authors_shapes(128, identities=3, cameras=2)))
    assert [name for name, _ in report.dropped] == [
        "clip_vision_encoder.cv_embed",
        "classifier.weight",
        "classifier_var.weight",
    ]


@pytest.mark.parametrize(
    ("module", "abbreviation"),
    [("global_alignment", "GAM"), ("local_alignment", "LAM"), ("selective_interaction", "SIM")],
)
def test_module_that_the_model_has_switched_off_is_dropped(module, abbreviation, make_model):
    report = checkpoints.load(make_model(f"model.{module}=false"), make_model().state_dict())
    assert any(name.startswith(module) for name, _ in report.dropped)
    assert f"the model has no {abbreviation}" in report.summary()


@pytest.mark.parametrize("module", ["global_alignment", "local_alignment"])
def test_training_only_module_that_the_file_lacks_keeps_its_initial_values(module, make_model):
    report = checkpoints.load(make_model(), make_model(f"model.{module}=false").state_dict())
    assert report.initialised == (module,)


def test_file_without_sim_is_refused(make_model, refused):
    message = refused(make_model(), make_model("model.selective_interaction=false").state_dict())
    assert "missing (selective_interaction.selection.query.weight" in message
    assert "set model.selective_interaction=false" in message


def test_file_without_a_camera_embedding_is_refused(make_model, refused):
    message = refused(make_model(), make_model("model.backbone.camera_embedding=false").state_dict())
    assert "1 missing (backbone.camera_embedding)" in message
    assert "set model.backbone.camera_embedding=false" in message


def test_camera_embedding_that_the_model_has_switched_off_is_dropped(make_model):
    report = checkpoints.load(make_model("model.backbone.camera_embedding=false"), make_model().state_dict())
    assert [name for name, _ in report.dropped] == ["backbone.camera_embedding"]


def test_part_of_a_training_only_module_is_refused(make_model, refused):
    state = make_model().state_dict()
    del state["local_alignment.mix_bias"]
    assert "1 missing (local_alignment.mix_bias)" in refused(make_model(), state)


def test_other_heads_are_refused(make_model, refused):
    message = refused(make_model(), make_model("model.heads=per_modality").state_dict())
    assert "heads.0.neck.weight: (32,) in the file, (96,) in the model" in message
    assert "model.heads (joint or per_modality) differs" in message


@pytest.mark.parametrize("naming", ["ours", "authors"])
def test_another_depth_is_one_number_and_not_a_list_of_names(naming, make_model, refused, tmp_path):
    small, large = make_model("model.backbone.layers=1"), make_model("model.backbone.layers=3")
    checkpoints.export(small, tmp_path / "small.safetensors", naming)
    for source, message in {
        tmp_path / "small.safetensors": "layers 1 (3 in the model); model.backbone.layers=1 builds",
        tmp_path / "wide.safetensors": "width 96 (48 in the model); model.backbone.width=96 builds",
    }.items():
        if source.name == "wide.safetensors":
            checkpoints.export(make_model("model.backbone.layers=3", "model.backbone.width=96"), source, naming)
        said = refused(large, source)
        assert f"its backbone is a CLIP vision transformer of another size: {message}" in said
        assert "missing" not in said


def test_another_image_size_is_refused(make_model, refused):
    message = refused(make_model(), make_model("data.image_size=[64,64]").state_dict())
    assert "backbone.position_embedding: (65, 48) in the file, (129, 48) in the model" in message
    assert "trained at another image size" in message


def test_turned_image_is_refused_though_its_shapes_agree(make_model, refused, tmp_path):
    checkpoints.export(make_model("data.image_size=[64,128]"), tmp_path / "wide.safetensors")
    message = refused(make_model(), tmp_path / "wide.safetensors")
    assert "a grid of 8 x 16 patches, the model has 16 x 8" in message


def test_long_lists_are_shortened_and_counted(foreign, make_model, refused):
    theirs = foreign.random_state(foreign.authors_shapes(128))
    theirs = {name: value for name, value in theirs.items() if ".attn." not in name}
    theirs |= {f"extra.{index}": torch.zeros(1) for index in range(6)}
    message = refused(make_model(), theirs)
    assert "read as the authors' Signal" in message
    assert "8 missing (clip_vision_encoder.base.transformer.resblocks.0.attn.in_proj_weight, " in message
    assert "and 4 more), 6 unexpected (extra.0, extra.1, extra.2, extra.3, and 2 more)" in message


def test_authors_backbone_of_another_kind_is_refused(foreign, make_model, refused):
    theirs = foreign.random_state(foreign.authors_shapes(128))
    adapter = "clip_vision_encoder.base.transformer.resblocks.0.adapter_r.0.weight"
    message = refused(make_model(), theirs | {adapter: torch.zeros(2, 2)})
    assert f"1 unexpected ({adapter})" in message


def test_offset_heads_that_do_not_stack_are_named(foreign, make_model, refused):
    theirs = foreign.random_state(foreign.authors_shapes(128))
    del theirs["AlignM.DAS_n.proj_q.bias"]
    message = refused(make_model(), theirs)
    assert "1 missing (AlignM.DAS_r.proj_q.bias + AlignM.DAS_n.proj_q.bias + AlignM.DAS_t.proj_q.bias)" in message
    assert "2 unexpected (AlignM.DAS_r.proj_q.bias, AlignM.DAS_t.proj_q.bias)" in message


def test_integers_in_the_place_of_weights_are_refused(make_model, refused):
    state = make_model().state_dict()
    state["heads.0.neck.weight"] = state["heads.0.neck.weight"].long()
    assert "heads.0.neck.weight: (96,) integers in the file, (96,) in the model" in refused(make_model(), state)


def test_known_name_on_too_few_dimensions_is_refused(foreign, make_model, refused):
    theirs = foreign.random_state(foreign.authors_shapes(128)) | {"clip_vision_encoder.cv_embed": torch.zeros(4)}
    assert "read as the authors' Signal, it does not fit" in refused(make_model(), theirs)


def test_any_damaged_entry_is_named_and_nothing_is_copied(make_model, copy_of, same):
    model, state = make_model(seed=1), make_model(seed=2).state_dict()
    before = copy_of(model)

    @settings(max_examples=40, deadline=None)
    @given(name=st.sampled_from(sorted(state)), missing=st.booleans())
    def check(name, missing):
        assume(not (missing and name == "global_alignment.temperature"))  # the whole of a module that may be missing
        damaged = state | {name: torch.zeros(*state[name].shape, 2)}
        if missing:
            del damaged[name]
        with pytest.raises(CheckpointError, match=re.escape(name)):
            checkpoints.load(model, damaged)
        assert same(model.state_dict(), before)

    check()


def test_description_tells_which_model_a_file_needs(foreign, make_model, clip_state, tiny_config, tmp_path):
    theirs = foreign.random_state(foreign.authors_shapes(128, identities=7, cameras=3))
    assert checkpoints.describe(theirs)[:4] == ("authors", 7, 3, None)
    assert checkpoints.describe(clip_state)[:4] == ("clip", None, 0, None)
    checkpoints.export(make_model(identities=5), tmp_path / "ours.safetensors", config=tiny_config())
    description = checkpoints.describe(tmp_path / "ours.safetensors")
    assert description[:3] == ("signal-reid", 5, 4)
    assert "patch_size: 8" in description.config
