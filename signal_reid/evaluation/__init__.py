"""Evaluation: features of a dataset, retrieval protocols, metrics, re-ranking and ranked lists."""

from signal_reid.evaluation.details import QueryRanks, bootstrap_interval, query_ranks
from signal_reid.evaluation.expansion import expanded_queries
from signal_reid.evaluation.features import FeatureSet, extract_features, load_features, save_features
from signal_reid.evaluation.metrics import Metrics, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.evaluation.protocols import PROTOCOLS, dropped
from signal_reid.evaluation.reranking import RerankingParameters, reranked_distances
from signal_reid.evaluation.verification import ROC, OperatingPoint, roc

__all__ = [
    "PROTOCOLS",
    "ROC",
    "FeatureSet",
    "Metrics",
    "OperatingPoint",
    "QueryRanks",
    "RerankingParameters",
    "bootstrap_interval",
    "dropped",
    "expanded_queries",
    "extract_features",
    "load_features",
    "match_ranks",
    "query_ranks",
    "rank_gallery",
    "reranked_distances",
    "retrieval_metrics",
    "roc",
    "save_features",
]
