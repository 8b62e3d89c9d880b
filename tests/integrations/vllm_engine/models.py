"""Random checkpoints of Gemma 3, Gemma 4 and PaliGemma 2 with images, in the hub's form, made without the hub."""

from __future__ import annotations

import pathlib
from typing import Any

import torch

VOCABULARY = 128
# Of prompts: a place for an image. vLLM's PaliGemma has none, it puts its one image before the prompt.
IMAGE_TOKEN = {"gemma3": 4, "gemma4": 6}
FIRST_LETTER = 16
PATCH = 14
_LETTERS = [chr(code) for code in range(32, 127)]
_NEWLINES = ["\n" * count for count in range(1, 5)]
_TINY = {"layers": 4, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 64, "window": 128}


def make(kind: str, folder: pathlib.Path, *, dtype: torch.dtype = torch.float32, **shape: Any) -> None:
    """Write a checkpoint.

    Args:
        kind: "gemma3", "gemma4" or "paligemma2".
        folder: made where it is not there.
        dtype: of the weights.
        shape: what is not as in the tiny model: layers (or `layer_types`), hidden, intermediate, heads, kv_heads,
            head_dim, window, of Gemma 3 image_size and image_tokens, of Gemma 4 global_head_dim, global_kv_heads,
            kv_shared and soft_tokens, of PaliGemma 2 image_size and softcap.
    """
    {"gemma3": _gemma3, "gemma4": _gemma4, "paligemma2": _paligemma2}[kind](folder, dtype, {**_TINY, **shape})


def image(index: int, size: int) -> Any:
    """A square image of a few soft patches, `size` pixels wide. Of noise a vision tower's pooling leaves little."""
    import numpy
    from PIL import Image

    patches = numpy.random.default_rng(index).integers(0, 256, (5, 5, 3), dtype=numpy.uint8)
    return Image.fromarray(patches).resize((size, size), Image.Resampling.BICUBIC)


