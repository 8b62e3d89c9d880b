"""Prefill and training step of Gemma 3 and Gemma 4 stacks in transformers, beside sdpa and flex_attention.

    python benchmarks/transformers_models.py --save benchmarks/results/h100-transformers.json

Random weights at real widths, a few layers, 8 images, one row; the stack without its vision tower and its head. First
every attention is held against float32 (eager up to 8192 tokens; past them SDPA, for eager's scores fill the GPU): what
is further from it than 1.25 times sdpa's own bfloat16 error is reported and not timed. Nothing is, where sdpa without
the images would not be 3 times as far off: then this says nothing of what is right. Then all are timed in turn, in
one run: the median of the rounds, and the peak of memory over what the model holds. Beside them are timed two that are
no right answer: FA4's own causal kernel, which drops the images, and "no attention", which hands values on without a
look at scores: the floor, what the rest of the model takes. What is done is kept as it is done. `--tiny` runs all of it
on a CPU, to test the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import importlib.metadata
import pathlib
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from engine_tables import FLOOR, WITHOUT_IMAGES
from harness import BAND, report, save

import fa4_prefixlm.integrations.transformers  # noqa: F401 (registers "fa4_prefixlm")
from fa4_prefixlm.testing.tables import columns
from fa4_prefixlm.testing.timing import time_in_rounds

OURS = "fa4_prefixlm"
ATTENTIONS = ("sdpa", "flex_attention", OURS)
IMAGES = 8
ROUND_MS = 300.0
TELLS = 3.0  # times sdpa's error
MOST_EAGER = 8192  # tokens: a training step of eager at twice as many takes more than 80 GB
# (tokens, faster than, by), of which the first row is a prefill of Gemma 3's widths.
TARGETS = ((16384, "flex_attention", 1.15), (32768, "flex_attention", 1.3), (16384, "sdpa", 2.0))

_LOCAL_GLOBAL = ["sliding_attention"] * 5 + ["full_attention"]
_COMMON = {"num_hidden_layers": 6, "layer_types": _LOCAL_GLOBAL, "vocab_size": 1024, "sliding_window": 1024}
_GEMMA3_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4}
_GEMMA4 = {"hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8, "num_key_value_heads": 4}
_VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 32,
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """A text stack: transformers' model type, and its text configuration."""

    name: str
    model_type: str
    text: dict[str, Any]
    image_tokens: int

    def model(self, device: str, dtype: torch.dtype) -> Any:
        """Random weights, float32 ones rounded to `dtype`.

        Gemma 4 scales no scores: its norms of queries and keys do, and with norms of ones a softmax would see scores of
        a deviation of 16 and more, of which bfloat16 leaves nothing. Here it is 1, as it is in Gemma 3.
        """
        text = {**_COMMON, **self.text}
        vision: dict[str, Any] = {"vision_config": {**_VISION, "image_size": 28, "patch_size": 14}}
        if self.model_type == "gemma4":
            text |= {"use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0}
            vision = {}
        config = transformers.AutoConfig.for_model(self.model_type, text_config=text, **vision)
        torch.manual_seed(0)
        with torch.device(device):
            made = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
        if self.model_type == "gemma4":
            for name, weight in made.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    torch.nn.init.constant_(weight, len(weight) ** -0.25)
        return made.model.to(dtype).eval()

    def inputs(self, tokens: int, device: str) -> dict[str, torch.Tensor]:
        """One row of text with images at even distances."""
        generator = torch.Generator().manual_seed(0)
        types = torch.zeros(1, tokens, dtype=torch.long)
        for index in range(IMAGES):
            start = tokens // IMAGES * index + tokens // IMAGES // 4
            types[:, start : start + self.image_tokens] = 1
        name = "token_type_ids" if self.model_type == "gemma3" else "mm_token_type_ids"
        ids = torch.randint(8, 1000, (1, tokens), generator=generator)
        return {"input_ids": ids.to(device), name: types.to(device), "attention_mask": torch.ones_like(ids).to(device)}


STACKS = (
    Stack("Gemma 3 4B widths", "gemma3", {**_GEMMA3_4B, "head_dim": 256}, 256),
    # transformers' default configuration of Gemma 4.
    Stack("Gemma 4 widths", "gemma4", {**_GEMMA4, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512}, 256),
)
TINY_STACKS = (
    Stack("Gemma 3, tiny", "gemma3", {**_TINY, "head_dim": 16}, 16),
    Stack("Gemma 4, tiny", "gemma4", {**_TINY, "head_dim": 16, "global_head_dim": 32}, 16),
)


class _ValuesAlone(torch.autograd.Function):
    """Values, repeated for their group of heads. Queries and keys get a gradient, as the rest of the model needs it."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        group = query.shape[1] // value.shape[1]
        return value.unsqueeze(2).expand(-1, -1, group, -1, -1).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = ctx.saved_tensors
        dvalue = grads[0].unflatten(1, (value.shape[1], -1)).sum(2)
        return torch.zeros_like(query), torch.zeros_like(key), dvalue


def values_alone(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object, **__: object
) -> tuple[torch.Tensor, None]:
    """What transformers takes for attention, in the shape that it wants."""
    return _ValuesAlone.apply(query, key, value).transpose(1, 2), None


def images_dropped(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: object,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **__: object,
) -> tuple[torch.Tensor, None]:
    """FA4 as its users call it, without a mask."""
    from flash_attn.cute import flash_attn_func

    window = (None, None) if sliding_window is None else (sliding_window - 1, 0)
    q, k, v = (own.transpose(1, 2) for own in (query, key, value))
    result = flash_attn_func(q, k, v, softmax_scale=scaling, causal=True, window_size=window)
    return result[0] if isinstance(result, tuple) else result, None


# Names without a mask function of their own: transformers makes no mask for them.
transformers.AttentionInterface.register(FLOOR, values_alone)
transformers.AttentionInterface.register(WITHOUT_IMAGES, images_dropped)
# What is timed and not held against anything.
NOT_RIGHT = {
    WITHOUT_IMAGES: "no right answer: FA4's own causal kernel",
    FLOOR: "the floor: the model without its attention",
}


@dataclasses.dataclass
class Result:
    """One attention at one size.

    error: of the last hidden states or of a gradient, relative to float32; None of what did not run, and of the floor.
    dropped: what that would be of sdpa without the images.
    ms, spread, peak_mib, synchronisations: of what was exact, and of the floor. note: why it was not timed, or what it
    warned of.
    """

    stack: str
    work: str
    tokens: int
    attention: str
    error: float | None = None
    dropped: float | None = None
    ms: float | None = None
    spread: float | None = None
    peak_mib: float | None = None
    synchronisations: int | None = None
    note: str = ""


def prefill(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last hidden states."""
    with torch.inference_mode():
        return model(**inputs, use_cache=False).last_hidden_state


def training_step(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward and backward; the gradient of the first layer's query projection."""
    model.zero_grad(set_to_none=True)
    hidden = model(**inputs, use_cache=False).last_hidden_state
    # Of a fixed direction: the norm before it keeps the length of every row, whatever the weights are.
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(1)).to(hidden)
    (hidden @ direction).float().square().mean().backward()
    return model.language_model.layers[0].self_attn.q_proj.weight.grad


WORK: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]] = {
    "prefill": prefill,
    "training step": training_step,
}


