"""Token ids of all texts, train and held out: code and documentation of packages, conversations."""

from pathlib import Path

import torch

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


class Stream:
    """Endless training rows, each a window of one kind's shuffled and joined documents.

    Args:
        documents: ids by kind, each document a list.
        shares: how often a row is of each kind.
        end: id between two documents.
        seed: rows depend only on it and on how many were drawn before.
    """

    def __init__(self, documents: dict[str, list], shares: dict[str, float], end: int, seed: int):
        self.documents, self.end = documents, end
        self.kinds = list(shares)
        self.shares = torch.tensor(list(shares.values()))
        self.random = torch.Generator().manual_seed(seed)
        self.windows: dict[str, list[torch.Tensor]] = {kind: [] for kind in shares}

    def state_dict(self) -> dict:
        """What ``load_state_dict`` needs to go on from here."""
        return {"random": self.random.get_state(), "windows": self.windows}

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned, over the same documents."""
        self.random.set_state(state["random"])
        self.windows = {kind: list(windows) for kind, windows in state["windows"].items()}

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Token ids int64 ``[rows, length]``."""
        picks = torch.multinomial(self.shares, rows, replacement=True, generator=self.random)
        return torch.stack([self._window(self.kinds[i], length) for i in picks.tolist()])

    def _window(self, kind: str, length: int) -> torch.Tensor:
        windows = self.windows[kind]
        if not windows or len(windows[-1]) != length:
            documents = self.documents[kind]
            order = torch.randperm(len(documents), generator=self.random).tolist()
            ids = torch.tensor([t for i in order for t in (*documents[i], self.end)])
            cut = ids.unfold(0, length, length)
            windows = list(cut[torch.randperm(len(cut), generator=self.random)])
            self.windows[kind] = windows
        return windows.pop()
