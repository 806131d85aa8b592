"""Arrays of other libraries: the same bits as with tensors, over the same memory, on the stream they live on."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

import raven
from raven import backends, interop, native, ops
from raven.cache import KVCache
from raven.layout import ChunkLayout

LAYOUT = ChunkLayout.repacked((2, 2), tokens_per_frame=4)
TOKENS = LAYOUT.length


def random_array(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


class Opaque:
    """No library behind it: two methods are all that DLPack asks for."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_memory_is_shared_both_ways():
    x = random_array(2, 3)
    tensor = interop.as_tensor(x)
    assert tensor.data_ptr() == x.ctypes.data and interop.as_tensor(tensor) is tensor
    back = interop.as_array(tensor, like=x)
    assert isinstance(back, np.ndarray) and back.ctypes.data == x.ctypes.data
    x[1, 2] = 7
    assert tensor[1, 2] == 7 and back[1, 2] == 7
    strided = random_array(4, 6)[::2, 1::3]
    assert np.array_equal(interop.as_tensor(strided).numpy(), strided)
    assert interop.as_tensor(strided).data_ptr() == strided.ctypes.data


def test_ops_read_and_write_in_place():
    """What the op gets lies where the array does, and what it returns is not copied either."""
    seen = []

    def op(x, y, scale=None, layout=None):
        seen.extend([x, y, scale])
        return x * 2, y

    x, y = random_array(3), random_array(3, seed=1)
    doubled, same = interop._for_arrays(op)(x, y=y, scale=0.5)
    assert [t.data_ptr() for t in seen[:2]] == [x.ctypes.data, y.ctypes.data] and seen[2] == 0.5
    assert np.array_equal(doubled, 2 * x) and same.ctypes.data == y.ctypes.data


def test_chunk_attention():
    q, k, v = (random_array(1, TOKENS, 2, 8, seed=i) for i in range(3))
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    want, want_lse = ops.chunk_attention(*tensors, LAYOUT, return_lse=True)
    got, lse = interop.chunk_attention(q, k, v=v, layout=LAYOUT, return_lse=True)
    assert isinstance(got, np.ndarray) and isinstance(lse, np.ndarray)
    assert np.array_equal(got, want.numpy()) and np.array_equal(lse, want_lse.numpy())
    got = interop.chunk_attention(*(Opaque(x) for x in (q, k, v)), LAYOUT)
    assert isinstance(got, torch.Tensor) and torch.equal(got, want)
    assert torch.equal(interop.chunk_attention(*tensors, LAYOUT), want)


def test_norm_and_append():
    q, k, v = (random_array(1, TOKENS, 2, 8, seed=i) for i in range(3))
    weight, positions = random_array(16, seed=3), np.arange(3 * TOKENS, dtype=np.int32).reshape(TOKENS, 3)
    arguments = (q, k, weight, None, positions)
    want = ops.qk_norm_rope(*(None if x is None else torch.from_numpy(x) for x in arguments))
    got = interop.qk_norm_rope(*arguments)
    assert all(np.array_equal(g, w.numpy()) for g, w in zip(got, want, strict=True))

    cache = KVCache(1, batch=1, heads=2, head_dim=8, chunk_tokens=TOKENS, max_chunks=1, dtype=torch.float32)
    cache.begin(TOKENS, 0, 4)
    rotated = interop.kv_append(q, k, v, weight, None, positions, cache, 0)
    assert isinstance(rotated, np.ndarray) and np.array_equal(rotated, got[0])
    rows = cache.slots.long()
    assert np.array_equal(cache.k[0][:, rows].numpy(), got[1]) and np.array_equal(cache.v[0][:, rows].numpy(), v)


def test_log_prob_and_step():
    v, x_t, x_s = (random_array(2, 3, 4, 5, seed=i) for i in range(3))
    t, s = np.float32([0.9, 0.8]), np.float32([0.5, 0.25])
    tensors = [torch.from_numpy(x) for x in (v, x_t, x_s, t, s)]
    got = interop.gaussian_log_prob(v, x_t, x_s, t, s)
    assert isinstance(got, np.ndarray) and np.array_equal(got, ops.gaussian_log_prob(*tensors).numpy())
    got = interop.consistency_step(v, x_t, t, s, noise=x_s)
    assert np.array_equal(got, ops.consistency_step(*tensors[:2], *tensors[3:], noise=tensors[2]).numpy())


