"""The public ops. Each picks its backend by its arguments; see `raven.explain` and `raven.set_backend`."""

from raven.ops.blend_rows import blend_rows
from raven.ops.chunk_attention import chunk_attention
from raven.ops.consistency_step import consistency_step
from raven.ops.gated_residual import gated_residual
from raven.ops.gaussian_log_prob import gaussian_log_prob
from raven.ops.kv_append import kv_append
from raven.ops.modulate import modulate
from raven.ops.norm_silu import norm_silu
from raven.ops.policy_loss import policy_loss
from raven.ops.qk_norm_rope import qk_norm_rope
from raven.ops.quantize_rows import quantize_rows
from raven.ops.read_rows import read_rows

__all__ = [
    "blend_rows",
    "chunk_attention",
    "consistency_step",
    "gated_residual",
    "gaussian_log_prob",
    "kv_append",
    "modulate",
    "norm_silu",
    "policy_loss",
    "qk_norm_rope",
    "quantize_rows",
    "read_rows",
]
