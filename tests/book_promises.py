"""What the book promises of itself, as functions from the repository's folder to a list of broken promises."""

import ast
import base64
import io
import json
import re
import tomllib
from collections import Counter, defaultdict
from itertools import chain

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from helpers.lab import ledger, registry
from helpers.lab.ledger import stored_claims
from helpers.lab.reading import length_of
from tests.hidden_state import Names, findings, streams

# runtime is where seeds and devices come from; reseed draws the seeds that it hands to runtime.
# Stored trainings have seeds of their own: they are the same under every BOOK_SEED.
EXEMPT = {
    "helpers/lab/runtime.py",
    "helpers/lab/reseed.py",
    "helpers/data/dropout.py",
    "helpers/data/initialization.py",
    "helpers/data/minibatch_loss.py",  # it measures milliseconds, and trains the network of the first two chapters
    "helpers/data/normalization.py",
}
ALLOWED = (
    # Expectations are few and small: they are computed on the CPU, where float64 is fast.
    "helpers/lab/gaussian.py: names the device 'cpu'",
    # They put random states back, and let two passes draw the same.
    "helpers/lab/watch.py: uses random.getstate",
    "helpers/lab/watch.py: uses random.setstate",
    "helpers/lab/watch.py: imports random",
    "helpers/lab/watch.py: uses numpy.random.get_state",
    "helpers/lab/watch.py: uses numpy.random.set_state",
    "helpers/lab/_problems.py: uses torch.set_rng_state",
    "helpers/lab/_problems.py: uses torch.cuda.set_rng_state",
    "helpers/lab/_problems.py: uses torch.cuda.get_rng_state",
)


REFERENCE = "book/api"  # the page of a chapter's module there is made when the book is built
MOST_WORDS, MOST_LINES, MOST_LINES_A_SECTION = 3_000, 150, 15
# Chapters that still have to be shortened: the set only shrinks.
UNREVISED: set[str] = set()


def notebooks(root):
    """Yield each notebook's path and cells, which say how JupyterLab shows them.

    That is ``[7]``, the execution count, for code. Jupyter's checkpoints are not part of the book.
    """
    for path in sorted((root / "book").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            behind = ""
            for cell in cells:
                if cell["cell_type"] == "code":
                    behind = cell["shown as"] = f"[{cell['execution_count'] or ' '}]"
                else:
                    cell["shown as"] = f"text behind {behind}" if behind else "text at the top"
            yield path, cells


def source(cell):
    return "".join(cell["source"])


def place(root, path, cell=None):
    name = path.relative_to(root).as_posix()
    return name if cell is None else f"{name} {cell['shown as']} ({cell.get('id', 'no id')})"


def texts(root):
    """Yield place and text of everything a reader reads: Markdown pages and Markdown cells."""
    for path in sorted((root / "book").rglob("*.md")):
        if ".ipynb_checkpoints" not in path.parts:
            yield path, place(root, path), path.read_text(encoding="utf-8")
    for path, cells in notebooks(root):
        for cell in cells:
            if cell["cell_type"] == "markdown":
                yield path, place(root, path, cell), source(cell)


def toc_entries(root):
    def files(node):
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("root", "file"):
                    yield value
                else:
                    yield from files(value)
        elif isinstance(node, list):
            for item in node:
                yield from files(item)

    return list(files(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))))


def missing_pages(root):
    """Every file in _toc.yml exists or is made, and every notebook and page under book/ is in it."""
    listed = toc_entries(root)
    made = {f"{REFERENCE}/{place.chapter}" for place in registry.places(root / "_toc.yml")}
    problems = [
        f"_toc.yml: {entry} does not exist"
        for entry in listed
        if entry not in made and not any((root / f"{entry}{suffix}").exists() for suffix in (".md", ".ipynb"))
    ]
    pages = {path for path, *_ in notebooks(root)} | {path for path, *_ in texts(root)}
    unlisted = [page for page in sorted(pages) if page.relative_to(root).with_suffix("").as_posix() not in listed]
    return problems + [f"{place(root, page)} is not in _toc.yml" for page in unlisted]


def registered_claims(root):
    """Every claim of the registry, by its id."""
    chapters = registry.read_chapters(root / "helpers/registry").values()
    return {claim.id: claim for chapter in chapters for claim in chapter.claims}


