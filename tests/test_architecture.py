"""Who may import whom, what nobody may do, and how long a file may get: read from the source, nothing is run."""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("verifier", "worker", "challenger", "requester", "contracts", "deploy", "bench")
OURS = {*PACKAGES, "plumb", "tests"}
PARTIES = ("worker", "challenger", "requester")
VERIFIER_MAY = {"numpy", "torch", "numba", "llvmlite", "safetensors", "verifier"} | set(sys.stdlib_module_names)
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "numpy.load", "np.load"}
# The calls that read a network, a clock or the environment: a judge answers from its arguments alone.
IMPURE_MODULES = {"socket", "http", "urllib", "requests", "time", "datetime", "random", "secrets", "subprocess"}
LINES, LINES_WITH_REASON = 400, 600
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not path.name.endswith(GENERATED)]


EVERYTHING = [*sources(*PACKAGES, "tests"), ROOT / "plumb.py"]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted names, relative ones made absolute; `from a import b` counts as a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
            )
            yield from (f"{base.strip('.')}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.split(".", 1)[0] for name in imports(path)}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offenders(paths: Iterable[Path], judge: Callable[[Path], object]) -> dict[str, object]:
    """What `judge` finds wrong, by file."""
    found = {ids(path): judge(path) for path in paths}
    return {path: wrong for path, wrong in found.items() if wrong}


def party(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def test_verifier_imports_only_arithmetic() -> None:
    assert offenders(sources("verifier"), lambda path: roots(path) - VERIFIER_MAY) == {}


def test_verifier_sees_no_network_no_clock_no_chance() -> None:
    def impure(path: Path) -> set[str]:
        named = {name_of(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
        return roots(path) & IMPURE_MODULES | named & {"os.environ", "os.getenv", "os.urandom"}

    assert offenders(sources("verifier"), impure) == {}


def test_parties_meet_only_on_the_wire_and_on_the_chain() -> None:
    assert offenders(sources(*PARTIES), lambda p: roots(p) & (OURS - {party(p), "verifier", "contracts"})) == {}


def test_the_chain_has_one_door() -> None:
    assert offenders(sources(*PARTIES), lambda path: roots(path) & {"web3"}) == {}


def test_contracts_knows_no_party() -> None:
    assert offenders(sources("contracts"), lambda path: roots(path) & (OURS - {"contracts", "verifier"})) == {}


def test_nobody_imports_a_test_but_tests() -> None:
    paths = [path for path in EVERYTHING if party(path) != "tests"]
    assert offenders(paths, lambda path: roots(path) & {"tests"}) == {}


def test_nobody_imports_the_front_door() -> None:
    paths = [path for path in EVERYTHING if party(path) not in {"deploy", "bench", "tests", "plumb.py"}]
    assert offenders(paths, lambda path: roots(path) & {"deploy", "bench", "plumb"}) == {}


def test_nothing_turns_data_into_code() -> None:
    def dangerous(path: Path) -> set[str]:
        calls = {name_of(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
        return roots(path) & FORBIDDEN_MODULES | calls & FORBIDDEN_CALLS

    assert offenders(EVERYTHING, dangerous) == {}


def test_files_can_be_read_in_one_sitting() -> None:
    """Above 400 lines the module's docstring says why (`Rationale:`); above 600 there is no why."""

    def excess(path: Path) -> int:
        reason = "Rationale:" in (ast.get_docstring(parse(path)) or "")
        return max(0, lines(path) - (LINES_WITH_REASON if reason else LINES))

    assert offenders(EVERYTHING, excess) == {}


def test_contracts_can_be_read_in_one_sitting() -> None:
    contracts = sorted((ROOT / "contracts" / "src").rglob("*.sol"))
    assert offenders(contracts, lambda path: max(0, lines(path) - LINES_WITH_REASON)) == {}


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def test_packages_say_what_they_are_and_tests_shadow_nobody() -> None:
    present = [name for name in PACKAGES if (ROOT / name).is_dir()]
    assert [name for name in present if not (ROOT / name / "__init__.py").exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []
