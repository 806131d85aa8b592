"""Wan's decoder and text encoder: tiny random models of the real classes, in the layout their own files have."""

import sys
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raven import cli
from raven.checkpoint import save_checkpoint
from raven.integrations import part_of, wan_decoder, wan_text, wan_vae
from raven.models import CausalWan, WanConfig
from raven.stream import Stream

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")

LETTERS = "abcdefghijklmnopqrstuvwxyz.,&\u2019'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder as diffusers writes it."""
    path = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 3.0],
    ).save_pretrained(path / "vae")  # fmt: skip
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)] + [(c, -3.0) for c in LETTERS]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(path / "tokenizer")
    config = transformers.UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2)
    transformers.UMT5EncoderModel(config).save_pretrained(path / "text_encoder")
    return path


@pytest.fixture
def vae(folder):
    return wan_vae.WanVAE.load(folder)


@pytest.fixture
def text(folder):
    return wan_text.WanText.load(folder, dtype=torch.float32)


def whole(folder, latents):
    """Every video decoded at once by diffusers, from latents de-normalised by its own config."""
    model = diffusers.AutoencoderKLWan.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval()
    mean, std = (
        torch.tensor(getattr(model.config, f"latents_{name}")).view(1, -1, 1, 1, 1) for name in ("mean", "std")
    )
    with torch.no_grad():
        return torch.cat([model.decode(video).sample for video in (latents * std + mean).split(1)])


@pytest.mark.parametrize("chunks", [(3, 3, 1), (1, 2, 4), (1,) * 7, (7,)], ids=str)
def test_chunk_by_chunk_is_the_whole_video(folder, vae, chunks):
    latents = torch.randn(2, 4, 7, 4, 6)
    parts = [vae.decode(part) for part in latents.split(chunks, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * chunks[0] - 3, *(4 * f for f in chunks[1:])]
    video = torch.cat(parts, dim=2)
    assert video.shape == (2, 3, vae.frames(7), 32, 48)
    torch.testing.assert_close(video, whole(folder, latents), rtol=0, atol=1e-5)
    assert video.std() > 0.05


def test_the_decoder_of_a_gpu_is_the_same(folder):
    """As it runs on a GPU, in float64: in float32 the rounding of another order of sums grows beyond it."""
    latents = torch.randn(2, 4, 5, 4, 6, dtype=torch.float64)
    own = wan_vae.WanVAE.load(folder, dtype=torch.float64)
    plain = own.decode(latents)
    wan_decoder.rearrange(own.vae.decoder)
    own = wan_vae.WanVAE(own.vae)  # again, as for another purpose
    wan_decoder.rearrange(own.vae.decoder)
    kinds = {type(module).__name__ for module in own.vae.decoder.modules()}
    assert not kinds & {"WanRMS_norm", "WanCausalConv3d", "WanResidualBlock", "WanResample"}
    own.reset()
    again = torch.cat([own.decode(part) for part in latents.split((1, 2, 2), dim=2)], dim=2)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)


def test_autocast_changes_nothing(folder):
    latents = torch.randn(1, 4, 2, 4, 6)
    own = wan_vae.WanVAE.load(folder)
    wan_decoder.rearrange(own.vae.decoder)
    plain = own.decode(latents)
    own.reset()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own.decode(latents), plain)


