"""The build of the CUDA library: its errors, what ptxas says about every kernel, and what the library asks for.

Tests marked ``cuda_build`` need nvcc, no GPU: ``make test-cuda`` installs it and compiles each source once, into
build/cuda, which all of them share.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import raven
from raven import env, native

ROOT = Path(__file__).parents[1]


def tool(name):
    """A file of csrc/, which is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / f"csrc/{name}.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


portable, resources = tool("portable"), tool("resources")
build_cuda = tool("build_cuda")

SPILLS_AND_SERIALISES = """
#include <cuda_runtime.h>
#include <cstdint>
__global__ void undeclared(float* x) { x[threadIdx.x] += 1; }
__global__ void __launch_bounds__(1024, 2) spills(float* x) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 3; ++r)
#pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i * 7 + r) % 64] + a[(i + 13) % 64];
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = a[i];
}
// The sum reads a register that a product in flight is writing.
__global__ void __launch_bounds__(128) serialises(uint64_t a, uint64_t b, float* out, int n) {
    float d[4] = {};
    for (int i = 0; i < n; ++i) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        asm volatile(
            "{ .reg .pred p; setp.ne.b32 p, 1, 0;\\n"
            "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0; }"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "l"(a), "l"(b));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        d[0] += 1;
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
"""

LOG = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {reason}
csrc/ops/x.cu(16): warning #177-D: variable "y" was declared but never referenced
Remark: The warnings can be suppressed with "-diag-suppress <warning-number>"
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_90a'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_90a'
ptxas info    : Function properties for _Z3twoPf
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 129 registers, used 1 barriers, 8 bytes cumulative stack size
"""
PTX = """
.visible .entry _Z3onePf(
        .param .u64 .ptr .align 1 _Z3onePf_param_0
)
.maxntid 384, 1, 1
{
        ret;
}
.visible .entry _Z3twoPf(
        .param .u64 .ptr .align 1 _Z3twoPf_param_0
)
.maxntid 16, 16, 1
.minnctapersm 2
{
        ret;
}
"""


def test_architectures():
    assert build_cuda.archs({}) == ["90a"]
    assert build_cuda.archs({"RAVEN_CUDA_ARCHS": " sm_90a;90a "}) == ["90a"]
    with pytest.raises(build_cuda.BuildError, match="RAVEN_CUDA_ARCHS: got '90', expected 90a .*RAVEN_BUILD_NO_CUDA=1"):
        build_cuda.archs({"RAVEN_CUDA_ARCHS": "90a;90"})


def fake_nvcc(folder, said):
    path = folder / "nvcc"
    path.write_text(f"#!/bin/sh\necho '{said}'\n")
    path.chmod(0o755)
    return str(path)


def test_nvcc(tmp_path):
    new = fake_nvcc(tmp_path, "Cuda compilation tools, release 13.1, V13.1.80")
    assert build_cuda.find_nvcc({"CUDACXX": new}).version == "13.1.80"
    old = fake_nvcc(tmp_path, "Cuda compilation tools, release 12.4, V12.4.131")
    with pytest.raises(build_cuda.BuildError, match=r"nvcc: got 12.4.131 \(.*, expected 13.0 or newer. Name one"):
        build_cuda.find_nvcc({"CUDACXX": old})
    with pytest.raises(build_cuda.BuildError, match="expected a version"):
        build_cuda.find_nvcc({"CUDACXX": fake_nvcc(tmp_path, "hello")})
    with pytest.raises(build_cuda.BuildError, match="CUDACXX: got 'nowhere', expected the path"):
        build_cuda.find_nvcc({"CUDACXX": "nowhere"})


def test_no_nvcc(monkeypatch):
    monkeypatch.setattr(build_cuda.os, "access", lambda path, mode: False)
    fix = r"nvcc: found none.*CUDACXX=.*cuda-toolkit\[cccl,crt,cudart,nvcc,nvvm\]==13.0.*RAVEN_BUILD_NO_CUDA=1"
    with pytest.raises(build_cuda.BuildError, match=fix):
        build_cuda.find_nvcc({"PATH": ""})


def test_no_torch(monkeypatch):
    monkeypatch.setattr(build_cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        build_cuda.BuildError, match="torch: not installed in the Python that builds.*no-build-isolation"
    ):
        build_cuda.find_torch()


def test_what_ptxas_says():
    one, two = resources.kernels(LOG, PTX)
    assert (one.registers, one.declared, one.faults) == (168, 168, [])
    assert (two.registers, two.declared, two.stack) == (129, 128, 8)
    assert two.faults == ["_Z3twoPf: spills 4 bytes and loads 12", "_Z3twoPf: 129 registers, declares at most 128"]
    assert [line.split()[0] for line in resources.complaints(LOG)] == ["csrc/ops/x.cu(16):", "ptxas"]
    assert resources.declared(PTX.replace(".maxntid 384, 1, 1", "")) == {"_Z3onePf": None, "_Z3twoPf": 128}
    assert resources.declared(PTX.replace(".minnctapersm 2", ".maxnreg 40"))["_Z3twoPf"] == 40
    with pytest.raises(ValueError, match="got 2 kernels, expected the 1 of the PTX"):
        resources.kernels(LOG, PTX[: PTX.index(".visible", 10)])


def test_build_config_without_a_library(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "none.so")
    forget(monkeypatch)
    assert native.build_config() == {"library": None, "unavailable": native.unavailable()}
    assert "not installed (make cuda" in native.unavailable()


def test_build_config_of_another_file(monkeypatch, tmp_path):
    """A library that was built some other way is named, and nothing is claimed about it."""
    library = tmp_path / "other.so"
    library.write_bytes(b"\x7fELF and no more")
    monkeypatch.setattr(native, "LIBRARY", library)
    forget(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = native.build_config()
    assert config.keys() == {"library", "unavailable"}
    assert config["unavailable"].startswith("the CUDA library does not load: ")


def test_a_library_of_another_version(monkeypatch, tmp_path):
    """What it was built with is read out of the file, which is used by the version that it was built for alone."""
    config = {"raven": "0.0.9", "archs": "90a", "ops": "one two", "nvcc": "13.0.88", "host_compiler": "GCC 12.2.0"}
    config |= {"cuda_runtime": 13000, "torch_target_version": "0x020a000000000000", "flags": "-O3"}
    library = tmp_path / "libraven_cuda.so"
    library.write_bytes(b"\x7fELF" + native.MARK + json.dumps(config).encode() + b"\0 more")
    monkeypatch.setattr(native, "LIBRARY", library)
    forget(monkeypatch)
    facts = native.build_config()
    why = f"the CUDA library was built for raven 0.0.9, and this is {raven.__version__}: build it again"
    assert facts == config | {
        "library": str(library), "unavailable": why, "archs": ["90a"], "ops": ["one", "two"], "cuda_runtime": "13.0",
        "torch_target_version": "2.10",
    }  # fmt: skip
    text = env.describe(env.collect())
    assert f"CUDA library: {library}, raven 0.0.9, sm_90a, nvcc 13.0.88, GCC 12.2.0, for torch 2.10 and newer" in text
    assert f"; not used: {why}\n" in text


def test_a_driver_that_is_too_old(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_compiled_in", lambda: {"cuda_runtime": 13000})
    for version, why in ((12080, "the driver runs CUDA 12.8, and the CUDA library needs 13.0"), (13020, None)):
        source = f"int raven_driver_version(void) {{ return {version}; }}"
        monkeypatch.setattr(native, "LIBRARY", shared_library(tmp_path / f"lib{version}.so", source))
        got = native._driver_too_old()
        assert got is None if why is None else got.startswith(why)


def forget(monkeypatch):
    """What `raven.native` remembers about the installed library, for the length of a test."""
    for name in ("unavailable", "_compiled_in"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)


def shared_library(path, source):
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture(scope="module")
def built():
    """Path of the library, from objects in build/cuda that are compiled here when they are not up to date."""
    try:
        build_cuda.find_nvcc()
    except build_cuda.BuildError as error:
        pytest.skip(str(error))
    library = "build/cuda/libraven_cuda.so"
    result = run(sys.executable, "csrc/build_cuda.py", "--output", library)
    assert result.returncode == 0, result.stderr
    return ROOT / library


def run(*command, **more):
    return subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, **more)


def program(name):
    """The one that is installed next to this Python, or in the system."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or pytest.skip(
        f"needs {name}"
    )


