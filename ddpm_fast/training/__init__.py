"""Training: one update, and what runs many of them."""

from .step import TrainStep

__all__ = ["TrainStep"]
