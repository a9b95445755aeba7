"""Query expansion: each query is replaced by a weighted mean of itself and its nearest gallery items."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from signal_reid.evaluation.distances import CHUNK_BYTES, SquaredDistances, key_columns, order_keys
from signal_reid.evaluation.features import FeatureSet
from signal_reid.runtime.errors import InputError

_BYTES_PER_PAIR = 32  # distance and key of a query and a gallery item, and the selection's copy


def expanded_queries(
    query: FeatureSet, gallery: FeatureSet, neighbours: int, power: float = 3.0, chunk_bytes: int = CHUNK_BYTES
) -> FeatureSet:
    """Alpha query expansion: the query, and its nearest items weighted by their cosine similarity to a power.

    No label takes part: the neighbours are of the whole gallery, what a protocol drops and the query itself included,
    where the gallery holds it. So it can be used where identities and cameras are unknown.

    Args:
        query: q items; their features are scaled to unit length.
        gallery: g items on the same device, of features of the same size.
        neighbours: how many, at most g; the query itself counts in addition, with weight 1.
        power: alpha; 0 is the plain average. Items at a negative similarity have weight 0, and so count not at all.
        chunk_bytes: working memory beside the features.

    Returns:
        The queries with features (q, d) in fp32, of unit length.

    Raises:
        ValueError: fewer gallery items than neighbours, or a power below 0.

    Source: Chum et al., Total Recall (2007); Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation
    (2018), section 3.5.
    """
    if not 1 <= neighbours <= len(gallery):
        raise InputError(f"neighbours must be in 1..{len(gallery)} (gallery items), got {neighbours}")
    if power < 0:
        raise InputError(f"power must be at least 0, got {power}")
    to_gallery = SquaredDistances(gallery.features, normalize=True)
    step = max(1, chunk_bytes // (_BYTES_PER_PAIR * len(gallery) + 4 * neighbours * gallery.features.shape[1]))
    parts = []
    for rows in query.features.split(step):
        keys = order_keys(to_gallery(rows)).topk(neighbours, dim=1, largest=False).values
        near = F.normalize(gallery.features[key_columns(keys)].float(), dim=2)  # (c, k, d)
        own = F.normalize(rows.float(), dim=1)  # (c, d)
        similarity = torch.einsum("cd,ckd->ck", own, near)
        weight = torch.where(similarity > 0, similarity.clamp(min=0) ** power, 0)
        parts.append(F.normalize(own + torch.einsum("ck,ckd->cd", weight, near), dim=1))
    return replace(query, features=torch.cat(parts))
