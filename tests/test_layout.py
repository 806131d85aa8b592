"""ChunkLayout and Spans against a statement of the visibility rule that knows nothing of how they are built."""

import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raven.layout import ChunkLayout, Spans, merge_ranges


class Token(NamedTuple):
    """One packed token, written down by hand."""

    document: int
    chunk: int
    role: str
    frame: int
    place: int


class Rule(NamedTuple):
    sink: int = 0
    window: int | None = None
    noisy_history: bool = False
    local_frames: int | None = None


def pack(parts, sizes, tokens_per_frame, document=0):
    """The tokens of (role, chunk) parts in packed order."""
    return [
        Token(document, chunk, role, sum(sizes[:chunk]) + f, p)
        for role, chunk in parts
        for f in range(sizes[chunk])
        for p in range(tokens_per_frame)
    ]


def sees(q, k, rule, sizes):
    """The rule, for one pair of tokens."""
    if (q.document, q.chunk, q.role) == (k.document, k.chunk, k.role):
        return True
    if q.document != k.document or k.chunk >= q.chunk:
        return False
    if rule.noisy_history:
        end = sum(sizes[: q.chunk + 1])
        return rule.local_frames is None or k.frame >= end - rule.local_frames
    if k.role == "noisy":
        return False
    return k.chunk < rule.sink or rule.window is None or q.chunk - k.chunk <= rule.window


def brute(tokens, rules, sizes):
    """bool [L, L], pair by pair; rules and sizes are one per document."""
    rows = [[sees(q, k, rules[q.document], sizes[q.document]) for k in tokens] for q in tokens]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(tokens), len(tokens))


def check(layout, tokens, rules, sizes):
    want = brute(tokens, rules, sizes)
    assert layout.length == len(tokens)
    assert torch.equal(layout.dense_mask(), want)
    assert torch.equal(layout.spans.dense_mask(layout.length, layout.length), want)
    assert layout.spans.pairs == int(want.sum())
    index = layout.segment_index().tolist()
    for token, i in zip(tokens, index, strict=True):
        s = layout.segments[i]
        assert (s.document, s.chunk, s.role) == (token.document, token.chunk, token.role)
        assert s.frame <= token.frame < s.frame + s.frames
    for role in ("noisy", "clean"):
        at = [i for i, t in enumerate(tokens) if t.role == role]
        order = sorted(at, key=lambda i: (tokens[i].document, tokens[i].frame, tokens[i].place))
        assert layout.tokens(role).tolist() == order


sizes_st = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)
tokens_per_frame_st = st.integers(1, 3)
sink_st = st.integers(0, 3)
window_st = st.none() | st.integers(0, 4)


@st.composite
def cases(draw):
    """A layout of one document, with its tokens, rule and sizes from the definitions in the docstrings."""
    sizes, t = draw(sizes_st), draw(tokens_per_frame_st)
    n, sink, window = len(sizes), draw(sink_st), draw(window_st)
    name = draw(st.sampled_from(["interleaved", "clean_first", "teacher", "prefill", "blockwise", "bidirectional"]))
    rule = Rule(sink, window)
    if name == "interleaved":
        parts = [(role, i) for i in range(n) for role in ("noisy", "clean")][:-1]
        layout = ChunkLayout.repacked(sizes, t, sink, window)
    elif name == "clean_first":
        parts = [("clean", i) for i in range(n - 1)] + [("noisy", i) for i in range(n)]
        layout = ChunkLayout.repacked(sizes, t, sink, window, order="clean_first")
    elif name == "teacher":
        parts = [("clean", i) for i in range(n)] + [("noisy", i) for i in range(n)]
        layout = ChunkLayout.teacher_forcing(sizes, t, sink, window)
    elif name == "prefill":
        parts = [("clean", i) for i in range(n)]
        layout = ChunkLayout.prefill(sizes, t, sink, window)
    elif name == "blockwise":
        parts = [("noisy", i) for i in range(n)]
        local = draw(st.none() | st.integers(max(sizes), sum(sizes) + 1))
        rule = Rule(noisy_history=True, local_frames=local)
        layout = ChunkLayout.blockwise(sizes, t, local)
    else:
        sizes, parts = (sum(sizes),), [("noisy", 0)]
        layout = ChunkLayout.bidirectional(sizes[0], t)
    return layout, parts, rule, sizes, t


