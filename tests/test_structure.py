"""The house's rules: who may import whom, how much a folder, file and function holds, one word.

Everything is read as text; no module of the project is imported.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from support.cpp_functions import functions as cpp_functions

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moesd_kernels", "decoder", "bench", "training", "moesd_vllm")
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
KERNELS = "decoder/model/kernels.py"  # the one file of the decoder that knows moesd_kernels


@functools.cache
def sources() -> dict[str, str]:
    """Every code file's text by its path from the root."""
    return {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in (*PACKAGES, "csrc", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in CODE and path.is_file()
    } | {"setup.py": (ROOT / "setup.py").read_text(encoding="utf-8")}


def python(*folders: str) -> dict[str, str]:
    """The Python files below some folders."""
    return {
        path: text
        for path, text in sources().items()
        if path.endswith(".py") and path.split("/")[0] in folders
    }


@functools.cache
def tree_of(path: str) -> ast.Module:
    return ast.parse(sources()[path], path)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@functools.cache
def imported(path: str) -> frozenset[str]:
    """Absolute names a file imports, wherever in it: for types and within functions, too.

    ``from a.b import c`` gives ``a.b.c``, which is a module or a name in one.
    """
    package = path.rpartition("/")[0].split("/")
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return frozenset(found)


def reaches(path: str, module: str) -> bool:
    """Whether a file imports a module, or something below it."""
    return any(name == module or name.startswith(f"{module}.") for name in imported(path))


@functools.cache
def file_graph() -> dict[str, set[str]]:
    """Which files of the packages import which; a name in a package stands for its ``__init__``."""
    modules = {module_of(path): path for path in python(*PACKAGES)}
    graph = {}
    for path in modules.values():
        names = imported(path)
        found = {modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names}
        graph[path] = {target for target in found if target and target != path}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes each of which reaches all the others of its group."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = graph.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    reach = {node: reachable(node) for node in graph}
    groups = {
        frozenset(other for other in reach[node] if node in reach.get(other, ()))
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def arrows(group: list[str], graph: dict[str, set[str]]) -> list[str]:
    return [f"{a} -> {b}" for a, b in product(group, group) if b in graph[a]]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_circle_among_files() -> None:
    graph = file_graph()
    found = [arrows(group, graph) for group in circles(graph)]
    assert not found, f"expected no circle of imports among files, found {found}"


def test_no_circle_among_folders() -> None:
    """Files of a package's root count one by one, and what its ``__init__`` re-exports does not."""
    place = {path: folder_of(path) for path in file_graph()}
    graph: dict[str, set[str]] = {name: set() for name in place.values()}
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, targets in file_graph().items():
        if path in {f"{package}/__init__.py" for package in PACKAGES}:
            continue
        for target in targets:
            if place[target] != place[path]:
                graph[place[path]].add(place[target])
                reasons[place[path], place[target]].append(f"{path} -> {target}")
    found = [
        "\n".join([f"{group}:", *(why for pair in product(group, group) for why in reasons[pair])])
        for group in circles(graph)
    ]
    assert not found, "expected no circle of imports among folders, found\n" + "\n".join(found)


def folder_of(path: str) -> str:
    folder = path.rpartition("/")[0]
    return path if folder in PACKAGES else folder


def importers(module: str, *folders: str) -> set[str]:
    return {path for path in python(*folders) if reaches(path, module)}


def test_the_kernels_stand_alone() -> None:
    for room in ("decoder", "bench", "training"):
        found = importers(room, "moesd_kernels")
        assert not found, f"expected no file of moesd_kernels to import {room}, found {found}"
    users = importers("transformers", "moesd_kernels")
    found = {path for path in users if not path.startswith("moesd_kernels/hooks/")}
    assert not found, f"expected transformers in moesd_kernels/hooks/ only, found it in {found}"


def test_the_decoder_knows_the_kernels_in_one_file() -> None:
    found = importers("moesd_kernels", "decoder")
    assert found == {KERNELS}, f"expected moesd_kernels in {KERNELS} only, found it in {found}"


def test_vllm_is_met_by_its_plugin_and_what_measures_it() -> None:
    others = ("moesd_kernels", "decoder", "training")
    found = importers("vllm", *others) | importers("moesd_vllm", *others)
    assert not found, f"expected vllm in moesd_vllm and bench only, found it in {found}"
    known = {name for path in python("moesd_vllm") for name in imported(path)}
    decoders = {name for name in known if name.startswith("decoder")}
    found = {name for name in decoders if not name.startswith("decoder.gamma.")}
    found |= {name for name in known if name.startswith(("bench", "training"))}
    assert not found, f"expected of the decoder its controller in moesd_vllm, found {found}"


def test_nothing_imports_bench_or_tests() -> None:
    others = ("moesd_kernels", "decoder", "training")
    found = importers("bench", *others) | importers("tests", *others, "bench")
    found |= importers("support", *others, "bench") | importers("training", "decoder", "bench")
    assert not found, f"expected nothing to import bench, tests or training, found {found}"


def test_operators_are_called_where_they_are_known() -> None:
    others = python("decoder", "bench", "training").items()
    found = {path for path, text in others if re.search(r"\bops\.moesd\b", text)} - {KERNELS}
    assert not found, f"expected torch.ops.moesd in {KERNELS} alone, found it in {found}"


def test_folders_hold_at_most_14_code_files() -> None:
    counts = Counter(path.rpartition("/")[0] for path in sources())
    found = {folder or ".": n for folder, n in counts.items() if n > 14}
    assert not found, f"expected at most 14 code files in a folder, found {found}"


def test_files_have_at_most_300_lines() -> None:
    lines = {path: text.count("\n") for path, text in sources().items()}
    found = {path: n for path, n in lines.items() if n > 300}
    assert not found, f"expected at most 300 lines in a file, found {found}"


def python_functions(path: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, decorators and docstring included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, (node.end_lineno or first) - first + 1


def test_functions_have_at_most_60_lines() -> None:
    found = {
        f"{path}: {name}": n
        for path, text in sources().items()
        for name, n in (python_functions(path) if path.endswith(".py") else cpp_functions(text))
        if n > 60
    }
    assert not found, f"expected at most 60 lines in a function, found {found}"


def test_a_row_is_no_slot() -> None:
    """``row`` is a sequence and ``position`` a place in it; dataclasses may have slots."""
    files = python("decoder") | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in files.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if "slot" in re.sub(r"\bslots=True\b|\b__slots__\b", "", line).lower()
    ]
    assert not found, "expected no 'slot', found\n" + "\n".join(found)


def test_every_folder_of_a_package_says_what_it_is() -> None:
    folders = {path.rpartition("/")[0] for path in python(*PACKAGES)}
    inits = {folder: f"{folder}/__init__.py" for folder in folders}
    missing = [init for init in inits.values() if init not in sources()]
    assert not missing, f"expected every folder with code to be a package, found no {missing}"
    silent = [init for init in inits.values() if not ast.get_docstring(tree_of(init))]
    assert not silent, f"expected a docstring in every __init__.py, found none in {silent}"


def test_the_tests_mirror_the_packages() -> None:
    packaged = {path.rpartition("/")[0] for path in python(*PACKAGES)}
    tests = {
        path.rpartition("/")[0].removeprefix("tests/")
        for path in python("tests")
        if path.rpartition("/")[2].startswith("test_") and path.count("/") > 1
    }
    found = {
        folder
        for folder in tests - {"support"}
        # Children of a folder's own tests, which run in another process, stay beside them.
        if folder not in packaged and folder.rpartition("/")[2] != "interpreted"
    }
    assert not found, f"expected a folder of the packages for each of tests/, found {found}"


def test_a_folder_of_bench_imports_only_from_those_below_it() -> None:
    """The order is the one that the docstring of ``bench`` gives."""
    doc = ast.get_docstring(tree_of("bench/__init__.py")) or ""
    order = re.findall(r"^- ``(\w+)``:", doc, flags=re.MULTILINE)
    files = {path: path.split("/")[1] for path in python("bench") if path.count("/") > 1}
    assert set(order) == set(files.values())
    for path, folder in files.items():
        above = [name for name in order[: order.index(folder)] if reaches(path, f"bench.{name}")]
        assert not above, f"{path} imports from {above}"


def test_nothing_that_is_loaded_is_run() -> None:
    """Said at each call: a folder's code and pickled objects run wherever a default allows it."""
    wanted = {"from_pretrained": ("trust_remote_code", False), "load": ("weights_only", True)}
    found = []
    for path in python(*PACKAGES):
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, name = ast.unparse(node.func), node.func.attr
            if called == "torch.load" or name == "from_pretrained":
                key, value = wanted[name]
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if said.get(key) != str(value):
                    found.append(f"{path}:{node.lineno}: {called} without {key}={value}")
            if called in ("pickle.load", "pickle.loads"):
                found.append(f"{path}:{node.lineno}: {called}")
    assert not found, found


def test_docstrings_speak_one_dialect() -> None:
    """Code and shapes stand in double backticks, as in Google's style with Markdown: no roles."""
    found = [
        f"{path}:{getattr(node, 'lineno', 1)}: {marks[0]}"
        for path in python(*PACKAGES)
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and (marks := re.findall(r":\w+:`|(?<!`)`[^`\n]+`(?!`)", ast.get_docstring(node) or ""))
    ]
    assert not found, "expected ``code`` and no :role:`code`, found\n" + "\n".join(found)