def test_bfloat16_as_bits():
    tensors = [torch.from_numpy(random_array(1, TOKENS, 2, 8, seed=i)).bfloat16() for i in range(3)]
    bits = [x.view(torch.uint16).numpy() for x in tensors]
    got = interop.chunk_attention(*bits, LAYOUT, bfloat16_bits=True)
    assert got.dtype == np.uint16
    assert np.array_equal(got, ops.chunk_attention(*tensors, LAYOUT).view(torch.uint16).numpy())
    assert interop.as_tensor(bits[0], bfloat16_bits=True).data_ptr() == bits[0].ctypes.data
    with pytest.raises(TypeError, match="q: got dtype uint16"):
        interop.chunk_attention(*bits, LAYOUT)
    with pytest.raises(TypeError, match="tensor: got bfloat16, expected a dtype that numpy has; bfloat16_bits=True"):
        interop.as_array(tensors[0], like=bits[0])


def test_errors_name_the_argument():
    q = random_array(1, TOKENS, 2, 8)
    with pytest.raises(ValueError, match=r"k: got strides .*-\d+.*, expected none that is negative"):
        interop.chunk_attention(q, q[:, ::-1], q, LAYOUT)
    with pytest.raises(ValueError, match="v: got numpy.ndarray of >f4, expected one that PyTorch can read"):
        interop.chunk_attention(q, q, v=q.astype(">f4"), layout=LAYOUT)
    with pytest.raises(ValueError, match="q: got numpy.ndarray of object"):
        interop.chunk_attention(q.astype(object), q, q, LAYOUT)
    with pytest.raises(TypeError, match="x: got list, expected an array with __dlpack__"):
        interop.as_tensor([1.0])
    with pytest.raises(ValueError, match="k: got shape"):
        interop.chunk_attention(q, q[0], q, LAYOUT)


def test_needs_no_cupy():
    code = "import sys; sys.modules['cupy'] = None; from raven import interop; print(interop.chunk_attention.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "chunk_attention\n"


# One block a sample: each thread adds up its elements in float64, then a tree over shared memory. Written from
# log N(x_s; (1 - s) (x_t - t v), s^2 I), in the order of the words and not of any other kernel here.
LOG_PROB = r"""
extern "C" __global__ void log_prob(const float* v, const float* x_t, const float* x_s, const float* t, const float* s,
                                    double* out, double* magnitude, long long elements) {
    __shared__ double sums[256];
    const long long sample = blockIdx.x;
    const double level = s[sample];
    double sum = 0;
    for (long long i = threadIdx.x; i < elements; i += 256) {
        const long long at = sample * elements + i;
        const double clean = (double)x_t[at] - (double)t[sample] * (double)v[at];
        const double z = ((double)x_s[at] - (1.0 - level) * clean) / level;
        sum += z * z;
    }
    sums[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
        const double log_2_pi = 1.8378770664093454836;
        out[sample] = -0.5 * sums[0] - elements * (log(level) + 0.5 * log_2_pi);
        magnitude[sample] = 0.5 * sums[0] + elements * (fabs(log(level)) + 0.5 * log_2_pi);
    }
}
"""


@pytest.fixture(scope="module")
def cupy():
    return pytest.importorskip("cupy")


def on_gpu(cupy, *shape, seed=0):
    return cupy.asarray(random_array(*shape, seed=seed))


@pytest.fixture
def backend(request):
    if request.param == "cuda" and native.unavailable():
        pytest.skip(native.unavailable())
    raven.set_backend(request.param)
    yield request.param
    raven.set_backend(None)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", backends.BACKENDS, indirect=True)
@pytest.mark.parametrize("shape", [(3, 16, 21, 60, 104), (2, 7), (1, 1)], ids=str)
def test_log_prob_against_a_kernel_from_the_formula(cupy, backend, shape):
    v, x_t, x_s = (on_gpu(cupy, *shape, seed=i) for i in range(3))
    t, s = (cupy.asarray(np.float32(levels[: shape[0]])) for levels in ([1.0, 0.9, 0.6], [0.75, 0.5, 0.25]))
    got = interop.gaussian_log_prob(v, x_t, x_s, t, s)
    want, magnitude = cupy.empty(shape[0]), cupy.empty(shape[0])
    elements = math.prod(shape[1:])
    cupy.RawKernel(LOG_PROB, "log_prob")((shape[0],), (256,), (v, x_t, x_s, t, s, want, magnitude, np.int64(elements)))
    assert isinstance(got, cupy.ndarray) and got.dtype == np.float32
    assert bool((cupy.abs(got - want) <= 1e-6 * magnitude).all())