@settings(max_examples=80, deadline=None)
@given(cases())
def test_every_constructor_follows_the_rule(case):
    layout, parts, rule, sizes, t = case
    check(layout, pack(parts, sizes, t), [rule], [sizes])


@settings(max_examples=20, deadline=None)
@given(st.lists(cases(), min_size=0, max_size=3))
def test_concat_keeps_documents_apart_with_their_own_rules(parts_of):
    tokens = [t for d, (_, parts, _, sizes, tpf) in enumerate(parts_of) for t in pack(parts, sizes, tpf, d)]
    layout = ChunkLayout.concat([case[0] for case in parts_of])
    check(layout, tokens, [case[2] for case in parts_of], [case[3] for case in parts_of])
    assert len(layout.documents) == len(parts_of)


# What each published model needs, drawn: a row is a query segment, a column a key segment in packed order.
PRESETS = {
    "raven": (ChunkLayout.repacked((3, 3, 3), 2), "z1 x1 z2 x2 z3", "#.... .#... .##.. .#.#. .#.##"),
    "raven_clean_first": (
        ChunkLayout.repacked((3, 3, 3), 2, order="clean_first"),
        "x1 x2 z1 z2 z3",
        "#.... ##... ..#.. #..#. ##..#",
    ),
    "raven_sink_1_window_1": (
        ChunkLayout.repacked((1, 3, 3, 3), 2, sink=1, window=1),
        "z1 x1 z2 x2 z3 x3 z4",
        "#...... .#..... .##.... .#.#... .#.##.. .#.#.#. .#...##",
    ),
    "raven_no_history": (ChunkLayout.repacked((2, 2), 1, window=0), "z1 x1 z2", "#.. .#. ..#"),
    "teacher_forcing": (
        ChunkLayout.teacher_forcing((1, 3, 3), 2),
        "x1 x2 x3 z1 z2 z3",
        "#..... ##.... ###... ...#.. #...#. ##...#",
    ),
    "blockwise": (ChunkLayout.blockwise((3, 3, 3), 2), "z1 z2 z3", "#.. ##. ###"),
    "blockwise_local_6_frames": (ChunkLayout.blockwise((3, 3, 3), 2, 6), "z1 z2 z3", "#.. ##. .##"),
    "diffusion_forcing": (ChunkLayout.blockwise((1,) * 4, 2), "z1 z2 z3 z4", "#... ##.. ###. ####"),
    "krea_recompute": (ChunkLayout.prefill((1, 1, 1), 2), "x1 x2 x3", "#.. ##. ###"),
    "longlive_recache": (ChunkLayout.prefill((3, 3, 3, 3), 2, sink=1, window=1), "x1 x2 x3 x4", "#... ##.. ###. #.##"),
    "bidirectional": (ChunkLayout.bidirectional(21, 2), "z1", "#"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_of_a_published_model(name):
    layout, labels, picture = PRESETS[name]
    assert [s.label for s in layout.segments] == labels.split()
    mask = layout.dense_mask()
    rows = []
    for q in layout.segments:
        cells = [mask[q.start : q.end, k.start : k.end] for k in layout.segments]
        assert all(c.all() or not c.any() for c in cells)
        rows.append("".join("#" if c.any() else "." for c in cells))
    assert rows == picture.split()
    assert torch.equal(layout.spans.dense_mask(layout.length, layout.length), mask)


def test_local_frames_may_cut_a_chunk():
    layout = ChunkLayout.blockwise((3, 3, 3), tokens_per_frame=2, local_frames=4)
    # Frames 3..5 look back to frame 2, frames 6..8 to frame 5; a frame is 2 tokens.
    assert layout.spans.rows() == (((0, 6), ((0, 6),)), ((6, 12), ((4, 12),)), ((12, 18), ((10, 18),)))


def test_the_training_case_of_the_paper():
    layout = ChunkLayout.repacked((3,) * 7, 1560)
    assert layout.length == 60_840
    assert layout.spans.pairs == 49 * 4680**2
    assert layout.flops(12, 128) == 4 * 12 * 128 * 49 * 4680**2
    assert layout.flops(12, 128) == pytest.approx(6.594e12, rel=1e-4)
    assert layout.flops(12, 128, backward=True) == pytest.approx(2.5 * 6.594e12, rel=1e-4)


def test_clean_first_needs_at_most_two_key_ranges():
    layout = ChunkLayout.repacked((3,) * 7, 1560, order="clean_first")
    counts = layout.spans.kv_indptr.diff()
    assert layout.spans.pairs == 49 * 4680**2
    assert int(counts.max()) == 2
    assert layout.spans.rows()[-1] == ((56_160, 60_840), ((0, 28_080), (56_160, 60_840)))


def test_noisy_and_clean_of_a_chunk_share_positions():
    layout = ChunkLayout.repacked((1, 2), 6)
    positions = layout.positions(2, 3)
    assert positions.dtype == torch.int32
    tokens = pack([("noisy", 0), ("clean", 0), ("noisy", 1)], (1, 2), 6)
    assert positions.tolist() == [[t.frame, t.place // 3, t.place % 3] for t in tokens]


def test_positions_count_frames_within_each_document():
    one, two = ChunkLayout.blockwise((2,), 4), ChunkLayout.blockwise((1, 2), 6)
    both = ChunkLayout.concat([one, two])
    assert torch.equal(both.positions((2, 2), (2, 3)), torch.cat([one.positions(2, 2), two.positions(2, 3)]))
    with pytest.raises(ValueError, match=r"tokens_per_frame \[4, 6\]"):
        _ = both.tokens_per_frame
    with pytest.raises(ValueError, match="rows: got 3 values"):
        both.positions((1, 2, 3), 2)
    with pytest.raises(ValueError, match="got 2 x 2, expected 6"):
        both.positions(2, 2)


def test_segment_ids_and_roles():
    layout = ChunkLayout.repacked((1, 2), 2)
    assert layout.segment_ids().tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert layout.segment_ids().dtype == torch.int32 and layout.segment_index().dtype == torch.int64
    assert [s.label for s in layout.by_role("noisy")] == ["z1", "z2"]
    both = ChunkLayout.concat([layout, layout])
    assert both.tokens("clean", document=1).tolist() == [10, 11]
    assert both.tokens("clean").tolist() == [2, 3, 10, 11]
    with pytest.raises(ValueError, match="role: got 'full'"):
        layout.by_role("full")


def test_layouts_are_values():
    one, same = (ChunkLayout.repacked([2, 1], 3, window=1) for _ in range(2))
    other = ChunkLayout.repacked([2, 1], 3, window=0)
    assert one == same and hash(one) == hash(same) and one != other
    assert one.spans == same.spans and hash(one.spans) == hash(same.spans) and one.spans != other.spans
    assert one.spans.key == same.spans.key != other.spans.key
    with pytest.raises(AttributeError):
        one.segments = ()
    assert repr(one) == "ChunkLayout(15 tokens, 1 document(s): z1 x1 z2)"


def test_a_compiled_function_reads_a_layout_without_graph_breaks():
    def total(x, layout):
        spans = layout.spans
        return x + spans.q_ranges.sum() + spans.pairs + spans.q_end + layout.length + len(layout.segments)

    compiled = torch.compile(total, fullgraph=True, backend="eager")
    for layout in (ChunkLayout.repacked((1, 2), 2), ChunkLayout.blockwise((2, 2), 1)):
        assert torch.equal(compiled(torch.zeros(2), layout), total(torch.zeros(2), layout))


@pytest.mark.parametrize(
    "layout",
    [
        ChunkLayout.repacked((3,) * 3, 16),
        ChunkLayout.concat([ChunkLayout.repacked((2, 3), 5, window=1), ChunkLayout.blockwise((2, 2), 7, 3)]),
        ChunkLayout.teacher_forcing((1, 3, 2), 5, sink=1, window=0),
        ChunkLayout.blockwise((15, 18), 1),
    ],
    ids=["whole_blocks", "two_documents", "ragged", "almost_full_block"],
)
def test_to_flex_is_the_same_mask(layout):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    n = layout.length
    mask = layout.to_flex(block_size=16)
    assert torch.equal(flex.create_mask(mask.mask_mod, 1, 1, n, n, device="cpu")[0, 0], layout.dense_mask())
    want = flex.create_block_mask(mask.mask_mod, None, None, n, n, device="cpu", BLOCK_SIZE=16)
    assert mask.shape == want.shape
    assert torch.equal(mask.to_dense(), want.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask, name), getattr(want, name)), name


def test_plot_writes_a_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    layout = ChunkLayout.concat([ChunkLayout.repacked((1, 2), 2), ChunkLayout.blockwise((1, 1), 2)])
    layout.plot(tmp_path / "mask.png", title="two documents")
    pixels = torch.from_numpy(image.imread(tmp_path / "mask.png"))[..., :3]
    for color in ((0xE0, 0x82, 0x14), (0x2B, 0x6C, 0xB0)):  # noisy, clean
        close = (pixels * 255 - torch.tensor(color)).abs().amax(-1) < 2
        assert close.float().mean() > 0.01
    with pytest.raises(ValueError, match="no tokens"):
        ChunkLayout.concat([]).plot(tmp_path / "empty.png")


def test_plot_names_the_extra_when_matplotlib_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"raven-kernels\[demo\]"):
        ChunkLayout.bidirectional(1, 1).plot(tmp_path / "mask.png")


def test_chunks_helper():
    assert ChunkLayout.chunks(21, 3) == (3,) * 7
    assert ChunkLayout.chunks(10, 3, first=1) == (1, 3, 3, 3)
    assert ChunkLayout.chunks(2, 3, first=2) == (2,)
    with pytest.raises(ValueError, match="frames: got 20, expected a multiple of chunk=3$"):
        ChunkLayout.chunks(20, 3)
    with pytest.raises(ValueError, match="after a first chunk of 5"):
        ChunkLayout.chunks(4, 3, first=5)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ChunkLayout.repacked((), 4), ValueError, "chunk_frames: got no chunk"),
        (lambda: ChunkLayout.repacked((3, 0), 4), ValueError, "chunk_frames: got 0"),
        (lambda: ChunkLayout.repacked(3, 4), TypeError, "chunk_frames: got 3"),
        (lambda: ChunkLayout.repacked((3, 1.5), 4), TypeError, "chunk_frames: got 1.5"),
        (lambda: ChunkLayout.repacked((3,), 0), ValueError, "tokens_per_frame: got 0"),
        (lambda: ChunkLayout.repacked((3,), 4, sink=-1), ValueError, "sink: got -1"),
        (lambda: ChunkLayout.repacked((3,), 4, window=-2), ValueError, "window: got -2"),
        (lambda: ChunkLayout.repacked((3,), 4, order="reversed"), ValueError, "order: got 'reversed'"),
        (lambda: ChunkLayout.blockwise((3, 4), 4, local_frames=3), ValueError, "local_frames: got 3.* 4"),
        (lambda: ChunkLayout.bidirectional(0, 4), ValueError, "frames: got 0"),
        (lambda: ChunkLayout.bidirectional(3, 4).flops(0, 64), ValueError, "heads: got 0"),
        (
            lambda: ChunkLayout(PRESETS["raven"][0].segments[1:], PRESETS["raven"][0].documents),
            ValueError,
            "segments: got one at 6, expected it at 0",
        ),
    ],
)
def test_bad_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


