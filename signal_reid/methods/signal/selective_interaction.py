"""SIM: selects informative patch tokens, then lets the class tokens attend to them across modalities."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from signal_reid.ops import add_layer_norm, cross_attend, select_tokens
from signal_reid.ops.casting import cast_for_products


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
        inter_query = self.inter_query(cls).to(torch.promote_types(tokens.dtype, cls.dtype))
        return select_tokens(tokens, cls, inter_query, self.k_intra, k_inter)

    def inter_query(self, cls: Tensor) -> Tensor:
        """(B, M, C) class tokens -> (B, M, C), whose products with the other modalities' tokens rank these."""
        weight, bias, key_weight = cast_for_products(self.query.weight, self.query.bias, self.key.weight)
        return (F.linear(cls.flatten(0, 1), weight, bias) @ key_weight).view(cls.shape)

    def k_inter(self, modalities: int, tokens: int) -> int:
        """How many of the other modalities' tokens each class token keeps; two modalities have fewer to choose from."""
        return min(2 * self.k_intra, (modalities - 1) * tokens)


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
        layers = (self.qkv, self.output, self.expand, self.contract)
        cast = cast_for_products(*(p for layer in layers for p in (layer.weight, layer.bias)))
        qkv, output, expand, contract = zip(cast[::2], cast[1::2], strict=True)

        attended = F.linear(cross_attend(cls, tokens, mask, *qkv, self.heads), *output)
        _, x = add_layer_norm(cls, attended, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        branch = F.linear(F.gelu(F.linear(x, *expand)), *contract)
        return add_layer_norm(x, branch, self.norm2.weight, self.norm2.bias, self.norm2.eps, self.norm2.weight.dtype)[1]


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
