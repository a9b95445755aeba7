"""The Signal model: a shared backbone, selective interaction, global and local alignment, and the heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from signal_reid.config.schema import Config
from signal_reid.methods.base import Ablation, Encoded, Method, Part
from signal_reid.methods.heads import Head
from signal_reid.methods.losses import head_losses
from signal_reid.methods.pictures import MethodPicture
from signal_reid.methods.signal.config import SignalConfig, SignalLossConfig
from signal_reid.methods.signal.global_alignment import GlobalAlignment
from signal_reid.methods.signal.local_alignment import LocalAlignment
from signal_reid.methods.signal.selective_interaction import SelectiveInteraction
from signal_reid.ops import mean_tokens
from signal_reid.upstream.parameters import AUTHORS


def _ablation(name: str, *modules: str) -> Ablation:
    known = ("selective_interaction", "global_alignment", "local_alignment")
    return Ablation(name, tuple(f"model.{module}={str(module in modules).lower()}" for module in known))


class Signal(Method):
    """Selective interaction and global-local alignment for multi-modal object re-identification.

    See `Method` for the arguments. The losses are `head_0`, `head_1`, ... of the heads on the class tokens and of the
    one on the SIM feature, `gam` and `lam`, each where the model has it.

    Source: Signal (AAAI 2026).
    """

    title = "Signal"
    settings = SignalConfig
    loss_settings = SignalLossConfig
    loss_titles = {"gam": "GAM", "lam": "LAM"}  # noqa: RUF012 - declared by `Method`
    parts = (
        Part("global_alignment", "the model has no GAM, which takes part in training only", True),
        Part("local_alignment", "the model has no LAM, which takes part in training only", True),
        Part("selective_interaction", "the model has no SIM, so its feature is the class tokens alone", False),
        Part("interaction_head", "the model has no SIM; heads are used in training only", False),
    )
    ablations = (
        _ablation("baseline"),
        _ablation("+ SIM", "selective_interaction"),
        _ablation("+ SIM + GAM", "selective_interaction", "global_alignment"),
        _ablation("+ SIM + GAM + LAM", "selective_interaction", "global_alignment", "local_alignment"),
    )
    namings = (AUTHORS,)

    def __init__(self, config: Config, num_identities: int, num_cameras: int):
        super().__init__(config, num_identities, num_cameras)
        model, dim = config.model, config.model.backbone.output_dim
        assert isinstance(model, SignalConfig)
        self.loss_config = config.losses
        self.joint = model.heads == "joint"
        inputs = [model.modalities * dim] if self.joint else [dim] * model.modalities
        self.heads = nn.ModuleList(Head(size, num_identities) for size in inputs)
        self.selective_interaction: SelectiveInteraction | None = None
        self.interaction_head: Head | None = None
        if model.selective_interaction:
            self.selective_interaction = SelectiveInteraction(dim, model.k_intra, model.interaction_heads)
            self.interaction_head = Head(model.modalities * dim, num_identities)
        self.global_alignment: GlobalAlignment | None = None
        if model.global_alignment:
            self.global_alignment = GlobalAlignment(label_smoothing=config.losses.label_smoothing)
        self.local_alignment: LocalAlignment | None = None
        if model.local_alignment:
            grid_size = self.backbone.grid_size
            self.local_alignment = LocalAlignment(dim, model.modalities, grid_size, model.offset_range)

    def losses(self, encoded: Encoded, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch by name, unweighted; see `Method.losses`."""
        cls, tokens, local = encoded.cls, encoded.tokens, self.local_alignment
        losses = self._head_losses(cls, self._interaction(encoded), labels)
        if self.global_alignment is not None:
            losses["gam"] = self.global_alignment(tokens)
        if local is not None:
            losses["lam"] = local(tokens)
        return losses

    def per_sample(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """Class tokens, the SIM feature, mean patch tokens and LAM's loss, each where the model has it.

        A hundredth of what the backbone gives; LAM's loss is the mean over these samples, once for each of them, so
        that the mean over a batch is the batch's.
        """
        samples = [encoded.cls]
        interaction = self._interaction(encoded)
        if interaction is not None:
            samples.append(interaction)
        if self.global_alignment is not None:
            samples.append(mean_tokens(encoded.tokens))
        if self.local_alignment is not None:
            samples.append(self.local_alignment(encoded.tokens).expand(len(encoded.cls)))
        return tuple(samples)

    def batch_losses(self, samples: tuple[Tensor, ...], labels: Tensor) -> dict[str, Tensor]:
        """The losses of a whole batch from `per_sample`; see `Method.batch_losses`."""
        cls, *others = samples
        given = iter(others)
        losses = self._head_losses(cls, next(given) if self.selective_interaction is not None else None, labels)
        if self.global_alignment is not None:
            losses["gam"] = self.global_alignment.loss(next(given))
        if self.local_alignment is not None:
            losses["lam"] = next(given).mean()
        return losses

    def feature(self, encoded: Encoded) -> Tensor:
        """The class tokens of the modalities and the SIM feature: (B, 2 M C); without SIM (B, M C)."""
        _, cls = encoded
        joint, interaction = cls.flatten(1), self._interaction(encoded)
        return joint if interaction is None else torch.cat([joint, interaction.to(joint.dtype)], dim=1)

    def feature_columns(self) -> Tensor:
        """A modality's class token and its row of the SIM feature: (M, 2 C); without SIM (M, C)."""
        M, C = self.modalities, self.backbone.output_dim
        parts = 1 if self.selective_interaction is None else 2
        return torch.arange(parts * M * C).view(parts, M, C).transpose(0, 1).flatten(1)

    def head_outputs(self, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
        """Logits (B, identities) and the feature before the neck (B, D) of each head, the SIM feature's last."""
        return self._head_outputs(encoded.cls, self._interaction(encoded))

    def flops(self) -> float:
        """Floating-point operations of the matrix products of one sample's forward in training."""
        total, M, C = super().flops(), self.modalities, self.backbone.output_dim
        rows, columns = self.backbone.grid_size
        N = rows * columns
        if self.selective_interaction is not None:
            queries = M * self.selective_interaction.interaction.heads
            total += 2 * M * C * C * (2 + 2 + 4) + 2 * 2 * queries * M * N * C + 2 * M * (M + 1) * N * C
        if self.local_alignment is not None:
            total += 2 * M * N * C * C
        return total

    def cost_notes(self) -> list[str]:
        """What the modules would cost as the paper writes them, and what is counted once a batch."""
        M, C = self.modalities, self.backbone.output_dim
        rows, columns = self.backbone.grid_size
        tokens, notes = M * rows * columns, []
        if self.selective_interaction is not None:
            heads = self.selective_interaction.interaction.heads
            absorbed = 2 * M * C * C * 5 + 4 * heads * M * tokens * C
            projected = 2 * M * C * C * 2 + 4 * M * tokens * C + 2 * tokens * C * C * 3
            notes.append(
                f"SIM's selection and attention are counted as they are computed, with the projections of keys and "
                f"values absorbed into the {M} queries: {_giga(absorbed)} a sample. With every token projected, as the "
                f"paper writes it, they would take {_giga(projected)}. Every token counts, kept or not."
            )
        if self.local_alignment is not None:
            notes.append(
                "LAM's first two layers are multiplied with each other before they meet the tokens: one product a "
                f"token instead of two, and {_giga(2 * M * C**3)} a batch, which the method's own count leaves out."
            )
        return notes

    @classmethod
    def pictures(cls) -> Mapping[str, MethodPicture]:
        """What `signal-reid show` draws of the model."""
        from signal_reid.methods.signal.pictures import PICTURES  # which draw this class

        return PICTURES

    @classmethod
    def mismatch_hints(cls, given: Collection[str], wanted: Collection[str]) -> list[str]:
        """Settings of the model that may explain why a file does not fit."""
        hints, second_head = [], "heads.1.neck.weight"
        if (second_head in given) != (second_head in wanted) and "heads.0.neck.weight" in given:
            hints.append("model.heads (joint or per_modality) differs")
        if any(name.startswith("selective_interaction.") for name in set(wanted) - set(given)):
            hints.append("without SIM set model.selective_interaction=false")
        return hints

    def _head_losses(self, cls: Tensor, interaction: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for i, output in enumerate(self._head_outputs(cls, interaction)):
            losses.update(head_losses(f"head_{i}", *output, labels, self.loss_config))
        return losses

    def _head_outputs(self, cls: Tensor, interaction: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        features = [cls.flatten(1)] if self.joint else list(cls.unbind(1))
        outputs = [(head(feature), feature) for head, feature in zip(self.heads, features, strict=True)]
        if interaction is not None and self.interaction_head is not None:
            outputs.append((self.interaction_head(interaction), interaction))
        return outputs

    def _interaction(self, encoded: Encoded) -> Tensor | None:
        return self.selective_interaction(*encoded) if self.selective_interaction is not None else None


def _giga(flops: float) -> str:
    return f"{flops / 1e9:.3g} GFLOP"
