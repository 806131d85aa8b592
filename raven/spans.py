"""Spans: for each run of queries, the runs of keys it sees. The one description of a mask that kernels consume."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch

Range = tuple[int, int]
_INT32_MAX = 2**31 - 1


def check_int(name: str, value: object, low: int) -> int:
    """``value`` as an ``int``; ``TypeError`` when it is none, ``ValueError`` when it is below ``low``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None
    if number < low:
        raise ValueError(f"{name}: got {number}, expected at least {low}")
    return number


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Sort ``[begin, end)`` ranges, drop empty ones, and join those that touch or overlap."""
    merged: list[Range] = []
    for begin, end in sorted(ranges):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)


@dataclass(frozen=True, eq=False, repr=False)
class Spans:
    """Queries ``q_ranges[i]`` see the keys ``kv_ranges[kv_indptr[i]:kv_indptr[i + 1]]``, and nothing else.

    q_ranges [n, 2], kv_indptr [n + 1], kv_ranges [m, 2]: int32 tensors on the CPU (sequences are converted), in
    tokens, every range ``[begin, end)``. Query ranges are sorted and disjoint. The key ranges of one query range are
    disjoint and come in any order: a softmax does not care, and a ring buffer has its own order. A query that lies in
    no range sees nothing. Raises ``ValueError`` for anything else, ``TypeError`` for values that are not integers.

    q_end, kv_end: ends of the last query and key range, so the least lengths these spans fit. pairs: number of
    (query, key) pairs that see each other. key: the content in bytes, to cache by. Immutable, and equal by content;
    do not write to the tensors.
    """

    q_ranges: torch.Tensor
    kv_indptr: torch.Tensor
    kv_ranges: torch.Tensor
    # Set once here and not on first use: torch.compile traces plain attributes, not cached properties.
    q_end: int = field(init=False)
    kv_end: int = field(init=False)
    pairs: int = field(init=False)
    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        for name, columns in (("q_ranges", 2), ("kv_indptr", None), ("kv_ranges", 2)):
            object.__setattr__(self, name, _as_int32(name, getattr(self, name), columns))
        _check_ranges("q_ranges", self.q_ranges)
        _check_ranges("kv_ranges", self.kv_ranges)
        q, indptr, kv = (x.numpy().astype(np.int64) for x in (self.q_ranges, self.kv_indptr, self.kv_ranges))
        late = np.flatnonzero(q[1:, 0] < q[:-1, 1])
        if len(late):
            begin, end = q[late[0] + 1, 0], q[late[0], 1]
            raise ValueError(f"q_ranges: got a range from {begin} after one to {end}, expected sorted and disjoint")
        sizes = f"expected {len(q) + 1} values from 0 up to {len(kv)}, never falling"
        if len(indptr) != len(q) + 1 or indptr[0] != 0 or indptr[-1] != len(kv) or (np.diff(indptr) < 0).any():
            raise ValueError(f"kv_indptr: got {indptr.tolist()}, {sizes}")
        _check_disjoint(indptr, kv)
        ends = np.append(0, np.cumsum(kv[:, 1] - kv[:, 0]))[indptr]
        pairs = int(((q[:, 1] - q[:, 0]) * np.diff(ends)).sum())
        parts = (self.q_ranges, self.kv_indptr, self.kv_ranges)
        key = len(q).to_bytes(4, "little") + b"".join(p.numpy().tobytes() for p in parts)
        object.__setattr__(self, "q_end", int(q[:, 1].max(initial=0)))
        object.__setattr__(self, "kv_end", int(kv[:, 1].max(initial=0)))
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "key", key)

    @classmethod
    def build(cls, rows: Iterable[tuple[Range, Iterable[Range]]]) -> Spans:
        """From ``((q_begin, q_end), key ranges)`` rows, in the fewest ranges.

        Key ranges are sorted and joined where they touch; neighbouring query ranges with the same keys become one;
        empty ranges go. The rows must be disjoint and may come in any order.
        """
        joined: list[tuple[Range, tuple[Range, ...]]] = []
        for (begin, end), keys in sorted(((q, merge_ranges(k)) for q, k in rows), key=lambda row: row[0]):
            if begin >= end or not keys:
                continue
            if joined and joined[-1][0][1] == begin and joined[-1][1] == keys:
                joined[-1] = ((joined[-1][0][0], end), keys)
            else:
                joined.append(((begin, end), keys))
        indptr = [0]
        for _, keys in joined:
            indptr.append(indptr[-1] + len(keys))
        return cls(
            [q for q, _ in joined],  # type: ignore[arg-type]
            indptr,  # type: ignore[arg-type]
            list(chain.from_iterable(keys for _, keys in joined)),  # type: ignore[arg-type]
        )

    @classmethod
    def full(cls, q_len: int, kv_len: int) -> Spans:
        """Every one of ``q_len`` queries sees every one of ``kv_len`` keys."""
        return cls.build([((0, check_int("q_len", q_len, 0)), [(0, check_int("kv_len", kv_len, 0))])])

    def rows(self) -> tuple[tuple[Range, tuple[Range, ...]], ...]:
        """``((q_begin, q_end), key ranges)`` for each query range: the form that ``build`` takes."""
        indptr = self.kv_indptr.tolist()
        kv = [tuple(r) for r in self.kv_ranges.tolist()]
        return tuple(
            (tuple(q), tuple(kv[first:last]))
            for q, first, last in zip(self.q_ranges.tolist(), indptr, indptr[1:], strict=False)
        )

    def shift(self, q: int = 0, kv: int = 0) -> Spans:
        """The same spans with ``q`` added to every query index and ``kv`` to every key index."""
        return Spans(self.q_ranges + q, self.kv_indptr, self.kv_ranges + kv)

    @classmethod
    def concat(cls, parts: Sequence[Spans], q_lens: Sequence[int], kv_lens: Sequence[int]) -> Spans:
        """One after the other, part i taking ``q_lens[i]`` queries and ``kv_lens[i]`` keys that no other part sees."""
        rows, q_start, kv_start = [], 0, 0
        for part, q_len, kv_len in zip(parts, q_lens, kv_lens, strict=True):
            part.check_fits(q_len, kv_len)
            rows.extend(part.shift(q_start, kv_start).rows())
            q_start, kv_start = q_start + q_len, kv_start + kv_len
        return cls.build(rows)

    def check_fits(self, q_len: int, kv_len: int) -> None:
        """Raise ``ValueError`` unless every query lies below ``q_len`` and every key below ``kv_len``."""
        if self.q_end > q_len:
            raise ValueError(f"spans: got queries up to {self.q_end}, expected at most {q_len}")
        if self.kv_end > kv_len:
            raise ValueError(f"spans: got keys up to {self.kv_end}, expected at most {kv_len}")

    def dense_mask(self, q_len: int | None = None, kv_len: int | None = None) -> torch.Tensor:
        """bool [q_len, kv_len], true where the query sees the key. The lengths default to ``q_end``, ``kv_end``."""
        q_len = self.q_end if q_len is None else q_len
        kv_len = self.kv_end if kv_len is None else kv_len
        self.check_fits(q_len, kv_len)
        mask = torch.zeros(q_len, kv_len, dtype=torch.bool)
        for (q_begin, q_end), keys in self.rows():
            for begin, end in keys:
                mask[q_begin:q_end, begin:end] = True
        return mask

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Spans) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return (
            f"Spans({len(self.q_ranges)} query ranges to {self.q_end}, "
            f"{len(self.kv_ranges)} key ranges to {self.kv_end}, {self.pairs} pairs)"
        )


def _as_int32(name: str, values: object, columns: int | None) -> torch.Tensor:
    """A private contiguous int32 copy of ``values``, [n] or [n, columns]."""
    if isinstance(values, torch.Tensor) and values.device.type != "cpu":
        raise ValueError(f"{name}: got device {values.device}, expected cpu")
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0:
        tensor = tensor.reshape((0,) if columns is None else (0, columns)).to(torch.int32)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {str(tensor.dtype).removeprefix('torch.')}, expected int32, int64")
    want = "[n]" if columns is None else f"[n, {columns}]"
    if tensor.dim() != (1 if columns is None else 2) or (columns is not None and tensor.shape[1] != columns):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {want}")
    if tensor.numel() and (int(tensor.max()) > _INT32_MAX or int(tensor.min()) < 0):
        raise ValueError(f"{name}: got values from {int(tensor.min())} to {int(tensor.max())}, expected [0, 2**31)")
    with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
        return tensor.detach().to(torch.int32).clone().contiguous()


def _check_disjoint(indptr: np.ndarray, kv: np.ndarray) -> None:
    """A key that is twice in one list would count twice in the softmax."""
    lists = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    filled = kv[:, 0] < kv[:, 1]
    lists, kv = lists[filled], kv[filled]
    for _ in range(2):  # as they come, and sorted where that is not enough
        twice = np.flatnonzero((lists[1:] == lists[:-1]) & (kv[1:, 0] < kv[:-1, 1]))
        if not len(twice):
            return
        order = np.lexsort((kv[:, 1], kv[:, 0], lists))
        lists, kv = lists[order], kv[order]
    row = twice[0] + 1
    raise ValueError(f"kv_ranges: got key {kv[row, 0]} twice for query range {lists[row]}, expected disjoint ranges")


def _check_ranges(name: str, ranges: torch.Tensor) -> None:
    backward = (ranges[:, 0] > ranges[:, 1]).nonzero()
    if len(backward):
        raise ValueError(f"{name}: got {ranges[backward[0, 0]].tolist()}, expected begin <= end")
