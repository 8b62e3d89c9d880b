"""Plans whose mask is data: the reference reads the same bounds as the kernels, and the tiles cover them."""

from __future__ import annotations

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.batch.tensors import describe
from fa4_prefixlm.fa4.builds.describe import BEST
from fa4_prefixlm.geometry.tiles import query_tiles, tile_map, tile_runs
from fa4_prefixlm.masks.interval_lists import EMPTY_HI, EMPTY_LO
from fa4_prefixlm.runtime.bounded_plans import BoundedBatch


def random_bounds(batch: int, rows: int, keys: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, keys + 1, (batch, rows, 2 * n), generator=generator, dtype=torch.int32).sort(2).values
    lo, hi = edges[..., 0::2].clone(), edges[..., 1::2].clone()
    touching = torch.cat([torch.zeros_like(lo[..., :1], dtype=torch.bool), lo[..., 1:] == hi[..., :-1]], dim=2)
    empty = (lo >= hi) | touching
    return torch.cat([lo.masked_fill(empty, EMPTY_LO), hi.masked_fill(empty, EMPTY_HI)], dim=2)


def dense(bounds: torch.Tensor, keys: int) -> torch.Tensor:
    lo, hi = bounds.unsqueeze(-1).chunk(2, dim=2)
    key = torch.arange(keys)
    return ((key >= lo) & (key < hi)).any(2)


@pytest.mark.parametrize(("rows", "keys"), [(40, 40), (7, 40), (40, 7), (1, 1)])
@pytest.mark.parametrize("n", [1, 3])
def test_reference_reads_the_bounds(rows: int, keys: int, n: int) -> None:
    bounds = random_bounds(2, rows, keys, n, seed=rows + n)
    q, k, v = torch.randn(2, rows, 4, 16), torch.randn(2, keys, 2, 16), torch.randn(2, keys, 2, 8)
    batch = BoundedBatch(describe(q, k, v), bounds)
    out = batch.plan(None, batch.choose(None))(q, k, v)
    visible = dense(bounds, keys)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).repeat_interleave(2, 1).mT) / 4
    weights = scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(3).nan_to_num(0.0)
    expected = (weights @ v.transpose(1, 2).repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_gradients_on_the_reference() -> None:
    bounds = random_bounds(1, 9, 9, 1, seed=0)
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    batch = BoundedBatch(describe(q, k, v), bounds)
    batch.plan(None, batch.choose(None))(q, k, v).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in (q, k, v))


@pytest.mark.parametrize(("rows", "keys"), [(300, 300), (40, 300), (300, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_of_tiles_covers_what_the_map_says(rows: int, keys: int, seed: int) -> None:
    """One interval a row is planned as `banded` whatever the rows' positions: the run must hold every visible tile."""
    q, k = torch.empty(2, rows, 1, 8), torch.empty(2, keys, 1, 8)
    batch = BoundedBatch(describe(q, k, k), random_bounds(2, rows, keys, 1, seed))
    plan = batch.plan(None, batch.choose(None))
    tiles = query_tiles(plan.lengths, 64)
    runs = tile_runs(plan.bounds, tiles, 64, 32)
    exact = tile_map(plan.bounds, tiles, plan.lengths, plan._batch.where, 64, 32)
    columns = exact.is_full.shape[1]
    column = torch.arange(columns)
    in_run = (column >= runs.first.unsqueeze(1)) & (column < runs.end.unsqueeze(1))
    full = (column >= runs.full_first.unsqueeze(1)) & (column < runs.full_end.unsqueeze(1))
    assert (in_run >= (exact.is_full | exact.is_partial)).all()
    assert (full == exact.is_full).all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_key_tiles_are_a_run_for_one_interval_a_row(n: int) -> None:
    """Of several, a run would hold the tiles between them too."""
    q = torch.empty(1, 64, 1, 8)
    assert BoundedBatch(describe(q, q, q), random_bounds(1, 64, 64, n, seed=n)).traits.banded is (n == 1)


def test_backend_by_intervals() -> None:
    """What would run it on a Hopper GPU, where the choice needs no tensors."""
    q = torch.empty(1, 64, 2, 128, dtype=torch.bfloat16)
    spec = describe(q, q, q)
    on_hopper = type(spec)(**{**vars(spec), "device": torch.device("cuda"), "arch": 90})
    names = {}
    for n in (1, 3, 5):
        batch = BoundedBatch(spec, random_bounds(1, 64, 64, n, seed=n))
        names[n] = fp.backends.select.choose("auto", on_hopper, batch.traits, batch.lengths, BEST).name
    assert names == {1: "native", 3: "varlen", 5: "flex"}


def test_refusals() -> None:
    q = torch.empty(1, 4, 1, 8)
    spec = describe(q, q, q)
    for bounds in (torch.zeros(1, 4, 3, dtype=torch.int32), torch.zeros(1, 4, 2), torch.zeros(1, 5, 2).int()):
        with pytest.raises(fp.InputError, match="bounds"):
            BoundedBatch(spec, bounds)
    with pytest.raises(fp.InputError, match="batch, seqlen"):
        BoundedBatch(describe(q[0], q[0], q[0]), torch.zeros(1, 4, 2).int())
