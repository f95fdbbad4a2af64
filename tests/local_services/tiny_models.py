"""Make tiny models with random weights, of the classes that the local servers load: a few hundred kilobytes in all.

    python tests/local_services/tiny_models.py FOLDER

Run by the servers' own Python; nothing is downloaded. In FOLDER are then `flux`, `clip`, `blip` (a captioner), and
heads for aesthetic scores: `head.safetensors` gives every picture 6.5, `nan-head.pth` gives NaN, and `wide-head.pth`
fits another CLIP. `references.json` lists pictures (base64) and prompts, with the cosines that transformers itself
computes for them.
"""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"
EMBEDDING = 16
CONSTANT_SCORE = 6.5


def main(folder: Path) -> None:
    torch.manual_seed(0)
    make_flux().save_pretrained(folder / "flux")
    make_clip(folder / "clip")
    make_blip(folder / "blip")
    write_references(folder / "clip", folder / "references.json")
    save_file(head(EMBEDDING, CONSTANT_SCORE), folder / "head.safetensors")
    torch.save(head(EMBEDDING, float("nan")), folder / "nan-head.pth")
    torch.save(head(EMBEDDING * 2, CONSTANT_SCORE), folder / "wide-head.pth")


def make_flux() -> FluxPipeline:
    text = CLIPTextConfig(
        vocab_size=200, max_position_embeddings=77, pad_token_id=1, bos_token_id=0, eos_token_id=1, **SMALL
    )
    t5 = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=CLIPTextModel(text),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,  # like FLUX' own, it makes a picture eight times as large
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(4,) * 4,
            sample_size=1024,  # larger pictures are decoded in tiles of this size
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ),
    )


def make_clip(folder: Path) -> None:
    text = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **SMALL}
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING)).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def write_references(clip: Path, file: Path) -> None:
    """Write what CLIP says with transformers' own preprocessing, for pictures of each kind, size and colour."""
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessor.from_pretrained(clip)
    references = []
    for kind, colour in zip(("PNG", "PNG", "JPEG", "WEBP"), ("#c03030", "#1020e0", "white", "#30c030"), strict=True):
        for prompt in ("a red square", "blue", "nothing at all", "z"):
            data = BytesIO()
            Image.new("RGB", (40, 32), colour).save(data, kind)
            with torch.inference_mode():
                pixels = processor(Image.open(data), return_tensors="pt")
                answer = model(**pixels, **tokenizer(prompt, truncation=True, return_tensors="pt"))
            cosine = float((answer.image_embeds * answer.text_embeds).sum())
            image = base64.b64encode(data.getvalue()).decode()
            references.append({"image": image, "prompt": prompt, "cosine": cosine})
    file.write_text(json.dumps(references))


def make_blip(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "picture", "of", "stripes"]
    text = {
        "vocab_size": len(words),
        "bos_token_id": 5,
        "pad_token_id": 0,
        "eos_token_id": 3,
        "sep_token_id": 3,
        **SMALL,
    }
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer that knows the letters, with CLIP's marks and its limit of 77 tokens."""
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    tokenizer = Tokenizer(
        Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -3.0) for c in "▁" + LETTERS)], 2)
    )
    tokenizer.pre_tokenizer = Metaspace()
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def head(inputs: int, score: float) -> dict[str, torch.Tensor]:
    """Return an aesthetic head's weights under LAION's names: zeros, so that only the last bias counts."""
    tensors, width = {}, inputs
    for number, outputs in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        tensors[f"layers.{number}.weight"] = torch.zeros(outputs, width)
        tensors[f"layers.{number}.bias"] = torch.zeros(outputs)
        width = outputs
    tensors["layers.7.bias"] += score
    return tensors


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
