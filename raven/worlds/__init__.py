"""Built-in worlds: small videos with prompts, made on the fly, whose quality can be measured exactly."""

from raven.worlds.shapes import Shapes

__all__ = ["Shapes"]
