"""What exists, read from the code: operators, modules, and the papers that their docstrings name.

`python -m seqops` prints it, and the site's tables are made from it.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import seqops
from seqops.core import backend

# A reader's order of rooms; one that is not named comes after them.
ORDER = ("rnn", "scan", "linear_attention", "attention", "conv", "ssm", "ttt")
PAPER = re.compile(r'([^";]*?),? *"([^"]+)",[^";]*?\b((?:19|20)\d\d)\b')


@dataclass(frozen=True)
class Paper:
    authors: str
    title: str
    year: int

    def __str__(self) -> str:
        return f'{self.authors}, "{self.title}", {self.year}' if self.authors else f'"{self.title}", {self.year}'


@dataclass(frozen=True)
class Operator:
    """Args:
    name: in seqops.
    room: the package that holds it.
    summary: the first sentence of its docstring.
    papers: those that its docstring ends with.
    """

    name: str
    room: str
    summary: str
    papers: tuple[Paper, ...]


@dataclass(frozen=True)
class Module:
    """Args:
    name: in seqops.nn.
    file: the module of seqops.nn that defines it.
    summary: the first sentence of its docstring.
    papers: those that its docstring ends with.
    operators: those that its code names, and the code of seqops.nn that it uses.
    """

    name: str
    file: str
    summary: str
    papers: tuple[Paper, ...]
    operators: tuple[str, ...]


@cache
def rooms() -> dict[str, str]:
    """Packages of operators and what each holds: the beginning of the package's docstring."""
    found = dict.fromkeys(operator.room for operator in operators())
    return {room: first_sentence(sys.modules[f"seqops.{room}"]).split(":")[0].rstrip(".") for room in found}


@cache
def operators() -> tuple[Operator, ...]:
    """In the order of rooms and, in each, of the code."""
    names = [name for name in seqops.__all__ if name in backend.table()]
    found = [Operator(name, room_of(name), first_sentence(of := getattr(seqops, name)), papers(of)) for name in names]
    order = {room: place for place, room in enumerate(ORDER)}
    return tuple(sorted(found, key=lambda each: (order.get(each.room, len(order)), each.room, each.name)))


def room_of(name: str) -> str:
    return getattr(seqops, name).__module__.split(".")[1]


@cache
def modules() -> tuple[Module, ...]:
    """The classes of seqops.nn whose forward runs operators, in the order of `seqops.nn.__all__`."""
    found = []
    for name in seqops.nn.__all__:
        cls = getattr(seqops.nn, name)
        if inspect.isclass(cls) and (used := sorted({*operators_of(cls)})):
            found.append(Module(name, cls.__module__.split(".")[-1], first_sentence(cls), papers(cls), tuple(used)))
    return tuple(found)


def first_sentence(target: object) -> str:
    """Up to the first full stop that ends a sentence, without markup."""
    start = (inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
    return re.split(r"(?<=[^.]\w[\w)\]'\"*]\.)\s|(?<=[^.]\w[)\]'\"*]\.)\s", start)[0].strip()


def papers(target: object) -> tuple[Paper, ...]:
    """The last paragraphs of a docstring as far as they cite: `Author et al., "Title", Year; ...`."""
    found: list[Paper] = []
    for paragraph in reversed((inspect.getdoc(target) or "").split("\n\n")):
        text = " ".join(paragraph.split())
        cited = [Paper(author(who), title, int(year)) for who, title, year in PAPER.findall(text)]
        if not cited:
            break
        found = cited + found
    return tuple(found)


def author(text: str) -> str:
    """Without what the paper is cited for: `heads: Pöppel et al.`."""
    return text.split(": ")[-1].lstrip(" .")


def operators_of(target: Any, seen: set[Any] | None = None) -> Iterator[str]:
    """Names of operators in the code of a class or function, of its bases, and of what it uses of seqops.nn."""
    seen = set() if seen is None else seen
    code = definitions(target.__module__).get(target.__name__)
    if target in seen or code is None:
        return
    seen.add(target)
    table = set(seqops.__all__) & set(backend.table())
    names = vars(sys.modules[target.__module__])
    asked = [node for node in ast.walk(code) if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
    ignored = {each for call in asked for each in ast.walk(call)}
    for node in ast.walk(code):
        if node in ignored:
            continue
        value = None
        if isinstance(node, ast.Name):
            value = names.get(node.id)
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in ("seqops", "torch.ops.seqops") and node.attr in table:
                yield node.attr
            value = getattr(names.get(owner), node.attr, None) if inspect.ismodule(names.get(owner)) else None
        name = getattr(value, "__name__", None)
        if isinstance(name, str) and name in table and value is getattr(seqops, name):
            yield name
        elif (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("seqops.nn."):
            yield from operators_of(value, seen)


@cache
def definitions(module: str) -> dict[str, ast.AST]:
    """The classes and functions of a module as its source has them."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def citations() -> list[tuple[Paper, tuple[str, ...], tuple[str, ...]]]:
    """Every paper, the operators that cite it or that a module of it runs, and the modules that cite it; by year."""
    cited: dict[str, tuple[Paper, list[str], list[str]]] = {}
    for operator in operators():
        for paper in operator.papers:
            cited.setdefault(key(paper), (paper, [], []))[1].append(operator.name)
    for module in modules():
        for paper in module.papers:
            _, used, made = cited.setdefault(key(paper), (paper, [], []))
            used += [name for name in module.operators if name not in used]
            made.append(module.name)
    rows = [(paper, tuple(used), tuple(made)) for paper, used, made in cited.values()]
    return sorted(rows, key=lambda row: (row[0].year, row[0].authors))


def key(paper: Paper) -> str:
    """The same for spellings of a title that differ in case and signs, or in the subtitle."""
    return re.sub(r"[^a-z0-9 ]", "", paper.title.split(":")[0].lower())
