"""Tools for tests and benches of these ops and of code that uses them: oracles, tolerances, memory traps, timers."""

from raven.testing.compare import (
    Tolerance,
    assert_as_accurate,
    assert_bitwise,
    relative_rms,
    tolerance,
)
from raven.testing.layouts import KINDS, RandomMask, random_mask
from raven.testing.machine import describe_machine
from raven.testing.memory import guarded, poison_freed_memory, poisoned_memory
from raven.testing.oracles import attention_oracle
from raven.testing.timers import copy_rate, matmul_rate, peak_extra_bytes, time_ms

__all__ = [
    "KINDS",
    "RandomMask",
    "Tolerance",
    "assert_as_accurate",
    "assert_bitwise",
    "attention_oracle",
    "copy_rate",
    "describe_machine",
    "guarded",
    "matmul_rate",
    "peak_extra_bytes",
    "poison_freed_memory",
    "poisoned_memory",
    "random_mask",
    "relative_rms",
    "time_ms",
    "tolerance",
]
