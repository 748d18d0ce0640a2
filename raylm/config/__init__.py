"""Typed, validated configuration. Nothing heavy is imported here."""

from raylm.config.distillation import DistillConfig
from raylm.config.inference import GenerateConfig
from raylm.config.load import dump_yaml, load_config
from raylm.config.serving import ServeConfig
from raylm.config.sweep import SweepConfig
from raylm.config.tree import TrainConfig
from raylm.config.vocabulary import VocabularyConfig

__all__ = [
    "DistillConfig",
    "GenerateConfig",
    "ServeConfig",
    "SweepConfig",
    "TrainConfig",
    "VocabularyConfig",
    "dump_yaml",
    "load_config",
]