@pytest.mark.cuda_build
def test_every_kernel_keeps_to_what_it_declares(built):
    faults, ops = [], set()
    for log in sorted(built.parent.glob("*.log")):
        found, wrong = resources.report(log)
        faults += wrong
        ops |= {log.stem} if found else set()
    assert not faults, "\n".join(faults)
    assert ops == {path.stem for path in build_cuda.sources()}


@pytest.mark.cuda_build
def test_faults_are_seen(built, tmp_path):
    """The same checks on kernels that spill, serialise and declare nothing."""
    source = tmp_path / "bad.cu"
    source.write_text(SPILLS_AND_SERIALISES)
    unit = build_cuda.Unit(source, tmp_path / "bad.o")
    tools = build_cuda.find_nvcc(), build_cuda.find_torch(), build_cuda.compile_flags(["90a"])
    assert build_cuda.compile_unit(unit, *tools) and not build_cuda.compile_unit(unit, *tools)
    found, faults = resources.report(unit.log)
    assert {kernel.name for kernel in found} == {"undeclared", "spills", "serialises"}
    text = "\n".join(faults)
    assert "undeclared: declares no __launch_bounds__" in text
    assert re.search(r"^spills: spills \d+ bytes", text, re.M)
    assert "wgmma.mma_async instructions are serialized" in text
    source.write_text(SPILLS_AND_SERIALISES + "// changed\n")
    assert build_cuda.compile_unit(unit, *tools)


@pytest.mark.cuda_build
def test_library_asks_for_nothing_new(built):
    """The stable C interface of PyTorch, and C and C++ libraries of the age that the wheel's tag names."""
    assert portable.too_new(built, build_cuda.FLAGS["newest_symbols"]) == {}
    unversioned = {name for name, version in portable.undefined(built).items() if version is None}
    unversioned -= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    assert {name for name in unversioned if not re.match("(aoti_)?torch_", name)} == set()
    assert "torch_library_impl" in unversioned
    system = {
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
    }
    asked = {name for name in portable.needed(built) if not name.startswith("ld-linux")}
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= asked <= system | {"libtorch_cpu.so", "libtorch_cuda.so"}
    assert portable.defined(built).keys() == set(build_cuda.FLAGS["exports"])


@pytest.mark.cuda_build
def test_older_versions_are_asked_for(tmp_path):
    """A function that the C library moved in 2.34, linked as in an older one, runs with this one."""
    newest = {"GLIBC": "2.28"}
    source = '#define _GNU_SOURCE\n#include <dlfcn.h>\nvoid *found(void) { return dlsym(RTLD_DEFAULT, "strlen"); }'
    library = shared_library(tmp_path / "libfound.so", source)
    stubs = portable.older_stubs(library, tmp_path / "stubs", newest)
    if not stubs:
        pytest.skip("the C library here is older than 2.34")
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *map(str, stubs), "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)
    assert portable.undefined(library)["dlsym"] == "GLIBC_2.2.5" and portable.too_new(library, newest) == {}
    code = (
        f"import ctypes; f = ctypes.CDLL({str(library)!r}).found; f.restype = ctypes.c_void_p; print(f() is not None)"
    )
    assert run(sys.executable, "-c", code).stdout.strip() == "True"


