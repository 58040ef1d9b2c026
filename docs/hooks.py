"""What mkdocs runs while it builds the site: a line `::: seqops.lstm` becomes that object's signature and docstring.

The API page is therefore made from the code it describes. Docstrings are Markdown, with sections (`Args:`, `Returns:`,
`Raises:`) whose entries are indented.
"""

import importlib
import inspect
import re
import textwrap
from typing import Any

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with the source of each page."""
    return re.sub(r"^::: ([\w.]+)$", lambda found: describe(found[1]), markdown, flags=re.MULTILINE)


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
        entries = re.split(r"\n(?! )", textwrap.dedent(body).strip())
        lines = [re.sub(r"\s*\n\s*", " ", entry) for entry in entries if entry]
        rendered.append(f"**{title}**\n\n" + "\n".join(f"- {emphasise(line)}" for line in lines) + f"\n\n{rest}")
    return "\n".join(rendered)


def emphasise(entry: str) -> str:
    """`name: meaning` with the name as code."""
    return re.sub(r"^([\w, ]+): ", lambda found: f"`{found[1]}`: ", entry)
