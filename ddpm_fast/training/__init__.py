"""Training: one update, and what runs many of them."""

from .config import PRESETS, Config, OptimizerConfig, parse_changes
from .points import EmbeddingMLP, MLPConfig
from .processes import Processes, joined
from .state import load
from .step import TrainStep
from .trainer import Trainer

__all__ = [
    "PRESETS",
    "Config",
    "EmbeddingMLP",
    "MLPConfig",
    "OptimizerConfig",
    "Processes",
    "TrainStep",
    "Trainer",
    "joined",
    "load",
    "parse_changes",
]
