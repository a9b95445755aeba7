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
    assert torch.allclose(function(*vectors), expected)


def test_gradients_reach_every_parameter_that_theirs_reach():
    modules = nn.ModuleList([drop_in.Select_Interactive_Module(16, k=3), drop_in.AlignmentM(16, 8, 8)])
    patches, cls = torch.randn(3, 2, 64, 16).unbind(0), torch.randn(3, 2, 16).unbind(0)
    global_loss, local_loss = modules[1](*patches, stage="together_CLS_Patch")
    (modules[0](*patches, *cls).sum() + global_loss + local_loss).backward()
    without = {name for name, p in modules.named_parameters() if p.grad is None}
    assert without == {f"0.token_selection.W_{x}.{kind}" for x in "qkv" for kind in ("weight", "bias")}