# Spans


def test_merge_ranges():
    assert merge_ranges([(4, 6), (0, 2), (2, 4), (8, 8), (7, 9), (8, 12)]) == ((0, 6), (7, 12))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9).flatmap(lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), max_size=8)))
def test_build_describes_any_mask_in_the_fewest_ranges(rows):
    width = len(rows[0]) if rows else 0
    mask = torch.tensor(rows, dtype=torch.bool).reshape(len(rows), width)
    spans = Spans.build(((i, i + 1), [(j, j + 1) for j in range(width) if row[j]]) for i, row in enumerate(rows))
    assert torch.equal(spans.dense_mask(len(rows), width), mask)
    padded = torch.nn.functional.pad(mask.int(), (1, 0))
    starts = (padded.diff(dim=1) == 1).sum(dim=1)  # runs of visible keys in each row
    changed = [i == 0 or rows[i] != rows[i - 1] for i in range(len(rows))]
    first = [i for i in range(len(rows)) if changed[i] and any(rows[i])]
    assert len(spans.q_ranges) == len(first)
    assert len(spans.kv_ranges) == sum(int(starts[i]) for i in first)
    assert spans.pairs == int(mask.sum())
    assert Spans.build(spans.rows()) == spans


def test_full_shift_and_concat():
    full = Spans.full(3, 5)
    assert (full.q_end, full.kv_end, full.pairs) == (3, 5, 15) and full.dense_mask().all()
    assert full.shift(q=2, kv=1).rows() == (((2, 5), ((1, 6),)),)
    both = Spans.concat([full, Spans.full(2, 2)], q_lens=(4, 2), kv_lens=(5, 3))
    assert both.rows() == (((0, 3), ((0, 5),)), ((4, 6), ((5, 7),)))
    with pytest.raises(ValueError, match="queries up to 3, expected at most 2"):
        Spans.concat([full], q_lens=(2,), kv_lens=(5,))


