"""What mkdocs runs while it builds the site: navigation, tables and signatures are made from the code and the files.

A line of its own in a page becomes

    ::: seqops.lstm     that object's signature and docstring
    ::: operators       tables of operators, one for each room
    ::: modules         a table of modules: what each is, its operators, its paper
    ::: papers          which paper is which operator and which module
    ::: examples        the pages in docs/examples and what each begins with

Docstrings are Markdown, with sections (`Args:`, `Returns:`, `Raises:`, `Example:`) whose entries are indented. Pages
enter the navigation by themselves: those of docs/nn and docs/examples by their folders, those of operators by their
names, and a page that nothing here knows comes last.
"""

import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seqops import catalog

DOCS = Path(__file__).resolve().parent
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")

# Sections of pages that stand for no operator, module or example; `*` is what follows from their names.
START = ("index.md", "choosing.md", "map.md", "migration.md")
KERNELS = ("kernels.md", "*-gpu.md", "numerics.md")
TOOLS = ("api.md", "tuning.md", "declaring.md", "solver.md", "adding-an-operator.md")


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads the pages."""
    config["nav"] = navigation()
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    here = Path(page.file.src_uri).parent
    return re.sub(r"^::: ([\w.]+)$", lambda found: replacement(found[1], here), markdown, flags=re.MULTILINE)


def replacement(name: str, here: Path) -> str:
    """What the line `::: name` becomes in a page of the folder `here`, which is relative to docs."""
    return TABLES[name](here) if name in TABLES else describe(name)


# ---- navigation


def navigation() -> list[dict[str, Any]]:
    """Every page once."""
    left = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))

    def take(*patterns: str) -> list[str]:
        found = [path for pattern in patterns for path in left if Path(path).match(pattern) and is_at(path, pattern)]
        for path in dict.fromkeys(found):
            left.remove(path)
        return list(dict.fromkeys(found))

    start, kernels, tools = take(*START), take(*KERNELS), take(*TOOLS)
    rooms = []
    for room, title in catalog.rooms().items():
        pages = take(f"{dashed(room)}.md", *(operator_page(each) for each in catalog.operators() if each.room == room))
        if pages:
            rooms.append({title: pages})
    modules = take("modules.md") + sorted(take("nn/*.md"), key=lambda path: title_of(path).lower())
    examples = take("examples.md") + sorted(take("examples/*.md"))
    sections = {
        "Start": start,
        "Operators": rooms,
        "Modules": modules,
        "Examples": examples,
        "How kernels work": kernels,
        "Measured": take("benchmarks.md", "hardware.md", "report*.md"),
        "Tools": tools,
        "More": left,
    }
    return [{title: titled(pages)} for title, pages in sections.items() if pages]


def is_at(path: str, pattern: str) -> bool:
    """Whether a path lies in the folder of the pattern, and not in one below it."""
    return Path(path).parent == Path(pattern).parent


def titled(pages: list[Any]) -> list[dict[str, Any]]:
    """Pages under their own titles; sections of pages stay sections."""
    named: list[dict[str, Any]] = []
    for page in pages:
        if isinstance(page, dict):
            ((title, inner),) = page.items()
            named.append({title: titled(inner)})
        else:
            named.append({"Home" if page == "index.md" else title_of(page): page})
    return named


def title_of(path: str) -> str:
    found = re.search(r"^# (.+)$", (DOCS / path).read_text(), re.MULTILINE)
    return re.sub(r"[`*]", "", found[1]) if found else Path(path).stem


# ---- which page is about what


def dashed(name: str) -> str:
    return name.replace("_", "-")


def operator_page(operator: catalog.Operator) -> str:
    """An operator's own page, else that of its room or of an operator of the room which names it most often."""
    own = f"{dashed(operator.name)}.md"
    if (DOCS / own).exists():
        return own
    others = [f"{dashed(each.name)}.md" for each in catalog.operators() if each.room == operator.room]
    pages = [path for path in (f"{dashed(operator.room)}.md", *others) if (DOCS / path).exists()]
    return max(pages, key=lambda path: (DOCS / path).read_text().count(operator.name), default="api.md")


def module_pages() -> dict[str, str]:
    """Class of seqops.nn -> the page in docs/nn that describes it."""
    pages = sorted((DOCS / "nn").glob("*.md"))
    return {
        name: page.relative_to(DOCS).as_posix()
        for page in pages
        for name in re.findall(r"^::: seqops\.nn\.(\w+)$", page.read_text(), re.MULTILINE)
    }


def link(name: str, page: str | None, here: Path) -> str:
    """`name` as code, leading to a page where there is one."""
    code = f"`{name}`"
    return code if page is None else f"[{code}]({os.path.relpath(page, here)})"


def operator_links(names: tuple[str, ...], here: Path) -> str:
    pages = {each.name: operator_page(each) for each in catalog.operators()}
    return ", ".join(link(name, pages[name], here) for name in names)


