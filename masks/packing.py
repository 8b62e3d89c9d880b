"""Several documents in one sequence: `mask & same_span("document")`.

Documents that are sequences of their own are cheaper: packed tensors with `cu_seqlens` need no mask for it, and spans
count from the start of their document. This is for a batch whose tensors are fixed, such as `(batch, seqlen, ...)` with
documents packed into each row: there all spans are positions of the row.

Two things follow from the rule. Tokens outside of all documents (padding, on either side) see nothing and no token sees
them. And `mask | one_block(name)` is one block per document, but it no longer runs by tags: a row may see as many
intervals as the sequence has spans, and above 4 the mask runs on slower kernels than FlashAttention-4's.

Source: this library. It is what transformers 5.24.0 builds from `position_ids` that restart, given neither an attention
mask nor a cache (`find_packed_sequence_indices` in `masking_utils.py`; tests/masks/models/test_transformers.py runs its
models), except on the sliding layers of Gemma 3 and Gemma 4. Those read the token types of every document from the
start of the row, in 5.23.0 as well: a defect. In 5.23.0 spans cross the borders of documents, `in_documents(causal) |
one_block(name)`: the images of all documents of a row see each other in Molmo 2, and so do the prefixes in PaliGemma.
"""

from __future__ import annotations

from fa4_prefixlm.errors import InputError
from fa4_prefixlm.masks.atoms import same_span
from fa4_prefixlm.masks.base import Mask


def in_documents(mask: Mask, name: str = "document") -> Mask:
    """`mask` applied to each document by itself. No other span may cross the borders of a document.

    `in_documents(causal | same_span("image"))` takes ranges such as
    `{"image": [[(2, 6), (13, 17)]], "document": [[(0, 9), (9, 20)]]}`.

    Args:
        mask: the mask of a document.
        name: of the span set that has the documents.

    Raises:
        InputError: `mask` is no mask, `name` is no string or empty, or `mask` reads a span set of that name itself.
    """
    if not isinstance(mask, Mask):
        raise InputError("mask", "a mask", type(mask).__name__)
    own_document = same_span(name)  # which checks the name
    if name in mask.names:
        raise InputError("name", f"a name that {mask!r} does not read", repr(name))
    return mask & own_document
