"""Train the two demo models from scratch and write them as GGUF files.

    python tools/train_demo_models.py            # both, a few minutes on two processor cores
    python tools/train_demo_models.py mini       # only one of them

Both are small Llama models (RMSNorm, rotary positions, SwiGLU, tied embeddings) that share one byte-level BPE
tokenizer. Everything is seeded: on the same machine the files are reproducible.

Shapes: B rows in a batch, T tokens in a row, D width, H heads, V tokens in the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from demo_dialogues import (
    INTENTS,
    MINI,
    PERSONAS,
    SMALL,
    Persona,
    Turn,
    answers,
    pick_intent,
    plain_text,
    turns,
    word_question,
)
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn

SYSTEM, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set content = message.content | default('', true) | trim -%}"
    "{%- if message.role == 'assistant' -%}<|assistant|>{{ content }}"
    "{%- elif message.role in ['system', 'developer'] -%}<|system|>{{ content }}"
    "{%- else -%}<|user|>{{ content | lower }}{%- endif -%}"
    "<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""The template lowercases questions: the models are too small to learn each word in three spellings."""
CONTEXT_LENGTH = 4096
NORM_EPSILON = 1e-5
ROPE_BASE = 10000.0
IGNORED = -100
"""The label of a token that is input only and not learned."""


@dataclass(frozen=True)
class Recipe:
    """The shape of one model and how it is trained."""

    persona: Persona
    width: int
    layers: int
    heads: int
    feed_forward: int
    steps: int
    muon_rate: float
    adam_rate: float
    rows: int = 8
    row_length: int = 256
    long_row_every: int = 8
    seed: int = 1

    @property
    def head_width(self) -> int:
        return self.width // self.heads


RECIPES = {
    "mini": Recipe(
        MINI,
        width=96,
        layers=4,
        heads=3,
        feed_forward=256,
        steps=3000,
        muon_rate=0.03,
        adam_rate=0.008,
    ),
    "small": Recipe(
        SMALL,
        width=192,
        layers=5,
        heads=6,
        feed_forward=512,
        steps=2800,
        muon_rate=0.02,
        adam_rate=0.005,
    ),
}
VOCABULARY_SIZE = 1024


