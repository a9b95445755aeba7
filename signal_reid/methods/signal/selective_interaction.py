"""SIM: selects informative patch tokens, then lets the class tokens attend to them across modalities."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signal_reid.ops import attend_masked, select_tokens


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
        k_inter = self.k_inter(*tokens.shape[1:3])
        return select_tokens(tokens, cls, self.inter_query(cls).to(tokens.dtype), self.k_intra, k_inter)

    def inter_query(self, cls: Tensor) -> Tensor:
        """(B, M, C) class tokens -> (B, M, C), whose products with the other modalities' tokens rank these."""
        return self.query(cls) @ self.key.weight.to(cls.dtype)

    def k_inter(self, modalities: int, tokens: int) -> int:
        """How many of the other modalities' tokens each class token keeps; two modalities have fewer to choose from."""
        return min(2 * self.k_intra, (modalities - 1) * tokens)


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
    query_weight, key_weight, value_weight = weight.view(3, C, C).unbind(0)
    query_bias, _, value_bias = bias.view(3, C).unbind(0)

    q = F.linear(cls, query_weight, query_bias).view(B * M, h, d).transpose(0, 1)  # (h, B * M, d)
    u = (q * d**-0.5) @ key_weight.view(h, d, C)  # (h, B * M, C)
    u = u.view(h, B, M, C).permute(1, 0, 2, 3).reshape(B, h * M, C)
    z = attend_masked(u, tokens, mask)  # (B, h * M, C)
    z = z.view(B, h, M, C).permute(1, 0, 2, 3).reshape(h, B * M, C)
    output = z @ value_weight.view(h, d, C).transpose(1, 2)  # (h, B * M, d)
    return output.permute(1, 0, 2).reshape(B, M, C) + value_bias


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