def test_empty_spans():
    for spans in (Spans([], [0], []), Spans.full(0, 4), Spans.full(4, 0), ChunkLayout.concat([]).spans):
        assert (spans.q_end, spans.kv_end, spans.pairs) == (0, 0, 0)
        assert spans.q_ranges.shape == (0, 2) and spans.kv_indptr.tolist() == [0]
        assert not spans.dense_mask(2, 3).any()
    assert ChunkLayout.concat([]).dense_mask().shape == (0, 0)


def test_spans_do_not_follow_later_writes():
    q = torch.tensor([[0, 2]], dtype=torch.int32)
    spans = Spans(q, torch.tensor([0, 1]), torch.tensor([[0, 3]]))
    q[0, 1] = 7
    assert spans.q_end == 2 and spans.q_ranges.dtype == spans.kv_indptr.dtype == spans.kv_ranges.dtype == torch.int32


def test_key_ranges_may_come_in_ring_order():
    assert Spans([[0, 2]], [0, 2], [[6, 9], [0, 3]]).dense_mask().sum() == 12


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        (([[0, 2], [1, 3]], [0, 1, 2], [[0, 1], [0, 1]]), ValueError, "q_ranges: got a range from 1 after one to 2"),
        (([[2, 3], [0, 1]], [0, 1, 2], [[0, 1], [0, 1]]), ValueError, "sorted and disjoint"),
        (([[3, 1]], [0, 1], [[0, 1]]), ValueError, r"q_ranges: got \[3, 1\]"),
        (([[0, 1]], [0, 1], [[5, 4]]), ValueError, r"kv_ranges: got \[5, 4\]"),
        (([[0, 1]], [0, 1], [[-1, 4]]), ValueError, "kv_ranges: got values from -1"),
        (([[0, 2**31]], [0, 1], [[0, 1]]), ValueError, "q_ranges: got values"),
        (([[0, 1]], [0, 2], [[0, 3], [2, 4]]), ValueError, "got key 2 twice for query range 0"),
        (([[0, 1]], [0], []), ValueError, "kv_indptr"),
        (([[0, 1]], [0, 2], [[0, 1]]), ValueError, "kv_indptr"),
        (([[0, 1], [1, 2]], [0, 2, 1], [[0, 1]]), ValueError, "kv_indptr"),
        (([[0, 1, 2]], [0, 1], [[0, 1]]), ValueError, r"q_ranges: got shape \(1, 3\)"),
        (([[0.0, 1.0]], [0, 1], [[0, 1]]), TypeError, "q_ranges: got dtype float32"),
    ],
)
def test_bad_spans_are_named(args, error, match):
    with pytest.raises(error, match=match):
        Spans(*args)


def test_spans_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="keys up to 5, expected at most 4"):
        Spans.full(3, 5).dense_mask(3, 4)
