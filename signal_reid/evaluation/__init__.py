"""Evaluation: features of a dataset, retrieval protocols, metrics, re-ranking and ranked lists."""

from signal_reid.evaluation.features import FeatureSet, extract_features, load_features, save_features
from signal_reid.evaluation.metrics import Metrics, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.evaluation.protocols import PROTOCOLS, dropped
from signal_reid.evaluation.reranking import RerankingParameters, reranked_distances

__all__ = [
    "PROTOCOLS",
    "FeatureSet",
    "Metrics",
    "RerankingParameters",
    "dropped",
    "extract_features",
    "load_features",
    "match_ranks",
    "rank_gallery",
    "reranked_distances",
    "retrieval_metrics",
    "save_features",
]
