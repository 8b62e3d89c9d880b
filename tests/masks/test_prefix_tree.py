"""Trees of shared beginnings against their words: a token sees its own node up to itself, and the nodes above."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import fa4_prefixlm as fp
from fa4_prefixlm.masks import prefix_trees
from fa4_prefixlm.masks.prefix_tree import Tree, tree_mask
from tests.masks.planned import visible_by_bounds


def random_tree(rng: random.Random, most_nodes: int = 12) -> list[tuple[int | None, int]]:
    """Depth first; roots, only children and nodes without tokens among them."""
    nodes: list[tuple[int | None, int]] = []
    path: list[int] = []
    for index in range(rng.randint(1, most_nodes)):
        path = path[: rng.randint(0 if rng.random() < 0.2 else min(1, len(path)), len(path))]
        nodes.append((path[-1] if path else None, rng.choice([0, 1, 1, 2, 3, 5])))
        path.append(index)
    return nodes


def by_its_words(tree: Tree, rows: int, keys: int) -> torch.Tensor:
    node_of = [index for index, (_, tokens) in enumerate(tree) for _ in range(tokens)]

    def above(node: int) -> set[int]:
        parent = tree[node][0]
        return set() if parent is None else {parent} | above(parent)

    result = torch.zeros(rows, keys, dtype=torch.bool)
    for row in range(rows):
        query = row + keys - rows
        for key in range(keys):
            if query < len(node_of) and key < len(node_of):
                own, other = node_of[query], node_of[key]
                result[row, key] = (own == other and key <= query) or other in above(own)
    return result


def of_one(ranges: dict[str, list]) -> dict[str, list]:
    return {name: own[0] for name, own in ranges.items()}


@pytest.mark.parametrize("seed", range(60))
def test_random_trees(seed: int) -> None:
    rng = random.Random(seed)
    tree = random_tree(rng)
    mask, ranges = prefix_trees([tree], levels=rng.choice([None, 12]))
    keys = sum(tokens for _, tokens in tree) + rng.choice([1, 3])
    rows = rng.choice([keys, rng.randint(1, keys)])
    wanted = by_its_words(tree, rows, keys)
    assert torch.equal(mask.dense(seqlen=keys, seqlen_q=rows, ranges=of_one(ranges)), wanted)
    assert torch.equal(visible_by_bounds(mask, of_one(ranges), keys, rows), wanted)


def test_a_tree_is_its_paths() -> None:
    """Attention over the tree gives each answer what attention over a copy of its path alone gives."""
    tree = [(None, 20), (0, 7), (1, 5), (1, 9), (0, 6)]
    paths = [(1, [0, 1]), (2, [0, 1, 2]), (3, [0, 1, 3]), (4, [0, 4])]
    q, k, v = (torch.randn(1, 47, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    trees = prefix_trees([tree])
    out = fp.attention(q, k, v, trees.ranges, mask=trees.mask)
    starts = [0, 20, 27, 32, 41]
    own = [torch.arange(start, start + tokens) for start, (_, tokens) in zip(starts, tree, strict=True)]
    for node, path in paths:
        tokens = torch.cat([own[each] for each in path])
        alone = fp.attention(q[:, tokens], k[:, tokens], v[:, tokens], mask=fp.masks.causal)
        torch.testing.assert_close(out[:, own[node]], alone[:, -len(own[node]) :])


def test_one_prompt_with_many_answers_is_two_intervals() -> None:
    trees = prefix_trees([[(None, 30), *[(0, 10)] * 9], [(None, 120)]])
    assert trees.mask == tree_mask(2)
    q = torch.zeros(2, 120, 2, 8)
    plan = fp.plan(trees.ranges, like=(q, q, q), mask=trees.mask)
    assert (plan.traits.intervals, plan.traits.tagged) == (2, False)
    assert trees.mask.whole("node 0") == trees.mask.whole("subtree 0") == "nothing"


def test_what_touches_is_one_interval() -> None:
    """A conversation of 9 turns is 9 levels; only what forks leaves gaps."""
    turns: list[tuple[int | None, int]] = [(None, 5), *[(at, 5) for at in range(8)]]
    trees = prefix_trees([[*turns, (4, 6)]])
    q = torch.zeros(1, 51, 2, 8)
    assert fp.plan(trees.ranges, like=(q, q, q), mask=trees.mask).traits.intervals == 2


def test_ranges() -> None:
    mask, ranges = prefix_trees([[(None, 4), (0, 2), (0, 3)], [(None, 1), (None, 0), (1, 5)]], levels=3)
    assert ranges == {
        "node 0": [[(0, 4)], [(0, 1)]],
        "subtree 0": [[(0, 9)], [(0, 1), (1, 6)]],
        "node 1": [[(4, 6), (6, 9)], [(1, 6)]],
        "subtree 1": [[(4, 6), (6, 9)], [(1, 6)]],
        "node 2": [[], []],
    }
    assert mask.names == set(ranges)
    assert prefix_trees([]) == (tree_mask(1), {"node 0": []})


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        (3, "trees: expected a list of nodes per sequence, got int"),
        ([3], r"trees\[0\]: expected a list of nodes \(parent, tokens\), got int"),
        ([[], [3]], r"trees\[1\]\[0\]: expected a pair \(parent, tokens\), got 3"),
        ([[(None, 3), ("0", 3)]], r"trees\[0\]\[1\]: expected a pair"),
        ([[(None, -1)]], r"trees\[0\]\[0\]\[1\]: expected a number of tokens, at least 0, got -1"),
        ([[(None, 2.5)]], r"trees\[0\]\[0\]\[1\]: expected a number of tokens"),
        ([[(None, 3), (1, 3)]], r"trees\[0\]\[1\]\[0\]: expected None, or the node before it or one above that: \[0\]"),
        ([[(None, 3), (-1, 3)]], r"trees\[0\]\[1\]\[0\]: expected None"),
        ([[(None, 3), (0, 3), (0, 3), (1, 2)]], r"trees\[0\]\[3\]\[0\]: .* \[0, 2\], in depth-first order, got 1"),
    ],
)
def test_wrong_trees(trees: Any, message: str) -> None:
    with pytest.raises(fp.InputError, match=message):
        prefix_trees(trees)


def test_too_few_levels() -> None:
    with pytest.raises(fp.InputError, match="levels: expected at least those of the deepest tree, 2, got 1"):
        prefix_trees([[(None, 3), (0, 3)]], levels=1)
    with pytest.raises(fp.InputError, match="levels: expected a positive number, got 0"):
        tree_mask(0)
