"""What `eval --details` tells of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

from signal_reid.config import Config
from signal_reid.evaluation.details import Group, Interval, QueryRanks, bootstrap_interval, query_ranks
from signal_reid.evaluation.evaluator import Evaluation, reranking_parameters
from signal_reid.evaluation.verification import ROC, OperatingPoint, roc


@dataclass(frozen=True, eq=False)
class Details:
    """What an evaluation came to beyond its summary.

    Args:
        ranks: of every query's matches.
        interval: of mAP, by bootstrap over queries.
        curve: of all pairs by their plain distance, also where the ranking is re-ranked.
        camera_name: from the number of a camera to what it is called, such as `Dataset.camera_name`.
    """

    ranks: QueryRanks
    interval: Interval
    curve: ROC
    camera_name: Callable[[int], str] = str

    PRECISIONS: ClassVar[tuple[int, ...]] = (1, 5, 10)
    FALSE_ACCEPT_RATES: ClassVar[tuple[float, ...]] = (1e-4, 1e-3, 1e-2, 1e-1)

    def points(self) -> list[tuple[float, OperatingPoint]]:
        """The usual false-accept rates, and what the threshold for each comes to."""
        return [(rate, self.curve.at(rate)) for rate in self.FALSE_ACCEPT_RATES]

    def cameras(self) -> list[tuple[str, Group]]:
        """What the queries of each camera came to, with its name."""
        return [(self.camera_name(group.label), group) for group in self.ranks.by_camera()]

    def as_json(self) -> dict[str, object]:
        """Plain values by name; squared distances as thresholds."""
        return {
            "mAP_interval": asdict(self.interval),
            "precision_at": {str(k): self.ranks.precision_at(k) for k in self.PRECISIONS},
            "verification": {
                "genuine_pairs": self.curve.genuine,
                "impostor_pairs": self.curve.impostors,
                "area": self.curve.area,
                "points": [{"asked_rate": rate, **asdict(point)} for rate, point in self.points()],
            },
            "cameras": [{**asdict(group), "label": name} for name, group in self.cameras()],
            "identities": [asdict(group) for group in self.ranks.by_identity()],
        }


def details_of(evaluation: Evaluation, config: Config, camera_name: Callable[[int], str] = str) -> Details:
    """Rank once more, to say more of an evaluation; `config.evaluation` says how it was measured.

    Args:
        evaluation, config: of the measurement.
        camera_name: see `Details`.

    Raises:
        ValueError: there is no genuine or no impostor pair; see `roc`.
    """
    sets, settings = (evaluation.query, evaluation.gallery), config.evaluation
    ranks = query_ranks(*sets, settings.protocol, settings.normalize, reranking_parameters(config))
    curve = roc(*sets, settings.protocol, settings.normalize)
    return Details(ranks, bootstrap_interval(evaluation.metrics.average_precision), curve, camera_name)