def test_channels_are_widened_to_what_the_kernels_want():
    """48 to 64 by zeros; the sums and what is kept between chunks stay those of diffusers."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock

    block = WanResidualBlock(48, 40).double().requires_grad_(False)
    own = wan_decoder.ResidualBlock(block)
    assert [conv.weight.shape[1] for conv in own.convs] == [64, 40]
    pasts = [None, None], [None, None]
    for frames in (1, 2, 4):
        x = torch.randn(1, 48, frames, 4, 5, dtype=torch.float64)
        want, got = (part(x, past, [0]) for part, past in zip((block, own), pasts, strict=True))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_reset_begins_another_video(vae):
    latents = torch.randn(1, 4, 2, 4, 4)
    first = vae.decode(latents)
    assert vae.decode(latents).shape[2] == 8
    vae.reset()
    torch.testing.assert_close(vae.decode(latents), first, rtol=0, atol=0)


def test_latents_that_do_not_fit(vae):
    with pytest.raises(ValueError, match="latents"):
        vae.decode(torch.zeros(1, 3, 1, 4, 4))
    vae.decode(torch.zeros(2, 4, 1, 4, 4))
    with pytest.raises(ValueError, match="got 1 videos, expected 2"):
        vae.decode(torch.zeros(1, 4, 1, 4, 4))


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, without computing anything on the meta device."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("dtype, batch", [(torch.bfloat16, 2), (torch.float32, 1)], ids=str)
def test_memory_at_wans_own_size(dtype, batch):
    with torch.device("meta"):
        own = wan_vae.WanVAE(diffusers.AutoencoderKLWan().to(dtype))
        wan_decoder.rearrange(own.vae.decoder)  # as it is on a GPU
    own.vae.encoder = own.vae.quant_conv = None
    parts = own.to("meta").memory(batch, (60, 104))
    with Live() as live:
        for _ in range(2):
            own.decode(torch.empty(batch, 16, 2, 60, 104, device="meta"))
    weights = sum(p.nbytes for p in own.vae.parameters())
    assert parts["VAE"] == weights
    assert abs(sum(parts.values()) - weights - live.peak) < 0.1 * live.peak


def test_text_is_as_in_wans_own_padded_call(text):
    """Wan pads to text_len, masks, and drops the rows of the padding."""
    prompts = ["a red cat", "a dog, running"]
    ours = text.encode(prompts, text_len=24)
    padded = text.tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        rows = text.encoder()(padded.input_ids, padded.attention_mask).last_hidden_state
    for i, own in enumerate(ours):
        length = int(padded.attention_mask[i].sum())
        assert own.shape == (length, 16) and length < 24
        torch.testing.assert_close(own, rows[i, :length], rtol=0, atol=1e-5)


def test_prompts_are_cleaned_as_wan_does():
    assert wan_text.clean("  a\tcat &amp;amp; \n a dog ") == "a cat & a dog"
    assert wan_text.clean("the cat\u00e2\u20ac\u2122s") == "the cat's"


def test_a_prompt_that_is_too_long(text):
    assert len(text.tokenize(["a" * 6], text_len=8)[0]) == 8
    with pytest.raises(ValueError, match=r"prompt: got 9 tokens in 'a{7}', expected at most text_len = 8"):
        text.encode(["b", "a" * 7], text_len=8)


def test_a_folder_of_another_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="diffusers' layout, with vae/"):
        part_of(tmp_path, "vae")


@pytest.mark.parametrize("package, load", [("diffusers", wan_vae.WanVAE.load), ("transformers", wan_text.WanText.load)])
def test_missing_package_names_the_extra(monkeypatch, folder, package, load):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}: pip install raven-kernels\[wan\]"):
        load(folder)


def test_missing_ftfy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs ftfy: pip install raven-kernels\[wan\]"):
        wan_text.clean("a cat")


# raven generate on all of it

CONFIG = WanConfig(
    dim=32, ffn_dim=32, num_heads=1, num_layers=1, in_dim=4, out_dim=4, freq_dim=16, text_dim=16, text_len=24
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = CausalWan(CONFIG)
    with torch.no_grad():
        model.head.head.weight.normal_(std=0.3)
    path = tmp_path_factory.mktemp("weights") / "student.safetensors"
    save_checkpoint(path, model)
    return path


def command(folder, checkpoint, out, *argv):
    fixed = (
        "--wan",
        folder,
        "--checkpoint",
        checkpoint,
        "-o",
        out,
        "--size",
        "32x48",
        "--frames",
        6,
        "--device",
        "cpu",
    )
    return [str(a) for a in ("generate", *fixed, *argv)]


def test_generate_writes_the_decoded_video(folder, checkpoint, text, tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    prompts = ("--prompt", "a red cat", "--prompt", "a dog", "--switch", "3: a bird")
    assert cli.main(command(folder, checkpoint, tmp_path / "a.safetensors", *prompts)) == 0
    assert cli.main(command(folder, checkpoint, tmp_path / "a.mp4", *prompts)) == 0
    latents = load_file(tmp_path / "a.safetensors")["latents"]

    model = CausalWan(CONFIG)
    model.load_state_dict(load_file(checkpoint))
    stream = Stream(model, text.encode(["a red cat", "a dog"]), (4, 4, 6), 3)
    bird = text.encode(["a bird"] * 2)
    own = stream.generate(6, generator=[torch.Generator().manual_seed(i) for i in (0, 1)], switches=[(3, bird)])
    torch.testing.assert_close(latents, torch.cat(list(own), dim=2), rtol=0, atol=1e-5)

    for i, video in enumerate(whole(folder, latents)):
        reader = ffmpeg.read_frames(str(tmp_path / f"a-{i + 1}.mp4"))
        about = next(reader)
        assert about["fps"] == 16
        shown = np.stack([np.frombuffer(frame, np.uint8).reshape(192, 288, 3)[::6, ::6] for frame in reader])
        right = ((video.permute(1, 2, 3, 0) + 1) * 127.5).numpy()
        assert shown.shape == right.shape == (21, 32, 48, 3)
        assert np.abs(shown - right).mean() < 6  # H.264, and chroma at half resolution


def test_one_prompt_is_no_plural(folder, checkpoint, tmp_path, capsys):
    assert cli.main(command(folder, checkpoint, tmp_path / "a.safetensors", "--prompt", "a cat", "--frames", 3)) == 0
    assert "encoding 1 prompt\n" in capsys.readouterr().err


def test_bad_input_of_generate(folder, checkpoint, tmp_path, capsys):
    def failure(*argv):
        assert cli.main(command(folder, checkpoint, tmp_path / "a.mp4", *argv)) == cli.BAD_INPUT
        return capsys.readouterr().err

    assert "prompt: got none" in failure()
    too_long = "b" * 23
    assert "prompt: got 25 tokens in 'bbb" in failure("--prompt", too_long)
    assert "expected at most text_len = 24" in failure("--prompt", "a cat", "--switch", f"3: {too_long}")
    assert "size: got 32x40, expected multiples of 16 and 16 (8 pixels" in failure("--prompt", "a", "--size", "32x40")
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, CausalWan(WanConfig(**{**CONFIG.to_dict(), "in_dim": 6, "patch_size": (1, 2, 2)})))
    assert "wan: got a VAE of 4 latent channels, expected 6" in failure("--prompt", "a", "--checkpoint", other)
    save_checkpoint(other, CausalWan(WanConfig(**{**CONFIG.to_dict(), "text_dim": 18, "patch_size": (1, 2, 2)})))
    assert "wan: got a text encoder of width 16, expected 18" in failure("--prompt", "a", "--checkpoint", other)
    assert not list(tmp_path.glob("*.mp4"))
