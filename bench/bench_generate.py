"""From a prompt to pixels at Wan2.1-1.3B size with random weights: 480x832, 81 frames, 4 steps, bfloat16, one video.

What ``raven generate --wan`` does between the prompt's tokens and the mp4, by its own parts: UMT5-XXL encodes 64
tokens, the transformer denoises 7 chunks of 3 latent frames, the VAE decodes them, and the pixels are copied to the
host as bytes. "beside": chunks are decoded on their own CUDA stream while the next ones are denoised, as the command
does it. "after": the same work, decoded when the last chunk is done; ``phases_ms`` says what each part took there.
"decode": the VAE alone. A row counts only if the pixels of both ways are the same bytes and the decoder is as close to
float32 as diffusers' own in bfloat16. Models are there before the clock starts, and encoding the mp4 is not timed.

Needs diffusers and transformers (``pip install raven-kernels[wan]``); without them the rows are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from bench_stream import TINY, WAN, milliseconds, model_of
from harness import DEVICE
from torch.utils.flop_counter import FlopCounterMode
from wan_step import GIB, Size, automatic, chosen, rollout_flops

import raven
from raven.generate.handover import Decoded, Handover
from raven.integrations import need
from raven.integrations.wan_vae import WanVAE
from raven.schedule import sampling_levels
from raven.stream import Stream
from raven.testing import assert_bitwise, relative_rms
from raven.worlds.pictures import to_bytes

pytestmark = pytest.mark.usefixtures("freed")
TOKENS = 64  # of the prompt
REPEATS = 3 if DEVICE == "cuda" else 1
SEED = 3
# How much further from float32 than diffusers' own decoder in bfloat16 ours may be.
NO_WORSE = 1.1
WAYS = ("beside", "after", "decode")


@dataclass(frozen=True, eq=False)
class Whole:
    """The three models: the transformer's sizes, and options of ``AutoencoderKLWan`` and ``UMT5Config``."""

    size: Size
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    @property
    def latent_frames(self) -> int:
        return sum(self.size.chunks)

    @property
    def frames(self) -> int:
        return 4 * self.latent_frames - 3


XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
REAL = Whole(WAN, text=XXL)
SMALL = Whole(
    TINY,
    vae={"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "latents_mean": [0.1, -0.2]}
    | {"latents_std": [1.0, 2.0]},
    text={"vocab_size": 32, "d_model": TINY.config.text_dim, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
)


def random_vae(options: dict[str, Any], dtype: torch.dtype, device: str = DEVICE) -> Any:
    """diffusers' own, always with the same weights; its pixels cover their range, which random ones do not."""
    diffusers = need("diffusers", "measuring generate")
    torch.manual_seed(2)
    with torch.device(device), torch.no_grad():
        vae = diffusers.AutoencoderKLWan(**options).eval()
        vae.encoder = vae.quant_conv = None
        if device != "meta":
            z = torch.randn(1, vae.config.z_dim, 1, 16, 16)
            vae.decoder.conv_out.weight.mul_(0.5 / vae.decode(z).sample.std())
    return vae.to(dtype)


@lru_cache(maxsize=1)  # made once for all rows
def random_text_encoder(whole: Whole) -> Any:
    transformers = need("transformers", "measuring generate")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return transformers.UMT5EncoderModel(transformers.UMT5Config(**whole.text)).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)


class Case:
    """Models, a stream with its graphs, and the way of its chunks to the host."""

    def __init__(self, whole: Whole) -> None:
        size = self.size = whole.size
        self.whole = whole
        self.levels = sampling_levels(size.steps)
        self.generator = torch.Generator(DEVICE)
        self.ids = torch.arange(TOKENS, device=DEVICE)[None] % whole.text["vocab_size"]
        self.encoder = random_text_encoder(whole)
        self.vae = WanVAE(random_vae(whole.vae, torch.bfloat16))
        self.handover = Handover(lambda z: to_bytes(self.vae.decode(z)), torch.device(DEVICE))
        model = model_of(size.config, False)
        self.stream = Stream(model, self.text(), size.latent, size.chunks[0], max_frames=whole.latent_frames)

    @torch.no_grad()
    def text(self) -> torch.Tensor:
        """Rows of the prompt's tokens ``[1, n, text_dim]``, no more than the transformer takes."""
        return self.encoder(self.ids[:, : self.size.config.text_len]).last_hidden_state

    @property
    def text_bytes(self) -> int:
        return sum(p.nbytes for p in self.encoder.parameters())

    def warm_up(self) -> None:
        self.stream.warm_up(levels=self.levels)
        latent = (1, self.size.latent[0], self.size.chunks[0], *self.size.latent[1:])
        self.handover.warm_up(torch.zeros(latent, device=DEVICE))

    def begin(self) -> None:
        self.stream.reset(self.text())
        self.vae.reset()
        self.generator.manual_seed(SEED)
        self.handover.begin()

    def chunks(self) -> Iterator[torch.Tensor]:
        return self.stream.generate(self.whole.latent_frames, self.levels, self.generator)

    def latents(self) -> list[torch.Tensor]:
        """The chunks of the video, kept on the device."""
        return [x.clone() for x in self.chunks()]

    def hand_over(self, chunks: list[torch.Tensor] | Iterator[torch.Tensor]) -> torch.Tensor:
        """Bytes ``[1, F, H, W, 3]`` on the host."""
        self.waiting: list[Decoded] = [self.handover.submit(x) for x in chunks]
        return torch.cat([done.wait() for done in self.waiting], dim=1)

    def beside(self) -> torch.Tensor:
        self.begin()
        return self.hand_over(self.chunks())

    def after(self) -> torch.Tensor:
        self.begin()
        return self.hand_over(self.latents())

    def decode(self, latents: list[torch.Tensor]) -> None:
        self.vae.reset()
        for x in latents:
            to_bytes(self.vae.decode(x))

    def phases(self) -> dict[str, float]:
        """Milliseconds of each part by itself, waited for."""
        found = {"text": milliseconds(self.begin)}
        kept: list[list[torch.Tensor]] = []
        found["denoising"] = milliseconds(lambda: kept.append(self.latents()))
        found["decoding"] = milliseconds(lambda: self.hand_over(kept[0]))
        return found

    def decoder_errors(self, latents: list[torch.Tensor]) -> dict[str, float]:
        """Relative RMS of two chunks' pixels against diffusers in float32: ours, and its own in bfloat16."""
        z = torch.cat(latents[:2], dim=2)

        @torch.no_grad()
        def video(dtype: torch.dtype) -> torch.Tensor:
            vae = random_vae(self.whole.vae, dtype)
            mean, std = (
                torch.tensor(values, device=DEVICE).view(1, -1, 1, 1, 1)
                for values in (vae.config.latents_mean, vae.config.latents_std)
            )
            return vae.decode((z.float() * std + mean).to(dtype)).sample

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = video(torch.float32)
        self.vae.reset()
        ours = relative_rms(torch.cat([self.vae.decode(x) for x in latents[:2]], dim=2), exact)
        plain = relative_rms(video(torch.bfloat16), exact)
        assert 0 < ours <= NO_WORSE * plain, f"decoder: {ours:.2e} from float32, diffusers' own {plain:.2e}"
        return {"decoder": ours, "diffusers in bfloat16": plain}

    def check(self) -> dict[str, float]:
        """Decoded beside, after, and once more: the same bytes, and pixels as they should be."""
        pixels = self.after()
        assert_bitwise(self.beside(), pixels, "pixels decoded beside")
        rows, columns = (8 * side for side in self.size.latent[1:])
        assert pixels.shape == (1, self.whole.frames, rows, columns, 3) and pixels.float().std() > 1
        self.begin()
        return {"beside against after": 0.0, **self.decoder_errors(self.latents())}


def decoder_flops(whole: Whole) -> float:
    """Of the decoder for the whole video, counted on tensors that have no memory, frame by frame."""
    own = WanVAE(random_vae(whole.vae, torch.bfloat16, "meta"))
    counts = []
    for _ in range(3):  # what the first two meet of the past differs from all others
        with FlopCounterMode(display=False) as counter:
            own.decode(torch.empty(1, whole.size.latent[0], 1, *whole.size.latent[1:], device="meta"))
        counts.append(counter.get_total_flops())
    return counts[0] + counts[1] + (whole.latent_frames - 2) * counts[2]


def median_ms(run: Callable[[], object]) -> float:
    return statistics.median(milliseconds(run) for _ in range(REPEATS))


def first_choice(size: Size) -> str:
    """The backend of the attention when none is asked for by name."""
    with chosen(None):
        shape = (1, 1, size.config.num_heads, size.config.head_dim)
        q = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        return raven.explain("chunk_attention", q, q, q).chosen


def missing_package() -> str | None:
    """What to install, where a package is not there."""
    try:
        for package in ("diffusers", "transformers"):
            need(package, "measuring generate")
    except ModuleNotFoundError as missing:
        return str(missing)
    return None


def measure(bench, name: str, whole: Whole, way: str) -> None:
    backend = automatic(whole.size)
    if way != "beside" and backend != first_choice(whole.size):
        pytest.skip("measured once, with what runs here unasked")
    if reason := missing_package():
        bench.recorder.leave_out("generate", reason)
        pytest.skip(reason)
    case, record = Case(whole), {}
    latents: list[torch.Tensor] = []

    def check() -> dict[str, float]:
        bench.progress(f"{name}, {backend}: warm-up")
        case.warm_up()
        errors = case.check()
        case.begin()
        latents.extend(case.latents())
        return errors

    def timed() -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        ms = median_ms({"beside": case.beside, "after": case.after, "decode": lambda: case.decode(latents)}[way])
        record["frames_per_s"] = 1e3 * whole.frames / ms
        if way == "decode":
            record["chunk_ms"] = median_ms(lambda: to_bytes(case.vae.decode(latents[-1])))
        else:
            record["newest_chunk_ms"] = [1e3 * done.seconds for done in case.waiting]
        if way == "after":
            record["phases_ms"] = case.phases()
        if DEVICE == "cuda":
            held = torch.cuda.max_memory_allocated() - case.text_bytes  # the command releases the encoder
            record["peak_gib"] = held / GIB
        bench.progress(f"{name}, {backend}: {record['frames_per_s']:.1f} frames/s, {ms:.0f} ms")
        return ms

    bench.row(
        op="generate",
        case=name,
        direction="forward",
        backend=backend,
        check=check,
        measure=timed,
        work=decoder_flops(whole) + (rollout_flops(whole.size) if way != "decode" else 0.0),
        unit="TFLOP/s",
        extra=lambda: record,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
def test_video(bench, way):
    measure(bench, f"81-frames-{way}", REAL, way)


@pytest.mark.parametrize("way", WAYS)
def test_smoke(bench, way):
    """Small enough for any machine, and the same code path as the others."""
    measure(bench, f"smoke-{way}", SMALL, way)