def unmatched_claims(root):
    """Every claim is checked as often as it is registered, in one notebook, and each check held."""
    registered = registered_claims(root)
    homes, checked, problems = defaultdict(set), [], []
    for path, cells in notebooks(root):
        for cell in cells:
            for claim in stored_claims({"cells": [cell]}):
                homes[claim["id"]].add(place(root, path))
                checked.append(claim["id"])
                if claim["id"] not in registered:
                    problems.append(f"{place(root, path, cell)}: {claim['id']} is not registered")
                if not claim["passed"]:
                    problems.append(f"{place(root, path, cell)}: {claim['id']} is stored as failed")
    problems += registry.miscounted(registered.values(), (id for id in checked if id in registered))
    return problems + [
        f"{id} is shown in more than one notebook: {', '.join(sorted(paths))}"
        for id, paths in homes.items()
        if len(paths) > 1
    ]


def repeated_cases(root):
    """Two checks of one claim have different cases: a notebook that runs counts them by their names."""
    problems = []
    for path, cells in notebooks(root):
        names = Counter((claim["id"], claim["case"]) for claim in stored_claims({"cells": cells}))
        problems += [
            f"{place(root, path)}: {count} checks of {id} have the case {case!r}"
            for (id, case), count in names.items()
            if count > 1
        ]
    return problems


def stale_ledger(root):
    """The stored ledger shows each check as the notebooks store it, and no other."""
    path = root / "book" / "ledger.ipynb"
    if not path.exists():
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pages = ("".join(output.get("data", {}).get("text/html", "")) for output in outputs)
    shown = Counter(row for page in pages for row in re.findall(r'<tr id="[^"]*" data-kind=.*?</tr>', page, re.DOTALL))
    problems, numbers = [], Counter()
    for notebook, cells in notebooks(root):
        rows = Counter()
        for claim in stored_claims({"cells": cells}):
            numbers[claim["id"]] += 1
            rows[ledger._html_check(f"{claim['id']}.{numbers[claim['id']]}", claim)] += 1
        if missing := (rows - shown).total():
            problems.append(f"{place(root, path)}: {missing} checks are not those of {place(root, notebook)}")
        shown -= rows
    if shown and not problems:
        problems.append(f"{place(root, path)}: {shown.total()} checks are in no notebook")
    return problems


def unexecuted_cells(root):
    """Every notebook is stored fully executed, top to bottom, without errors or stderr."""
    problems = []
    for path, cells in notebooks(root):
        expected = 0
        for cell in cells:
            if cell["cell_type"] != "code" or not source(cell).strip():
                continue
            expected += 1
            where = place(root, path, cell)
            if cell["execution_count"] != expected:
                problems.append(f"{where}: execution count {cell['execution_count']}, wanted {expected}")
            for output in cell["outputs"]:
                if output["output_type"] == "error":
                    problems.append(f"{where}: stores the error {output['ename']}")
                if output.get("name") == "stderr":
                    problems.append(f"{where}: stores text on stderr")
    return problems


def figures_without_a_page(root):
    """Every Plotly figure is stored as HTML as well: the page draws that one."""
    return [
        f"{place(root, path, cell)}: a Plotly figure without its HTML form"
        for path, cells in notebooks(root)
        for cell in cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {}) and "text/html" not in output["data"]
    ]


def unfaithful_pictures(root):
    """Every figure stores a picture that can be read, is not blank, and says of itself what the figure says it draws.

    What it draws is compared when the notebook is executed again; the picture carries the same words inside its file.
    """
    problems = []
    for path, cells in notebooks(root):
        for cell in (cell for cell in cells if cell["cell_type"] == "code"):
            shown = [output.get("data", {}) for output in cell["outputs"]]
            figures = [data for data in shown if "image/png" in data or is_matplotlib(data)]
            faults = list(filter(None, map(fault_of_picture, figures)))
            is_described = {"figure", "image"} & cell["metadata"].get("mystnb", {}).keys()
            if is_described and not figures and not any("application/vnd.plotly.v1+json" in data for data in shown):
                faults.append("a caption without a figure")
            problems += [f"{place(root, path, cell)}: {fault}" for fault in faults]
    return problems


def is_matplotlib(data):
    return "".join(data.get("text/plain", "")).startswith("<Figure size")


