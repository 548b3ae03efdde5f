"""scikit-learn's 1,797 real handwritten digits, 8 x 8, in [-1, 1]: four fifths to train on, one held out."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

Split = tuple[Tensor, Tensor]


def train_and_held_out() -> tuple[Split, Split]:
    """((images, labels), (images, labels)); images float32 (n, 1, 8, 8), labels int64 (n,)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(digits.target)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return (split[0], split[2]), (split[1], split[3])