def without_images(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tokens, all text."""
    return {name: torch.zeros_like(own) if name.endswith("type_ids") else own for name, own in inputs.items()}


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def exact(stack: Stack, work: str, tokens: int, eager: bool, device: str) -> torch.Tensor:
    """The answer in float32, without tensor cores' shorter floats, on the CPU."""
    model = stack.model(device, torch.bfloat16).float()  # the weights that the others run with
    model.set_attn_implementation("eager" if eager else "sdpa")
    if work == "training step":  # all layers' float32 at 32768 tokens do not fit 80 GB; the gradients are the same
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    result = WORK[work](model, stack.inputs(tokens, device)).float().cpu()
    del model
    free()
    return result


def peak_of(run: Callable[[], object]) -> float | None:
    """MiB above what is held before."""
    if not torch.cuda.is_available():
        return None
    free()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronise()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def synchronisations_of(run: Callable[[], object]) -> int | None:
    """How often the host waits for the GPU in one call, transformers' own waits included."""
    if not torch.cuda.is_available():
        return None
    synchronise()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def wall_clock(run: Callable[[], object], calls: int) -> float:
    """Milliseconds of one call on a CPU."""
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) * 1e3 / calls


def measure(
    stack: Stack, work: str, tokens: int, attentions: list[str], *, eager: bool, rounds: int, device: str
) -> list[Result]:
    """Verify, then time in turn; last those that are not verified. attentions: sdpa among them."""
    progress = functools.partial(report, f"{stack.name}, {work}, {tokens} tokens")
    progress("float32")
    answer = exact(stack, work, tokens, eager, device)
    model, inputs = stack.model(device, torch.bfloat16), stack.inputs(tokens, device)
    if work == "training step":
        model.train()
    results = {name: Result(stack.name, work, tokens, name) for name in attentions}

    def run_with(name: str, inputs: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
        if model.config._attn_implementation != name:
            model.set_attn_implementation(name)
        return WORK[work](model, inputs)

    def error_of(found: torch.Tensor) -> float:
        return float((found.float().cpu() - answer).norm() / answer.norm())

    torch._dynamo.reset()
    for name, result in results.items():
        progress(f"compiling and verifying {name}")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result.error = error_of(run_with(name))
            result.note = "; ".join(str(own.message) for own in caught if str(own.message).startswith("fa4_prefixlm: "))
        except Exception as raised:  # what does not run is a result too
            result.note = f"{type(raised).__name__}: {raised}"[:200]
        free()
    dropped = None
    if results["sdpa"].error is not None:
        dropped = error_of(run_with("sdpa", without_images(inputs)))
        free()
    timed = right(results, dropped)
    for name, note in NOT_RIGHT.items():
        if name == WITHOUT_IMAGES and device == "cpu":
            continue
        results[name] = Result(stack.name, work, tokens, name, note=note)
        try:
            run_with(name)
            timed.append(name)
        except Exception as raised:  # of head dims that FA4 lacks
            results[name].note = f"{type(raised).__name__}: {raised}"[:200]
    progress(f"timing {', '.join(timed)}")
    calls = {name: functools.partial(run_with, name) for name in timed}
    clock = None if torch.cuda.is_available() else wall_clock
    timings = time_in_rounds(calls, rounds=rounds, round_ms=ROUND_MS, clock=clock)
    for name in timed:
        result = results[name]
        result.ms, result.spread = timings[name].ms, timings[name].spread
        run_with(name)
        result.peak_mib = peak_of(calls[name])
        result.synchronisations = synchronisations_of(calls[name])
    return list(results.values())


def right(results: dict[str, Result], dropped: float | None) -> list[str]:
    """The attentions to time; of the others, which ran, the note says why not. dropped: of sdpa without the images."""
    band = results["sdpa"].error
    timed = []
    for name, result in results.items():
        result.dropped = dropped
        if result.error is None or band is None or dropped is None:
            continue
        if not dropped >= TELLS * band:
            result.note = f"NOT TOLD FROM WRONG: sdpa is {band:.3g} off, without the images {dropped:.3g}; not timed"
        elif not result.error <= BAND * band:
            result.note = f"WRONG: more than {BAND} times sdpa's error, not timed"
        else:
            timed.append(name)
    return timed


def show(results: list[Result]) -> None:
    """A table; the ratio is how many times as fast as this row's attention ours is."""
    rows = [["stack", "work", "tokens", "attention", "error", "ms", "spread", "MiB", "waits", "ours is", ""]]
    for own in results:
        row = [own.stack, own.work, str(own.tokens), own.attention, "-" if own.error is None else f"{own.error:.2e}"]
        if own.ms is None or own.spread is None:
            rows.append([*row, "-", "-", "-", "-", "-", own.note])
            continue
        ours = time_of(results, own.stack, own.work, own.tokens, OURS) if own.attention not in NOT_RIGHT else None
        peak = "-" if own.peak_mib is None else f"{own.peak_mib:.0f}"
        waits = "-" if own.synchronisations is None else str(own.synchronisations)
        ratio = "-" if ours is None else f"{own.ms / ours:.2f}x"
        rows.append([*row, f"{own.ms:.2f}", f"{own.spread:.1%}", peak, waits, ratio, own.note])
    print("\n".join(columns(rows, right=range(4, 10))), flush=True)


def time_of(results: list[Result], stack: str, work: str, tokens: int, attention: str) -> float | None:
    for own in results:
        if (own.stack, own.work, own.tokens, own.attention) == (stack, work, tokens, attention):
            return own.ms
    return None


def targets(results: list[Result]) -> list[str]:
    """What was to be reached, what was, and what any attention could, for a prefill of Gemma 3's widths."""
    lines = []
    for tokens, attention, wanted in TARGETS:
        ours, other, floor = (
            time_of(results, STACKS[0].name, "prefill", tokens, name) for name in (OURS, attention, FLOOR)
        )
        if ours and other:
            word = "reached" if other / ours >= wanted else "MISSED"
            if word == "MISSED" and floor and other / floor < wanted:
                word = "out of reach for any attention"
            line = f"{word}: {other / ours:.2f}x as fast as {attention} at {tokens}, wanted {wanted}x"
            for name in NOT_RIGHT:
                at_best = time_of(results, STACKS[0].name, "prefill", tokens, name)
                line += f", {name} {other / at_best:.2f}x" if at_best else ""
            lines.append(line)
    peaks = {(own.stack, own.work, own.tokens, own.attention): own.peak_mib for own in results}
    for (stack, work, tokens, attention), peak in peaks.items():
        flex = peaks.get((stack, work, tokens, "flex_attention"))
        if attention == OURS and peak is not None and flex is not None:
            word = "reached" if peak <= 1.01 * flex else "MISSED"
            lines.append(f"{word}: {peak:.0f} MiB, flex {flex:.0f} ({stack}, {work}, {tokens})")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save", type=pathlib.Path, metavar="FILE", help="keep the results as JSON, each as soon as it is there"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768])
    parser.add_argument("--only", default="", metavar="TEXT", help="only stacks whose name holds TEXT")
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=["prefill"])
    parser.add_argument("--without", choices=ATTENTIONS[1:], nargs="+", default=[], help="flex compiles for minutes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU too; its times mean nothing")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.tiny:
        print("this benchmark needs a GPU (--tiny runs without one, to test the program)")
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    sizes = [256] if arguments.tiny else sorted(arguments.tokens)
    attentions = [name for name in ATTENTIONS if name not in arguments.without]
    results: list[Result] = []
    for stack in TINY_STACKS if arguments.tiny else STACKS:
        if arguments.only not in stack.name:
            continue
        for work in arguments.work:
            for tokens in sizes:
                eager, rounds = tokens <= MOST_EAGER, arguments.rounds
                measured = measure(stack, work, tokens, attentions, eager=eager, rounds=rounds, device=device)
                free()
                show(measured)
                results += measured
                if arguments.save:
                    save(arguments.save, results, transformers=importlib.metadata.version("transformers"))
    if not arguments.tiny:
        print("\n".join(targets(results)))
    wrong = [own for own in results if own.attention == OURS and own.ms is None]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