# ---- tables


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """The class is for stylesheets/extra.css: sentences keep a width at which they can be read."""
    lines = [head, tuple("---" for _ in head), *rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f'<div class="catalog" markdown>\n\n{body}\n\n</div>\n'


def operators_table(here: Path) -> str:
    """One of each room, under its name."""
    tables = []
    for room, title in catalog.rooms().items():
        found = [each for each in catalog.operators() if each.room == room]
        rows = [(link(each.name, operator_page(each), here), escaped(each.summary)) for each in found]
        tables.append(f"### {title}\n\n" + table(("operator", ""), rows))
    return "\n".join(tables)


def modules_table(here: Path) -> str:
    pages = module_pages()
    rows = [
        (
            link(each.name, pages.get(each.name), here),
            f"{escaped(each.summary)} ({'; '.join(map(short, each.papers))})",
            operator_links(each.operators, here),
        )
        for each in catalog.modules()
    ]
    return table(("module", "", "operators"), rows)


def papers_table(here: Path) -> str:
    pages = module_pages()
    rows = [
        (
            str(paper.year),
            f"{paper.authors}, *{paper.title}*" if paper.authors else f"*{paper.title}*",
            operator_links(used, here),
            ", ".join(link(name, pages.get(name), here) for name in made),
        )
        for paper, used, made in catalog.citations()
    ]
    return table(("", "paper", "operators", "modules"), rows)


def examples_table(here: Path) -> str:
    rows = []
    for page in sorted((DOCS / "examples").glob("*.md")):
        path = page.relative_to(DOCS).as_posix()
        begin = re.search(r"^# .+\n\n((?:.+\n)+)", page.read_text())
        text = first_sentence(begin[1]) if begin else ""
        rows.append((f"[{title_of(path)}]({os.path.relpath(path, here)})", text, f"`docs/examples/{page.stem}.py`"))
    return table(("example", "", "script"), rows)


def first_sentence(text: str) -> str:
    """Without links, which would lead elsewhere from another folder."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(text.split()))
    return re.split(r"(?<=[\w)`]{2}[.:]) (?=[A-Z`])", plain)[0].rstrip(":")


def escaped(text: str) -> str:
    """Docstrings' plain stars are no emphasis."""
    return re.sub(r"(?<=\s)\*(?=\s)", r"\\*", text)


def short(paper: catalog.Paper) -> str:
    return f"{paper.authors}, {paper.year}" if paper.authors else f"{paper.title.split(':')[0]}, {paper.year}"


TABLES: dict[str, Callable[[Path], str]] = {
    "operators": operators_table,
    "modules": modules_table,
    "papers": papers_table,
    "examples": examples_table,
}


# ---- signatures and docstrings


def find(name: str) -> Any:
    """The object that a dotted name stands for. An attribute comes before a module of the same name."""
    first, *rest = name.split(".")
    path, target = first, importlib.import_module(first)
    for part in rest:
        path = f"{path}.{part}"
        target = getattr(target, part) if hasattr(target, part) else importlib.import_module(path)
    return target


def describe(name: str) -> str:
    """Markdown: a heading, the signature, the docstring."""
    target = find(name)
    documentation = inspect.getdoc(target)
    if not documentation:
        raise ValueError(f"{name} has no docstring")
    return f"### {name}\n\n```python\n{signature(name, target)}\n```\n\n{render(documentation)}\n"


def signature(name: str, target: Any) -> str:
    """`name(arguments)` with annotations; one argument a line where it would not fit into 80 columns."""
    short = name.rpartition(".")[2]
    described = inspect.signature(target, eval_str=True)
    if isinstance(target, type):
        described = described.replace(return_annotation=inspect.Signature.empty)
    text = short + re.sub(
        r"torch\.(?=Tensor)|torch\.nn\.\w+\.\w+\.(?=\w)|typing\.|collections\.abc\.|~", "", str(described)
    )
    if len(text) <= 80:
        return text
    arrow = "" if described.return_annotation is inspect.Signature.empty else text[text.rindex(" -> ") :]
    inside = text[len(short) + 1 : len(text) - len(arrow) - 1]
    # A comma inside brackets belongs to an annotation.
    arguments = re.split(r", (?![^\[(]*[\])])", inside)
    return f"{short}(\n    " + ",\n    ".join(arguments) + f",\n){arrow}"


def render(documentation: str) -> str:
    """Turn the indented sections of a docstring into lists; everything else is Markdown already."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n((?:    .*\n?|\n)+)", documentation + "\n", flags=re.MULTILINE)
    rendered = [pieces[0]]
    for title, body, rest in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        if title == "Example":
            rendered.append(f"**{title}**\n\n```pycon\n{textwrap.dedent(body).strip()}\n```\n\n{rest}")
            continue
        if title in ("Returns", "Yields"):  # sentences, where a new line begins nothing
            rendered.append(f"**{title}**\n\n{textwrap.dedent(body).strip()}\n\n{rest}")
            continue
        entries = re.split(r"\n(?! )", textwrap.dedent(body).strip())
        lines = [re.sub(r"\s*\n\s*", " ", entry) for entry in entries if entry]
        rendered.append(f"**{title}**\n\n" + "\n".join(f"- {emphasise(line)}" for line in lines) + f"\n\n{rest}")
    return "\n".join(rendered)


def emphasise(entry: str) -> str:
    """`name: meaning` with the name as code."""
    return re.sub(r"^([\w, ]+): ", lambda found: f"`{found[1]}`: ", entry)
