"""The authors' modules under their names, with their constructors, parameters and results, on this package's operators.

In their repository, or in one that grew from it, changing these imports is the whole migration:

    modeling/AddModule/useA.py   Select_Interactive_Module, TokenSelection, ModalInteractive, LayerNorm
    modeling/AddModule/useB.py   AlignmentM, QuickGELU
    modeling/AddModule/DAS.py    DA_sample
    utils/volume.py              volume_computation3, volume_computation4, volume_computation5

Their state dicts load with `strict=True`, and back. Hooks on any module inside see what they see there: a module whose
parts are computed together runs them one by one while somebody watches one. docs/migrating.md goes file by file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from signal_reid.methods.signal.local_alignment import WINDOW, offset_maps
from signal_reid.ops import (
    cross_attend,
    deformable_sample,
    gramian_contrastive_loss,
    gramian_volume,
    quick_gelu,
    select_tokens,
)

__all__ = [
    "AlignmentM",
    "DA_sample",
    "LayerNorm",
    "ModalInteractive",
    "QuickGELU",
    "Select_Interactive_Module",
    "TokenSelection",
    "volume_computation3",
    "volume_computation4",
    "volume_computation5",
]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _watched(*modules: nn.Module) -> bool:
    """Whether a hook waits for a call of one of these modules or of a module inside them."""
    if any(getattr(module_hooks, f"_global{name}") for name in _HOOKS):
        return True
    return any(getattr(part, name) for module in modules for part in module.modules() for name in _HOOKS)


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in fp32 and returns the dtype that it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> like x."""
        return super().forward(x.float()).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), see `signal_reid.ops.quick_gelu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> like x."""
        return quick_gelu(x)


class TokenSelection(nn.Module):
    """Top-k intra- and inter-modal token selection; tokens that nobody keeps are set to zero.

    Args:
        dim: channels C.
        k: tokens that each modality keeps of its own; it keeps 2 k of the others'. Fewer tokens than that are all kept.
    """

    def __init__(self, dim: int, k: int = 112):
        super().__init__()
        self.dim = dim
        self.k1 = k
        self.k2 = 2 * k
        self.W_q = nn.Linear(dim, dim)
        self.W_k = nn.Linear(dim, dim)
        self.W_v = nn.Linear(dim, dim)

    def forward(
        self,
        rgb_patches: Tensor,
        nir_patches: Tensor,
        tir_patches: Tensor,
        rgb_global: Tensor,
        nir_global: Tensor,
        tir_global: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N, C) and class tokens (B, C) of three modalities -> the patches, dropped ones zero.

        The number N of tokens may differ between the modalities.
        """
        patches = rgb_patches, nir_patches, tir_patches
        cls = torch.stack([rgb_global, nir_global, tir_global], dim=1)
        rgb, nir, tir = (x * m.unsqueeze(-1) for x, m in zip(patches, self.masks(patches, cls), strict=True))
        return rgb, nir, tir

    def masks(self, patches: Sequence[Tensor], cls: Tensor) -> Sequence[Tensor]:
        """(B, N, C) of each modality and (B, M, C) -> (B, N) bool of each, true where a token is kept."""
        if len({x.shape[1] for x in patches}) == 1 and not _watched(self.W_k):
            return self.mask(torch.stack(list(patches), dim=1), cls).unbind(1)
        arguments = *patches, *cls.unbind(1)
        intra, inter = self.intra_modal_token_selection(*arguments), self.inter_modal_token_selection(*arguments)
        return [(a + b).squeeze(-1) > 0 for a, b in zip(intra, inter, strict=True)]

    @torch.no_grad()
    def intra_modal_token_selection(
        self,
        rgb_patches: Tensor,
        nir_patches: Tensor,
        tir_patches: Tensor,
        rgb_global: Tensor,
        nir_global: Tensor,
        tir_global: Tensor,
    ) -> tuple[Tensor, ...]:
        """Patches (B, N, C) and class tokens (B, C) -> (B, N, 1), 1 where a modality keeps a token of its own."""
        patches, cls = (rgb_patches, nir_patches, tir_patches), (rgb_global, nir_global, tir_global)
        kept = (_largest(torch.einsum("bnc,bc->bn", x, c), self.k1) for x, c in zip(patches, cls, strict=True))
        return tuple(k.to(x.dtype).unsqueeze(-1) for k, x in zip(kept, patches, strict=True))

    @torch.no_grad()
    def inter_modal_token_selection(
        self,
        rgb_patches: Tensor,
        nir_patches: Tensor,
        tir_patches: Tensor,
        rgb_global: Tensor,
        nir_global: Tensor,
        tir_global: Tensor,
    ) -> tuple[Tensor, ...]:
        """Patches (B, N, C) and class tokens (B, C) -> (B, N, 1), 1 where another modality keeps a token."""
        patches = rgb_patches, nir_patches, tir_patches
        sizes = [x.shape[1] for x in patches]
        queries = self.W_q(torch.stack([rgb_global, nir_global, tir_global], dim=1))  # (B, M, C)
        scores = queries @ self.W_k(torch.cat(patches, dim=1)).transpose(1, 2)  # (B, M, sum of N)
        kept = torch.zeros_like(scores[:, 0], dtype=torch.bool)
        owner = torch.arange(len(sizes), device=scores.device).repeat_interleave(
            torch.tensor(sizes, device=scores.device)
        )
        for modality, of_modality in enumerate(scores.unbind(1)):
            others = owner != modality
            kept[:, others] |= _largest(of_modality[:, others], self.k2)
        return tuple(k.to(x.dtype).unsqueeze(-1) for k, x in zip(kept.split(sizes, 1), patches, strict=True))

    @torch.no_grad()
    def mask(self, tokens: Tensor, cls: Tensor) -> Tensor:
        """(B, M, N, C) and (B, M, C) -> (B, M, N) bool, true where a token is kept."""
        M, N = tokens.shape[1:3]
        cls = cls.to(tokens.dtype)
        inter_query = self.W_q(cls) @ self.W_k.weight.to(cls.dtype)
        k_intra, k_inter = min(self.k1, N), min(self.k2, (M - 1) * N)
        return select_tokens(tokens, cls, inter_query.to(tokens.dtype), k_intra, k_inter)


def _largest(scores: Tensor, count: int) -> Tensor:
    """(B, N) -> (B, N) bool, true at the largest of each row; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


class ModalInteractive(nn.Module):
    """Class tokens attend to the selected tokens of all modalities.

    Args:
        dim: channels C.
        num_heads: of the attention.
    """

    def __init__(self, dim: int, num_heads: int = 8):
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm1 = LayerNorm(dim)
        self.norm2 = LayerNorm(dim)

    def forward(
        self,
        rgb_selected: Tensor,
        nir_selected: Tensor,
        tir_selected: Tensor,
        rgb_global: Tensor,
        nir_global: Tensor,
        tir_global: Tensor,
    ) -> Tensor:
        """Selected patches (B, N, C) and class tokens (B, C) of three modalities -> (B, 3 C).

        The number N of tokens may differ between the modalities.
        """
        tokens = torch.cat([rgb_selected, nir_selected, tir_selected], dim=1).unsqueeze(1)  # (B, 1, sum of N, C)
        cls = torch.stack([rgb_global, nir_global, tir_global], dim=1)
        return self.interact(tokens, tokens.new_ones(tokens.shape[:3], dtype=torch.bool), cls)

    def interact(self, tokens: Tensor, mask: Tensor, cls: Tensor) -> Tensor:
        """(B, M, N, C), (B, M, N), (B, M, C) -> (B, M C), reading only the tokens that the mask keeps."""
        attention = self.cross_attn
        if _watched(attention):
            selected = (tokens * mask.unsqueeze(-1)).flatten(1, 2)
            attended, _ = attention(cls, selected, selected)
        else:
            heads = cross_attend(cls, tokens, mask, attention.in_proj_weight, attention.in_proj_bias, self.num_heads)
            attended = attention.out_proj(heads)
        x = self.norm1(cls + attended)
        return self.norm2(x + self.ffn(x)).flatten(1)


class Select_Interactive_Module(nn.Module):  # noqa: N801 - the authors' name
    """The selective interaction module: selection, then interaction.

    Args:
        dim: channels C.
        k: see `TokenSelection`.
    """

    def __init__(self, dim: int, k: int = 112):
        super().__init__()
        self.token_selection = TokenSelection(dim, k)
        self.modal_interactive = ModalInteractive(dim, num_heads=8)

    def forward(
        self,
        rgb_patches: Tensor,
        nir_patches: Tensor,
        tir_patches: Tensor,
        rgb_global: Tensor,
        nir_global: Tensor,
        tir_global: Tensor,
    ) -> Tensor:
        """Patches (B, N, C) and class tokens (B, C) of three modalities -> (B, 3 C).

        The number N of tokens may differ between the modalities.
        """
        patches, cls = (rgb_patches, nir_patches, tir_patches), (rgb_global, nir_global, tir_global)
        equal = len({x.shape[1] for x in patches}) == 1
        if not equal or _watched(self.token_selection, self.modal_interactive):
            return self.modal_interactive(*self.token_selection(*patches, *cls), *cls)
        tokens, stacked = torch.stack(patches, dim=1), torch.stack(cls, dim=1)
        return self.modal_interactive.interact(tokens, self.token_selection.mask(tokens, stacked), stacked)


class DA_sample(nn.Module):  # noqa: N801 - the authors' name
    """Shift-aware deformable sampling of a feature map, with the head that makes the offsets.

    Args:
        n_heads, n_head_channels: their product is the number of channels C.
        n_groups: groups of channels that share offsets.
        stride, ksize: of the depthwise convolution.
        offset_range_factor: largest shift, see `signal_reid.ops.deformable_sample`; with 0 or less, the
            head's output moves the points as it is, without tanh and without a range.
    """

    def __init__(
        self, n_heads: int, n_head_channels: int, n_groups: int, stride: int, offset_range_factor: float, ksize: int
    ):
        super().__init__()
        self.n_head_channels = n_head_channels
        self.nc = n_head_channels * n_heads
        self.n_groups = n_groups
        self.n_group_channels = self.nc // n_groups
        self.kk = ksize
        self.stride = stride
        self.offset_range_factor = offset_range_factor
        C = self.n_group_channels
        self.conv_offset = nn.Sequential(
            nn.Conv2d(C, C, 1),
            nn.GELU(),
            nn.Conv2d(C, C, ksize, stride, groups=C),
            nn.GELU(),
            nn.Conv2d(C, 1, 1, bias=False),
        )
        self.proj_q = nn.Conv2d(self.nc, self.nc, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * groups, C / groups, Hk, Wk)."""
        B, _, H, W = x.shape
        if self.offset_range_factor <= 0:
            return self._sample_unbounded(x)
        grouped = x.reshape(B * self.n_groups, self.n_group_channels, H, W)
        tokens = grouped.flatten(2).transpose(1, 2)
        if tokens.stride(2) != 1:  # a map that is not a permuted token sequence
            tokens = tokens.contiguous()
        offsets = self.offsets(x)
        sampled = deformable_sample(tokens, offsets.to(tokens.dtype), (H, W), self.offset_range_factor)
        return sampled.transpose(1, 2).unflatten(2, tuple(offsets.shape[1:]))

    def _sample_unbounded(self, x: Tensor) -> Tensor:
        offsets = self.offsets(x)  # (B * groups, Hk, Wk)
        Hk, Wk = offsets.shape[1:]
        points = self._get_ref_points(Hk, Wk, len(x), offsets.dtype, offsets.device)
        points = (points + offsets.unsqueeze(-1)).clamp(-1, 1).flip(-1)  # y, x -> x, y
        grouped = x.reshape(-1, self.n_group_channels, *x.shape[2:])
        return F.grid_sample(grouped, points.to(x.dtype), mode="bilinear", align_corners=True)

    @torch.no_grad()
    def _get_ref_points(self, H_key: int, W_key: int, B: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The points that offsets move, y before x: (B * groups, H_key, W_key, 2)."""
        y, x = (2 * torch.arange(0.5, n, dtype=dtype, device=device) / (n - 1) - 1 for n in (H_key, W_key))
        points = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1)
        return points.expand(B * self.n_groups, -1, -1, -1)

    def offsets(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * groups, Hk, Wk), before tanh."""
        if _watched(self.proj_q, self.conv_offset) or self.n_groups != 1 or self.kk != WINDOW or self.stride != WINDOW:
            q = self.proj_q(x).reshape(-1, self.n_group_channels, *x.shape[2:])
            return self.conv_offset(q).squeeze(1)
        # The two 1x1 layers have nothing between them: one product with the tokens instead of two.
        mix, window, out = (layer for layer in self.conv_offset if isinstance(layer, nn.Conv2d))
        weight = mix.weight.flatten(1) @ self.proj_q.weight.flatten(1)
        bias = mix.weight.flatten(1) @ _bias(self.proj_q) + _bias(mix)
        head = weight, bias, window.weight.squeeze(1), _bias(window), out.weight.flatten()
        rows, columns = x.shape[2:]
        maps = x.flatten(2).transpose(1, 2).unsqueeze(0)  # of one modality
        return offset_maps(maps, (rows, columns), *(parameter.unsqueeze(0) for parameter in head)).squeeze(0)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


class AlignmentM(nn.Module):
    """Global alignment (gramian volume of the modalities) and local alignment (deformable sampling).

    Args:
        feat_dim: channels C; the authors' code has 512 whatever is given here, this one has what is given.
        H, W: rows and columns of patches.
    """

    def __init__(self, feat_dim: int, H: int, W: int):
        super().__init__()
        self.feat_dim = feat_dim
        self.contra_temp = nn.Parameter(torch.tensor(0.07))
        self.h, self.w = H, W
        self.mse = nn.MSELoss()
        self.DAS_r = DA_sample(1, feat_dim, 1, stride=4, offset_range_factor=2, ksize=4)
        self.DAS_n = DA_sample(1, feat_dim, 1, stride=4, offset_range_factor=2, ksize=4)
        self.DAS_t = DA_sample(1, feat_dim, 1, stride=4, offset_range_factor=2, ksize=4)

    def Cls_Align(self, RGB_patch: Tensor, NI_patch: Tensor, TI_patch: Tensor) -> Tensor:  # noqa: N802
        """Patches (B, N, C) of three modalities -> () loss."""
        features = torch.stack([patch.mean(dim=1) for patch in (RGB_patch, NI_patch, TI_patch)], dim=1)
        return gramian_contrastive_loss(features, self.contra_temp).float()

    def patch_Align(self, RGB_patch: Tensor, NI_patch: Tensor, TI_patch: Tensor) -> Tensor:  # noqa: N802
        """Patches (B, N, C) of three modalities -> () loss."""
        samplers = (self.DAS_r, self.DAS_n, self.DAS_t)
        maps = (patch.transpose(1, 2).unflatten(2, (self.h, self.w)) for patch in (RGB_patch, NI_patch, TI_patch))
        sampled = [sampler(x) for sampler, x in zip(samplers, maps, strict=True)]
        return torch.stack([self.mse(b, a) for a, b in combinations(sampled, 2)]).mean()

    def forward(
        self, RGB_patch: Tensor, NI_patch: Tensor, TI_patch: Tensor, stage: str
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Patches (B, N, C) -> the global loss; with another stage than `CLS`, the local loss as well."""
        global_loss = self.Cls_Align(RGB_patch, NI_patch, TI_patch)
        if stage == "CLS":
            return global_loss
        return global_loss, self.patch_Align(RGB_patch, NI_patch, TI_patch)


def volume_computation3(language: Tensor, video: Tensor, audio: Tensor) -> Tensor:
    """Volume of three vectors for every pair of rows, in fp32; see
    `signal_reid.ops.gramian_volume`."""
    return gramian_volume(language, video, audio).float()


def volume_computation4(language: Tensor, video: Tensor, audio: Tensor, subtitles: Tensor) -> Tensor:
    """Volume of four vectors for every pair of rows, in fp32; see
    `signal_reid.ops.gramian_volume`."""
    return gramian_volume(language, video, audio, subtitles).float()


def volume_computation5(language: Tensor, video: Tensor, audio: Tensor, subtitles: Tensor, depth: Tensor) -> Tensor:
    """Volume of five vectors for every pair of rows, in fp32; see
    `signal_reid.ops.gramian_volume`."""
    return gramian_volume(language, video, audio, subtitles, depth).float()
