"""What a generator leaves on the disk, and the way there: files that are kept, a writer, a decoder beside the work."""

import os
import resource
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from raven.generate.handover import Handover
from raven.generate.output import LatentsFile, Writer
from raven.generate.video import VideoWriter, count_frames, trim
from raven.worlds.pictures import to_uint8


def latents(path):
    return load_file(path)["latents"]


def pictures(path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    reader = ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_a_full_disk_keeps_the_latents_written_before(tmp_path, monkeypatch):
    chunks = torch.randn(3, 2, 3, 2, 4, 4)
    whole = torch.cat(list(chunks), dim=2)
    file = LatentsFile(tmp_path / "a.safetensors", whole.shape)
    file.add(chunks[0])
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"could not write .*a.safetensors \(No space left on device\)"):
        file.add(chunks[1])
    file.close()
    assert torch.equal(latents(tmp_path / "a.safetensors"), whole[:, :, :2])
    assert file.kept(6) == f"{tmp_path / 'a.safetensors'} holds 2 of 6 frames"


def test_latents_can_be_read_while_they_come(tmp_path):
    whole = torch.randn(2, 3, 5, 4, 6)
    file = LatentsFile(tmp_path / "a.safetensors", whole.shape)
    for part, done in zip(whole.split(2, dim=2), (2, 4, 5), strict=True):
        file.add(part)
        now = latents(tmp_path / "a.safetensors")
        assert torch.equal(now[:, :, :done], whole[:, :, :done]) and not now[:, :, done:].any()
        with safe_open(tmp_path / "a.safetensors", "pt") as opened:
            assert opened.metadata()["frames_done"] == str(done)
    with pytest.raises(ValueError, match="after 5 frames"):
        file.add(whole[:, :, :1])
    file.close()
    file.close()
    assert torch.equal(latents(tmp_path / "a.safetensors"), whole)


def test_a_video_plays_while_it_grows(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    noise = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", key_every=3) as writer:
        for i in range(3):
            writer.add(noise)
            end = time.monotonic() + 20
            while count_frames(tmp_path / "a.mp4") < 3 * i + 2 and time.monotonic() < end:
                time.sleep(0.02)
            assert len(pictures(tmp_path / "a.mp4")) >= 3 * i + 2
    assert count_frames(tmp_path / "a.mp4") == 9


def test_a_full_disk_keeps_a_video_that_plays(tmp_path):
    """A limit on the file's size stands for a full disk: the encoder's write fails in the middle of a fragment."""
    pytest.importorskip("imageio_ffmpeg")
    noise = np.random.default_rng(0).integers(0, 255, (6, 64, 64, 3), np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = VideoWriter(tmp_path / "a.mp4")
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*a.mp4 \(.*File too large\)"):
            for _ in range(200):
                writer.add(noise)
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert count_frames(tmp_path / "a.mp4") == len(pictures(tmp_path / "a.mp4")) >= 3
    with pytest.raises(ValueError, match="was closed"):
        writer.add(noise)


def test_a_file_cut_anywhere_is_trimmed_to_whole_fragments(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    frames = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), np.uint8)
    with VideoWriter(tmp_path / "a.mp4", key_every=3) as writer:
        writer.add(frames)
    whole = (tmp_path / "a.mp4").read_bytes()
    assert count_frames(tmp_path / "a.mp4") == 9
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    kept = trim(tmp_path / "b.mp4")
    assert 3 <= kept < 9 and len(pictures(tmp_path / "b.mp4")) == kept
    assert whole.startswith((tmp_path / "b.mp4").read_bytes())


def test_the_writer_raises_where_the_caller_is_and_drops_the_rest():
    seen = []

    def write(item):
        seen.append(item)
        if item == 1:
            raise OSError("full")

    writer = Writer(write, depth=1)
    writer.put(0)
    writer.put(1)
    with pytest.raises(OSError, match="full"):
        writer.put(2)
    writer.close()
    assert seen == [0, 1]


def test_handover_decodes_in_order():
    handover = Handover(to_uint8, torch.device("cpu"))
    x = torch.rand(1, 3, 2, 4, 4)
    handover.warm_up(x)
    handover.begin()
    done = [handover.submit(x * i) for i in range(3)]
    for i, item in enumerate(done):
        assert torch.equal(item.wait(), to_uint8(x * i)) and item.seconds >= 0


@pytest.mark.gpu
def test_handover_beside_a_busy_stream_is_not_a_race():
    """A static buffer is written again right after it was handed over, while the decoder is still at the one before."""
    device = torch.device("cuda")
    heavy = torch.randn(2048, 2048, device=device)

    def decode(x):
        for _ in range(20):
            heavy @ heavy
        return x * 2

    handover, buffer, done = Handover(decode, device), torch.empty(1 << 20, device=device), []
    for i in range(8):
        (heavy @ heavy).sum()
        buffer.fill_(i)
        done.append(handover.submit(buffer))
        buffer.fill_(-1)
        torch.full((1 << 20,), 99.0, device=device)  # takes freed memory, if any was given away too early
    for i, item in enumerate(done):
        assert (item.wait() == 2 * i).all() and item.seconds > 0
