"""The pictures of any method's features, by name."""

from __future__ import annotations

from signal_reid.report.embedding import EmbeddingPicture
from signal_reid.report.pictures import GeneralPicture
from signal_reid.report.ranking import RankingPicture

GENERAL: dict[str, GeneralPicture] = {picture.name: picture for picture in (RankingPicture(), EmbeddingPicture())}
