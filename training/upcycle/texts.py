"""Token ids of all texts, train and held out: code and documentation of packages, conversations."""

from pathlib import Path

from training.data import is_held_out
from training.upcycle.answers import read_answers
from training.upcycle.sources import Sources

CONVERSATIONS = "chat"  # the kind of everything in answers.jsonl


def build_texts(sources: Sources, answers: Path, tokenizer) -> dict[str, dict[str, list]]:
    """Ids as ``[part][kind][document]``, each an int64 list; kinds code, docs and chat."""
    texts = {
        part: {
            kind: [e.ids for e in tokenizer.backend_tokenizer.encode_batch(documents)]
            for kind, documents in getattr(sources, part).items()
        }
        | {CONVERSATIONS: []}
        for part in ("train", "held_out")
    }
    for line in read_answers(answers):
        part = "held_out" if is_held_out(f"conversation:{line['index']}") else "train"
        texts[part][CONVERSATIONS].append(line["token_ids"])
    return texts
