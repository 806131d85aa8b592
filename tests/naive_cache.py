"""A key/value cache as its rules are written: a list of chunks, joined and rotated anew at every read.

It stands in for ``KVCache`` under a model. Nothing here is a ring, a slot or in place, so that it can be the plain
statement which the real cache is held against.
"""

import torch

from raven.reference.qk_norm_rope import cos_sin, rotate
from raven.spans import Spans


class NaiveCache:
    """``chunks``: every chunk ever committed, with raw keys and values ``[B, T, H, D]`` of each layer, float64."""

    keys = "raw"  # what kv_append is to write into ``k``; ``read`` rotates
    k_scale = v_scale = (None,) * 99

    def __init__(self, config, batch, grid, sink=0, window=None, keys="rotated", ema=None):
        self.config, self.batch, self.grid = config, batch, grid
        self.sink, self.window, self.rule, self.ema = sink, window, keys, ema
        self.chunks, self.open, self.blended = [], None, None

    def begin(self, tokens, frame, frames):
        if self.open is None:
            shape = (self.batch, tokens, self.config.num_heads, self.config.head_dim)
            k, v = ([torch.empty(shape, dtype=torch.float64) for _ in range(self.config.num_layers)] for _ in range(2))
            self.open = {"frame": frame, "frames": frames, "k": k, "v": v}
            self.k, self.v, self.slots = k, v, torch.arange(tokens, dtype=torch.int32)

    def visible(self):
        now = len(self.chunks)
        past = [j for j in range(now) if j < self.sink or self.window is None or now - j <= self.window]
        return [self.chunks[j] if self.blended is None or j >= self.sink else self.blended for j in past]

    @property
    def query_frame(self):
        return self.open["frame"] if self.rule == "rotated" else sum(c["frames"] for c in self.visible())

    def read(self, layer, dtype):
        keys, values, count = [], [], 0
        for chunk in (*self.visible(), self.open):
            first = chunk["frame"] if self.rule == "rotated" else count
            count += chunk["frames"]
            frames = range(first, first + chunk["frames"])
            places = [(f, y, x) for f in frames for y in range(self.grid[0]) for x in range(self.grid[1])]
            k = chunk["k"][layer]
            keys.append(rotate(k, *cos_sin(torch.tensor(places), k.shape[-1], 10000.0, torch.float64)))
            values.append(chunk["v"][layer])
        return torch.cat(keys, dim=1).to(dtype), torch.cat(values, dim=1).to(dtype)

    @property
    def spans(self):
        own = self.open["k"][0].shape[1]
        return Spans.full(own, own + sum(c["k"][0].shape[1] for c in self.visible()))

    def commit(self):
        self.chunks.append(self.open)
        self.open = None
        evicted = len(self.chunks) - 1 - self.window if self.window is not None else -1
        if self.ema is not None and evicted >= self.sink:
            old, new = self.blended or self.chunks[0], self.chunks[evicted]
            self.blended = dict(old)
            for name in ("k", "v"):
                pairs = zip(old[name], new[name], strict=True)
                self.blended[name] = [self.ema * a + (1 - self.ema) * b for a, b in pairs]
