"""The pair's tokenizer: byte-level BPE that keeps indentation in one token."""

from pathlib import Path

from training.data import Corpus

VOCAB_SIZE = 4096
EOS = "<|endoftext|>"
PAD = "<|pad|>"
# Words with the mark or space before them, short digit runs, punctuation with the newlines after
# it, runs of whitespace.
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(corpus: Corpus, out: Path) -> None:
    """Train on the training part of the corpus and save a ``PreTrainedTokenizerFast`` directory."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = corpus.train["code"] + corpus.train["prose"]
    tokenizer.train_from_iterator(documents, trainer, length=len(documents))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        bos_token=EOS,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    ).save_pretrained(out)


def encode(tokenizer, corpus: Corpus) -> dict[str, dict[str, list[list[int]]]]:
    """Return token ids as ``[part][kind][document]``."""
    return {
        part: {
            kind: [list(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(documents)]
            for kind, documents in getattr(corpus, part).items()
        }
        for part in ("train", "held_out")
    }
