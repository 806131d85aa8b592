"""Every Triton kernel compiles for every architecture it claims, on a machine without a GPU.

A kernel file lists its cases: ``aot_cases()`` yields ``(kernel, signature, constexprs, options)``, where ``signature``
maps argument names to Triton types ("*bf16", "i32", ...), ``constexprs`` the remaining ones to their values (``None``
for a missing pointer) and ``options`` holds ``num_warps`` and ``num_stages``. A file whose launch options depend on the
architecture takes it as an argument: ``aot_cases(capability)`` with 80, 90, 100 or 120.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from raven import backends

pytest.importorskip("triton")
if backends.interpreting():
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.aot

KERNELS = Path(__file__).parents[1] / "kernels"
OPS = sorted(path.stem for path in KERNELS.glob("*.py") if "@triton.jit" in path.read_text())
# Bytes of shared memory that one program can have: CUDA C programming guide, "technical specifications".
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def cases_of(op, capability):
    aot_cases = importlib.import_module(f"raven.kernels.{op}").aot_cases
    return list(aot_cases(capability) if inspect.signature(aot_cases).parameters else aot_cases())


def compile_case(kernel, signature, constexprs, options, capability):
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    assert constexprs.keys() == {name for name, kind in signature.items() if kind == "constexpr"}
    # Allocations are aligned, as the launcher finds out at run time; vector loads and pipelining depend on it.
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("op", OPS)
def test_compiles(op, capability):
    cases = cases_of(op, capability)
    assert cases
    for case in cases:
        compiled = compile_case(*case, capability)
        assert compiled.asm["cubin"][:4] == b"\x7fELF"
        assert re.search(rf"\.target sm_{capability}", compiled.asm["ptx"])
        assert compiled.metadata.shared <= SHARED_MEMORY[capability], f"{case[0].__name__} {case[2]} {case[3]}"


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_is_left_out(op):
    """A function is compiled as a case of its own, or inside another one that calls it."""
    module = importlib.import_module(f"raven.kernels.{op}")
    functions = {
        name: f for name, f in vars(module).items() if isinstance(f, JITFunction) and f.__module__ == module.__name__
    }
    compiled = {case[0].__name__ for case in cases_of(op, 90)}
    called = {name for name in functions for f in functions.values() if re.search(rf"(?<!def )\b{name}[(),]", f.src)}
    assert functions.keys() - compiled - called == set()
