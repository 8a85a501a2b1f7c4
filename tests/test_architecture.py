"""Who may import whom, what nobody may do, and how long a file may get: read from the source, nothing is run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("verifier", "worker", "challenger", "requester", "contracts", "deploy", "bench")
OURS = {*PACKAGES, "plumb", "tests"}
PARTIES = {"worker", "challenger", "requester"}
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


@pytest.mark.parametrize("path", sources("verifier"), ids=ids)
def test_verifier_imports_only_arithmetic(path: Path) -> None:
    assert roots(path) - VERIFIER_MAY == set()


@pytest.mark.parametrize("path", sources("verifier"), ids=ids)
def test_verifier_sees_no_network_no_clock_no_chance(path: Path) -> None:
    assert roots(path) & IMPURE_MODULES == set()
    named = {name_of(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)}
    assert named & {"os.environ", "os.getenv", "os.urandom"} == set()


@pytest.mark.parametrize("path", sources(*PARTIES), ids=ids)
def test_parties_meet_only_on_the_wire_and_on_the_chain(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    assert roots(path) & (OURS - {own, "verifier", "contracts"}) == set()


@pytest.mark.parametrize("path", sources(*PARTIES), ids=ids)
def test_the_chain_has_one_door(path: Path) -> None:
    assert "web3" not in roots(path)


@pytest.mark.parametrize("path", sources("contracts"), ids=ids)
def test_contracts_knows_no_party(path: Path) -> None:
    assert roots(path) & (OURS - {"contracts", "verifier"}) == set()


@pytest.mark.parametrize("path", [p for p in EVERYTHING if p.name != "plumb.py"], ids=ids)
def test_nobody_imports_the_front_door(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = {"deploy", "bench", "tests"}
    assert own in allowed or roots(path) & {"deploy", "bench", "plumb"} == set()


@pytest.mark.parametrize("path", EVERYTHING, ids=ids)
def test_nothing_turns_data_into_code(path: Path) -> None:
    assert roots(path) & FORBIDDEN_MODULES == set()
    calls = {name_of(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)}
    assert calls & FORBIDDEN_CALLS == set()


@pytest.mark.parametrize("path", EVERYTHING, ids=ids)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    """Above 400 lines the module's docstring says why (`Rationale:`); above 600 there is no why."""
    lines = path.read_text(encoding="utf-8").count("\n")
    reason = "Rationale:" in (ast.get_docstring(parse(path)) or "")
    assert lines <= (LINES_WITH_REASON if reason else LINES)


@pytest.mark.parametrize("path", sorted((ROOT / "contracts" / "src").rglob("*.sol")), ids=ids)
def test_contracts_can_be_read_in_one_sitting(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= LINES_WITH_REASON


def test_packages_say_what_they_are_and_tests_shadow_nobody() -> None:
    present = [name for name in PACKAGES if (ROOT / name).is_dir()]
    assert [name for name in present if not (ROOT / name / "__init__.py").exists()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []
