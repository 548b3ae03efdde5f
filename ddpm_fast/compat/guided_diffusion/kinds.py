"""What a model returns, and what it is trained on."""

from __future__ import annotations

import enum


class ModelMeanType(enum.Enum):
    """What the model returns."""

    PREVIOUS_X = enum.auto()  # the mean of p(x_{t-1} | x_t)
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t): learned as its log, or as where it lies between the fixed two."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What `GaussianDiffusion.training_losses` returns."""

    MSE = enum.auto()  # of what is predicted; and the bound, where the variance is learned
    RESCALED_MSE = enum.auto()  # the same with the bound times T / 1000
    KL = enum.auto()  # the bound
    RESCALED_KL = enum.auto()  # T times the bound
    BCE_DICE = enum.auto()  # as MSE, of segmentation forks

    def is_vb(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)
