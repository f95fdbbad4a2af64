"""Which files of a repository vLLM loads. Pure rules."""

from __future__ import annotations

import pytest

from services.downloads.fetcher import DownloadError
from services.downloads.huggingface.names import parse
from services.downloads.huggingface.weight_files import choose, missing_files, weights_of

NAME = parse("org/model")


@pytest.mark.parametrize(
    ("listed", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "consolidated.00.pt"], ["pytorch_model.bin"]),
        (["model.pt", "optimizer.pt"], ["model.pt"]),
        (["model-00001-of-00001.safetensors", "consolidated.safetensors"], ["consolidated.safetensors"]),
        (["model.safetensors", "original/model.safetensors", "metal/model.bin"], ["model.safetensors"]),
        (["shards/a.safetensors", "original/a.safetensors", "onnx/b.bin"], ["shards/a.safetensors"]),
        (["model.gguf", "model.onnx", "original/consolidated.00.pth"], []),
    ],
)
def test_weights_are_taken_in_one_format(listed, weights):
    """The one that vLLM prefers, never the same weights in two formats."""
    assert list(weights_of(listed)) == weights


def test_all_files_except_other_weights_and_media_are_taken():
    """Configuration, tokenizer, templates and code, also from subfolders."""
    beside = [
        "config.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "modeling.py",
        "1_Pooling/config.json",
    ]
    others = ["pytorch_model.bin", "onnx/model.onnx", "model.gguf", "picture.png", "data.tar.gz", "old.pth"]
    assert set(choose(NAME, [*beside, *others, "model.safetensors"])) == {*beside, "model.safetensors"}


@pytest.mark.parametrize(
    ("listed", "code"), [(["model.gguf", "config.json"], "no_weights"), (["../x.json", "a.safetensors"], "unsafe_path")]
)
def test_a_repository_that_can_not_be_loaded_is_refused(listed, code):
    """Before anything is downloaded."""
    with pytest.raises(DownloadError) as caught:
        choose(NAME, listed)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("sizes", "indexed", "lack"),
    [
        ({"config.json": 2, "model.safetensors": 9}, [], ()),
        ({"params.json": 2, "consolidated.safetensors": 9}, [], ()),
        ({"model.safetensors": 9}, [], ("config.json",)),
        ({"config.json": 2}, [], ("weights",)),
        ({"config.json": 2, "tokenizer.json": None, "model.safetensors": 9}, [], ("tokenizer.json",)),
        ({"config.json": 2, "model-00001-of-00002.safetensors": 9}, [], ("1 parts of model",)),
        (
            {"config.json": 2, "model-00001-of-00002.safetensors": 9},
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ("model-00002-of-00002.safetensors",),
        ),
        ({"config.json": 2, "a.safetensors": 9}, ["a.safetensors", "more/b.safetensors"], ("more/b.safetensors",)),
    ],
)
def test_missing_files_are_named(sizes, indexed, lack):
    """From the index if there is one, otherwise from the shards' file names."""
    assert missing_files(sizes, indexed) == lack
