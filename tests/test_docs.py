"""Documentation that can be wrong is checked: examples run, links lead somewhere, names exist, nothing is left out."""

import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import seqops
import seqops.nn
from seqops import catalog
from seqops.core import backend

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
OPERATORS = [name for name in seqops.__all__ if name in backend.table()]
MODULES = [module.name for module in catalog.modules()]


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def hooks() -> ModuleType:
    """What mkdocs runs while it builds the site."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced code of a page: line number and text."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=ids)
def test_examples_run(page, tmp_path, monkeypatch, capsys):
    """A reader can paste the blocks of a page one after another; a `text` block right after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "example"}
    printed = dict(blocks(page, "text"))
    for line, code in blocks(page, "python"):
        # The empty lines make tracebacks name the line in the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)
        output = capsys.readouterr().out
        expected = printed.get(line + code.count("\n") + 3)
        assert expected is None or output == expected, page


def test_readme_first_screen():
    """What it is, the two commands and what they need come before anything else, and there is an example."""
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:20])
    for expected in ("make demo", "make test", "Python 3.10", "C++20", "PyTorch"):
        assert expected in screen
    assert len(blocks(ROOT / "README.md", "python")) >= 2


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_to_files_and_headings(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose):
        path, _, heading = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings]
            assert heading in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:`|^    )(?:\w+=\S+ )?make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_pages_render_exists(page):
    """A line `::: seqops.nn.LRU` names something with a docstring, or one of the tables."""
    site = hooks()
    for name in re.findall(r"^::: (.*)$", page.read_text(), re.MULTILINE):
        assert site.replacement(name, page.parent.relative_to(DOCS)).strip(), name


def test_every_make_target_is_described():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert set(re.findall(r"make ([a-z-]+)", shown)) == set(phony)


def test_environment_variables_are_those_that_the_code_reads():
    sources = [*ROOT.glob("seqops/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"]
    read = {
        name
        for source in sources
        for name in re.findall(r"(?:getenv\(|environ\.get\(|environ\[)\s*\"(SEQOPS_\w+)\"", source.read_text())
    }
    readme = (ROOT / "README.md").read_text()
    documented = set(re.findall(r"^\| `(SEQOPS_\w+)`", readme, re.MULTILINE))
    assert documented == read
    for page in PAGES:
        assert set(re.findall(r"SEQOPS_[A-Z_]+(?=`)", page.read_text())) <= documented | {"SEQOPS_ISA"}, page.name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_that_pages_name_exist(page):
    made_by_the_benchmark = {"bench/results/latest.json", "bench/results/latest.html"}
    pattern = r"`((?:csrc|seqops|tests|bench|docs)/[\w./-]*|setup\.py|Makefile|requirements\.txt|pyproject\.toml)`"
    for path in set(re.findall(pattern, page.read_text())) - made_by_the_benchmark:
        assert (ROOT / path).exists(), path


def test_tables_hold_everything():
    """Operators, modules, their papers and the examples, each with a link to a page that exists."""
    site = hooks()
    holds = {
        "operators": [operator.name for operator in catalog.operators()],
        "modules": MODULES,
        "papers": [paper.title for paper, _, _ in catalog.citations()],
        "examples": [page.stem for page in (DOCS / "examples").glob("*.md")],
    }
    assert holds.keys() == site.TABLES.keys()
    for name, expected in holds.items():
        for folder in (Path(), Path("nn")):
            text = site.replacement(name, folder)
            assert [each for each in expected if each not in text] == []
            targets = re.findall(r"\]\(([^)]+)\)", text)
            assert targets and all((DOCS / folder / target).resolve().exists() for target in targets)


def test_every_public_name_is_described():
    """Operators and what modules share in the API, modules on pages of their own."""
    pages = [DOCS / "api.md", *(DOCS / "nn").glob("*.md")]
    described = [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)]
    public = {f"seqops.{name}" for name in seqops.__all__ if callable(getattr(seqops, name))}
    public |= {f"seqops.nn.{name}" for name in seqops.nn.__all__}
    assert public <= set(described)
    assert len(described) == len(set(described)), "described twice"
    assert OPERATORS


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_page_and_a_picture(module):
    """The page in docs/nn that describes it shows what reaches what in it, and runs it."""
    page = next(page for page in (DOCS / "nn").glob("*.md") if f"\n::: seqops.nn.{module}\n" in page.read_text())
    assert re.search(rf"^!\[.+\]\(\.\./figures/nn/{module}\.svg\)$", page.read_text(), re.MULTILINE)
    assert blocks(page, "python")
    picture = (DOCS / "figures" / "nn" / f"{module}.svg").read_text()
    assert "input step" in picture and "output step" in picture and len(picture) < 20_000


