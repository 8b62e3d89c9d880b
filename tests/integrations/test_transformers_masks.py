"""The row bounds that layers get, against SDPA's own dense mask, for every mask that transformers makes.

By torch's operations, and once more, in a process where Triton interprets, by the launch that makes them on a GPU.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

masking_utils = pytest.importorskip("transformers.masking_utils")

import fa4_prefixlm.integrations.transformers as integration  # noqa: E402
from fa4_prefixlm.errors import InputError  # noqa: E402
from fa4_prefixlm.integrations.transformers import masks  # noqa: E402
from fa4_prefixlm.integrations.transformers.mask_functions import is_known, read  # noqa: E402
from tests.kernels.triton_processes import INTERPRETED, run_interpreted  # noqa: E402

pytestmark = pytest.mark.slow

ROWS, KEYS, BATCH = 40, 48, 3
CAUSAL = masking_utils.causal_mask_function


@pytest.fixture(autouse=True)
def _launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process where Triton interprets, in blocks that are smaller than the masks."""
    if INTERPRETED:
        from fa4_prefixlm.kernels import run_rows

        monkeypatch.setattr(masks, "launches", lambda device: True)
        monkeypatch.setattr(run_rows, "BLOCK", 32)
        monkeypatch.setattr(run_rows, "TOGETHER", 16)


if not INTERPRETED:

    def test_in_the_interpreter() -> None:
        run_interpreted(__file__, "-k", "not as_sdpa or 1-own or 2-joined")


def block_ids(batch: int, width: int, seed: int, *, blocks: int = 3, joined: bool = False) -> torch.Tensor:
    """Random runs of tokens: of an id each, or (joined) all of id 0, as PaliGemma and Molmo 2 have them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((batch, width), -1)
    for row in ids:
        edges = torch.randperm(width, generator=generator)[: 2 * blocks].sort().values.view(-1, 2)
        for number, (start, end) in enumerate(edges.tolist()):
            row[start:end] = 0 if joined else number
    return ids


def padding(kind: str, batch: int, width: int, seed: int) -> torch.Tensor | None:
    if kind == "none":
        return None
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(batch, width, dtype=torch.bool)
    for index, row in enumerate(real):
        pad = int(torch.randint(0, width - 5, (), generator=generator)) if index else 0
        if kind == "left":
            row[:pad] = False
        elif kind == "right":
            row[width - pad :] = False
        else:
            row[pad : pad + 3] = False
            row[pad // 2 : pad // 2 + 2] = False
    return real


def both(function: Callable[..., Any], **more: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bounds, what they show, SDPA's mask)."""
    sizes = {"batch_size": BATCH, "q_length": ROWS, "kv_length": KEYS, "q_offset": KEYS - ROWS, "kv_offset": 0}
    sizes |= {"mask_function": function, "attention_mask": None} | more
    bounds = integration.mask(**sizes, config=None, dtype=torch.float32, local_size=None)
    assert bounds is not None
    assert bounds.dtype == torch.int32
    assert bounds.shape[:3] == (sizes["batch_size"], 1, sizes["q_length"])
    expected = masking_utils.sdpa_mask(**sizes, allow_is_causal_skip=False)
    return bounds, shown_by(bounds, sizes["kv_length"]), expected


def shown_by(bounds: torch.Tensor, kv_length: int) -> torch.Tensor:
    """What a layer is shown, without reading anything back first."""
    record = masks.found(bounds, kv_length)
    several = record.general is not None and bool((bounds == masks.NO_GOOD).any())
    return masks.visible(record.in_several() if several else bounds, kv_length)


def gemma3_local(ids: torch.Tensor, window: int) -> Callable[..., Any]:
    both_ways = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids))
    return masking_utils.and_masks(both_ways, masking_utils.sliding_window_overlay(window))


def paligemma2_local(ids: torch.Tensor, window: int) -> Callable[..., Any]:
    sliding = masking_utils.sliding_window_causal_mask_function(window)
    return masking_utils.or_masks(sliding, masking_utils.blockwise_overlay(ids))


def gemma_global(ids: torch.Tensor, window: int) -> Callable[..., Any]:
    return masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids))


