"""What a piece of code does to seeds, clocks, devices and the environment behind the book's back, read from its syntax.

Names are followed through imports, aliases and ``getattr``; what a program computes as it runs is out of reach.
"""

import ast
import re
from collections.abc import Iterable, Iterator

MODULES = re.compile(r"(random|secrets|time|datetime|uuid|numpy\.random)(\.|$)")
# Whatever has such a name: a seed, a state, or a source of draws that nobody named.
NAMES = {
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed", "set_rng_state", "set_rng_state_all"),
    *("default_rng", "RandomState", "SeedSequence", "Generator", "default_generator", "default_generators"),
    *("urandom", "getrandom", "putenv", "unsetenv", "cuda", "mps"),
    *("set_default_device", "set_default_dtype", "set_num_threads", "use_deterministic_algorithms"),
}
# torch.cuda is a module as well: to ask whether there is a device is no harm, to choose one is.
ALLOWED = re.compile(
    r"torch\.backends\..*|torch\.cuda\.(is_available|device_count|is_initialized)|torch\.random\.fork_rng"
)
TYPES = {"torch.cuda", "torch.Generator", "numpy.random.Generator"}  # they may be named, in annotations
DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|binomial)(_like)?"
    r"|(?!torch\.nn\.init\.).*\.(normal|uniform|bernoulli|exponential|random|log_normal|cauchy|geometric)_|.*\.(multinomial|bernoulli)"
)
# A function may call these, since it is called inside ``with seeded(…)`` itself, as constructors are.
INITIAL_DRAWS = re.compile(r"torch\.nn\.init\.(?!zeros|ones|constant|eye|dirac|calculate_gain)\w+")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
OF_DISTRIBUTIONS = {"sample", "rsample", "sample_n"}  # torch.distributions take no generator
SEEDS = {"seed", "random_state"}
SOURCES = ("seeded", "generator", "rng")
DEVICE_NAME = re.compile(r"(cpu|cuda(:\d+)?|mps)")


class Names:
    """What names stand for, by a program's imports and assignments so far."""

    def __init__(self) -> None:
        self.meaning: dict[str, str] = {}
        self.with_generator: set[str] = set()  # dictionaries that hold one

    def read(self, tree: ast.AST) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    full = name.name if name.asname else name.name.partition(".")[0]
                    self.meaning[name.asname or full] = full
            elif isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    self.meaning[name.asname or name.name] = f"{node.module}.{name.name}"
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr) and node.value:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self._assign(target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            if full := self.full(value):
                self.meaning.setdefault(target.id, full)
            if self.holds_generator(value):
                self.with_generator.add(target.id)
        elif isinstance(target, ast.Subscript) and getattr(target.slice, "value", None) == "generator":
            self.with_generator.add(getattr(target.value, "id", ""))

    def full(self, node: ast.AST) -> str:
        """Return the dotted name of an expression, with what its first part stands for; else nothing."""
        if isinstance(node, ast.Name):
            return self.meaning.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            start = self.full(node.value)
            return f"{start}.{node.attr}" if start else f"?.{node.attr}"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and len(node.args) > 1:
            return f"{self.full(node.args[0])}.{getattr(node.args[1], 'value', '?')}"
        return ""

    def holds_generator(self, node: ast.expr) -> bool:
        """Whether a dictionary, or what is joined with it, has the key ``generator``."""
        for part in ast.walk(node):
            if isinstance(part, ast.Dict) and any(getattr(key, "value", None) == "generator" for key in part.keys):
                return True
            if isinstance(part, ast.Call) and any(word.arg == "generator" for word in part.keywords):
                return getattr(part.func, "id", "") == "dict"
            if isinstance(part, ast.Name) and part.id in self.with_generator:
                return True
        return False


def findings(code: str, names: Names | None = None) -> Iterator[str]:
    """Yield what a piece of code does; `names` are those of the pieces before it, which a notebook shares."""
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        yield f"is no Python in its line {error.lineno}: magics and shell commands change what a run depends on"
        return
    names = Names() if names is None else names
    names.read(tree)
    seeded = {child for block in ast.walk(tree) if _is_seeded(block, names) for child in ast.walk(block)}
    deferred = {child for block in ast.walk(tree) if isinstance(block, FUNCTIONS) for child in ast.walk(block)}
    parameters = {argument.kwarg.arg for argument in _arguments(tree) if argument.kwarg}
    asked = {part for node in ast.walk(tree) if isinstance(node, ast.Compare) for part in ast.walk(node)}
    parts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}  # judged with what follows
    for node in ast.walk(tree):
        yield from _imports(node)
        yield from _environment(node, names)
        if isinstance(node, ast.Call):
            yield from _call(node, names)
            yield from _initial_draw(node, names) if node not in seeded | deferred else ()
            yield from _draw(node, names, parameters) if node not in seeded else ()
        if isinstance(node, ast.Attribute | ast.Name | ast.Call) and node not in parts:
            yield from _reference(node, names)
        is_name = isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in asked
        if is_name and DEVICE_NAME.fullmatch(node.value):
            yield f"names the device {node.value!r}"


