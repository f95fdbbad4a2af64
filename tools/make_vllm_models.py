"""Make the models that `make test-vllm` loads: Llamas with 4 million random parameters; nothing is downloaded.

    .venv-vllm/bin/python tools/make_vllm_models.py FOLDER

`tiny-a` and `tiny-b` differ only in their seed; `damaged` is `tiny-a` with one truncated shard. Their answers have no
meaning.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEEDS = {"tiny-a": 1, "tiny-b": 2}
SHARD = "2MB"
"""Small, so that a model has several shards."""
CONTEXT = 1024
PAD, BEGIN, END = SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CORPUS = "system: user: assistant: Hello, who are you? I am a model of random weights, and what I say means nothing.\n"
ASCII = [chr(code) for code in range(32, 127)]


def main(folder: Path) -> None:
    tokenizer = make_tokenizer()
    for name, seed in SEEDS.items():
        model = make_model(seed, tokenizer)
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder / name)
        shards = len(list((folder / name).glob("*.safetensors")))
        print(f"{name}: {model.num_parameters() / 1e6:.1f} M parameters in {shards} shards")
    damage(folder / "tiny-a", folder / "damaged")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of printable ASCII: each token is valid text, so each one is streamed by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted({piece for text in [*ASCII, "\n"] for piece in _as_bytes(text)})
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
    )


def _as_bytes(text: str) -> str:
    """The characters that a byte-level tokenizer writes for a text's bytes."""
    return "".join(piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text))


def make_model(seed: int, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that never ends its answer: the logits of the special tokens are always 0, and others are higher."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.bfloat16,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(SPECIAL)] = 0
    return model


def damage(whole: Path, target: Path) -> None:
    """Copy a model and cut its last shard in half, as an interrupted download leaves it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(whole, target)
    shard = max(target.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
