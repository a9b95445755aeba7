"""What the operators say they cost is what PyTorch's counter finds in the formulas that they stand for."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from signal_reid import ops
from signal_reid.ops.cpu import cross_attention
from signal_reid.ops.cpu import masked_attention as kept_attention
from signal_reid.ops.flops import FORMULAS, flop_counter
from signal_reid.ops.library import ENTRIES
from signal_reid.ops.reference import attention, gramian, gramian_loss, token_selection

B, M, N, C, Q, H = 3, 3, 10, 8, 6, 2
TOKENS, CLS, QUERIES = torch.randn(B, M, N, C), torch.randn(B, M, C), torch.randn(B, Q, C)
MASK = torch.ones(B, M, N, dtype=torch.bool)
VECTORS = tuple(torch.randn(5, C) for _ in range(2))
ANCHOR, FEATURES, TEMPERATURE = torch.randn(4, C), torch.randn(5, M, C), torch.tensor(0.07)
QKV = torch.randn(3, B, H, N, 4)


def plain(function, *arguments):
    """What PyTorch's counter finds by itself."""
    with FlopCounterMode(display=False) as counter:
        result = function(*arguments)
    return counter.get_total_flops(), result


def ours(name, *arguments):
    """What it finds in one of our operators with our formulas."""
    with flop_counter() as counter:
        getattr(torch.ops.signal_reid, name)(*arguments)
    return counter.get_total_flops()


def test_operators_cost_what_their_oracles_multiply():
    selection = (TOKENS, CLS, CLS, 2, 4)
    assert ours("select_tokens", *selection) == plain(token_selection.select_tokens, *selection)[0] > 0
    assert ours("gramian_volume", ANCHOR, VECTORS) == plain(gramian.forward, ANCHOR, VECTORS)[0] > 0
    batch = (FEATURES, TEMPERATURE, 0.1)
    assert ours("gramian_loss", *batch) == plain(gramian_loss.forward, *batch)[0] > 0
    assert ours("attend", QKV) == plain(attention.forward, QKV)[0] > 0
    assert ours("attend_masked", QUERIES, TOKENS, MASK) == plain(kept_attention.forward, QUERIES, TOKENS, MASK)[0] > 0


def test_backwards_cost_what_the_gradient_needs():
    grad = torch.randn(4, 5)
    assert ours("gramian_volume_backward", grad, ANCHOR, VECTORS) == plain(gramian.backward, grad, ANCHOR, VECTORS)[0]
    loss, slope, statistics = gramian_loss.forward(FEATURES, TEMPERATURE, 0.1)
    of_loss = (FEATURES, torch.ones_like(loss), TEMPERATURE, slope, statistics, 0.1)
    assert ours("gramian_loss_backward", *of_loss) == plain(gramian_loss.backward, *of_loss)[0] > 0
    attended, p = attention.forward(QKV)
    assert ours("attend_backward", attended, QKV, p) == plain(attention.backward, attended, QKV, p)[0] > 0
    z, kept = kept_attention.forward(QUERIES, TOKENS, MASK)
    of_masked = (z, QUERIES, TOKENS, MASK, z, kept)
    assert ours("attend_masked_backward", *of_masked) == plain(kept_attention.backward, *of_masked)[0] > 0


def test_windows_cost_what_the_convolution_does():
    """One channel, as PyTorch's counter takes the gradient of a depthwise window for that of a full one."""
    x, window = torch.randn(B, 9, 8, 1), torch.randn(1, 4, 4)
    image, kernel = x.permute(0, 3, 1, 2).requires_grad_(), window.unsqueeze(1).requires_grad_()
    forward, y = plain(lambda: F.conv2d(image, kernel, stride=4))
    grad = torch.ones_like(y).permute(0, 2, 3, 1)
    x, window = x.detach(), window.detach()
    assert ours("convolve_windows", x, window) == forward > 0
    assert ours("convolve_windows_backward", grad, x, window) == plain(y.sum().backward)[0] == 2 * forward
    assert ours("convolve_windows", x.expand(-1, -1, -1, C), window.expand(C, -1, -1)) == C * forward


def test_cross_attention_costs_what_a_backend_that_projects_no_token_multiplies():
    """Which calls attention over masked tokens, whose formula is tested above."""
    queries, weight, bias = torch.randn(B, M, C), torch.randn(3 * C, C), torch.randn(3 * C)
    arguments = (queries, TOKENS, MASK, weight, bias, H)
    with flop_counter() as forward:
        _, kept = cross_attention.forward(*arguments)
    of_gradient = (torch.randn(B, M, C), *arguments, kept)
    with flop_counter() as backward:
        cross_attention.backward(*of_gradient)
    assert ours("cross_attend", *arguments) == forward.get_total_flops() > 0
    assert ours("cross_attend_backward", *of_gradient) == backward.get_total_flops() > 0


def test_the_offset_head_costs_its_convolution_and_its_projection():
    hidden, parameters = torch.randn(M, B, 8 * 12, 1), (torch.randn(M, 1), torch.randn(M, 1, 4, 4))
    arguments = (hidden, *parameters, torch.randn(M, 1), torch.randn(M, 1), 8, 12)
    image = hidden.view(M * B, 1, 8, 12)
    convolution, y = plain(lambda: F.conv2d(image, parameters[1][0][None], stride=4))
    projection, _ = plain(lambda: y.flatten(1).unsqueeze(-1) @ torch.ones(1, 1))
    assert ours("offset_head", *arguments) == convolution + projection > 0
    grad = torch.randn(M, B, 2, 3)
    assert ours("offset_head_backward", grad, *arguments) == 2 * (convolution + projection)


def test_attention_counts_alike_in_training_and_in_evaluation():
    with flop_counter() as evaluating:
        ops.attend(QKV)
    with flop_counter() as training:
        ops.attend(QKV.clone().requires_grad_())
    assert evaluating.get_total_flops() == training.get_total_flops() == plain(attention.forward, QKV)[0]


def test_every_operator_with_a_product_has_a_formula():
    without = {
        "deformable_sample",
        "quick_gelu",
        "add_layer_norm",
        "layer_norm",
        "mean_tokens",
        "pairwise_error",
    }  # element by element
    without |= {f"{name}_backward" for name in without} | {"sort_rows"}
    listed = {packet.__name__ for packet in FORMULAS if packet.__name__ in ENTRIES}
    assert set(ENTRIES) - listed <= without
    assert listed.isdisjoint(without)
