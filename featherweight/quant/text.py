"""Calibration text to token ids, by the tokenizer of a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featherweight.quant.export.directory import check_directory, import_transformers

_LEAST = 8  # sequences below which a text is refused, unless fewer are asked for
_CHARACTERS = 16  # of text that are read for each token asked for


def read_tokens(source: Path, text: Path, sequences: int, tokens: int) -> Tensor:
    """Cut the beginning of a text into sequences of token ids.

    Args:
        source: a model directory.
        text: a UTF-8 file.
        sequences: how many at most; a shorter text gives fewer, but at least eight.
        tokens: of a sequence.

    Returns:
        int64, ``[sequences, tokens]``.

    Raises:
        ValueError: the text is too short or not UTF-8.
        OSError: it can't be read.
    """
    with text.open(encoding="utf-8") as file:
        try:
            characters = file.read(_CHARACTERS * sequences * tokens)
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is not UTF-8 text: {error.reason}") from None
    tokenizer = load_tokenizer(source)
    found = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    whole, least = min(sequences, len(found) // tokens), min(_LEAST, sequences)
    if whole < least:
        raise ValueError(
            f"{text} has {len(found)} tokens, calibration needs at least {least * tokens}: "
            f"{least} sequences of {tokens}"
        )
    return torch.tensor(found[: whole * tokens]).view(whole, tokens)


def load_tokenizer(source: Path) -> Any:
    """Return the tokenizer of a model directory, also of one that holds a GGUF file alone."""
    gguf = check_directory(source, allow_pickle=True)
    options = {"gguf_file": gguf.name} if gguf else {}
    return import_transformers().AutoTokenizer.from_pretrained(
        source, local_files_only=True, trust_remote_code=False, **options
    )