FUNCTIONS: dict[str, Callable[[torch.Tensor, int], Callable[..., Any]]] = {
    "causal": lambda ids, window: CAUSAL,
    "bidirectional": lambda ids, window: masking_utils.bidirectional_mask_function,
    "sliding": lambda ids, window: masking_utils.sliding_window_causal_mask_function(window),
    "sliding both ways": lambda ids, window: masking_utils.sliding_window_bidirectional_mask_function(window),
    "chunked": lambda ids, window: masking_utils.chunked_causal_mask_function(window, torch.tensor([0, 1, 5])),
    "global": gemma_global,
    "gemma3 local": gemma3_local,
    "paligemma2 local": paligemma2_local,
}


@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("joined", [False, True], ids=["own", "joined"])
@pytest.mark.parametrize("seed", range(4))
def test_as_sdpa(name: str, pad: str, joined: bool, seed: int) -> None:
    window = (1, 4, 13, 100)[seed]
    function = FUNCTIONS[name](block_ids(BATCH, KEYS, seed, joined=joined, blocks=2 if pad == "holes" else 3), window)
    assert is_known(read(function))
    bounds, shown, expected = both(function, attention_mask=padding(pad, BATCH, KEYS, seed))
    record = masks.known(bounds, KEYS)
    assert bool(record.seen.overflow) == bool((runs_of(expected) > 4).any())
    if not record.seen.overflow:
        assert (shown == expected).all()
    if pad != "holes" and not joined:
        assert not record.uses_several, "the usual case is one interval"


def test_more_runs_on_the_way_than_a_row_has() -> None:
    """Six images that see each other, packed by threes: an image is of six runs, of which a row sees three."""
    ids = torch.full((BATCH, KEYS), -1)
    for start in range(1, KEYS, 8):
        ids[:, start : start + 4] = 0
    documents = torch.arange(KEYS).ge(24).long().expand(BATCH, -1)
    packed = masking_utils.packed_sequence_mask_function(documents)
    bounds, _, expected = both(masking_utils.and_masks(gemma_global(ids, 0), packed))
    assert runs_of(expected).max() == 3
    record = masks.known(bounds, KEYS)
    assert not record.seen.overflow
    assert (masks.visible(record.in_several(), KEYS) == expected).all()


def test_too_many_runs_on_the_way() -> None:
    """The window leaves a run or two of 24: the bounds do not know that, and say so."""
    ids = torch.full((BATCH, KEYS), -1)
    ids[:, ::2] = 0
    function = masking_utils.and_masks(
        masking_utils.blockwise_overlay(ids), masking_utils.sliding_window_bidirectional_mask_function(2)
    )
    bounds, _, expected = both(function)
    assert runs_of(expected).max() <= 4
    record = masks.known(bounds, KEYS)
    assert record.seen.overflow
    assert (record.as_dense() == expected).all()


def random_part(rng: random.Random, keys: int, depth: int) -> Callable[..., Any]:
    """A mask function of functions of transformers."""
    if depth == 0 or rng.random() < 0.2:
        size, seed = rng.randint(1, keys), rng.randrange(2**31)
        ids = block_ids(2, keys, seed, blocks=rng.randint(0, 8), joined=rng.random() < 0.5)
        documents = torch.tensor([sorted(rng.randint(0, 3) for _ in range(keys)) for _ in range(2)])
        real = torch.rand(2, keys, generator=torch.Generator().manual_seed(seed)) > 0.1
        leaves = (
            CAUSAL,
            masking_utils.bidirectional_mask_function,
            masking_utils.sliding_window_overlay(size),
            masking_utils.sliding_window_bidirectional_overlay(size),
            masking_utils.chunked_overlay(size, torch.tensor([0, rng.randint(0, 5)])),
            masking_utils.blockwise_overlay(ids),
            masking_utils.packed_sequence_mask_function(documents),
            masking_utils.padding_mask_function(real),
        )
        return rng.choices(leaves, weights=(2, 1, 1, 1, 1, 4, 1, 1))[0]
    if rng.random() < 0.1:
        length = rng.randint(1, keys)
        positions = torch.arange(keys).remainder(length).expand(2, -1)
        documents = torch.arange(keys).div(length, rounding_mode="floor").expand(2, -1)
        inner = masking_utils.remap_positions_for_packed_sequence(random_part(rng, keys, 1), positions)
        return masking_utils.and_masks(inner, masking_utils.packed_sequence_mask_function(documents))
    combine = rng.choice((masking_utils.and_masks, masking_utils.or_masks))
    return combine(*(random_part(rng, keys, depth - 1) for _ in range(rng.randint(2, 3))))


