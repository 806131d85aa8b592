"""The decoder of Wan's VAE, chunk by chunk, through diffusers' ``AutoencoderKLWan``.

The decoder is causal in time: what it needs of earlier latent frames are the last two inputs of every convolution. They
are kept between chunks, one set a video, so a video decoded in pieces is the video decoded at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from os import PathLike
from typing import Any

import torch

from raven.errors import check_shape
from raven.integrations import need, part_of
from raven.integrations.wan_decoder import convolutions, rearrange


class WanVAE:
    """Latents to pixels for a batch of videos that grow chunk by chunk.

    ``vae``: an ``AutoencoderKLWan``; only its decoder is used, which on a GPU is changed in place for speed and has no
    gradients from then on. Computed in the decoder's dtype, also under ``torch.autocast``. Latents are as the
    transformer has them: the config's ``latents_mean`` and ``latents_std`` are put back here.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self._convolutions = convolutions(vae.decoder)
        if vae.device.type == "cuda":
            rearrange(vae.decoder)
        self.channels: int = vae.config.z_dim
        # Pixels of a latent pixel's side, and video frames of a latent frame (the first one gives one frame).
        self.spatial: int = vae.config.scale_factor_spatial
        self.temporal: int = vae.config.scale_factor_temporal
        shape = (1, self.channels, 1, 1, 1)
        where = {"device": vae.device, "dtype": torch.float32}
        self._mean = torch.tensor(vae.config.latents_mean, **where).reshape(shape)
        self._std = torch.tensor(vae.config.latents_std, **where).reshape(shape)
        self.reset()

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> WanVAE:
        """Read ``folder/vae``. ``ModuleNotFoundError`` without diffusers, ``OSError`` when it cannot be read."""
        path = part_of(folder, "vae")
        diffusers = need("diffusers", "decoding Wan's latents")
        vae = diffusers.AutoencoderKLWan.from_pretrained(path, torch_dtype=dtype, low_cpu_mem_usage=False)
        vae.encoder = vae.quant_conv = None
        return cls(vae.to(device))

    def to(self, device: torch.device | str) -> WanVAE:
        """Move weights to a device; videos begin anew."""
        self.vae.to(device)
        if self.vae.device.type == "cuda":
            rearrange(self.vae.decoder)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        self.reset()
        return self

    def reset(self) -> None:
        """Begin new videos."""
        self._features: list[list[Any]] = []

    def frames(self, latent_frames: int) -> int:
        """Video frames of so many latent frames from the start."""
        return 1 + self.temporal * (latent_frames - 1)

    def memory(self, batch: int, latent_size: tuple[int, int]) -> dict[str, int]:
        """Bytes that decoding ``batch`` videos of latents (H, W) takes on a GPU at its peak, by what they are for."""
        size = self.vae.dtype.itemsize
        pixels = latent_size[0] * latent_size[1] * self.spatial**2
        # A frame of the last layers' input, which are the widest by far.
        frame = pixels * (self.vae.config.decoder_base_dim or self.vae.config.base_dim) * size
        weights = sum(p.numel() for p in self.vae.parameters()) * size
        # Two frames of the input of every convolution that looks back: 7 at the full resolution, 6 of them widened by a
        # third, 6 twice as wide on a quarter of the pixels, and so on.
        features = int(batch * 2 * frame * 14.3)
        # In the last block, for the frames of one latent frame: its input, the widened input of its second convolution
        # with the two frames before, the results of the first and of the second, and what is left of the one before.
        activations = int(7.7 * self.temporal * frame)
        return {"VAE": weights, "VAE features": features, "VAE decoding": activations}

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The next latent frames ``[B, C, f, H, W]`` as video ``[B, 3, F, spatial * H, spatial * W]`` in [-1, 1].

        F is ``temporal * f``, and ``temporal - 1`` less for the chunk that begins the video. Runs on the current
        stream. Raises ``ValueError`` for another number of channels, or of videos than before.
        """
        check_shape("latents", latents, ("B", self.channels, "f", "H", "W"))
        begins = not self._features
        if begins:
            self._features = [[None] * self._convolutions for _ in range(latents.shape[0])]
        if len(self._features) != latents.shape[0]:
            raise ValueError(f"latents: got {latents.shape[0]} videos, expected {len(self._features)} as before")
        wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
        z = (wide * self._std + self._mean).to(self.vae.dtype)
        kind = z.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            videos = zip(z, self._features, strict=True)
            return torch.stack([self._decode_one(video[None], features, begins) for video, features in videos])

    def _decode_one(self, z: torch.Tensor, features: list[Any], begins: bool) -> torch.Tensor:
        """One video at a time and frame by frame: the widest layers are what limits the memory."""
        z = self.vae.post_quant_conv(z)
        if z.is_cuda:
            z = z.contiguous(memory_format=torch.channels_last_3d)
        parts = [
            self.vae.decoder(frame, feat_cache=features, feat_idx=[0], first_chunk=begins and i == 0)
            for i, frame in enumerate(z.split(1, dim=2))
        ]
        if self.vae.config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            parts = [unpatchify(part, self.vae.config.patch_size) for part in parts]
        return torch.cat(parts, dim=2)[0].clamp(-1, 1)
