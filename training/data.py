"""The corpus: what every Python carries, as code and prose, train and held-out.

Code is the standard library's source. Prose is its documentation strings and the language reference
that ``help()`` prints (``pydoc_data.topics``). The text differs a little between Python versions,
so a corpus carries the version and a hash of what it was built from.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

SEED = 20
HELD_OUT_SHARE = 0.03
TEST_FILE_SHARE = 0.33  # of the standard library's own tests: more code, but repetitive code
MAX_TEST_FILE_BYTES = 80_000
MIN_DOCSTRING_CHARS = 160
SKIPPED_DIRS = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "ensurepip",
}
SKIPPED_PREFIXES = (
    "encodings/cp",
    "encodings/mac_",
    "encodings/iso",
    "encodings/koi8",
    "pydoc_data/",
)
TEST_DIRS = {"test", "tests", "idle_test"}


@dataclass
class Corpus:
    """Documents by part (``train``, ``held_out``) and kind (``code``, ``prose``)."""

    train: dict[str, list[str]] = field(default_factory=lambda: {"code": [], "prose": []})
    held_out: dict[str, list[str]] = field(default_factory=lambda: {"code": [], "prose": []})
    held_out_names: list[str] = field(default_factory=list)
    train_names: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """Sizes in characters, the Python version and a hash over every document."""
        digest = hashlib.sha256()
        sizes = {}
        for part in ("train", "held_out"):
            for kind, documents in getattr(self, part).items():
                sizes[f"{part}_{kind}_chars"] = sum(map(len, documents))
                sizes[f"{part}_{kind}_documents"] = len(documents)
                for document in documents:
                    digest.update(document.encode())
        return {"python": sys.version.split()[0], **sizes, "sha256": digest.hexdigest()}


def share(name: str, salt: str) -> float:
    """A number in [0, 1) that depends only on name, salt and SEED, never on file order."""
    digest = hashlib.sha256(f"{SEED}:{salt}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_held_out(name: str) -> bool:
    """Whether the file or topic ``name`` belongs to the held-out part."""
    return share(name, "held-out") < HELD_OUT_SHARE


def source_files(stdlib: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative posix path, text) of the standard library's sources, by path."""
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib).as_posix()
        parts = set(path.relative_to(stdlib).parts[:-1])
        if parts & SKIPPED_DIRS or name.startswith(SKIPPED_PREFIXES):
            continue
        if parts & TEST_DIRS and (
            path.stat().st_size > MAX_TEST_FILE_BYTES or share(name, "tests") >= TEST_FILE_SHARE
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 200 and "\0" not in text:
            yield name, text.expandtabs(8) if "\n\t" in text else text


def docstrings(source: str) -> list[str]:
    """Return the long documentation strings of one source file, cleaned of their indentation."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) >= MIN_DOCSTRING_CHARS:
                found.append(inspect.cleandoc(text))
    return found


def build_corpus() -> Corpus:
    """Read the corpus of this Python installation; equal installations give equal corpora."""
    from pydoc_data.topics import topics

    corpus = Corpus()
    seen: set[str] = set()
    for name, text in source_files(Path(sysconfig.get_paths()["stdlib"])):
        held_out = is_held_out(name)
        part = corpus.held_out if held_out else corpus.train
        (corpus.held_out_names if held_out else corpus.train_names).append(name)
        part["code"].append(text)
        if not set(Path(name).parts) & TEST_DIRS:
            new = [d for d in docstrings(text) if d not in seen]
            seen.update(new)
            part["prose"].extend(new)
    for topic, text in sorted(topics.items()):
        part = corpus.held_out if is_held_out(f"topic:{topic}") else corpus.train
        part["prose"].append(text)
    return corpus


class TokenStream:
    """Endless training rows: windows of one kind's shuffled and joined documents, shuffled too.

    A batch therefore mixes many files. Its content depends only on the seed and on how many rows
    were drawn before it, so that a resumed run continues exactly where it stopped.

    Args:
        documents: token ids by kind.
        shares: how often a row is of each kind, summing to one.
        eos: id between two documents.
        seed: of the order.
    """

    def __init__(
        self,
        documents: Mapping[str, list[list[int]]],
        shares: Mapping[str, float],
        eos: int,
        seed: int = SEED,
    ):
        self.documents, self.eos, self.kinds = documents, eos, list(shares)
        self.bounds = torch.tensor(list(shares.values())).cumsum(0)[:-1]
        self.random = torch.Generator().manual_seed(seed)
        self.windows: dict[str, list[torch.Tensor]] = {kind: [] for kind in shares}
        self.epochs = dict.fromkeys(shares, 0)

    def state_dict(self) -> dict:
        """What ``load_state_dict`` needs to go on from here: tensors and numbers only."""
        return {
            "random": self.random.get_state(),
            "windows": {kind: list(windows) for kind, windows in self.windows.items()},
            "epochs": dict(self.epochs),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what ``state_dict`` returned, over the same documents."""
        self.random.set_state(state["random"])
        self.windows, self.epochs = state["windows"], state["epochs"]

    def _refill(self, kind: str, length: int) -> None:
        self.epochs[kind] += 1
        order = torch.randperm(len(self.documents[kind]), generator=self.random).tolist()
        stream = torch.tensor([t for i in order for t in (*self.documents[kind][i], self.eos)])
        if len(stream) <= length:
            raise ValueError(f"expected more than {length} tokens of {kind}, got {len(stream)}")
        windows = stream.unfold(0, length + 1, length)
        self.windows[kind] = list(windows[torch.randperm(len(windows), generator=self.random)])

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """Return int64 [rows, length + 1]: inputs and, shifted by one, labels."""
        drawn = torch.rand(rows, generator=self.random)
        out = []
        for pick in torch.bucketize(drawn, self.bounds, right=True).tolist():
            kind = self.kinds[pick]
            if not self.windows[kind] or len(self.windows[kind][-1]) != length + 1:
                self._refill(kind, length)
            out.append(self.windows[kind].pop())
        return torch.stack(out)
