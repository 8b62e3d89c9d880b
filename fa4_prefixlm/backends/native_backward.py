"""native backward: FA4's own SM90 backward main loop over the rows that see each key. No block lists, no mask_mod.

Only on builds whose backward is known (`fa4.builds.fingerprint`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from fa4_prefixlm.backends.base import BackwardBackend, Gradients, MaskedBatch, Refusal
from fa4_prefixlm.backends.fa4_verdicts import backward_call_refusal
from fa4_prefixlm.backends.rows import kernel_bounds
from fa4_prefixlm.batch.forward_pass import ForwardPass, Grads
from fa4_prefixlm.batch.lengths import Lengths
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.batch.tensors import CallSpec
from fa4_prefixlm.fa4.builds.describe import BACKWARD_ARGUMENTS, Build
from fa4_prefixlm.fa4.kernels.backward_tiles import BackwardTile, native_tile
from fa4_prefixlm.fa4.kernels.launch import PADDING
from fa4_prefixlm.fa4.kernels.native_backward_launch import KeyTables, native_backward
from fa4_prefixlm.geometry.key_bounds import KeyBounds, any_key_bounds, rises, rising_key_bounds
from fa4_prefixlm.geometry.row_tiles import key_tile_ends, row_tiles, visitors_before
from fa4_prefixlm.geometry.traits import Traits

# Intervals of rows that see one key, at most: each takes registers.
MOST_ROW_INTERVALS = 4


@dataclass(frozen=True)
class NativeGradients(Gradients):
    """One launch of each of three kernels, and two more where query heads share key heads."""

    build: Build
    tile: BackwardTile
    tables: KeyTables
    lengths: Lengths

    def run(self, forward: ForwardPass, dout: torch.Tensor, dlse: torch.Tensor | None, options: Options) -> Grads:
        return native_backward(
            forward,
            dout,
            dlse,
            build=self.build,
            tile=self.tile,
            tables=self.tables,
            lengths=self.lengths,
            options=options,
        )

    def describe(self) -> str:
        count = self.tables.intervals
        held = f"{count} interval{'s' * (count > 1)} a key, {self.tables.nbytes() / 2**20:.2f} MiB"
        return f"tile {self.tile}, {held}{', deterministic' * (self.tables.order is not None)}"


class NativeBackward(BackwardBackend):
    name = "native"
    summary = "FlashAttention-4's SM90 backward main loop over the rows that see each key"

    def refusal(self, spec: CallSpec, traits: Traits, build: Build | None, *, deterministic: bool) -> str | None:
        if traits.custom or traits.tagged:
            return "it takes masks of intervals alone"
        refusal = backward_call_refusal(spec, build, BACKWARD_ARGUMENTS)
        if refusal is not None or build is None:
            return refusal
        if spec.arch // 10 != 9:
            return f"it is made for SM90, not sm_{spec.arch}"
        return build.backward_refusal

    def prepare(self, batch: MaskedBatch, *, deterministic: bool) -> NativeGradients | Refusal:
        spec, traits, lengths = batch.spec, batch.traits, batch.lengths
        windowed = traits.banded and traits.reach.left is not None
        tile = native_tile(spec.head_dim, spec.head_dim_v, windowed=windowed, deterministic=deterministic)
        tile = folded(tile, spec, lengths)
        tables = key_tables(batch, tile, deterministic=deterministic)
        if isinstance(tables, Refusal):
            return tables
        return NativeGradients(batch.fa4(), tile, tables, lengths)


def folded(tile: BackwardTile, spec: CallSpec, lengths: Lengths) -> BackwardTile:
    """Each CTA takes all query heads of its key head where enough CTAs are left to keep the GPU busy to the end."""
    if tile.fold_from is None or spec.heads_q == spec.heads_kv:
        return tile
    key_tiles = lengths.total_k // tile.n * spec.heads_kv
    return dataclasses.replace(tile, fold=key_tiles >= tile.fold_from)


def key_tables(batch: MaskedBatch, tile: BackwardTile, *, deterministic: bool) -> KeyTables | Refusal:
    """The rows that see each key, and what follows from them.

    Synchronises only where the host can't tell that the rows of the mask rise.
    """
    lengths = batch.lengths
    rising = batch.traits.intervals == 1 and rises(batch.traits.closed_form, lengths)
    if rising and batch.on_gpu:
        from fa4_prefixlm.kernels.key_tables import rising_key_tables

        made = rising_key_tables(kernel_bounds(batch), lengths, tile.m, tile.n, padding=PADDING, ordered=deterministic)
        return KeyTables(made[0], made[1], 1, made[2])
    bounds = batch.bounds
    if rising:
        keys: KeyBounds | int = rising_key_bounds(bounds, batch.where.sequence, lengths)
    else:
        keys = any_key_bounds(bounds, batch.where.sequence, lengths, MOST_ROW_INTERVALS)
    if isinstance(keys, int):
        return Refusal(f"a key is seen by {keys} intervals of rows, it takes {MOST_ROW_INTERVALS}")
    tiles = row_tiles(keys, lengths, tile.m, tile.n)
    order = None
    if deterministic and keys.rising:
        order = key_tile_ends(bounds, lengths, tile.m, tile.n)
    elif deterministic:
        order = visitors_before(tiles, lengths, tile.m, tile.n)
    return KeyTables.of(keys, tiles, order)