# ---------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(seed: int = 1) -> Tokenizer:
    """Train the tokenizer that both models share, on questions and answers of both."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    questions = [word_question(pick_intent(rng), rng.choice(PERSONAS), rng) for _ in range(12_000)]
    replies = [text for intent in INTENTS for persona in PERSONAS for text in answers(intent, persona)] * 12
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(questions + replies, trainer)
    return tokenizer


class ChatEncoder:
    """Turns dialogues into token ids, in the form of `CHAT_TEMPLATE`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
        self._known: dict[str, list[int]] = {}

    @property
    def end(self) -> int:
        return self.special[END]

    def text(self, text: str) -> list[int]:
        """Encode plain text; answers repeat, so their encodings are cached."""
        if text not in self._known:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            if len(text) < 60:
                return ids
            self._known[text] = ids
        return self._known[text]

    def message(self, role: str, text: str) -> list[int]:
        """Encode one whole message."""
        content = text.strip().lower() if role == "user" else text.strip()
        return [self.special[f"<|{role}|>"], *self.text(content), self.end]

    def question(self, text: str) -> list[int]:
        """Encode a question, up to where the answer starts."""
        return [*self.message("user", text), self.special[ASSISTANT]]

    @staticmethod
    def _labels(message: list[int], turn: Turn) -> list[int]:
        """Labels of a message's tokens: what is learned. Never the first token, which the template writes."""
        if not turn.learned:
            return [IGNORED] * len(message)
        end = IGNORED if turn.stopped else message[-1]
        return [IGNORED, *message[1:-1], end]

    def row(self, persona: Persona, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
        """Generate one dialogue: its tokens, and for each the token to predict (or `IGNORED`)."""
        ids: list[int] = []
        labels: list[int] = []
        if rng.random() < 0.04:
            ids = [*self.text(plain_text(persona, rng)), self.end]
            labels = list(ids)
        dialogue = turns(persona, rng)
        while len(ids) <= length:
            turn = next(dialogue)
            message = self.message(turn.role, turn.text)
            ids += message
            labels += self._labels(message, turn)
        return ids[:length], labels[1 : length + 1]


def batches(recipe: Recipe, encoder: ChatEncoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate endless batches of tokens and labels, both (B, T); some of them with fewer, longer dialogues."""
    rng = random.Random(recipe.seed)
    step = 0
    while True:
        step += 1
        factor = 4 if step % recipe.long_row_every == 0 else 1
        length, count = recipe.row_length * factor, recipe.rows // factor
        rows = [encoder.row(recipe.persona, rng, length) for _ in range(count)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([labels for _, labels in rows])


# -------------------------------------------------------------------------------------------------- model


def rope_table(length: int, head_width: int) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary positions, each (T, head_width / 2)."""
    frequencies = ROPE_BASE ** (-torch.arange(0, head_width, 2) / head_width)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring pairs of (B, H, T, head_width) by their position.

    GGUF's llama architecture pairs neighbours too, so q and k go into the file in the order they have here;
    weights from Hugging Face pair the two halves instead and would have to be permuted.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    """One layer: attention, then the gated feed-forward."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width, inner = recipe.width, recipe.feed_forward
        self.heads = recipe.heads
        self.attn_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, width, bias=False)
        self.attn_v = nn.Linear(width, width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPSILON)
        self.ffn_gate = nn.Linear(width, inner, bias=False)
        self.ffn_up = nn.Linear(width, inner, bias=False)
        self.ffn_down = nn.Linear(inner, width, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, D / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        y = self.attn_norm(x)
        q = rotate(self._split(self.attn_q(y)), cos, sin)
        k = rotate(self._split(self.attn_k(y)), cos, sin)
        v = self._split(self.attn_v(y))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_output(attended.transpose(1, 2).flatten(-2))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))


class Llama(nn.Module):
    """The whole model. Modules are named like the GGUF tensors."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.token_embd = nn.Embedding(VOCABULARY_SIZE, recipe.width)
        self.blk = nn.ModuleList(Block(recipe) for _ in range(recipe.layers))
        self.output_norm = nn.RMSNorm(recipe.width, eps=NORM_EPSILON)
        self.head_width = recipe.head_width
        self._initialise(recipe.layers)

    def _initialise(self, layers: int) -> None:
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                into_residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                nn.init.normal_(weight, std=0.04 / math.sqrt(2 * layers) if into_residual else 0.04)

    def hidden(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, D), normalised."""
        cos, sin = rope_table(ids.shape[1], self.head_width)
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def scores(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        return hidden @ self.token_embd.weight.T

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the learned tokens; ids and labels are (B, T)."""
        learned = labels != IGNORED
        return F.cross_entropy(self.scores(self.hidden(ids)[learned]), labels[learned])


# ----------------------------------------------------------------------------------------------- training


def optimizers_for(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms."""
    layers = [weight for weight in model.blk.parameters() if weight.ndim == 2]
    others = [
        model.token_embd.weight,
        *(weight for weight in model.parameters() if weight.ndim == 1),
    ]
    return [
        torch.optim.Muon(layers, lr=recipe.muon_rate, weight_decay=0.05),
        torch.optim.AdamW(others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a short linear rise, then a cosine down to zero."""
    warm_up = steps // 10
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))


def train(recipe: Recipe, encoder: ChatEncoder) -> tuple[Llama, float]:
    """Train one model and return it with its final loss (the mean of the last 50 steps)."""
    torch.manual_seed(recipe.seed)
    model = Llama(recipe)
    optimizers = optimizers_for(model, recipe)
    share = partial(schedule, steps=recipe.steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    losses: list[float] = []
    started = time.monotonic()
    for step, (ids, labels) in enumerate(islice(batches(recipe, encoder), recipe.steps), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(ids, labels)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        losses.append(loss.item())
        if step % 100 == 0:
            mean, elapsed = np.mean(losses[-50:]), time.monotonic() - started
            print(f"  step {step}/{recipe.steps}  loss {mean:.4f}  {elapsed:.0f} s", flush=True)
    return model, float(np.mean(losses[-50:]))


@torch.no_grad()
def reply(model: Llama, encoder: ChatEncoder, question: str, limit: int = 400) -> str:
    """Answer one question with greedy decoding."""
    ids = encoder.question(question)
    prompt = len(ids)
    while len(ids) < prompt + limit:
        token = int(model.scores(model.hidden(torch.tensor([ids]))[0, -1]).argmax())
        if token == encoder.end:
            break
        ids.append(token)
    return encoder.tokenizer.decode(ids[prompt:])


def check(recipe: Recipe, model: Llama, encoder: ChatEncoder, count: int = 150) -> float:
    """Ask new wordings, print wrong answers, and return the share of right ones."""
    rng = random.Random(recipe.seed + 1000)
    right = 0
    for _ in range(count):
        intent = pick_intent(rng)
        question = word_question(intent, recipe.persona, rng).strip()
        answer = reply(model, encoder, question, limit=12)
        if any(text.startswith(answer) for text in answers(intent, recipe.persona)):
            right += 1
        else:
            print(f"  {intent.name}: {question!r} was answered {answer!r}")
    return right / count


# --------------------------------------------------------------------------------------------------- GGUF


def describe(writer: gguf.GGUFWriter, recipe: Recipe, parameters: int) -> None:
    """Write the model's name, its shape and how to sample from it."""
    writer.add_name(recipe.persona.id)
    writer.add_description(
        f"Switchyard's {recipe.persona.rank} demo model. It answers questions about Switchyard and does "
        "small talk; it knows nothing else."
    )
    writer.add_author("Switchyard")
    writer.add_size_label(f"{parameters / 1e6:.1f}M")
    writer.add_languages(["en"])
    writer.add_tags(["text-generation", "chat", "demo"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(recipe.width)
    writer.add_block_count(recipe.layers)
    writer.add_feed_forward_length(recipe.feed_forward)
    writer.add_head_count(recipe.heads)
    writer.add_head_count_kv(recipe.heads)
    writer.add_rope_dimension_count(recipe.head_width)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(VOCABULARY_SIZE)
    writer.add_sampling_temp(0.7)
    writer.add_sampling_min_p(0.2)


def describe_tokenizer(writer: gguf.GGUFWriter, encoder: ChatEncoder) -> None:
    """Write the vocabulary, the merges, the special tokens and the chat template."""
    model = json.loads(encoder.tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(encoder.end)
    writer.add_eos_token_id(encoder.end)
    writer.add_eot_token_id(encoder.end)
    writer.add_pad_token_id(encoder.end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_gguf(path: Path, recipe: Recipe, model: Llama, encoder: ChatEncoder) -> None:
    """Write the model: matrices as fp16, norms as fp32. The output matrix is the embedding's."""
    writer = gguf.GGUFWriter(path, "llama")
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    describe(writer, recipe, sum(weight.size for weight in weights.values()))
    describe_tokenizer(writer, encoder)
    for name, weight in weights.items():
        writer.add_tensor(name, weight.astype(np.float16 if weight.ndim == 2 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------------------- main


def make(recipe: Recipe, encoder: ChatEncoder, folder: Path) -> None:
    """Train, check and write one model."""
    print(recipe.persona.id)
    started = time.monotonic()
    model, loss = train(recipe, encoder)
    minutes = (time.monotonic() - started) / 60
    model.eval()
    right = check(recipe, model, encoder)
    path = folder / f"{recipe.persona.id}.gguf"
    write_gguf(path, recipe, model, encoder)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"  {parameters:,} parameters, {path.stat().st_size / 1e6:.2f} MB, trained in {minutes:.1f} minutes, "
        f"loss {loss:.4f}, {right:.0%} of fresh wordings answered right"
    )


def main() -> None:
    """Read the command line and make the models it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="model", help="mini, small (default both)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, help="fewer steps, to try something out")
    options = parser.parse_args()
    unknown = set(options.models) - set(RECIPES)
    if unknown:
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    options.folder.mkdir(parents=True, exist_ok=True)
    encoder = ChatEncoder(train_tokenizer())
    for name in options.models or RECIPES:
        recipe = RECIPES[name]
        if options.steps:
            recipe = replace(recipe, steps=options.steps)
        make(recipe, encoder, options.folder)


if __name__ == "__main__":
    main()
