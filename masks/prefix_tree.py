"""Sequences that share their beginnings, each beginning held once: one prompt with many answers, or a tree of turns.

A tree is laid out in one sequence, depth first: each node's own tokens, then its children one after the other. A token
sees its own node up to itself and all tokens of the nodes above, which is what it would see in a copy of its path from
the root alone. So rollouts of reinforcement learning, beams and conversations that fork cost the tokens of the tree
and not those of all its paths, forward and backward.

Per level of the tree there is a set of spans with the nodes' own tokens, and one with their whole subtrees. The node of
a level that is above a row is the last one of that level that begins at or before it, as long as its subtree holds the
row:

    causal & (prefix("node 0") & same_span("subtree 0") | ... | same_span("node n"))

A row sees at most one interval a level, and fewer where they touch: a first child follows its parent. (Kernels take 4
intervals a row.) In the transposed view, of a backward, one interval of rows sees each key: from the key to the end of
its node's subtree.

Source: this library. It is `tin[key] <= tin[query] < tout[key]` and `key <= query`, with the times at which a walk
enters and leaves a token's node.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

from fa4_prefixlm.batch.integers import whole_number
from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import causal, prefix, same_span
from fa4_prefixlm.masks.base import Mask
from fa4_prefixlm.masks.spans import BatchSpans

Tree = Sequence[tuple[int | None, int]]


class PrefixTrees(NamedTuple):
    """What a call takes: `fp.attention(q, k, v, trees.ranges, mask=trees.mask)`.

    Attributes:
        mask: of all trees of so many levels, whatever their tokens: an equal value for the next batch.
        ranges: the spans that it reads, by name.
    """

    mask: Mask
    ranges: dict[str, BatchSpans]


def prefix_trees(trees: Sequence[Tree], *, levels: int | None = None) -> PrefixTrees:
    """The mask of sequences that are trees, and its ranges.

    A prompt of 100 tokens with two answers, and one of 80 with an answer of 30 that goes on in two ways:

        prefix_trees([[(None, 100), (0, 40), (0, 25)], [(None, 80), (0, 30), (1, 12), (1, 7)]])

    Args:
        trees: per sequence of the batch, its nodes in the order in which they are laid out, depth first. A node is
            `(parent, tokens)`: the index of its parent in the list, None for a root, and the number of its own tokens,
            which may be 0. Several roots in a sequence do not see each other. Tokens of a sequence after its last node
            (padding) see nothing, and no token sees them. Positions for rotary embeddings are the model's own: a
            node's first token follows the last of its parent.
        levels: levels of the mask, at least those of the deepest tree; None: just those. With a number, batches of
            trees of any depth up to it share one mask.

    Returns:
        the mask and its ranges. Chunks of a prefill may end anywhere: no row sees ahead.

    Raises:
        InputError: a node is no such pair, or not in depth-first order: its parent is neither the node before it nor
            above that one. Or the deepest tree has more than `levels` levels.
    """
    if not isinstance(trees, Sequence) or isinstance(trees, str):
        raise InputError("trees", "a list of nodes per sequence", type(trees).__name__)
    laid_out = [_laid_out(f"trees[{index}]", tree) for index, tree in enumerate(trees)]
    deepest = max((node.level + 1 for nodes in laid_out for node in nodes), default=1)
    if levels is None:
        levels = deepest
    elif whole_number("levels", levels, "a positive number", least=1) < deepest:
        raise InputError("levels", f"at least those of the deepest tree, {deepest}", levels)
    ranges = {}
    for level in range(levels):
        ranges[f"node {level}"] = [_spans(nodes, level, whole=False) for nodes in laid_out]
        if level < levels - 1:
            ranges[f"subtree {level}"] = [_spans(nodes, level, whole=True) for nodes in laid_out]
    return PrefixTrees(tree_mask(levels), ranges)


def tree_mask(levels: int) -> Mask:
    """The mask of `prefix_trees` for trees of at most `levels` levels; 2 is prompts with answers.

    Args:
        levels: nodes on a path from a root, at most. The span sets are "node 0" to "node {levels - 1}" and "subtree 0"
            to "subtree {levels - 2}": each node's own tokens, and those with all that is below it.

    Raises:
        InputError: `levels` is no positive number.
    """
    levels = whole_number("levels", levels, "a positive number", least=1)
    above = [prefix(f"node {level}") & same_span(f"subtree {level}") for level in range(levels - 1)]
    return causal & functools.reduce(operator.or_, [*above, same_span(f"node {levels - 1}")])


class _Node(NamedTuple):
    """A node at its place: its tokens are `[start, own_end)`, those with all that is below it `[start, end)`."""

    level: int
    start: int
    own_end: int
    end: int


def _laid_out(argument: str, tree: Tree) -> list[_Node]:
    if not isinstance(tree, Sequence) or isinstance(tree, str):
        raise InputError(argument, "a list of nodes (parent, tokens)", type(tree).__name__)
    nodes: list[_Node] = []
    path: list[int] = []  # the node before, and those above it
    position = 0
    for index, node in enumerate(tree):
        name = f"{argument}[{index}]"
        parent, tokens = _pair(name, node)
        if parent is not None and parent not in path:
            expected = f"None, or the node before it or one above that: {path}, in depth-first order"
            raise InputError(f"{name}[0]", expected, parent)
        level = 0 if parent is None else path.index(parent) + 1
        _close(nodes, path[level:], position)
        path[level:] = [index]
        nodes.append(_Node(level, position, position + tokens, position))
        position += tokens
    _close(nodes, path, position)
    return nodes


def _pair(name: str, node: tuple[int | None, int]) -> tuple[int | None, int]:
    try:
        parent, tokens = node
        parent = None if parent is None else operator.index(parent)
    except (TypeError, ValueError):
        raise InputError(name, "a pair (parent, tokens)", node) from None
    return parent, whole_number(f"{name}[1]", tokens, "a number of tokens, at least 0")


def _close(nodes: list[_Node], indices: list[int], end: int) -> None:
    for index in indices:
        nodes[index] = nodes[index]._replace(end=end)


def _spans(nodes: Sequence[_Node], level: int, *, whole: bool) -> list[tuple[int, int]]:
    pairs = [(node.start, node.end if whole else node.own_end) for node in nodes if node.level == level]
    return [(start, end) for start, end in pairs if start < end]