@pytest.mark.parametrize("seed", range(8))
def test_random_masks(seed: int) -> None:
    """Never a wrong one; and what no row sees more than four runs of overflows on the way in one of a hundred."""
    rng = random.Random(seed)
    within, overflows = 0, 0
    for _ in range(100):
        last = rng.randint(30, 60)
        first = rng.choice((0, 0, rng.randint(0, 9)))
        keys = last - first
        rows = rng.randint(masks.FEW_QUERIES + 1, keys)
        more = {"batch_size": 2, "q_length": rows, "kv_length": keys, "kv_offset": first}
        more["q_offset"] = first + rng.choice((keys - rows, rng.randint(0, keys - rows)))
        pad = padding(rng.choice(("none", "left", "right", "holes")), 2, last, rng.randrange(2**31))
        bounds, shown, expected = both(random_part(rng, last, 3), attention_mask=pad, **more)
        record, few = masks.known(bounds, keys), not (runs_of(expected) > 4).any()
        within += few
        if record.seen.overflow:
            overflows += few
            assert (record.as_dense() == expected).all()
        else:
            assert (shown == expected).all()
    assert overflows <= 0.03 * within


@pytest.mark.parametrize("end", [0, 9, 40])
def test_keys_that_are_no_run_around_the_row(end: int) -> None:
    """Seen in full or not at all, beside a window: one interval for the rows near them, two for the others."""
    real = torch.arange(KEYS).lt(end).expand(BATCH, -1)
    sliding = masking_utils.sliding_window_causal_mask_function(4)
    function = masking_utils.or_masks(sliding, masking_utils.padding_mask_function(real))
    assert is_known(read(function))
    bounds, shown, expected = both(function)
    assert (shown == expected).all()
    assert masks.known(bounds, KEYS).uses_several == bool((runs_of(expected) > 1).any())


@pytest.mark.parametrize("size", [2**30 + 1, 2**31 - 1, 2**31 + 30, 2**32 + 1, 2**33, 2**63 - 1])
@pytest.mark.parametrize("pad", ["none", "holes"])
@pytest.mark.parametrize("name", ["sliding", "sliding both ways", "chunked"])
def test_sizes_wider_than_int32(name: str, pad: str, size: int) -> None:
    """They are no limit: what SDPA's own mask has is computed in int64, and wraps for the largest."""
    real = padding(pad, BATCH, KEYS, seed=0)
    _, shown, _ = both(FUNCTIONS[name](torch.empty(0), size), attention_mask=real)
    _, _, expected = both(FUNCTIONS[name](torch.empty(0), 10**6), attention_mask=real)
    assert (shown == expected).all()


def runs_of(dense: torch.Tensor) -> torch.Tensor:
    """How many runs of keys each row sees."""
    before = torch.nn.functional.pad(dense, (1, 0))[..., :-1]
    return (dense & ~before).sum(-1)


@pytest.mark.parametrize("q_offset", [0, 7, torch.tensor(7)], ids=["0", "7", "tensor"])
@pytest.mark.parametrize("kv", [(200, 0), (47, 0), (60, 30)], ids=["static", "dynamic", "sliding"])
def test_offsets(q_offset: int | torch.Tensor, kv: tuple[int, int]) -> None:
    kv_length, kv_offset = kv
    ids = block_ids(BATCH, kv_length + kv_offset, seed=1)
    for name in ("global", "gemma3 local"):
        real = padding("left", BATCH, 30, seed=2)
        more = {
            "kv_length": kv_length,
            "kv_offset": kv_offset,
            "q_offset": q_offset + kv_offset,
            "attention_mask": real,
        }
        _, shown, expected = both(FUNCTIONS[name](ids, 9), **more)
        assert (shown == expected).all()


