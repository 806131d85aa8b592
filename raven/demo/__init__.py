"""The demo: teacher, causal start, RAVEN, CM-GRPO, evaluation and a report, on the built-in world ``shapes``."""
