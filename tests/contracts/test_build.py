"""One compiler set-up:

forge and py-solc-x must come to the same bytes, and the committed ABIs must be those of the source.
"""

import json
import subprocess
from pathlib import Path

import pytest

from contracts import build
from contracts.errors import BuildError
from deploy.devnet import foundry_binary

LARGEST_CONTRACT_BYTES = 24_576  # EIP-170


@pytest.fixture(scope="module")
def built() -> dict[str, build.Artifact]:
    return build.artifacts()


@pytest.fixture(scope="module")
def forged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forge")
    command = [str(foundry_binary("forge")), "build", "--out", str(out / "out"), "--cache-path", str(out / "cache")]
    answer = subprocess.run([*command, "contracts/src"], cwd=build.ROOT, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return out / "out"


def canonical_json(entry: dict[str, object]) -> str:
    return json.dumps(entry, sort_keys=True)


@pytest.mark.parametrize("name", build.DEPLOYED)
def test_forge_and_py_solc_x_make_the_same_bytecode(name: str, built: dict[str, build.Artifact], forged: Path) -> None:
    content = json.loads((forged / f"{name}.sol" / f"{name}.json").read_text(encoding="utf-8"))
    assert built[name].bytecode.hex() == content["bytecode"]["object"].removeprefix("0x")
    assert built[name].deployed.hex() == content["deployedBytecode"]["object"].removeprefix("0x")
    # forge sorts the entries of an ABI, solc keeps its own order
    assert sorted(map(canonical_json, built[name].abi)) == sorted(map(canonical_json, content["abi"]))


@pytest.mark.parametrize("name", build.DEPLOYED)
def test_every_contract_fits_a_chain(name: str, built: dict[str, build.Artifact]) -> None:
    assert 0 < len(built[name].deployed) <= LARGEST_CONTRACT_BYTES


def test_committed_abis_and_storage_layouts_are_current() -> None:
    assert build.write_snapshots(check=True) == []


def test_an_unchanged_tree_compiles_nothing(built: dict[str, build.Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, object]:
        raise AssertionError("compiled again")

    monkeypatch.setattr(build, "_compile", refuse)
    assert build.artifacts() == built


def copy_of_setup(folder: Path, source: str) -> Path:
    for name in ("foundry.toml", "package.json", "contracts/solc"):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((build.ROOT / name).read_bytes())
    (folder / "contracts" / "solc").chmod(0o755)
    (folder / "node_modules").symlink_to(build.ROOT / "node_modules")
    (folder / "contracts" / "src").mkdir()
    (folder / "contracts" / "src" / "Some.sol").write_text(source, encoding="utf-8")
    return folder


def test_a_changed_source_compiles_anew(tmp_path: Path) -> None:
    root = copy_of_setup(tmp_path, "pragma solidity 0.8.37; contract Some { uint256 public one = 1; }")
    first = build.artifacts(root)["Some"]
    (root / "contracts" / "src" / "Some.sol").write_text("pragma solidity 0.8.37; contract Some {}", encoding="utf-8")
    second = build.artifacts(root)["Some"]
    assert first.bytecode != second.bytecode
    assert len(list((root / "build" / "artifacts").iterdir())) == 2


def test_a_compile_error_is_told_in_the_compilers_words(tmp_path: Path) -> None:
    root = copy_of_setup(tmp_path, "pragma solidity 0.8.37; contract Some { uint256 public one = nothing; }")
    with pytest.raises(BuildError, match="Undeclared identifier"):
        build.artifacts(root)
    assert not list(root.glob("build/artifacts/*"))


def test_a_missing_import_is_named(tmp_path: Path) -> None:
    root = copy_of_setup(tmp_path, 'pragma solidity 0.8.37;\nimport {\n  A\n} from "./A.sol"; // import "./B.sol"\n')
    with pytest.raises(BuildError, match=r"contracts/src/A\.sol is missing"):
        build.artifacts(root)


def test_an_unknown_abi_is_named() -> None:
    with pytest.raises(BuildError, match="no ABI for Nothing"):
        build.load_abi("Nothing")
