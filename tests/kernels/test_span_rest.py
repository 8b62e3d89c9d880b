"""The second pass over spans: a dense causal pass and the kernel in Triton's interpreter, against dense attention.

`test_in_the_interpreter` runs this file again with the interpreter on, as in `test_row_update`.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fa4_prefixlm.testing.batches import UGLY, Batch, random_batch
from fa4_prefixlm.testing.stages import prepare
from tests.kernels.triton_processes import INTERPRETED, run_interpreted

pytest.importorskip("triton", reason="triton is not installed")

import triton

from fa4_prefixlm import Mask, PrefixLM
from fa4_prefixlm.batch.options import Options
from fa4_prefixlm.kernels import span_rest
from fa4_prefixlm.kernels.span_rest import add_span_rest
from fa4_prefixlm.masks import causal, query_in, same_span, window
from fa4_prefixlm.masks.dense import dense_mask
from fa4_prefixlm.testing.accuracy import exact_attention

HOPPER_SHARED = 227 * 1024
NAN, UNTOUCHED = float("nan"), 77.0
PADDING = 150


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch under `mask`, of which a causal pass with the window `first` did its part.

    heads: of q and of k. page_size: None for contiguous keys. blind: of that many rows the first sees nothing; 0 is
    none.
    """

    batch: Batch
    mask: Mask = dataclasses.field(default_factory=PrefixLM)
    first: int | None = None
    heads: tuple[int, int] = (1, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float16
    page_size: int | None = None
    softcap: float = 0.0
    sink: bool = False
    blind: int = 0
    seed: int = 0

    def check(self) -> None:
        """Rows that miss keys get them. All others keep their bits, and what is not needed may be NaN."""
        q, k, v = self.batch.tensors(self.heads, self.dims, self.dtype, "cpu", self.seed)
        sink = torch.linspace(-1, 2, self.heads[0]) if self.sink else None
        options = Options(self.dims[0] ** -0.5, self.softcap, sink)
        given = {"seqlens": self.batch.as_seqlens, "options": options}
        nothing = ((),) * len(self.batch.spans)
        out, lse = exact_attention(q, k, v, mask=PrefixLM(self.first), spans=nothing, **given)
        wanted, wanted_lse = exact_attention(q, k, v, mask=self.mask, spans=self.batch.spans, **given)
        bounds = self.bounds()
        missing = self.missing() & (bounds[:, 0] < bounds[:, 1])

        rows, kept = len(q) + PADDING, ~missing
        q = gapped(padded(q.masked_fill(kept[:, None, None], NAN), rows, NAN))
        out = gapped(padded(out.to(self.dtype).masked_fill(kept[:, None, None], UNTOUCHED), rows, UNTOUCHED))
        lse = padded(lse.float().masked_fill(kept, UNTOUCHED).T, rows, UNTOUCHED).T.contiguous()
        add_span_rest(
            q,
            **self.keys(k, v),
            out=out,
            lse=lse,
            bounds=padded(bounds, rows, 5),
            cu_seqlens_q=int32(self.batch.cu_q),
            window=self.first,
            options=options,
        )
        kept = padded(kept, rows, True)
        assert (out[kept] == UNTOUCHED).all()
        assert (lse[:, kept] == UNTOUCHED).all()
        assert gap_is_whole(out)
        # The weights of keys, pass 1's output and the output itself are rounded to the dtype, the LSE is not.
        rounding = 2 * torch.finfo(self.dtype).eps
        close(out[~kept].double(), wanted[missing], rtol=rounding, atol=rounding)
        close(lse[:, ~kept].double(), wanted_lse[:, missing], rtol=0, atol=2e-5)

    def bounds(self) -> torch.Tensor:
        bounds = prepare(self.batch, self.mask).bounds
        both = torch.cat([bounds.lo, bounds.hi], dim=1)
        if self.blind:
            count = len(both[:: self.blind])
            both[:: self.blind] = int32([(0, 0), (9, 9), (2**31 - 1, 0)] * count)[:count]
        return both

    def missing(self) -> torch.Tensor:
        """`(total_q,)` bool: the rows that see a key which pass 1 left out."""
        own = []
        for (rows, keys), spans in zip(self.batch.seqlens, self.batch.spans, strict=True):
            whole = dense_mask(self.mask, rows, keys, {"image": spans})
            own.append((whole & ~dense_mask(PrefixLM(self.first), rows, keys, {"image": ()})).any(1))
        return torch.cat(own)

    def keys(self, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keys and where they are. Memory around them is NaN."""
        if self.page_size is None:
            k, v = (gapped(padded(tensor, len(tensor) + 99, NAN)) for tensor in (k, v))
            return {"k": k, "v": v, "cu_seqlens_k": int32(self.batch.cu_k)}
        pages = self.batch.in_pages(k, v, self.page_size, self.seed)
        for own, (_, keys) in zip(pages.table, self.batch.seqlens, strict=True):
            if keys % self.page_size:
                pages.k[own[keys // self.page_size], keys % self.page_size :] = NAN
                pages.v[own[keys // self.page_size], keys % self.page_size :] = NAN
        table = torch.nn.functional.pad(pages.table, (0, 7), value=-(2**20))[:, : pages.table.shape[1]]
        used = int32(self.batch.as_seqlens[1])
        return {"k": gapped(pages.k), "v": gapped(pages.v), "seqused_k": used, "page_table": table}


def int32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def padded(tensor: torch.Tensor, rows: int, value: float) -> torch.Tensor:
    """With rows of `value` after it."""
    return torch.cat([tensor, tensor.new_full((rows - len(tensor), *tensor.shape[1:]), value)])


def gapped(tensor: torch.Tensor) -> torch.Tensor:
    """A view of the same values, between whose heads there is as much NaN."""
    return torch.cat([tensor, torch.full_like(tensor, NAN)], dim=-1)[..., : tensor.shape[-1]]


def gap_is_whole(tensor: torch.Tensor) -> bool:
    """Whether a `gapped` tensor still has its NaN."""
    return bool(tensor.as_strided(tensor.shape, tensor.stride(), tensor.shape[-1]).isnan().all())


def close(found: torch.Tensor, wanted: torch.Tensor, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


# Windowed masks with the window of their first pass; spans of the batches below are longer than some of the windows.
MASKS = {
    "global": (PrefixLM(), None),
    "clamped": (PrefixLM(50), 50),
    "joined": (PrefixLM(20, clamp=False), 20),
    "window 1": (PrefixLM(1, clamp=False), 1),
    "window of all": (PrefixLM(2**40, clamp=False), 2**40),
    "window to the right too": (window(20) | same_span("image"), 20),
    "queries see all": (causal | query_in("image"), None),
}
# Two sequences, the second a chunk of queries that begins inside a span.
TWO = Batch(((150, 150), (70, 200)), (((3, 70), (90, 91), (100, 150)), ((10, 20), (120, 190))))
MANY_SPANS = Batch(((200, 200),), (tuple((start, start + 3) for start in range(0, 198, 5)),))


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter (3.9) holds bfloat16 as uint16, and `tl.dot` multiplies those: widen them before."""
    from triton.runtime import interpreter

    product = interpreter.InterpreterBuilder.create_dot

    def widened(self, a, b, *rest):
        if a.dtype.scalar == triton.language.bfloat16:
            a, b = (self.cast_impl(operand, triton.language.float32) for operand in (a, b))
        return product(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("name", MASKS)
    @pytest.mark.parametrize("page_size", [None, 16])
    def test_masks(self, name: str, page_size: int | None) -> None:
        Case(TWO, *MASKS[name], page_size=page_size).check()

    @pytest.mark.parametrize("name", UGLY)
    def test_ugly_batches(self, name: str) -> None:
        rng = random.Random(name)
        Case(UGLY[name], *MASKS[rng.choice(["global", "joined"])], page_size=rng.choice([None, 16])).check()

    @pytest.mark.parametrize("name", ["global", "joined"])
    def test_many_spans_in_a_tile(self, name: str) -> None:
        Case(MANY_SPANS, *MASKS[name]).check()

    @pytest.mark.parametrize("seed", range(10))
    def test_random_batches(self, seed: int) -> None:
        rng = random.Random(seed)
        mask = PrefixLM(rng.choice([None, 1, 2, 17, 64, 100, 129]), clamp=rng.random() < 0.3)
        heads = rng.choice([(1, 1), (2, 1), (2, 2)])
        page_size = rng.choice([None, None, 1, 3, 16])
        Case(random_batch(rng, longest=260), mask, mask.window, heads, page_size=page_size, seed=seed).check()

    @pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
    @pytest.mark.parametrize("page_size", [None, 3])
    def test_query_heads_share_their_key_head(self, heads: tuple[int, int], page_size: int | None) -> None:
        Case(TWO, *MASKS["joined"], heads=heads, page_size=page_size).check()

    @pytest.mark.parametrize("dims", [(8, 8), (64, 64), (72, 72), (192, 128), (64, 256), (512, 512)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.usefixtures("bfloat16_products")
    def test_head_dims(self, dims: tuple[int, int], dtype: torch.dtype) -> None:
        Case(TWO, *MASKS["joined"], dims=dims, dtype=dtype).check()

    @pytest.mark.parametrize("page_size", [1, 3, 16, 100])
    def test_page_sizes(self, page_size: int) -> None:
        Case(TWO, *MASKS["joined"], dims=(24, 8), page_size=page_size, seed=page_size).check()

    @pytest.mark.parametrize("softcap", [0.5, 30.0])
    def test_softcap(self, softcap: float) -> None:
        Case(TWO, *MASKS["joined"], dims=(64, 64), softcap=softcap).check()

    def test_a_sink_of_the_first_pass_stays(self) -> None:
        Case(TWO, *MASKS["joined"], heads=(4, 2), sink=True).check()

    @pytest.mark.parametrize("name", ["global", "joined"])
    def test_rows_that_see_nothing_are_left_alone(self, name: str) -> None:
        Case(TWO, *MASKS[name], blind=3).check()

    def test_a_first_pass_that_saw_nothing_adds_nothing(self) -> None:
        """All rows of a span whose first pass gave 0 and an LSE of -inf get the attention over their rest alone."""
        q, k, v = Batch(((100, 100),), ((),)).tensors((1, 1), (16, 16), torch.float16, "cpu")
        out, lse = torch.full_like(q, NAN), torch.full((1, 100), -torch.inf)
        given = {"options": Options(0.25), "cu_seqlens_q": int32([0, 100]), "cu_seqlens_k": int32([0, 100])}
        add_span_rest(q, k, v, out, lse, bounds=int32([(0, 100)] * 100), window=None, **given)
        scores = q[:, 0].double() @ k[:, 0].double().T * 0.25
        scores = scores.masked_fill(torch.ones(100, 100).tril().bool(), -torch.inf)
        close(lse[0, :99].double(), scores.logsumexp(1)[:99], rtol=0, atol=2e-5)
        close(out[:99, 0].double(), (scores.softmax(1) @ v[:, 0].double())[:99], rtol=2e-3, atol=2e-3)
        assert lse[0, 99] == -torch.inf

    def test_large_scores(self) -> None:
        """Exponents beyond what float32 holds, with the maximum before, in and after the rest."""
        q, k, v = Batch(((130, 130),), ((),)).tensors((1, 1), (16, 16), torch.float16, "cpu")
        given = {"seqlens": ((130,), (130,)), "options": Options(100.0, 0.0, None)}
        out, lse = exact_attention(q, k, v, mask=PrefixLM(), spans=((),), **given)
        wanted, wanted_lse = exact_attention(q, k, v, mask=PrefixLM(), spans=(((0, 130),),), **given)
        out, lse = out.half(), lse.float()
        cu = int32([0, 130])
        where = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "bounds": int32([(0, 130)] * 130), "window": None}
        add_span_rest(q, k, v, out, lse, **where, options=Options(100.0))
        close(out.double(), wanted, rtol=2e-3, atol=2e-3)
        close(lse.double(), wanted_lse, rtol=1e-6, atol=0)

    def test_no_rows_and_no_sequences(self) -> None:
        empty = torch.zeros(0, 1, 16, dtype=torch.float16)
        given = {"bounds": int32([]).view(0, 2), "window": None, "options": Options(1.0)}
        for cu in (int32([0]), int32([0, 0])):
            add_span_rest(empty, empty, empty, empty, torch.zeros(1, 0), cu_seqlens_q=cu, cu_seqlens_k=cu, **given)


@pytest.mark.slow
class TestCompiled:
    __test__ = not INTERPRETED

    def test_in_the_interpreter(self) -> None:
        run_interpreted(__file__)

    @pytest.mark.parametrize(
        ("capability", "dims"),
        [
            *((90, (dim, dim)) for dim in (64, 128, 256, 512)),
            (90, (192, 128)),
            *((100, (dim, dim)) for dim in (128, 256, 512)),
        ],
        ids=str,
    )
    def test_compiles_within_shared_memory(self, capability: int, dims: tuple[int, int]) -> None:
        self.check(compiled_for(capability, dims), capability)

    @pytest.mark.parametrize("page_size", [16, 100])
    def test_compiles_for_pages_and_odd_heads(self, page_size: int) -> None:
        self.check(compiled_for(90, (72, 40), page_size=page_size, capped=True), 90)

    @staticmethod
    def check(compiled, capability: int) -> None:
        assert compiled.metadata.shared <= HOPPER_SHARED
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert "cp.async.cg.shared.global" in compiled.asm["ptx"], "keys are not loaded ahead, 16 bytes at a time"


def compiled_for(capability: int, dims: tuple[int, int], page_size: int = 0, capped: bool = False):
    """The kernel with a window, as a launch on bfloat16 tensors with aligned strides compiles it."""
    from triton.backends.compiler import GPUTarget

    kernel = span_rest.add_span_rest_kernel
    options = dict(span_rest.constants(*dims, page_size, True, capped))
    built = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("q", "k", "v", "out"), "*bf16")
    kinds |= dict.fromkeys(("bounds", "cu_seqlens_q", "seqlens_k", "page_table"), "*i32")
    kinds |= {"lse": "*fp32", "softmax_scale": "fp32", "softcap": "fp32"} | dict.fromkeys(options, "constexpr")
    constants = dict(options)
    if not page_size:
        for name in ("k_stride_page", "v_stride_page"):
            constants[name], kinds[name] = 0, "constexpr"
    aligned = [name for name, kind in kinds.items() if kind.startswith("*") or "stride" in name]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=built)