# Loads the library argv[1] and prints, for each op in argv[2], its schema and whether it returns nothing and writes.
# Without a GPU a call on the CUDA key ends in an error at the stream or the launch; it must arrive in Python.
LOAD = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
facts, raised = [], 0
samples = {"Tensor": torch.ones(2, 2, 2, 128), "int": 1, "float": 1.0, "bool": False}
for name in sys.argv[2].split(","):
    op = getattr(torch.ops.raven_cuda, name).default
    arguments = op._schema.arguments
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    facts.append([str(op._schema), len(op._schema.returns) == 0 and writes])
    kinds = [str(a.type) for a in arguments]
    if torch.version.cuda is None and all(k in samples or k.startswith("Optional") for k in kinds):
        try:
            op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *(samples.get(k) for k in kinds))
        except RuntimeError:
            raised += 1
print(json.dumps([facts, raised]))
"""


@pytest.mark.cuda_build
def test_library_loads_and_registers_every_op(built, tmp_path):
    """Without a GPU: a file called libtorch_cuda.so stands in where PyTorch has none."""
    names = {
        name for path in build_cuda.sources() for name in re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / path).read_text())
    }
    assert len(names) >= len(build_cuda.sources())
    environment = dict(os.environ)
    if torch.version.cuda is None:
        source = "int aoti_torch_get_current_cuda_stream(int i, void **s) { return 1; }"
        shared_library(tmp_path / "libtorch_cuda.so", source)
        environment["LD_LIBRARY_PATH"] = str(tmp_path)
    result = run(sys.executable, "-c", LOAD, built, ",".join(sorted(names)), env=environment)
    assert result.returncode == 0, result.stderr
    facts, raised = json.loads(result.stdout)
    assert [schema for schema, right in facts if not right] == []
    assert raised > 0 or torch.version.cuda is not None


@pytest.fixture(scope="module")
def configured(built, tmp_path_factory):
    """A CMake build folder, with one op for the library (the smallest; the rest took long enough once)."""
    cmake, ninja = program("cmake"), program("ninja")
    smallest = min(build_cuda.sources(), key=lambda path: (built.parent / f"{path.stem}.o").stat().st_size).stem
    folder = tmp_path_factory.mktemp("cmake")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DRAVEN_CUDA=ON"]
    result = run(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *options, f"-DRAVEN_OPS={smallest}")
    assert result.returncode == 0, result.stderr
    return cmake, folder, smallest


@pytest.mark.cuda_build
def test_cmake_compiles_with_the_same_flags(configured, built):
    cmake, folder, op = configured
    commands = run(program("ninja"), "-C", folder, "-t", "commands", "raven_cuda").stdout.splitlines()
    (command,) = [shlex.split(line) for line in commands if f"csrc/ops/{op}.cu" in line]
    nvcc = str(build_cuda.find_nvcc().path)
    arguments = command[command.index(nvcc) + 1 :]
    flags = build_cuda.compile_flags(["90a"])
    assert arguments[: len(flags)] == flags


@pytest.mark.cuda_build
@pytest.mark.timeout(900)
def test_cmake_builds_the_library_and_headers_are_complete(configured):
    cmake, folder, op = configured
    result = run(cmake, "--build", folder, "--target", "raven_headers", "raven_cuda_headers", "raven_cuda")
    assert result.returncode == 0, result.stdout + result.stderr
    headers = [path for path in (ROOT / "csrc/include/raven").iterdir() if path.suffix in (".h", ".cuh")]
    made = {path.stem for path in (folder / "cuda/headers").glob("*.ptx")}
    made |= {path.name.partition(".")[0] for path in folder.rglob("raven_*.cpp.o")}
    assert made >= {re.sub(r"\W", "_", f"raven/{path.name}") for path in headers}
    library = folder / "cuda/libraven_cuda.so"
    assert portable.defined(library).keys() == set(build_cuda.FLAGS["exports"])
    assert f'"ops": "{op}"'.encode() in library.read_bytes()