def fault_of_picture(data):
    """Return what is wrong with a stored picture, or nothing."""
    if "image/png" not in data:
        return "a figure without its picture"
    try:
        picture = Image.open(io.BytesIO(base64.b64decode("".join(data["image/png"]))))
        picture.load()
    except (ValueError, OSError):
        return "a picture that cannot be read"
    if min(picture.size) < 100 or all(low == high for low, high in picture.convert("RGBA").getextrema()):
        return f"a blank picture of {picture.size[0]} by {picture.size[1]} pixels"
    drawn = "".join(data.get("text/plain", ""))
    if "\n" not in drawn:
        return "a picture that does not say what it draws"
    if picture.text.get("Description") != drawn:
        return f"a picture of another figure: it draws {picture.text.get('Description')!r}, not {drawn!r}"
    return None


def undescribed_figures(root):
    """Every figure has alt text and a caption; every image in the text has alt text."""
    problems = []
    for path, cells in notebooks(root):
        for cell in cells:
            if not any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                continue
            described = cell["metadata"].get("mystnb", {})
            if not described.get("image", {}).get("alt", "").strip():
                problems.append(f"{place(root, path, cell)}: a figure without alt text")
            if not described.get("figure", {}).get("caption", "").strip():
                problems.append(f"{place(root, path, cell)}: a figure without a caption")
    for _, where, text in texts(root):
        problems += [
            f"{where}: the image {name} has no alt text"
            for name, options in re.findall(r"\{(?:image|figure)\} (\S+)\n((?::.*\n)*)", text)
            if not re.search(r":alt: *\S", options)
        ]
        problems += [f"{where}: the image {name} has no alt text" for name in re.findall(r"!\[\s*\]\((.*?)\)", text)]
    return problems


def unresolved_references(root):
    """Every citation, glossary term, theorem, label, page and glued number that the text refers to exists."""
    everything = list(texts(root))
    bibliography = "".join(path.read_text(encoding="utf-8") for path in (root / "book").glob("*.bib"))
    cited = set(re.findall(r"@\w+\{([^,\s]+),", bibliography))
    terms = {
        line.strip().lower()
        for _, _, text in everything
        for block in re.findall(r"```\{glossary\}\n(.*?)```", text, flags=re.DOTALL)
        for line in block.splitlines()
        if line and not line.startswith(" ")
    }
    labels = {
        label
        for _, _, text in everything
        for pattern in (r"^:label: *(\S+)", r"^:name: *(\S+)", r"^\(([^()\s]+)\)=$")
        for label in re.findall(pattern, text, flags=re.MULTILINE)
    }
    pages = toc_entries(root)
    chapters = {place.chapter for place in registry.places(root / "_toc.yml")}
    glued = defaultdict(set)
    for path, cells in notebooks(root):
        for cell in cells:
            labels |= {cell["metadata"].get("mystnb", {}).get("figure", {}).get("name")}
            for output in cell.get("outputs", []):
                glued[path] |= {output.get("metadata", {}).get("scrapbook", {}).get("name")}

    def resolves(path, role, target):
        if role.startswith("cite"):
            return set(target.replace(" ", "").split(",")) <= cited
        if role == "term":
            return target.lower() in terms
        if role == "doc":
            return (path.parent / target).resolve().relative_to(root.resolve()).as_posix() in pages
        if role == "chapter":
            return target in chapters
        if role == "glue:text":
            name, _, rest = target.partition("::")
            return rest.split(":")[0] in glued[(path.parent / name).resolve()]
        return target in labels

    problems = []
    for path, where, text in everything:
        for role, content in re.findall(r"\{(cite:\w+|term|prf:ref|ref|numref|doc|chapter|glue:text)\}`([^`]+)`", text):
            target = re.sub(r"^.*<(.+)>$", r"\1", content, flags=re.DOTALL)
            if not resolves(path.resolve(), role, target):
                problems.append(f"{where}: {{{role}}}`{content}` refers to nothing")
    return problems


def incomplete_chapters(root):
    """A chapter has notebook, module, registry file and tests of one name, and its module a page in the reference."""
    pages, problems = toc_entries(root), []
    registered = registry.read_chapters(root / "helpers/registry")
    listed = registry.places(root / "_toc.yml")
    titles = {path.relative_to(root).with_suffix("").as_posix(): source(cells[0]) for path, cells in notebooks(root)}
    for chapter, page in ((place.chapter, place.page) for place in listed):
        files = [
            f"{page}.ipynb",
            f"helpers/{chapter}.py",
            f"helpers/registry/{chapter}.yml",
            f"tests/test_{chapter}*.py",
        ]
        problems += [f"{chapter} has no {file}" for file in files if not any(root.glob(file))]
        if f"{REFERENCE}/{chapter}" not in pages:
            problems.append(f"{chapter} has no line {REFERENCE}/{chapter} in _toc.yml")
        if chapter in registered and page in titles:
            title = f"# {registered[chapter].title}"
            if titles[page].splitlines()[0] != title:
                problems.append(f"{page}.ipynb does not begin with its registered title: {title}")
    unlisted = registered.keys() - {place.chapter for place in listed}
    return problems + [f"{chapter} is registered, but no chapter of _toc.yml" for chapter in sorted(unlisted)]


