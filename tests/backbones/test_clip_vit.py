"""The backbone's blocks are those of the textbook, whichever backend adds and normalises between their branches."""

import pytest
import torch
import torch.nn.functional as F

from signal_reid import ops
from signal_reid.backbones.clip_vit import ClipViT, ClipViTConfig
from signal_reid.backbones.clip_vit import network as clip_vit


def textbook(model, images):
    """x + attention(LN(x)), then x + MLP(LN(x)), block by block, by PyTorch's own layer normalisation."""

    def norm(module, x):
        return F.layer_norm(x, module.weight.shape, module.weight, module.bias, module.eps)

    class_token = model.class_token.expand(len(images), 1, -1)
    patches = model.embed_patches(images)
    x = torch.cat([class_token.to(patches.dtype), patches], dim=1) + model.position_embedding
    x = norm(model.norm_before, x)
    for block in model.blocks:
        x = x + block.attention(norm(block.norm1, x))
        x = x + block.mlp(norm(block.norm2, x))
    return norm(model.norm_after, x) @ model.projection


@pytest.fixture
def model(backend):
    torch.manual_seed(3)
    model = ClipViT(ClipViTConfig(layers=2, width=24, heads=2, patch_size=8, stride=8, output_dim=12), (16, 24))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.3)
    return model


def outputs_and_gradients(forward, model, images):
    model.zero_grad()
    output = forward(images)
    output.float().square().sum().backward()
    return {"output": output.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def test_blocks_are_the_textbooks(model):
    images = torch.randn(3, 3, 16, 24)
    ours = outputs_and_gradients(model, model, images)
    expected = outputs_and_gradients(lambda x: textbook(model, x), model, images)
    for name, value in ours.items():
        assert (value - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_under_autocast_they_are_as_close_to_it_as_plain_pytorch(model):
    images = torch.randn(3, 3, 16, 24)
    wide = ClipViT(ClipViTConfig(layers=2, width=24, heads=2, patch_size=8, stride=8, output_dim=12), (16, 24)).double()
    wide.load_state_dict(model.state_dict())
    with ops.use_backend("reference"):
        exact = outputs_and_gradients(lambda x: textbook(wide, x), wide, images.double())
    with torch.autocast(images.device.type, torch.bfloat16):
        ours = outputs_and_gradients(model, model, images)
        plain = outputs_and_gradients(lambda x: textbook(model, x), model, images)
    assert ours["output"].dtype == plain["output"].dtype == torch.bfloat16
    for name, value in ours.items():
        error, of_plain = ((x.double() - exact[name]).norm() for x in (value, plain[name]))
        assert error <= 2 * of_plain, name


def test_the_residual_stream_stays_in_fp32_and_branches_get_what_their_product_takes(model, monkeypatch):
    calls = []

    def recorded(x, branch, *arguments, **keywords):
        results = ops.add_layer_norm(x, branch, *arguments, **keywords)
        calls.append((branch is None, *(result.dtype for result in results)))
        return results

    monkeypatch.setattr(clip_vit, "add_layer_norm", recorded)
    with torch.autocast("cuda" if torch.get_default_device().type == "cuda" else "cpu", torch.bfloat16):
        model(torch.randn(1, 3, 16, 24))
    # Two in each of two blocks, the first without a branch to add, and one behind them.
    assert calls == [(index == 0, torch.float32, torch.bfloat16) for index in range(5)]


def test_compiled_it_is_the_textbook_without_a_graph_break(model):
    images = torch.randn(2, 3, 16, 24)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), textbook(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("naming", ClipViT.namings, ids=lambda naming: naming.title)
def test_every_entry_has_names_in_each_kind_of_file(naming):
    settings = ClipViTConfig(layers=2, width=24, heads=2, patch_size=8, stride=8, output_dim=12, camera_embedding=False)
    ours = [f"backbone.{name}" for name in ClipViT(settings, (16, 24)).state_dict()]
    theirs = [name for entry in ours for name in naming.file_names(entry, ours)]
    assert len(set(theirs)) == len(theirs)
    assert not set(theirs) & set(ours)


@pytest.mark.parametrize(("size", "stride"), [((32, 48), 8), ((32, 48), 6), ((37, 30), 8)])
def test_the_area_of_the_tokens_has_each_cell_around_the_pixels_that_its_patch_sees(size, stride):
    model = ClipViT(ClipViTConfig(layers=1, width=24, heads=2, patch_size=8, stride=stride, output_dim=12), size)
    top, left, bottom, right = model.token_area
    rows, columns = model.grid_size
    for row, column in ((0, 0), (rows - 1, columns - 1), (1, 2)):
        images = torch.ones(1, 3, *size, requires_grad=True)
        model.embed_patches(images)[0, row * columns + column].sum().backward()
        seen = images.grad[0].abs().sum(0).nonzero().float() + 0.5  # centres of pixels
        middle = (seen.amin(0) + seen.amax(0)) / 2
        cell = top + (row + 0.5) * (bottom - top) / rows, left + (column + 0.5) * (right - left) / columns
        assert middle.tolist() == pytest.approx(cell)


@pytest.mark.parametrize("camera", [-1, 4])
def test_a_camera_that_the_model_does_not_know_is_named(camera):
    settings = ClipViTConfig(layers=1, width=24, heads=2, patch_size=8, stride=8, output_dim=12)
    model = ClipViT(settings, (16, 24), num_cameras=4)
    with pytest.raises(ValueError, match=rf"cameras must be in 0\.\.3, .*, got {camera}"):
        model(torch.randn(2, 3, 16, 24), torch.tensor([0, camera]))
