"""Training loops: teacher and causal start, RAVEN distillation, CM-GRPO. See ``docs/training.md``."""

from raven.train.config import DistillConfig, PolicyConfig, PretrainConfig
from raven.train.loop import Interrupted, read_metrics, run

__all__ = ["DistillConfig", "Interrupted", "PolicyConfig", "PretrainConfig", "read_metrics", "run"]
