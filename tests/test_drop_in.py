"""The drop-ins take the authors' state dicts and give their modules' results."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from signal_reid import drop_in


@pytest.fixture(scope="module")
def authors(golden):
    model = golden.model()
    return model, golden.authors_state(model)


@pytest.fixture(scope="module")
def encoded(golden, authors):
    with torch.no_grad():
        tokens, cls = authors[0].encode(golden.images, golden.cameras)
    return [*tokens.unbind(1)], [*cls.unbind(1)]


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def test_selective_interaction_of_the_golden_weights(golden, authors, encoded):
    module = drop_in.Select_Interactive_Module(512, k=golden.config.model.k_intra)
    module.load_state_dict(part(authors[1], "SIM."), strict=True)
    with torch.no_grad():
        feature = module(*encoded[0], *encoded[1])
    expected = torch.from_numpy(golden.expected["eval_feature"][:, 1536:])
    assert (feature - expected).abs().max() < 1e-4 * expected.abs().max()


def test_selection_keeps_the_golden_tokens(golden, authors, encoded):
    module = drop_in.TokenSelection(512, k=golden.config.model.k_intra)
    module.load_state_dict(part(authors[1], "SIM.token_selection."), strict=True)
    selected = torch.stack(module(*encoded[0], *encoded[1]), dim=1)
    expected = torch.from_numpy(golden.expected["selected"])
    assert torch.equal(selected.abs().sum(-1) > 0, expected)
    assert torch.equal(selected[expected], torch.stack(encoded[0], 1)[expected])


def test_interaction_of_selected_tokens_equals_the_whole_module(golden, authors, encoded):
    module = drop_in.Select_Interactive_Module(512, k=golden.config.model.k_intra)
    module.load_state_dict(part(authors[1], "SIM."), strict=True)
    with torch.no_grad():
        selected = module.token_selection(*encoded[0], *encoded[1])
        in_two_steps = module.modal_interactive(*selected, *encoded[1])
        assert torch.allclose(in_two_steps, module(*encoded[0], *encoded[1]), rtol=1e-4, atol=1e-4)


def test_alignment_losses_of_the_golden_weights(golden, authors, encoded):
    module = drop_in.AlignmentM(512, *golden.config.grid_size)
    module.load_state_dict(part(authors[1], "AlignM."), strict=True)
    global_loss, local_loss = module(*encoded[0], stage="together_CLS_Patch")
    assert global_loss.item() == pytest.approx(golden.expected["loss_gam"].item(), rel=1e-4)
    assert local_loss.item() == pytest.approx(golden.expected["loss_lam"].item(), rel=1e-4)
    assert module(*encoded[0], stage="CLS").item() == global_loss.item()


def test_state_dicts_go_back_unchanged(golden, authors):
    module = drop_in.AlignmentM(512, *golden.config.grid_size)
    state = part(authors[1], "AlignM.")
    module.load_state_dict(state, strict=True)
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def by_convolutions(module, x):
    """The sampling as the textbook has it: convolutions, then grid_sample."""
    q = module.proj_q(x).reshape(-1, module.n_group_channels, *x.shape[2:])
    o = module.conv_offset(q).tanh().squeeze(1)
    (Hk, Wk), factor = o.shape[1:], module.offset_range_factor
    y, x_ = (2 * (torch.arange(n, dtype=x.dtype) + 0.5) / (n - 1) - 1 for n in (Hk, Wk))
    grid = torch.stack([x_ + o * factor / (Wk - 1), y[:, None] + o * factor / (Hk - 1)], -1).clamp(-1, 1)
    return F.grid_sample(x.reshape(-1, module.n_group_channels, *x.shape[2:]), grid, align_corners=True)


@pytest.mark.parametrize(
    "arguments", [(1, 8, 1, 4, 2, 4), (2, 4, 2, 4, 2, 4), (1, 8, 1, 2, 1.5, 3), (1, 8, 4, 3, 2, 5)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_deformable_sampling_for_any_groups_and_kernels(arguments, channels_last):
    module = drop_in.DA_sample(*arguments).double()
    x = torch.randn(3, 8, 12, 9, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(module(x), by_convolutions(module, x), rtol=1e-9)


def test_few_tokens_are_all_kept():
    module = drop_in.TokenSelection(4, k=112)
    patches, cls = torch.randn(3, 2, 5, 4).unbind(0), torch.randn(3, 2, 4).unbind(0)
    assert all(torch.equal(a, b) for a, b in zip(module(*patches, *cls), patches, strict=True))


@pytest.mark.parametrize("count", [3, 4, 5])
def test_volumes(count):
    vectors = torch.randn(count, 6, 10, dtype=torch.float64).unbind(0)
    function = getattr(drop_in, f"volume_computation{count}")
    stacked = torch.stack([vectors[0][:, None].expand(-1, 6, -1), *(v[None].expand(6, -1, -1) for v in vectors[1:])], 2)
    expected = torch.linalg.det(stacked @ stacked.transpose(2, 3)).abs().sqrt()
    assert function(*vectors).dtype == torch.float32  # as the authors' code has it, for fp64 too
    assert torch.allclose(function(*vectors), expected.float())


def test_gradients_reach_every_parameter_that_theirs_reach():
    modules = nn.ModuleList([drop_in.Select_Interactive_Module(16, k=3), drop_in.AlignmentM(16, 8, 8)])
    patches, cls = torch.randn(3, 2, 64, 16).unbind(0), torch.randn(3, 2, 16).unbind(0)
    global_loss, local_loss = modules[1](*patches, stage="together_CLS_Patch")
    (modules[0](*patches, *cls).sum() + global_loss + local_loss).backward()
    without = {name for name, p in modules.named_parameters() if p.grad is None}
    assert without == {f"0.token_selection.W_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")}


def three(tokens, dim):
    generator = torch.Generator().manual_seed(0)
    patches = [torch.randn(2, n, dim, generator=generator) for n in tokens]
    return *patches, *torch.randn(3, 2, dim, generator=generator)


@pytest.mark.parametrize("tokens", [(9, 9, 9), (9, 5, 2)])
def test_the_two_halves_of_the_selection_make_the_whole(tokens):
    """Also where the modalities have different numbers of tokens."""
    module = drop_in.TokenSelection(8, k=2)
    arguments = three(tokens, 8)
    intra, inter = module.intra_modal_token_selection(*arguments), module.inter_modal_token_selection(*arguments)
    for own, others, patches, selected in zip(intra, inter, arguments, module(*arguments), strict=False):
        assert own.shape == others.shape == (*patches.shape[:2], 1)
        assert torch.equal(selected, patches * ((own + others) > 0))
        assert own.sum(1).flatten().tolist() == [min(2, patches.shape[1])] * 2


def test_modalities_of_different_lengths_are_those_of_padding_with_nothing():
    module = drop_in.Select_Interactive_Module(8, k=2)
    arguments = three((9, 5, 2), 8)
    selected = torch.cat(module.token_selection(*arguments), dim=1)
    attended, _ = module.modal_interactive.cross_attn(torch.stack(arguments[3:], 1), selected, selected)
    x = module.modal_interactive.norm1(torch.stack(arguments[3:], 1) + attended)
    expected = module.modal_interactive.norm2(x + module.modal_interactive.ffn(x)).flatten(1)
    assert torch.allclose(module(*arguments), expected, atol=1e-5)


def test_hooks_fire_on_every_module_and_change_nothing():
    """The authors' CAM script hooks SIM.token_selection."""
    interactive, alignment = drop_in.Select_Interactive_Module(16, k=3), drop_in.AlignmentM(16, 8, 8)
    arguments = three((64, 64, 64), 16)
    before = interactive(*arguments), *alignment(*arguments[:3], stage="together_CLS_Patch")
    seen = set()
    for module in (interactive, alignment):
        for part in module.modules():
            part.register_forward_hook(lambda part, *_: seen.add(part))
    after = interactive(*arguments), *alignment(*arguments[:3], stage="together_CLS_Patch")
    silent = {interactive.token_selection.W_v, interactive.modal_interactive.cross_attn.out_proj}  # nobody calls these
    assert seen == {*interactive.modules(), *alignment.modules()} - silent
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, after, strict=True))