@pytest.mark.gpu
def test_cupy_arrays_give_the_bits_of_tensors(cupy):
    layout = ChunkLayout.repacked((1, 1), tokens_per_frame=100)
    q, k, v = (on_gpu(cupy, 1, layout.length, 2, 64, seed=i).astype(cupy.float16) for i in range(3))
    tensors = [torch.from_dlpack(x) for x in (q, k, v)]
    assert tensors[0].data_ptr() == q.data.ptr
    got = interop.chunk_attention(q, k, v, layout)
    assert isinstance(got, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(got), ops.chunk_attention(*tensors, layout))
    bits = [torch.from_dlpack(x).bfloat16() for x in (q, k, v)]
    arrays = [interop.as_array(x, like=q, bfloat16_bits=True) for x in bits]
    got = interop.chunk_attention(*arrays, layout, bfloat16_bits=True)
    assert got.dtype == np.uint16
    want = ops.chunk_attention(*bits, layout)
    assert torch.equal(interop.as_tensor(got, bfloat16_bits=True), want)
    if int(cupy.__version__.partition(".")[0]) >= 14:
        got = interop.chunk_attention(*(interop.as_array(x, like=q) for x in bits), layout)
        assert str(got.dtype) == "bfloat16" and torch.equal(interop.as_tensor(got), want)


@pytest.mark.gpu
def test_cupy_arrays_fill_a_cache(cupy):
    tokens = 96
    q, k, v = (on_gpu(cupy, 1, tokens, 2, 64, seed=i) for i in range(3))
    weight, positions = on_gpu(cupy, 128, seed=3), cupy.arange(3 * tokens, dtype=cupy.int32).reshape(tokens, 3)
    cache = KVCache(
        1, batch=1, heads=2, head_dim=64, chunk_tokens=tokens, max_chunks=2, dtype=torch.float32, device="cuda"
    )
    cache.begin(tokens, 0, 1)
    rotated = interop.kv_append(q, k, v, weight, weight, positions, cache, 0)
    want_q, want_k = interop.qk_norm_rope(q, k, weight, weight, positions)
    assert bool((rotated == want_q).all())
    kept = interop.as_array(cache.k[0], like=q)[:, :tokens]
    assert kept.data.ptr == cache.k[0].data_ptr() and bool((kept == want_k).all())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["null", "own"])
def test_work_runs_on_the_current_stream_of_cupy(cupy, kind):
    """The op waits for what CuPy has queued before it, and CuPy for the op, without a word from the host."""
    stream = cupy.cuda.Stream.null if kind == "null" else cupy.cuda.Stream(non_blocking=True)
    seen = []

    def op(x):
        seen.append(torch.cuda.current_stream().cuda_stream)
        return ops.gaussian_log_prob(x, x, x, 0.5, 0.5)

    x = on_gpu(cupy, 1, 1 << 20)
    want = interop.gaussian_log_prob(x, x, x, 0.5, 0.5)
    slow = cupy.RawKernel(
        r"""extern "C" __global__ void slow(const float* x, float* y, int n) {
            const long long end = clock64() + 200000000;
            while (clock64() < end) {}
            for (int i = threadIdx.x; i < n; i += 1024) y[i] = x[i];
        }""",
        "slow",
    )
    cupy.cuda.Device().synchronize()
    with stream:
        y = cupy.zeros_like(x)
        slow((1,), (1024,), (x, y, np.int32(x.size)))
        got = interop._for_arrays(op)(y) + 0
        y.fill(0)
    stream.synchronize()
    assert bool((got == want).all())
    assert seen == [stream.ptr]
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@pytest.mark.gpu
def test_stream_of_a_thread_is_refused(cupy):
    x = on_gpu(cupy, 1, 4)
    with cupy.cuda.Stream.ptds, pytest.raises(ValueError, match="got CuPy's per-thread default stream, expected"):
        interop.gaussian_log_prob(x, x, x, 0.5, 0.5)


@pytest.mark.gpu
def test_negative_strides_of_cupy_are_refused(cupy):
    x = on_gpu(cupy, 1, 4)
    with pytest.raises(ValueError, match="v: got strides .* expected none that is negative"):
        interop.gaussian_log_prob(x[:, ::-1], x, x, 0.5, 0.5)