def source_rows(root):
    """Section and problems of each row of the source map."""
    rows = [line.split("|") for line in (root / "book/source_map.md").read_text(encoding="utf-8").splitlines()]
    return [{row[0].strip(), *registry.split(row[2].strip())} for row in rows if len(row) == 3]


def unmapped_sources(root):
    """Every source of a chapter, written or to come, stands in source_map.md, and every row there has its chapter."""
    rows = source_rows(root)
    parts = yaml.safe_load((root / "book/to_come.yml").read_text(encoding="utf-8"))
    named = {id: set(claim.sources) for id, claim in registered_claims(root).items()}
    for chapters in parts.values():
        named |= {name: set(registry.split(chapter["source"])) for name, chapter in chapters.items()}
    problems = [
        f"{id} has the source {part}, which no row of source_map.md names"
        for id, sources in named.items()
        for part in sorted(sources - set().union(*rows))
    ]
    return problems + [
        f"no chapter has the sources of a row of source_map.md: {', '.join(sorted(row))}"
        for row in rows
        if row.isdisjoint(set().union(*named.values()))
    ]


def missing_errata(root):
    """Every erratum that the registry names is an entry of errata.md."""
    anchors = re.findall(r"^\((\S+)\)=$", (root / "book" / "errata.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [
        f"{id} has the erratum {claim.erratum}, which errata.md does not have"
        for id, claim in registered_claims(root).items()
        if claim.erratum and claim.erratum not in anchors
    ]


def hidden_state(root):
    """No notebook and no helper seeds a generator, reads the clock or names a device, except helpers.lab.runtime."""
    problems = []
    for path in sorted((root / "helpers").rglob("*.py")):
        if path.relative_to(root).as_posix() not in EXEMPT:
            problems += [f"{place(root, path)}: {found}" for found in findings(path.read_text(encoding="utf-8"))]
    for path, cells in notebooks(root):
        names = Names()  # what one cell imports, the next one uses
        for cell in cells:
            if cell["cell_type"] == "code":
                problems += [f"{place(root, path, cell)}: {found}" for found in findings(source(cell), names)]
    return [problem for problem in problems if problem not in ALLOWED]


def shared_streams(root):
    """Every simulation has a stream of its own: within a notebook no two ask for one name, nor for a helper's."""
    helpers = [path for path in sorted((root / "helpers").rglob("*.py")) if place(root, path) not in EXEMPT]
    of_helpers = Counter(chain.from_iterable(streams([parsed(path.read_text(encoding="utf-8"))]) for path in helpers))
    problems = []
    for path, cells in notebooks(root):
        trees = [parsed(source(cell)) for cell in cells if cell["cell_type"] == "code"]
        problems += [
            f"{place(root, path)}: {count} simulations draw from the stream {name!r}"
            for name, count in (Counter(streams(trees)) + of_helpers).items()
            if count > 1
        ]
    return problems


def parsed(code):
    """Return the syntax tree of code; what is no Python, another promise refuses."""
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def revised_chapters(root):
    for path, cells in notebooks(root):
        if path.stem not in UNREVISED | {"ledger"} and path.parent.name != "practice":
            yield path, cells


def long_stories(root):
    """Every chapter is short to read: so many words outside exercises, so many lines of code that are not folded."""
    problems = []
    for path, cells in revised_chapters(root):
        length = length_of(cells)
        lines = sum(length.visible.values())
        if length.words > MOST_WORDS:
            problems.append(f"{place(root, path)}: {length.words} words, at most {MOST_WORDS}")
        if lines > MOST_LINES:
            problems.append(f"{place(root, path)}: {lines} visible lines of code, at most {MOST_LINES}")
        problems += [
            f"{place(root, path)}: {count} visible lines in the section {section!r}, at most {MOST_LINES_A_SECTION}"
            for section, count in length.visible.items()
            if count > MOST_LINES_A_SECTION
        ]
    return problems


def unlabeled_folds(root):
    """Every cell that is folded away says what it holds, in a comment in its first line."""
    return [
        f"{place(root, path, cell)}: a folded cell must begin with a comment that says what it holds"
        for path, cells in revised_chapters(root)
        for cell in cells
        if {"hide-input", "hide-cell"} & set(cell["metadata"].get("tags", []))
        if not re.match(r"# *\w", source(cell))
    ]


def constraints(root):
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def disagreeing_packages(root):
    """environment.yml, pyproject.toml and constraints.txt agree: conda users, pip users and CI get the same."""
    problems, pins = [], defaultdict(list)
    for pin in constraints(root):
        pins[canonicalize_name(pin.name)].append(pin)
        if not re.fullmatch(r"==[^*+]+", str(pin.specifier)):
            problems.append(f"constraints.txt: {pin} is not one exact version that installs anywhere")
    extras = project(root)["optional-dependencies"]
    for wanted in map(Requirement, chain(project(root)["dependencies"], *extras.values())):
        chosen = pins[canonicalize_name(wanted.name)]
        if not chosen:
            problems.append(f"constraints.txt: {wanted.name} of pyproject.toml has no line")
        for pin in chosen:
            if not all(wanted.specifier.contains(version.version, prereleases=True) for version in pin.specifier):
                problems.append(f"constraints.txt: {pin} is outside pyproject.toml's {wanted}")

    environment = yaml.safe_load((root / "environment.yml").read_text(encoding="utf-8"))
    *from_conda, from_pip = environment["dependencies"]
    for_readers = [name for name in extras if name not in ("bench", "constraints")]
    wanted = ["--constraint constraints.txt", f"--editable .[{','.join(for_readers)}]"]
    if [re.split("[=<>]", package)[0] for package in from_conda] != ["python", "pip"]:
        problems.append(f"environment.yml: conda should install python and pip, not {from_conda}")
    if from_pip.get("pip") != wanted:
        problems.append(f"environment.yml: pip should get {wanted}, not {from_pip.get('pip')}")
    return problems


def chapters_without_a_tool(root):
    """The toolbox names something of each chapter's module."""
    toolbox = (root / "book/toolbox.md").read_text(encoding="utf-8")
    return [
        f"toolbox.md names nothing of helpers.{place.chapter}"
        for place in registry.places(root / "_toc.yml")
        if not re.search(rf"`~?helpers\.{place.chapter}\.\w", toolbox)
    ]


def undocumented_modules(root):
    """Every module of the bench stands on a page of the reference."""
    pages = "".join(path.read_text(encoding="utf-8") for path in sorted((root / REFERENCE).glob("*.md")))
    documented = re.findall(r"automodule:: helpers\.lab\.(\w+)$", pages, flags=re.MULTILINE)
    modules = sorted(path.stem for path in (root / "helpers/lab").glob("[!_]*.py"))
    return [f"helpers.lab.{name} is on no page of {REFERENCE}" for name in modules if name not in documented]


def names_of_the_bench(root):
    """What notebooks import from helpers.lab is what it offers: no name more, none less."""
    offered = set()
    for node in ast.walk(ast.parse((root / "helpers/lab/__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            offered = set(ast.literal_eval(node.value))
    imported = {
        alias.name
        for _, cells in notebooks(root)
        for cell in cells
        if cell["cell_type"] == "code"
        for node in ast.walk(ast.parse(source(cell)))
        if isinstance(node, ast.ImportFrom) and node.module == "helpers.lab"
        for alias in node.names
    }
    return [
        *(f"helpers.lab offers {name}, which no notebook uses" for name in sorted(offered - imported)),
        *(f"a notebook imports {name}, which helpers.lab does not offer" for name in sorted(imported - offered)),
    ]


PROMISES = (
    disagreeing_packages,
    missing_pages,
    incomplete_chapters,
    chapters_without_a_tool,
    undocumented_modules,
    names_of_the_bench,
    unmatched_claims,
    repeated_cases,
    stale_ledger,
    unexecuted_cells,
    figures_without_a_page,
    unfaithful_pictures,
    undescribed_figures,
    unresolved_references,
    unmapped_sources,
    missing_errata,
    hidden_state,
    shared_streams,
    long_stories,
    unlabeled_folds,
)
