"""The vision transformer of CLIP, with a camera embedding added to its class token."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from signal_reid.backbones.base import Backbone
from signal_reid.backbones.clip_vit.hugging_face import HUGGING_FACE
from signal_reid.backbones.clip_vit.openai import CLIP, CLIP_VISUAL
from signal_reid.config.schema import BackboneConfig
from signal_reid.ops import add_layer_norm, attend, quick_gelu


class ClipViTConfig(BackboneConfig):
    """The defaults are ViT-B/16."""

    layers: int = Field(12, ge=1)
    """Transformer blocks."""
    width: int = Field(768, ge=8)
    """Channels of the transformer."""
    heads: int = Field(12, ge=1)
    """Attention heads of each block."""
    patch_size: int = Field(16, ge=1)
    """Pixels of a patch on each side."""
    stride: int = Field(16, ge=1)
    """Pixels from one patch to the next."""
    output_dim: int = Field(512, ge=8)
    """Channels of the projected tokens."""
    sie_coe: float = 1.0
    """Factor of the camera embedding."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ClipViTConfig:
        if self.width % self.heads:
            raise ValueError(f"heads must divide width ({self.width}), got {self.heads}")
        return self

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of whole patches."""
        rows, columns = ((side - self.patch_size) // self.stride + 1 for side in image_size)
        return rows, columns


class AddLayerNorm(nn.LayerNorm):
    """Layer normalisation of a residual stream that a branch is still to be added to."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The residual stream x + branch, and its normalisation in the precision of the matrix product that follows."""
        dtype = None
        if not torch.compiler.is_compiling() and not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return add_layer_norm(x, branch, self.weight, self.bias, self.eps, out_dtype=dtype)


class Attention(nn.Module):
    """Multi-head self-attention with fused query, key and value projections."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, W)
        B, L, W = x.shape
        qkv = self.qkv(x).view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        return self.output(attend(qkv).transpose(1, 2).reshape(B, L, W))

    def of_class_token(self, x: Tensor) -> Tensor:
        """(B, 1 + N, W) -> (B, heads, N) fp32, how much the class token attends to each patch."""
        B, L, W = x.shape
        q, k, _ = self.qkv(x).view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # (B, heads, L, d)
        scores = q[:, :, :1].float() @ k.float().mT * (W // self.heads) ** -0.5  # (B, heads, 1, L)
        return scores.softmax(-1)[:, :, 0, 1:]


class MLP(nn.Module):
    """Two linear layers around QuickGELU."""

    def __init__(self, width: int):
        super().__init__()
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(quick_gelu(self.expand(x)))


class Block(nn.Module):
    """A pre-LN transformer block; it leaves adding its last branch to the normalisation that follows."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = AddLayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = AddLayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, normed = self.norm1(x, branch)
        x, normed = self.norm2(x, self.attention(normed))
        return x, self.mlp(normed)