def test_pictures_of_modules_are_the_same_when_drawn_again(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS / "figures"))
    drawing = importlib.import_module("modules")
    first = drawing.draw("LSTM")
    assert drawing.draw("LSTM") == first
    # Nothing above the diagonal of a causal module, and everything on it.
    sizes = drawing.influence(drawing.case_of("LSTM"))
    assert sizes.shape == (drawing.STEPS, drawing.STEPS)
    assert bool((sizes.triu(1) == 0).all()) and bool((sizes.diagonal() > 0).all())


def test_every_page_is_in_the_navigation():
    """Once, under its own title."""

    def leaves(nav: list) -> list[str]:
        return [
            path
            for entry in nav
            for value in entry.values()
            for path in ([value] if isinstance(value, str) else leaves(value))
        ]

    nav = hooks().navigation()
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(leaves(nav)) == sorted(pages)
    assert [title for section in nav for title in section][:5] == [
        "Start",
        "Operators",
        "Modules",
        "Examples",
        "How kernels work",
    ]


@pytest.mark.parametrize("operator", OPERATORS)
def test_pages_of_operators_have_formula_picture_shapes_cost_and_numbers(operator):
    """On the operator's own page or its room's."""
    page = DOCS / hooks().operator_page(next(each for each in catalog.operators() if each.name == operator))
    text = page.read_text()
    assert re.search(r"^    \S.* = ", text, re.MULTILINE), "a formula"
    assert re.search(r"^!\[.+\]\(figures/[\w-]+\.svg\)$", text, re.MULTILINE), "a picture"
    assert re.search(r"`\[[A-Z*.]\S*, ", text), "shapes"
    assert re.search(r"^#+ .*(Cost|How it is computed|[Mm]emory|Rules for all)", text, re.MULTILINE), "cost"
    results = "".join(path.read_text() for path in (ROOT / "bench" / "results").glob("*.json"))
    assert re.search(rf'"op": *"{operator}"', results), f"a measurement: python -m bench --op {operator}"
    measured = "".join(re.findall(r"^<!-- bench:begin -->$(.*?)^<!-- bench:end -->$", text, re.MULTILINE | re.DOTALL))
    rows = {operator, *(f"nn.{module.name}" for module in catalog.modules() if module.operators == (operator,))}
    assert any(re.search(rf"^\| [^|]*(?<![\w.]){re.escape(row)}\b", measured, re.MULTILINE) for row in rows), "numbers"


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_page(operator):
    """Its own page, or that of its room, names it, with all its arguments."""
    function = getattr(seqops, operator)
    own, room = (
        ROOT / "docs" / f"{name}.md" for name in (operator.replace("_", "-"), function.__module__.split(".")[1])
    )
    page = (own if own.exists() else room).read_text()
    assert f"`{operator}`" in page
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"[`(, ]{argument}[`=,\]]", page), argument


@pytest.mark.parametrize("operator", OPERATORS)
def test_docstrings_are_complete(operator):
    """Every argument, what comes back, what can be raised, and the memory beyond the outputs."""
    function = getattr(seqops, operator)
    sections = re.search(r"Args:(.*)Returns:(.*)Raises:(.*)Memory:", function.__doc__, re.DOTALL)
    assert sections
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"^ *(\w+, )*{argument}[,:]", sections[1], re.MULTILINE), argument


def test_pins_satisfy_what_the_package_asks_for():
    """Each dependency and tool of pyproject.toml has an exact version in requirements.txt."""
    project = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(
        r"^(?:dependencies|cuda|test|bench|docs|examples) = \[(.*?)\]$", project, re.MULTILINE | re.DOTALL
    )
    asked = re.findall(r'"([a-z0-9-]+)[^"]*"', "".join(lists))
    pinned = re.findall(r"^([a-z0-9-]+)==[\d.]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert {"torch", "numpy", "click", "rich", "pytest", "mkdocs"} <= set(asked) <= set(pinned)


def test_site_loads_nothing_over_the_network(tmp_path):
    """The built pages open from disk: scripts, styles and pictures are local, and the API page holds the signatures."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text())
        assert loaded
        assert [address for address in loaded if re.match(r"(https?:)?//", address)] == [], page.name
        assert "<p>::: " not in page.read_text(), page.name
    api = (tmp_path / "api.html").read_text()
    for operator in OPERATORS:
        assert f'id="seqops{operator}"' in api or f'id="seqops.{operator}"' in api
