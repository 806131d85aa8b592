"""Models whose attention runs on the ops of ``raven``."""

from raven.models.config import WanConfig
from raven.models.wan import CausalWan, TextCache

__all__ = ["CausalWan", "TextCache", "WanConfig"]
