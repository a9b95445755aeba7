"""The absorbed forms equal the textbook ones, for any number of modalities."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import signal_reid
from signal_reid.backbones.clip_vit import ClipViT, ClipViTConfig, resize_position_embedding
from signal_reid.methods.signal.local_alignment import LocalAlignment, by_modality
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction
from signal_reid.ops import cross_attend, deformable_sample


def as_multihead_attention(interaction):
    """PyTorch's own attention with the same weights."""
    C = interaction.output.in_features
    attention = nn.MultiheadAttention(C, interaction.heads, batch_first=True).double()
    attention.in_proj_weight.data, attention.in_proj_bias.data = interaction.qkv.weight.data, interaction.qkv.bias.data
    attention.out_proj.load_state_dict(interaction.output.state_dict())
    return attention


@pytest.mark.parametrize("M", [2, 3, 4])
def test_interaction_is_attention_over_masked_tokens(M):
    module = SelectiveInteraction(32, k_intra=3, heads=4).double()
    nn.init.normal_(module.interaction.qkv.bias)
    tokens, cls = torch.randn(2, M, 9, 32).double(), torch.randn(2, M, 32).double()
    mask = module.selection(tokens, cls)
    assert 0 < mask.sum() < mask.numel()
    keys = (tokens * mask[..., None]).flatten(1, 2)
    expected, _ = as_multihead_attention(module.interaction)(cls, keys, keys)
    layers = module.interaction
    attended = layers.output(cross_attend(cls, tokens, mask, layers.qkv.weight, layers.qkv.bias, layers.heads))
    assert torch.allclose(attended, expected, rtol=1e-9)
    x = layers.norm1(cls + expected)
    x = layers.norm2(x + layers.contract(F.gelu(layers.expand(x))))
    assert torch.allclose(module(tokens, cls), x.flatten(1), rtol=1e-9)


def test_selection_scores_are_those_of_projected_tokens():
    module = SelectiveInteraction(16, k_intra=2, heads=4).double().selection
    tokens, cls = torch.randn(3, 3, 10, 16).double(), torch.randn(3, 3, 16).double()
    q, k = module.query(cls), module.key(tokens)
    expected = torch.zeros(3, 3, 10, dtype=torch.bool)
    for m in range(3):
        own = (tokens[:, m] @ cls[:, m, :, None]).squeeze(-1)
        expected[:, m].scatter_(1, own.topk(2).indices, True)
        others = [o for o in range(3) if o != m]
        across = (k[:, others].flatten(1, 2) @ q[:, m, :, None]).squeeze(-1).softmax(1)
        kept = torch.zeros(3, 20, dtype=torch.bool).scatter_(1, across.topk(4).indices, True)
        expected[:, others] |= kept.view(3, 2, 10)
    assert torch.equal(module(tokens, cls), expected)


def test_offsets_are_those_of_the_convolutions():
    module = LocalAlignment(12, modalities=2, grid_size=(9, 10)).double()
    tokens = torch.randn(3, 2, 90, 12).double()
    offsets = module.offsets(tokens)
    assert offsets.shape == (3, 2, 2, 2)
    for m in range(2):
        x = tokens[:, m].transpose(1, 2).unflatten(2, (9, 10))
        x = F.conv2d(x, module.query_weight[m, :, :, None, None], module.query_bias[m])
        x = F.gelu(F.conv2d(x, module.mix_weight[m, :, :, None, None], module.mix_bias[m]))
        x = F.gelu(F.conv2d(x, module.window_weight[m, :, None], module.window_bias[m], stride=4, groups=12))
        x = F.conv2d(x, module.offset_weight[m, None, :, None, None])
        assert torch.allclose(offsets[:, m], x[:, 0], rtol=1e-9)


def test_local_alignment_is_the_mean_difference_of_the_samples():
    module = LocalAlignment(6, modalities=3, grid_size=(8, 8)).double()
    tokens = torch.randn(2, 3, 64, 6).double()
    offsets = module.offsets(tokens)
    a, b, c = (deformable_sample(tokens[:, m], offsets[:, m], (8, 8)) for m in range(3))
    expected = (F.mse_loss(a, b) + F.mse_loss(a, c) + F.mse_loss(b, c)) / 3
    assert module(tokens).item() == pytest.approx(expected.item())


def test_tokens_that_lie_modality_by_modality_are_not_copied():
    maps = torch.randn(3, 2, 64, 6)
    assert by_modality(maps.transpose(0, 1)).data_ptr() == maps.data_ptr()
    assert by_modality(maps).is_contiguous()


def test_local_alignment_refuses_a_grid_with_fewer_than_two_windows():
    with pytest.raises(ValueError, match="grid_size must be at least 8 x 8, got \\(8, 4\\)"):
        LocalAlignment(6, modalities=3, grid_size=(8, 4))