@pytest.mark.parametrize("order", ["(causal or block) and packed", "(packed and causal) or block"])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(5))
def test_packed(order: str, window: int | None, seed: int) -> None:
    """Both orders, of 5.24 and 5.23, and the image mask inside of the positions too, as Gemma's sliding layers have."""
    lengths = torch.tensor([[5, 20, 15], [40, 0, 0], [1, 1, 38]])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths.tolist()])
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    ids, packed = block_ids(BATCH, ROWS, seed), masking_utils.packed_sequence_mask_function(documents)
    inner = CAUSAL if window is None else gemma3_local(ids, window)
    inner = masking_utils.remap_positions_for_packed_sequence(inner, positions)
    overlay = masking_utils.blockwise_overlay(ids)
    if order == "(causal or block) and packed":
        function = masking_utils.and_masks(masking_utils.or_masks(inner, overlay), packed)
    else:
        function = masking_utils.or_masks(masking_utils.and_masks(packed, inner), overlay)
    assert is_known(read(function))
    _, shown, expected = both(function, kv_length=ROWS, q_offset=0)
    assert (shown == expected).all()


def test_a_function_of_ones_own_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is vmapped, and in several chunks of rows."""
    monkeypatch.setattr(masks, "EVALUATED_PAIRS", 7 * KEYS * BATCH)

    def every_third(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (q - kv) // 16 % 3 == 0

    for use_vmap in (False, True):
        function = masking_utils.and_masks(CAUSAL, every_third)
        assert not is_known(read(function))
        _, shown, expected = both(function, use_vmap=use_vmap, attention_mask=padding("left", BATCH, KEYS, seed=3))
        assert (shown == expected).all()


def test_too_many_runs_are_seen() -> None:
    ids = torch.full((BATCH, KEYS), -1)
    ids[:, ::3] = 0
    bounds, shown, expected = both(gemma_global(ids, 0))
    record = masks.known(bounds, KEYS)
    assert record.seen is not None
    assert record.seen.overflow
    assert not (shown == expected).all()
    assert (record.as_dense() == expected).all()


def test_what_is_read_of_a_mask() -> None:
    def seen(function: Callable[..., Any], kv_length: int = KEYS, **more: Any) -> masks.Seen | None:
        return masks.known(both(function, kv_length=kv_length, **more)[0], kv_length).seen

    plain = masks.Seen(intervals=1, overflow=False, from_key_0=True, longest=KEYS, end=KEYS, causal=True)
    assert seen(CAUSAL) == plain
    assert seen(CAUSAL, attention_mask=torch.ones(BATCH, KEYS, dtype=torch.bool)) == plain
    assert seen(CAUSAL, kv_length=2 * KEYS) == plain, "the slots of a static cache that nobody sees"
    windowed = seen(FUNCTIONS["sliding"](torch.empty(0), 5))
    assert windowed == masks.Seen(intervals=1, overflow=False, from_key_0=False, longest=5, end=KEYS, causal=True)
    for pad in ("left", "right"):
        padded = seen(CAUSAL, attention_mask=padding(pad, BATCH, KEYS, seed=0))
        assert padded is not None
        assert not padded.causal
    spans = seen(gemma_global(block_ids(BATCH, KEYS, seed=0), 0))
    assert spans is not None
    assert (spans.intervals, spans.from_key_0, spans.causal) == (1, True, False)


def test_all_masks_of_a_forward_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _, _ = both(CAUSAL)
    second, _, _ = both(FUNCTIONS["sliding"](torch.empty(0), 5))
    reads = []
    numbers = masks.Reading.numbers
    monkeypatch.setattr(masks.Reading, "numbers", lambda own: reads.append(own) or numbers(own))
    masks.known(first, KEYS)
    assert len(reads) == 2
    masks.known(second, KEYS)
    masks.known(first, KEYS)
    assert len(reads) == 2


def test_a_mask_is_waited_for_once_and_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that was read before, that another layer has a view of, or that is on another GPU."""
    made = [both(CAUSAL)[0] for _ in range(3)]
    before, own, elsewhere = (masks.found(bounds, KEYS) for bounds in made)
    masks.known(made[0], KEYS)
    view = made[1][:]
    assert masks.found(view, KEYS) is own
    elsewhere.seen, elsewhere.read.device = None, torch.device("cuda", 1)
    own.seen = None
    reads: list[list[masks.Record]] = []
    read = masks.read_back
    monkeypatch.setattr(masks, "read_back", lambda waiting: reads.append(waiting) or read(waiting))
    assert masks.known(made[1], KEYS).seen == before.seen
    assert [list(map(id, waiting)) for waiting in reads] == [[id(own)]]
    assert elsewhere.seen is None


