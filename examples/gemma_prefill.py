"""Prefill and generation of a Gemma model through this library, beside SDPA: the argument is all that differs.

    python examples/gemma_prefill.py                              # tiny random Gemma 3, anywhere
    python examples/gemma_prefill.py --model google/gemma-3-4b-it --image photo.jpg

Prints the largest difference of the logits, the time of each prefill and the tokens that both generate.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import fa4_prefixlm.integrations.transformers  # noqa: F401 (registers "fa4_prefixlm")


def tiny_gemma3() -> Any:
    """Gemma 3 with a tiny random configuration; 64 tokens an image."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512, "sliding_window": 128}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 112, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=64, image_token_index=500
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def tiny_inputs(images: int) -> dict[str, torch.Tensor]:
    """Text with images, as the processor would make it: token types say which tokens are of an image."""
    pieces, types = [], []
    for _ in range(images):
        pieces += [torch.randint(8, 400, (40,)), torch.full((64,), 500)]
        types += [torch.zeros(40, dtype=torch.long), torch.ones(64, dtype=torch.long)]
    pieces.append(torch.randint(8, 400, (40,)))
    types.append(torch.zeros(40, dtype=torch.long))
    ids = torch.cat(pieces)[None]
    made = {"input_ids": ids, "token_type_ids": torch.cat(types)[None], "attention_mask": torch.ones_like(ids)}
    return made | {"pixel_values": torch.randn(images, 3, 112, 112)}


def of_a_checkpoint(name: str, image: str, prompt: str, device: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model and the inputs for a prompt about an image."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        name, dtype=torch.bfloat16, attn_implementation="fa4_prefixlm"
    )
    processor = transformers.AutoProcessor.from_pretrained(name)
    content = [{"type": "image", "path": image}, {"type": "text", "text": prompt}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.to(device).eval(), dict(made.to(device, dtype=torch.bfloat16))


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds) of the second of two runs."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference of the logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: a tiny random Gemma 3")
    parser.add_argument("--image", help="an image file or address, with --model")
    parser.add_argument("--prompt", default="Describe this image.")
    parser.add_argument("--new-tokens", type=int, default=12)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        model, inputs = of_a_checkpoint(options.model, options.image, options.prompt, device)
    else:
        model = tiny_gemma3().to(device)
        inputs = {name: tensor.to(device) for name, tensor in tiny_inputs(images=3).items()}
    logits, tokens = {}, {}
    for attention in ("sdpa", "fa4_prefixlm"):
        model.set_attn_implementation(attention)
        with torch.inference_mode():
            prefill, seconds = timed(lambda: model(**inputs, logits_to_keep=1))
            tokens[attention] = model.generate(**inputs, max_new_tokens=options.new_tokens, do_sample=False)
        logits[attention] = prefill.logits.float()
        rows = inputs["input_ids"].shape[1]
        new = tokens[attention][0, rows:].tolist()
        print(f"{attention:13} prefill of {rows} tokens {seconds * 1e3:8.1f} ms, then {new}")
    difference = float((logits["sdpa"] - logits["fa4_prefixlm"]).abs().max())
    print(f"largest difference of the logits {difference:.2e}, of {float(logits['sdpa'].abs().max()):.2f}")
    return difference


if __name__ == "__main__":
    main()
