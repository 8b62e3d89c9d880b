"""Fine-tune a tiny random Gemma 3 with Trainer on packed rows: no padding, and every document sees only itself.

    python examples/finetune_gemma.py --steps 20

Documents are text with an image in it, and the text after an image repeats one token over and over: a few steps bring
the loss down. A row holds several documents one after the other; `position_ids` that restart tell where each begins.
Needs accelerate, as Trainer does.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

import fa4_prefixlm.integrations.transformers  # noqa: F401 (registers "fa4_prefixlm")

IMAGE_TOKEN, IMAGE_TOKENS, ROW = 500, 16, 128
Document = dict[str, torch.Tensor]


class Documents(Dataset[Document]):
    """Text, an image, an answer; of random lengths."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Document:
        generator = torch.Generator().manual_seed(self.seed + index)
        before, after = torch.randint(4, 12, (2,), generator=generator).tolist()
        answer = torch.full((after,), int(torch.randint(8, 16, (), generator=generator)))
        text = torch.randint(100, 400, (before,), generator=generator)
        ids = torch.cat([text, torch.full((IMAGE_TOKENS,), IMAGE_TOKEN), answer])
        labels = torch.cat([torch.full((before + IMAGE_TOKENS,), -100), answer])
        return {"input_ids": ids, "labels": labels, "image": torch.randn(3, 56, 56, generator=generator)}


def pack(documents: list[Document]) -> dict[str, torch.Tensor]:
    """One row of documents, as long as ROW at most; what does not fit is left out."""
    row: list[Document] = []
    for document in documents:
        if sum(len(own["input_ids"]) for own in row) + len(document["input_ids"]) <= ROW:
            row.append(document)
    ids = torch.cat([own["input_ids"] for own in row])
    return {
        "input_ids": ids[None],
        "labels": torch.cat([own["labels"] for own in row])[None],
        "position_ids": torch.cat([torch.arange(len(own["input_ids"])) for own in row])[None],
        "token_type_ids": (ids == IMAGE_TOKEN).long()[None],
        "pixel_values": torch.stack([own["image"] for own in row]),
    }


def tiny_gemma3(attention: str) -> Any:
    """A random Gemma 3 of 6 layers, 5 of them with a window shorter than a row."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "sliding_window": 32}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 56, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=IMAGE_TOKENS, image_token_index=IMAGE_TOKEN
    )
    return transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attention)


def train(attention: str, steps: int, *, checkpointing: bool = True) -> list[float]:
    """The loss of every step."""
    transformers.set_seed(0)
    model = tiny_gemma3(attention)
    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=8,  # documents, packed into one row
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model, args=options, train_dataset=Documents(8 * steps), data_collator=pack
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(arguments: list[str] | None = None) -> list[float]:
    """Returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--attention", default="fa4_prefixlm", help="what transformers calls attn_implementation")
    options = parser.parse_args(arguments)
    losses = train(options.attention, options.steps)
    print(f"{options.attention}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    return losses


if __name__ == "__main__":
    main()
