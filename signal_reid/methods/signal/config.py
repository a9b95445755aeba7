"""Signal's sections of the configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from signal_reid.config.schema import LossConfig, ModelConfig

SMALLEST_GRID = 8
"""Rows and columns of tokens that local alignment needs: two windows of 4 each way."""


class SignalConfig(ModelConfig):
    """The section `model`."""

    modalities: int = Field(3, ge=1)
    """Images of a sample; SIM, GAM and LAM relate modalities to each other and need 2 or more."""
    heads: Literal["joint", "per_modality"] = "joint"
    """One head on the concatenated class tokens, or one per modality."""
    selective_interaction: bool = True
    """Whether the model has SIM."""
    global_alignment: bool = True
    """Whether the model has GAM, which takes part in training only."""
    local_alignment: bool = True
    """Whether the model has LAM, which takes part in training only."""
    k_intra: int = Field(80, ge=1)
    """Tokens kept by each modality's own class token; the other modalities keep twice as many between them."""
    interaction_heads: int = Field(8, ge=1)
    """Attention heads of SIM's interaction."""
    offset_range: float = Field(2.0, gt=0)
    """LAM's largest shift, see `signal_reid.ops.deformable_sample`."""

    @model_validator(mode="after")
    def _modalities_suffice(self) -> SignalConfig:
        named = ("selective_interaction", "global_alignment", "local_alignment")
        relating = [name for name in named if getattr(self, name)]
        if self.modalities == 1 and relating:
            remedy = " ".join(f"model.{name}=false" for name in relating)
            raise ValueError(f"modalities must be at least 2 for {', '.join(relating)}, got 1; set {remedy}")
        return self

    @model_validator(mode="after")
    def _gram_matrix_fits(self) -> SignalConfig:
        if self.global_alignment and self.modalities > 5:
            raise ValueError(f"global_alignment needs 2 to 5 modalities, got {self.modalities}")
        return self

    @model_validator(mode="after")
    def _heads_divide_output(self) -> SignalConfig:
        if self.backbone.output_dim % self.interaction_heads:
            raise ValueError(
                f"interaction_heads must divide backbone.output_dim ({self.backbone.output_dim}), "
                f"got {self.interaction_heads}"
            )
        return self

    def problem(self, grid_size: tuple[int, int]) -> str | None:
        rows, columns = grid_size
        if self.selective_interaction and self.k_intra > rows * columns:
            return f"k_intra must be in 1..{rows * columns} (N), got {self.k_intra}"
        if self.local_alignment and min(grid_size) < SMALLEST_GRID:
            return (
                f"local_alignment needs a grid of at least {SMALLEST_GRID} x {SMALLEST_GRID} patches "
                f"(two 4 x 4 windows each way), got {rows} x {columns}"
            )
        return None


class SignalLossConfig(LossConfig):
    """The section `losses`."""

    global_alignment: float = Field(0.2, ge=0)
    """Weight of GAM's loss."""
    local_alignment: float = Field(0.2, ge=0)
    """Weight of LAM's loss."""

    def weight(self, name: str) -> float:
        """The weight in the total of `gam`, `lam` or a head's loss."""
        return {"gam": self.global_alignment, "lam": self.local_alignment}.get(name, 1.0)
