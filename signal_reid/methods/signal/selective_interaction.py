"""SIM: selects informative patch tokens, then lets the class tokens attend to them across modalities."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from signal_reid.ops import attend_masked, select_tokens
from signal_reid.ops.layout import as_autocast_multiplies


class TokenSelection(nn.Module):
    """Marks the patch tokens that any modality's class token ranks among its best.

    Only the order of scores matters, so no gradient reaches these layers and `value` takes no part: it is here because
    the authors' files hold it.
    """

    def __init__(self, dim: int, k_intra: int):
        super().__init__()
        self.k_intra = k_intra
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tensor, cls: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens and (B, M, C) class tokens -> (B, M, N) bool."""
        M, N = tokens.shape[1:3]
        k_inter = min(2 * self.k_intra, (M - 1) * N)  # two modalities have fewer to choose from
        inter_query = self.query(cls.flatten(0, 1)) @ self.key.weight.to(cls.dtype)  # (B * M, C)
        return select_tokens(tokens, cls, inter_query.view(cls.shape).to(tokens.dtype), self.k_intra, k_inter)


def multiply_by_head(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """`scale * x @ weight` of each head, with the heads of a row side by side before and after.

    One matrix product that writes where its result belongs, forward and for each gradient. `einsum` lays operands and
    results out anew, a pass over memory and a launch each: three forward and three backward in this module.

    Args:
        x: (rows, h, a).
        weight: (h, a, b), of the same dtype.
        scale: of the product.

    Returns:
        (rows, h, b).
    """
    if torch.compiler.is_compiling():
        return scale * torch.einsum("rha,hab->rhb", x, weight)
    return _MultiplyByHead.apply(x, weight, scale)


class _MultiplyByHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return _product_by_head(x, weight, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        of_weight = weight.new_empty(weight.shape)  # a CPU multiplies into a transposed one 2,000 times slower in bf16
        torch.baddbmm(of_weight, x.permute(1, 2, 0), grad.transpose(0, 1), beta=0, alpha=ctx.scale, out=of_weight)
        return _product_by_head(grad, weight.mT, ctx.scale), of_weight, None


def _product_by_head(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    result = x.new_empty(*x.shape[:2], weight.shape[2])
    by_head = result.transpose(0, 1)
    torch.baddbmm(by_head, x.transpose(0, 1), weight, beta=0, alpha=scale, out=by_head)
    return result


def cross_modal_attention(
    tokens: Tensor, mask: Tensor, cls: Tensor, weight: Tensor, bias: Tensor, heads: int
) -> Tensor:
    """Multi-head attention of the class tokens over all tokens times their mask, before its output projection.

    The queries are few, so keys and values are never projected: per head, with u = W_k^T q / sqrt(d),

        p = softmax(mask_n u . x_n),    z = sum_n p_n mask_n x_n,    head = W_v z + b_v

    The key bias shifts all logits of a query alike and drops out.

    Args:
        tokens: (B, M, N, C); any strides but a unit last one.
        mask: (B, M, N) bool.
        cls: (B, M, C).
        weight: (3 C, C), the projections of queries, keys and values as `nn.MultiheadAttention` stacks them.
        bias: (3 C,).
        heads: h, of d = C / h channels each.

    Returns:
        (B, M, C), the heads side by side.
    """
    B, M, _, C = tokens.shape
    h, d = heads, C // heads
    weight, bias = as_autocast_multiplies(weight), as_autocast_multiplies(bias)  # each at once
    query_weight, key_weight, value_weight = weight.view(3, C, C).unbind(0)
    query_bias, _, value_bias = bias.view(3, C).unbind(0)

    q = F.linear(cls.flatten(0, 1), query_weight, query_bias).view(B * M, h, d)
    u = multiply_by_head(q, key_weight.view(h, d, C), d**-0.5)  # (B * M, h, C)
    z = attend_masked(u.view(B, M * h, C), tokens, mask)
    output = multiply_by_head(z.view(B * M, h, C), value_weight.view(h, d, C).mT)  # (B * M, h, d)
    return output.view(B, M, C) + value_bias


class CrossModalInteraction(nn.Module):
    """Class tokens attend to all selected tokens, then a feed-forward layer; both with residual and LayerNorm."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.contract = nn.Linear(2 * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, tokens: Tensor, mask: Tensor, cls: Tensor) -> Tensor:
        """(B, M, N, C), (B, M, N), (B, M, C) -> (B, M, C)."""
        x = self.norm1(cls + self.attend(tokens, mask, cls))
        return self.norm2(x + self.contract(F.gelu(self.expand(x))))

    def attend(self, tokens: Tensor, mask: Tensor, cls: Tensor) -> Tensor:
        """The attention alone; shapes as in `forward`."""
        return self.output(cross_modal_attention(tokens, mask, cls, self.qkv.weight, self.qkv.bias, self.heads))


class SelectiveInteraction(nn.Module):
    """The selective interaction module.

    Args:
        dim: channels C.
        k_intra: tokens kept by each modality's own class token; the others keep twice as many between them.
        heads: attention heads.

    Source: Signal (AAAI 2026), section on the selective interaction module.
    """

    def __init__(self, dim: int, k_intra: int, heads: int = 8):
        super().__init__()
        self.selection = TokenSelection(dim, k_intra)
        self.interaction = CrossModalInteraction(dim, heads)

    def forward(self, tokens: Tensor, cls: Tensor) -> Tensor:
        """(B, M, N, C) patch tokens and (B, M, C) class tokens -> (B, M * C)."""
        mask = self.selection(tokens, cls)
        return self.interaction(tokens, mask, cls).flatten(1)