@pytest.mark.parametrize("stride", [8, 6])
def test_backbone_tokens_follow_the_grid(stride):
    config = ClipViTConfig(layers=1, width=12, heads=2, patch_size=8, stride=stride, output_dim=8)
    grid = ((32 - 8) // stride + 1, (16 - 8) // stride + 1)
    assert ClipViT(config, (32, 16))(torch.randn(2, 3, 32, 16)).shape == (2, 1 + grid[0] * grid[1], 8)


def test_camera_embedding_moves_features_and_can_be_left_out(tiny_config):
    config = tiny_config()
    model = signal_reid.build_model(config, 4, num_cameras=2).eval()
    images = torch.randn(1, 3, 3, 64, 64)
    without, first, second = (model(images, c) for c in (None, torch.tensor([0]), torch.tensor([1])))
    assert not torch.allclose(first, second)
    assert not torch.allclose(without, first)
    model.backbone.camera_embedding.data.zero_()
    assert torch.allclose(model(images, torch.tensor([1])), without)


def test_position_embedding_is_resized_bilinearly():
    embedding = torch.randn(1 + 14 * 14, 6)
    resized = resize_position_embedding(embedding, (16, 8))
    grid = embedding[1:].T.reshape(1, 6, 14, 14)
    expected = F.interpolate(grid, (16, 8), mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(resized[0], embedding[0])
    assert torch.allclose(resized[1:], expected[0].flatten(1).T)
    assert resize_position_embedding(embedding, (14, 14)) is embedding
    with pytest.raises(ValueError, match=r"must have 1 \+ n \* n rows, got 3"):
        resize_position_embedding(torch.randn(3, 6), (2, 2))


@pytest.mark.parametrize("modalities", [2, 4])
@pytest.mark.parametrize("heads", ["joint", "per_modality"])
def test_other_numbers_of_modalities_train_and_evaluate(tiny_config, modalities, heads):
    config = tiny_config("rgbnt201", f"model.modalities={modalities}", f"model.heads={heads}")
    model = signal_reid.build_model(config, 4, 2)
    images, labels = torch.randn(4, modalities, 3, 64, 64), torch.tensor([0, 0, 1, 1])
    losses = model.losses(model.encode(images, torch.tensor([0, 1, 0, 1])), labels)
    heads_lost = [name for name in losses if name.startswith("head_") and "." not in name]
    assert len(heads_lost) == 1 + (1 if heads == "joint" else modalities)
    signal_reid.training.total_loss(losses, config).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    assert model.eval()(images).shape == (4, 2 * modalities * 32)


def test_evaluation_runs_neither_alignment(tiny_config, monkeypatch):
    model = signal_reid.build_model(tiny_config(), 4, 2).eval()
    for module in (model.global_alignment, model.local_alignment):
        monkeypatch.setattr(module, "forward", lambda tokens: pytest.fail("alignment ran in evaluation"))
    assert model(torch.randn(2, 3, 3, 64, 64)).shape == (2, 6 * 32)


def test_modules_can_be_switched_off(tiny_config):
    off = [f"model.{name}=false" for name in ("selective_interaction", "global_alignment", "local_alignment")]
    model = signal_reid.build_model(tiny_config("rgbnt201", *off), 4, 2)
    images, labels = torch.randn(4, 3, 3, 64, 64), torch.tensor([0, 0, 1, 1])
    losses = model.losses(model.encode(images), labels)
    assert [name for name in losses if "." not in name] == ["head_0"]
    assert model(images).shape == (4, 3 * 32)
    assert model.eval()(torch.randn(2, 3, 3, 64, 64)).shape == (2, 3 * 32)


def test_images_of_another_shape_are_named(tiny_config):
    model = signal_reid.build_model(tiny_config(), 4, 2)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 3, 64, 64\), got \(2, 3, 3, 64, 32\)"):
        model(torch.randn(2, 3, 3, 64, 32))


def test_one_identity_is_refused(tiny_config):
    with pytest.raises(ValueError, match="num_identities must be at least 2, got 1"):
        signal_reid.build_model(tiny_config(), 1, 2)


def test_the_feature_does_not_depend_on_the_mode(tiny_config):
    model = signal_reid.build_model(tiny_config(), 4, 2)
    images = torch.randn(4, 3, 3, 64, 64)
    assert torch.equal(model.train()(images), model.eval()(images))


def test_label_smoothing_reaches_every_cross_entropy(tiny_config):
    images, labels = torch.randn(4, 3, 3, 64, 64), torch.tensor([0, 0, 1, 1])

    def losses(smoothing):
        torch.manual_seed(0)
        model = signal_reid.build_model(tiny_config("rgbnt201", f"losses.label_smoothing={smoothing}"), 4, 2)
        with torch.no_grad():
            return model.losses(model.encode(images), labels)

    without, smoothed = losses(0.0), losses(0.3)
    names = {name for name in without if "." not in name}
    changed = {name for name in names if not torch.equal(without[name], smoothed[name])}
    assert changed == names - {"lam"}
