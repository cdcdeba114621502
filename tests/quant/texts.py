"""A word tokenizer and a text that fit the small decoders' vocabulary."""

import torch

from tests.quant.tiny import transformers

WORDS = [f"w{i}" for i in range(120)]


def save_tokenizer(directory):
    """Write a tokenizer whose words are w0, w1, ... with ids 8, 9, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {f"<s{i}>": i for i in range(8)}
    vocabulary = special | {word: 8 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def text(words=2000, seed=0):
    """Return a random text of so many words."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator))