class ClipViT(Backbone):
    """CLIP's image encoder that returns the projection of every token; see `Backbone` for the arguments."""

    settings = ClipViTConfig
    namings = (HUGGING_FACE, CLIP, CLIP_VISUAL)

    def __init__(self, settings: ClipViTConfig, image_size: tuple[int, int], num_cameras: int = 0):
        super().__init__(settings, image_size, num_cameras)
        config, grid_size = settings, self.grid_size
        self.patch_size, self.stride, self.sie_coe = config.patch_size, config.stride, config.sie_coe
        scale, tokens = config.width**-0.5, grid_size[0] * grid_size[1]
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.stride, bias=False)
        self.class_token = nn.Parameter(scale * torch.randn(config.width))
        self.position_embedding = nn.Parameter(scale * torch.randn(1 + tokens, config.width))
        if config.camera_embedding and num_cameras:
            embedding = nn.init.trunc_normal_(torch.empty(num_cameras, config.width), std=0.02)
            self.camera_embedding = nn.Parameter(embedding)
        self.norm_before = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm_after = AddLayerNorm(config.width)
        self.projection = nn.Parameter(scale * torch.randn(config.width, config.output_dim))

    def forward(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) and (B,) -> (B, 1 + N, output_dim); see `Backbone.forward`."""
        x, branch = self.embed(images, cameras), None  # (B, 1 + N, W); the branch is what is to be added to x
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x, branch = checkpoint(block, x, branch, use_reentrant=False)
            else:
                x, branch = block(x, branch)
        _, normed = self.norm_after(x, branch)
        return normed @ self.projection

    def class_attention(self, images: Tensor, cameras: Tensor | None = None, last: int = 3) -> Tensor | None:
        """The attention of the class token to each patch in the last blocks; see `Backbone.class_attention`."""
        x, branch, kept = self.embed(images, cameras), None, []
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            if index >= len(self.blocks) - last:
                kept.append(block.attention.of_class_token(block.norm1(x, branch)[1]))
            x, branch = block(x, branch)
        return torch.stack(kept)

    def embed(self, images: Tensor, cameras: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) and (B,) -> (B, 1 + N, width), what the first block takes."""
        patches = self.embed_patches(images)  # (B, N, W)
        class_token = self.class_token.expand(patches.shape[0], 1, -1)
        if cameras is not None and self.camera_embedding is not None:
            _check_cameras(cameras, len(self.camera_embedding))
            class_token = class_token + self.sie_coe * F.embedding(cameras, self.camera_embedding)[:, None]
        x = torch.cat([class_token.to(patches.dtype), patches], dim=1) + self.position_embedding
        return self.norm_before(x)

    def embed_patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, width); patches side by side are one matrix product, others a convolution."""
        if self.stride != self.patch_size:
            return self.patch_embedding(images).flatten(2).transpose(1, 2)
        (rows, columns), size = self.grid_size, self.patch_size
        images = images[:, :, : rows * size, : columns * size]
        patches = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (B, 3, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], rows * columns, -1)
        return F.linear(patches, self.patch_embedding.weight.flatten(1))

    @property
    def token_area(self) -> tuple[float, float, float, float]:
        """A cell of one stride around the centre of each patch; see `Backbone.token_area`."""
        start, (rows, columns) = (self.patch_size - self.stride) / 2, self.grid_size
        return start, start, start + rows * self.stride, start + columns * self.stride

    def flops(self) -> float:
        """Floating-point operations of the matrix products of one image's forward."""
        rows, columns = self.grid_size
        N, W = rows * columns, self.class_token.shape[0]
        L = N + 1
        block = 2 * L * 12 * W * W + 4 * L * L * W
        return 2 * N * 3 * self.patch_size**2 * W + len(self.blocks) * block + 2 * L * W * self.output_dim

    def other_size(self, state: Mapping[str, Tensor]) -> str | None:
        """Name the dimensions in which the network of some weights is not this one; none where all agree."""
        theirs, ours = _size(state), _size(self.state_dict())
        names = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        if not names:
            return None
        different = ", ".join(f"{name.replace('_', ' ')} {theirs[name]} ({ours[name]} in the model)" for name in names)
        settings = " ".join(f"model.backbone.{name}={theirs[name]}" for name in names)
        return f"a CLIP vision transformer of another size: {different}; {settings} builds a model of that size"

    def adapt(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fit CLIP's weights to this network: its square position embedding is resized to the grid, in fp32."""
        misfit = self.other_size(state)
        if misfit is not None:
            raise ValueError(misfit)
        positions = state.get("position_embedding")
        if positions is None or positions.ndim != 2:
            return state, []
        resized = resize_position_embedding(positions.float(), self.grid_size)
        side, (rows, columns) = round((len(positions) - 1) ** 0.5), self.grid_size
        adapted = {**state, "position_embedding": resized}
        if (side, side) == (rows, columns):
            return adapted, []
        return adapted, [f"position embedding resized from {side} x {side} to {rows} x {columns} patches"]


def _check_cameras(cameras: Tensor, count: int) -> None:
    """Raise ValueError for a camera that the model has no embedding of; a GPU is not waited for.

    What has no values, as while a model is compiled, exported or counted, is not asked.
    """
    if type(cameras) is not Tensor or cameras.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = cameras[(cameras < 0) | (cameras >= count)].tolist()
    if outside:
        raise ValueError(
            f"cameras must be in 0..{count - 1}, the cameras that the model was built for, got {outside[0]}"
        )


def _size(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the weights tell of it, by the names of the settings; blocks that are missing in between count."""
    blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d{1,4})\.", name))]
    size = {"layers": 1 + max(blocks)} if blocks else {}
    patches, projection = state.get("patch_embedding.weight"), state.get("projection")
    if patches is not None and patches.ndim == 4:
        size |= {"width": patches.shape[0], "patch_size": patches.shape[-1]}
    if projection is not None and projection.ndim == 2:
        size["output_dim"] = projection.shape[1]
    return size


def resize_position_embedding(embedding: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Resize the square grid of a pre-trained position embedding, bilinearly and without antialiasing.

    Args:
        embedding: (1 + n * n, W), the class token's row first.
        grid_size: rows and columns to resize to.

    Returns:
        (1 + rows * columns, W).

    Raises:
        ValueError: the embedding's grid is not square.
    """
    side = round((embedding.shape[0] - 1) ** 0.5)
    if side * side != embedding.shape[0] - 1:
        raise ValueError(f"position embedding must have 1 + n * n rows, got {embedding.shape[0]}")
    if (side, side) == tuple(grid_size):
        return embedding
    grid = embedding[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=grid_size, mode="bilinear", align_corners=False)
    return torch.cat([embedding[:1].float(), grid.flatten(2)[0].T]).to(embedding.dtype)
