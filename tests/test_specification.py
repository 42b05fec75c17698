"""docs/specification.md against what it describes: clauses, the code that cites them, and the checks that hold them."""

import ast
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

from refspan import CLAUSES
from refspan.conformance.protocol import OPERATIONS, Stream
from refspan.conformance.runner import select

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "specification.md"
LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")


@cache
def sections() -> dict[str, str]:
    """Heading -> text, in order, of all sections that a `## ` begins; fenced code holds no headings."""
    found: dict[str, str] = {}
    name, fenced = "", False
    for line in PAGE.read_text().splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            name = line.removeprefix("## ").strip()
            assert name not in found, f"two sections are headed '## {name}': an anchor must be unique"
            found[name] = ""
        elif name:
            found[name] += f"{line}\n"
    return found


def section(clause: str) -> str:
    assert clause in sections(), f"docs/specification.md: write a section headed '## {clause}'"
    return sections()[clause]


def paragraph(clause: str, start: str) -> str:
    """The one paragraph of a clause's section that begins so, on one line."""
    found = [" ".join(p.split()) for p in section(clause).split("\n\n") if p.lstrip().startswith(f"{start}: ")]
    assert len(found) == 1, f"## {clause}: expected one paragraph that begins with '{start}: ', found {len(found)}"
    return found[0]


def linked_code(clause: str) -> list[tuple[str, list[str]]]:
    """Paths in the paragraph Code, each with the names that stand between it and the next."""
    text = paragraph(clause, "Code")
    parts = re.split(LINK, text)[1:]  # label, target, text, label, target, text, ..
    return [(label, re.findall(r"`([\w.]+)`", after)) for label, after in zip(parts[::3], parts[2::3], strict=True)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def defined_in(path: Path) -> set[str]:
    """Functions and classes of a module, methods as `Class.method`."""
    names = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return names


def docstrings_of(path: Path) -> str:
    """Every string that stands as a statement of its own: docstrings of modules, classes, functions and attributes."""
    strings = [
        node.value.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return "\n".join(strings)


def cites(text: str, clause: str) -> bool:
    return re.search(rf"\b{clause}\b", text) is not None


def test_a_section_per_clause_in_order():
    headings = re.findall(r"^(#+ +[A-Z]{2,}\b.*)$", PAGE.read_text(), flags=re.MULTILINE)
    expected = [f"## {clause}" for clause in CLAUSES]
    assert headings == expected, (
        "docs/specification.md: a heading that looks like an id must be that of a clause, and each clause has one, in "
        f"the order of refspan/clauses.py; missing {[h for h in expected if h not in headings]}, "
        f"no clauses {[h for h in headings if h not in expected]}, expected {expected}"
    )


@pytest.mark.parametrize("clause", CLAUSES)
def test_section_begins_with_the_rule(clause):
    line = f"> {CLAUSES[clause]}"
    assert section(clause).split("\n\n")[0].strip() == line, (
        f"## {clause}: must begin with the rule of refspan/clauses.py, word for word, on a line of its own:\n{line}"
    )


@pytest.mark.parametrize("clause", CLAUSES)
def test_section_lists_the_checks_of_its_clause(clause):
    expected = [check.id for check in select() if clause in check.clauses]
    assert expected, f"no check cites {clause}: write one in conformance/checks/ with clauses=[.., '{clause}']"
    written = re.findall(r"`([^`]+)`", paragraph(clause, "Checks"))
    line = textwrap.fill(f"Checks: {', '.join(f'`{id_}`' for id_ in expected)}", 120, break_on_hyphens=False)
    assert written == expected, f"## {clause}: the checks that cite it are others; write\n\n{line}\n"


@pytest.mark.parametrize("clause", CLAUSES)
def test_section_links_the_code_of_its_clause(clause):
    linked = linked_code(clause)
    assert linked, (
        f"## {clause}: the paragraph Code links nothing; write [refspan/FILE.py](../refspan/FILE.py) `function`"
    )
    for label, names in linked:
        assert (ROOT / label).is_file(), f"## {clause}: there is no {label}; link the module that it is in now"
        assert names, f"## {clause}: write which functions of {label} implement it, each in `..`, behind the link"
        unknown = set(names) - defined_in(ROOT / label)
        assert not unknown, f"## {clause}: {label} defines no {', '.join(sorted(unknown))}; name what it is called now"
    files = [label for label, _ in linked if label.startswith("refspan/")]
    assert any(cites(docstrings_of(ROOT / file), clause) for file in files), (
        f"## {clause}: the code that obeys a clause cites its id; write it into a docstring of {' or '.join(files)}"
    )


def test_links_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in sections()}  # as GitHub makes them
    for label, target in LINK.findall(PAGE.read_text()):
        if target.startswith("https://"):
            continue
        if target.startswith("#"):
            assert target[1:] in anchors, f"[{label}]({target}): no such section; expected one of {sorted(anchors)}"
            continue
        assert target == f"../{label.rstrip('/')}", f"[{label}]({target}): write [{label}](../{label.rstrip('/')})"
        assert (ROOT / label).exists(), f"[{label}]({target}): no such file; link the one that it is in now"


def test_operations_are_those_of_the_protocol():
    rows = [line.split("|") for line in section("Backend operations").splitlines() if line.startswith("|")]
    written = [name for row in rows for name in re.findall(r"`(\w+)`", row[1])]
    expected = [*OPERATIONS, *(name for name in vars(Stream) if not name.startswith("_"))]
    assert sorted(written) == sorted(expected), (
        "## Backend operations: the tables must name the operations of conformance/protocol.py, each once in the first "
        f"column; missing {sorted(set(expected) - set(written))}, not there {sorted(set(written) - set(expected))}"
    )