def _gemma3(folder: pathlib.Path, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor

    size, tokens = shape.get("image_size", 112), shape.get("image_tokens", 64)
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer, words = _tokenizer(names)
    config = Gemma3Config(
        text_config=_text(shape) | {"query_pre_attn_scalar": shape["head_dim"]},
        vision_config=_siglip(size),
        mm_tokens_per_image=tokens,
        boi_token_index=words[names["boi_token"]],
        eoi_token_index=words[names["eoi_token"]],
        image_token_index=words[names["image_token"]],
        architectures=["Gemma3ForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
    )
    _save(Gemma3ForConditionalGeneration(config), folder, dtype)
    # As on the hub, where vLLM looks for it; transformers 5 saves its own name.
    _rename(folder, "vision_tower.", "vision_tower.vision_model.")
    images = _image_processor("gemma3")(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    Gemma3Processor(images, tokenizer, image_seq_length=tokens).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _gemma4(folder: pathlib.Path, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4Processor,
    )

    soft = shape.get("soft_tokens", 70)
    names = {
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "image_token": "<|image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
        "video_token": "<|video|>",
    }
    tokenizer, words = _tokenizer(names)
    ids: dict[str, Any] = {name.replace("_token", "_token_id"): words[word] for name, word in names.items()}
    ids["eoa_token_index"] = ids.pop("eoa_token_id")
    config = Gemma4Config(
        text_config=_text(shape)
        | {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 0,  # vLLM and transformers differ on it, images or not
            "global_head_dim": shape.get("global_head_dim", 2 * shape["head_dim"]),
            "num_global_key_value_heads": shape.get("global_kv_heads"),
            "num_kv_shared_layers": shape.get("kv_shared", 0),
            "use_bidirectional_attention": "vision",
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 1024,
            "default_output_length": soft,  # vLLM reads it in the hub's configurations; transformers has no such field
        },
        audio_config=None,
        architectures=["Gemma4ForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
        **ids,
    )
    _save(Gemma4ForConditionalGeneration(config), folder, dtype, norms_of_qk=0.25, last_norm=0.75)
    Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=_image_processor("gemma4")(patch_size=16, pooling_kernel_size=3, max_soft_tokens=soft),
        tokenizer=tokenizer,
        video_processor=_video_processor(),
        image_seq_length=soft,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _paligemma2(folder: pathlib.Path, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

    size = shape.get("image_size", 140)
    tokenizer, words = _tokenizer({"image_token": "<image>"})
    config = PaliGemmaConfig(
        text_config=_text(shape)
        | {
            "model_type": "gemma2",
            "query_pre_attn_scalar": shape["head_dim"],
            "attn_logit_softcapping": shape.get("softcap", 1.0),  # the hub's 50 would not show in a model this small
            "final_logit_softcapping": None,  # vLLM caps PaliGemma's logits, transformers doesn't
        },
        vision_config=_siglip(size),
        hidden_size=shape["hidden"],
        projection_dim=shape["hidden"],
        image_token_index=words["<image>"],
        architectures=["PaliGemmaForConditionalGeneration"],
        dtype=str(dtype).removeprefix("torch."),
    )
    _save(PaliGemmaForConditionalGeneration(config), folder, dtype)
    _rename(folder, "vision_tower.", "vision_tower.vision_model.")  # as for Gemma 3
    images = _image_processor("siglip")(size={"height": size, "width": size}, image_seq_length=(size // PATCH) ** 2)
    PaliGemmaProcessor(images, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _siglip(size: int) -> dict[str, Any]:
    """The vision tower of images of so many pixels."""
    return {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": PATCH,
        "vision_use_head": False,
    }


def _image_processor(kind: str) -> Any:
    """The class that works on PIL images, which transformers has under a name of its own since it has another."""
    import importlib

    import transformers

    name = f"{kind.capitalize()}ImageProcessor"
    try:
        return getattr(importlib.import_module(f"transformers.models.{kind}.image_processing_pil_{kind}"), f"{name}Pil")
    except ImportError:
        return getattr(transformers, name)


def _video_processor() -> Any:
    """None without torchvision, which it works with; no test has a video."""
    import transformers

    try:
        return transformers.Gemma4VideoProcessor()
    except ImportError:
        return None


def _text(shape: dict[str, Any]) -> dict[str, Any]:
    kinds = shape.get("layer_types") or [
        "full_attention" if index % 2 else "sliding_attention" for index in range(shape["layers"])
    ]
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": shape["hidden"],
        "intermediate_size": shape.get("intermediate", 2 * shape["hidden"]),
        "num_hidden_layers": len(kinds),
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "sliding_window": shape["window"],
        "layer_types": kinds,
        "max_position_embeddings": 131072,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def _tokenizer(names: dict[str, str]) -> tuple[Any, dict[str, int]]:
    """A tokenizer of characters, and its words: the special ones, those of `names`, newlines, letters."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    words = {word: index for index, word in enumerate([*special.values(), *names.values(), *_NEWLINES, *_LETTERS])}
    assert len(words) <= VOCABULARY
    merges = [("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n")]
    made = Tokenizer(BPE(vocab=words, merges=merges, unk_token=special["unk_token"]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=names, **special), words


def _save(
    model: Any, folder: pathlib.Path, dtype: torch.dtype, norms_of_qk: float = 1.0, last_norm: float = 1.0
) -> None:
    """With weights so large that what attention sees decides the logits.

    norms_of_qk: factor of the weights that queries and keys are normalised with. Gemma 4 does not scale its scores, and
    with ones each row would look at one key, which bfloat16 can't tell from the next.

    last_norm: factor of the weights of the norm before the logits, which says how large they are.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                base = parameter if "norm" in name or "scal" in name else 0.0
                base = base * norms_of_qk if ".q_norm." in name or ".k_norm." in name else base
                base = base * last_norm if name.endswith("language_model.norm.weight") else base
                parameter.copy_(base + 0.02 * noise)
            else:
                parameter.copy_(noise * (0.05 if "embed" in name else parameter[0].numel() ** -0.5))
    model.to(dtype).save_pretrained(folder)


def _rename(folder: pathlib.Path, old: str, new: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
