"""k-nearest-neighbour accuracy: how good features are, without training anything. Used to watch a target model learn.

Knows features and labels only, not where they come from.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import normalize

CHUNK = 1024
"""query rows compared at once"""


def knn_accuracy(train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 20, *,
                 temperature: float = 0.07) -> float:
    """Share of the test rows [q, d] whose class wins the vote of their k nearest training rows [n, d].

    Cosine similarity s; a neighbour's vote weighs exp(s / temperature) (Wu et al. 2018). Fewer than k training rows: all of them vote.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = normalize(train_features.float())  # [n, d]
    right = 0
    for start in range(0, len(test_features), CHUNK):
        queries = normalize(test_features[start : start + CHUNK].float())  # [c, d]
        similarity, neighbour = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # [c, k] each
        votes = similarity.new_zeros(len(queries), classes)
        votes.scatter_add_(1, train_labels[neighbour], ((similarity - 1) / temperature).exp())
        right += int((votes.argmax(1) == test_labels[start : start + CHUNK]).sum())
    return right / len(test_features)