def test_a_hook_on_the_selection_sees_the_selected_tokens():
    module = drop_in.Select_Interactive_Module(8, k=2)
    arguments, seen = three((6, 6, 6), 8), []
    module.token_selection.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    module(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(seen, module.token_selection.forward(*arguments), strict=True))


@pytest.mark.parametrize("factor", [0, -1])
def test_without_a_range_the_head_moves_the_points_as_they_are(factor):
    module = drop_in.DA_sample(1, 8, 2, 4, factor, 4).double()
    x = torch.randn(3, 8, 12, 8, dtype=torch.float64)
    o = module.conv_offset(module.proj_q(x).reshape(-1, 4, 12, 8)).squeeze(1)
    points = module._get_ref_points(3, 2, 3, x.dtype, x.device)
    assert points.shape == (6, 3, 2, 2)
    assert points[0, :, 0, 0].tolist() == [-0.5, 0.5, 1.5]
    expected = F.grid_sample(
        x.reshape(6, 4, 12, 8), (points + o[..., None]).clamp(-1, 1)[..., (1, 0)], align_corners=True
    )
    assert torch.allclose(module(x), expected)


def test_layer_norm_and_quick_gelu_keep_the_precision_they_are_given():
    x = torch.randn(3, 8).half()
    assert torch.equal(drop_in.LayerNorm(8)(x), F.layer_norm(x.float(), (8,)).half())
    assert torch.equal(drop_in.QuickGELU()(x.float()), x.float() * torch.sigmoid(1.702 * x.float()))