def _arguments(tree: ast.AST) -> Iterable[ast.arguments]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.arguments))


def _is_seeded(node: ast.AST, names: Names) -> bool:
    """Whether a block draws from torch's global generator as it should: inside ``with seeded(…)``."""
    return isinstance(node, ast.With) and any(
        isinstance(item.context_expr, ast.Call) and names.full(item.context_expr.func).endswith("seeded")
        for item in node.items
    )


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        modules = [name.name for name in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        modules = [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    else:
        return
    found = [
        module for module in modules if MODULES.match(module) or module.rpartition(".")[2] in NAMES - {"Generator"}
    ]
    if found:
        yield f"imports {found[0]}"


def _environment(node: ast.AST, names: Names) -> Iterator[str]:
    """Reading a variable is allowed, changing one is not."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        changed = node.value
    elif isinstance(node, ast.AugAssign):
        changed = node.target
    elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"update", "setdefault", "pop", "clear"}:
        changed = node.func.value
    else:
        return
    if names.full(changed) == "os.environ":
        yield "changes os.environ"


def _reference(node: ast.expr, names: Names) -> Iterator[str]:
    full = names.full(node)
    is_harmless = ALLOWED.fullmatch(full) or full in TYPES or getattr(node, "id", "") == full
    if not is_harmless and (NAMES & set(full.split(".")) or MODULES.match(full)):
        yield f"uses {full}"


def _call(node: ast.Call, names: Names) -> Iterator[str]:
    full = names.full(node.func)
    last = full.rpartition(".")[2]
    given = {word.arg: word.value for word in node.keywords}
    if full in TYPES:
        yield f"calls {full}"
    if last in {"import_module", "__import__"}:
        yield f"imports by {last}"
    for name in SEEDS & given.keys():
        if not (isinstance(given[name], ast.Call) and names.full(given[name].func).rpartition(".")[2] == "rng"):
            yield f"passes {name}="
    if last == "rvs" and "random_state" not in given:
        yield f"draws by {ast.unparse(node.func)} without rng(…) as random_state"


def _draw(node: ast.Call, names: Names, parameters: set[str]) -> Iterator[str]:
    full = names.full(node.func)
    unpacked = [word.value for word in node.keywords if word.arg is None]
    with_generator = any(word.arg == "generator" for word in node.keywords) or any(
        names.holds_generator(value) or getattr(value, "id", "") in parameters for value in unpacked
    )
    if full.rpartition(".")[2] in OF_DISTRIBUTIONS or (DRAWS.fullmatch(full) and not with_generator):
        yield f"draws by {ast.unparse(node.func)} without a generator"


def _initial_draw(node: ast.Call, names: Names) -> Iterator[str]:
    if INITIAL_DRAWS.fullmatch(names.full(node.func)) and all(word.arg != "generator" for word in node.keywords):
        yield f"draws by {ast.unparse(node.func)} outside of seeded(…)"


def streams(trees: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the name of each stream where code asks for one, with … for what a run fills in.

    A stream is asked for by ``seeded``, ``generator`` or ``rng``, or by a function of the same code that hands its
    parameter ``stream`` to one of them as it is. A name of which nothing is written down is not yielded.
    """
    trees = list(trees)
    positions = dict.fromkeys(SOURCES, 0)
    for function in (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        parameters = [argument.arg for argument in function.args.args + function.args.kwonlyargs]
        if "stream" in parameters and any(_called(node) in SOURCES and _hands_on(node) for node in ast.walk(function)):
            positions[function.name] = parameters.index("stream")
    for node in (node for tree in trees for node in ast.walk(tree) if _called(node) in positions):
        place = positions[_called(node)]
        given = [*node.args[place : place + 1], *(word.value for word in node.keywords if word.arg == "stream")]
        yield from filter(None, map(_template, given))


def _called(node: ast.AST) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""


def _hands_on(call: ast.Call) -> bool:
    return bool(call.args) and getattr(call.args[0], "id", "") == "stream"


def _template(node: ast.expr) -> str:
    """Return the text of a literal, with … for each computed part; nothing if it has no letter of its own."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return text if re.search(r"\w", text) else ""