@pytest.mark.parametrize("evaluated", [False, True])
def test_too_many_runs_are_read_once(evaluated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once more in several intervals, where the first were of one; whatever number of layers asks."""
    ids = torch.full((BATCH, KEYS), -1)
    ids[:, ::3] = 0

    def every_third(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return kv % 3 == 0

    bounds, _, expected = both(every_third if evaluated else gemma_global(ids, 0))
    reads: list[int] = []
    read = masks.read_back
    monkeypatch.setattr(masks, "read_back", lambda waiting: reads.append(len(waiting)) or read(waiting))
    for _ in range(2):
        record = masks.known(bounds, KEYS)
        assert record.seen is not None
        assert record.seen.overflow
        assert (record.as_dense() == expected).all()
    assert reads == ([1] if evaluated else [1, 1])


def test_records_go_with_their_masks() -> None:
    bounds, _, _ = both(CAUSAL)
    rows = bounds[:, :, -20:]
    for made in (bounds, rows):
        masks.known(made, KEYS).as_dense()
    before = len(masks._records)
    del bounds, rows, made
    assert len(masks._records) == before - 2


@pytest.mark.parametrize("joined", [False, True], ids=["one interval", "several"])
@pytest.mark.parametrize("own_first", [False, True])
def test_rows_of_a_mask(joined: bool, own_first: bool) -> None:
    """Gemma 4 cuts masks to the last rows for its layers that share keys."""
    bounds, _, expected = both(FUNCTIONS["global"](block_ids(BATCH, KEYS, seed=5, joined=joined), 9))
    if own_first:
        masks.known(bounds, KEYS)
    rows = bounds[:, :, -20:]
    record = masks.known(rows, KEYS)
    assert record.seen is not None
    assert not record.seen.overflow
    assert record.uses_several == joined
    assert (masks.visible(record.in_several() if joined else rows, KEYS) == expected[:, :, -20:]).all()
    assert (record.as_dense() == expected[:, :, -20:]).all()
    few = bounds[:, :, -3:]
    assert (masks.found(few, KEYS).as_dense() == expected[:, :, -3:]).all()


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first rows": lambda own: own[:, :, :15],
    "every second row": lambda own: own[:, :, ::2],
    "a sequence": lambda own: own[:1],
    "another sequence": lambda own: own[1:2],
    "a copy": lambda own: own.clone(),
    "the same": lambda own: own[:],
}


@pytest.mark.parametrize("name", VIEWS)
def test_parts_of_a_mask(name: str) -> None:
    """Beside the mask, its last and its first rows, each of which has a record: no part takes that of another."""
    whole, _, expected = both(FUNCTIONS["gemma3 local"](block_ids(BATCH, KEYS, seed=5), 9))
    parts = whole, whole[:, :, -20:], whole[:, :, :20]
    for part in parts:
        masks.known(part, KEYS).as_dense()
    view = VIEWS[name](whole)
    record = masks.known(view, KEYS)
    assert record.seen is not None
    assert not record.seen.overflow
    assert torch.equal(record.as_dense(), VIEWS[name](expected))
    assert torch.equal(masks.visible(view, KEYS), VIEWS[name](expected))


@pytest.mark.parametrize("begins", [(0, 20), (20, 0)])
def test_rows_of_a_mask_that_is_not_known(begins: tuple[int, int]) -> None:
    """Two halves of one: neither is rows of the other."""
    bounds, _, expected = both(FUNCTIONS["sliding"](torch.empty(0), 9))
    whole = bounds.clone()
    del bounds
    halves = [whole[:, :, begin : begin + 20] for begin in begins]
    for begin, rows in zip(begins, halves, strict=True):
        assert torch.equal(masks.known(rows, KEYS).as_dense(), expected[:, :, begin : begin + 20])


def test_masks_in_the_same_memory_or_of_the_same_shape() -> None:
    """Side by side, as a compiler may lay them out; and elsewhere. None is rows of another, nor are both one mask."""
    made = [both(FUNCTIONS["sliding"](torch.empty(0), window)) for window in (3, 9)]
    together = torch.cat([bounds for bounds, _, _ in made], dim=3)
    parts = [together[..., :2], together[..., 2:], made[1][0].clone()]
    wanted = [made[0][2], made[1][2], made[1][2]]
    for part, expected in zip(parts, wanted, strict=True):
        assert torch.equal(masks.known(part, KEYS).as_dense(), expected)
    for padding in (0, 1, -1, KEYS):  # T5Gemma 2 puts two masks side by side, DeepSeek V4 pads one
        padded = torch.nn.functional.pad(made[0][0], (0, 6), value=padding)
        for other in (together, padded):
            with pytest.raises(InputError, match="attention_mask: expected a mask as the mask function made it"):
                masks.known(other, KEYS)


def test_what_another_thread_reads_late_is_left() -> None:
    """It reads every mask that waits, also one whose own thread has gone on to its several intervals."""
    bounds, _, expected = both(FUNCTIONS["global"](block_ids(BATCH, KEYS, seed=5, joined=True), 9))
    record, late = masks.found(bounds, KEYS), threading.Event()
    first, numbers = record.read, record.read.numbers

    def wait() -> list[int]:
        if threading.current_thread() is not threading.main_thread():
            assert late.wait(30)
        return numbers()

    first.numbers = wait  # type: ignore[method-assign]
    other = threading.Thread(target=masks.read_back, args=([record],))
    other.start()
    record = masks.known(bounds, KEYS)
    late.set()
    other.join()
    assert record.uses_several
    assert record.seen is not None
    assert not record.seen.overflow
    assert (masks.visible(record.in_several(), KEYS) == expected).all()


@torch.inference_mode()
def test_a_view_keeps_what_is_known_of_a_mask() -> None:
    """That of a mask which is gone: in inference mode nothing else keeps it."""
    bounds, _, expected = both(FUNCTIONS["global"](block_ids(BATCH, KEYS, seed=5, joined=True), 9))
    view = bounds[:]
    record = masks.known(view, KEYS)
    del bounds
    assert masks.known(view, KEYS) is record
    assert (masks.visible(record.in_several(), KEYS) == expected).all()


def test_rows_of_a_mask_of_too_many_runs() -> None:
    ids = torch.full((BATCH, KEYS), -1)
    ids[:, ::3] = 0
    bounds, _, expected = both(gemma_global(ids, 0))
    rows = bounds[:, :, -20:]
    record = masks.known(rows, KEYS)
    assert record.seen is not None
    assert record.seen.overflow
    assert (record.as_dense() == expected[:, :, -20:]).all()
    other = bounds[:, :, -20:].clone()  # nobody knows whose they are
    with pytest.raises(ValueError, match="attention_mask: expected a mask as the mask function made it"):
        masks.known(other, KEYS).as_dense()


def test_other_keys_than_the_mask_is_for() -> None:
    bounds, _, _ = both(CAUSAL)
    with pytest.raises(ValueError, match="key: expected 48 keys, as the mask was made for"):
        masks.known(bounds, KEYS + 1)


def test_few_queries_get_sdpas_own_mask() -> None:
    made = integration.mask(batch_size=2, q_length=3, kv_length=9, q_offset=6, mask_function=CAUSAL)
    assert made is not None
    assert made.dtype == torch.bool
    assert (made == masking_utils.sdpa_mask(2, 3, 9, q_offset=6, allow_is_causal_skip=False)).all()


def test_everything_is_no_mask() -> None:
    function = masking_utils.bidirectional_mask_function
    sizes = {"batch_size": 2, "q_length": 30, "kv_length": 30, "mask_function": function}
    assert integration.mask(**sizes, allow_is_bidirectional_skip=True) is None
    assert integration.mask(**sizes) is not None
