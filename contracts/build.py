"""Compiles the contracts with the project's one compiler set-up (foundry.toml), through py-solc-x, and keeps the
result.

Artifacts lie in build/artifacts/<digest>.json, digest over foundry.toml, the compiler script and every source: an
unchanged tree costs a hash.
The ABIs are committed (contracts/snapshots/abi/) so that a running party needs neither compiler nor Node.
"""

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contracts.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOTS = ROOT / "contracts" / "snapshots"
ABI_FOLDER = SNAPSHOTS / "abi"
DEPLOYED = ("Models", "Workers", "Escrow", "Disputes", "Demands", "Referee", "Token")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_IMPORT = re.compile(r"""\bimport\b[^;"']*["']([^"']+)["']""")


@dataclass(frozen=True)
class Artifact:
    name: str
    abi: list[dict[str, Any]]
    bytecode: bytes  # creation code, without constructor arguments
    deployed: bytes  # runtime code; immutables are zero
    storage: list[str]  # one line a variable: slot, offset, name, type


def settings(foundry: dict[str, Any]) -> dict[str, Any]:
    """The standard-JSON settings that forge derives from the same `[profile.default]`."""
    profile = foundry["profile"]["default"]
    result: dict[str, Any] = {
        "remappings": profile.get("remappings", []),
        "optimizer": {"enabled": profile.get("optimizer", False), "runs": profile.get("optimizer_runs", 200)},
        "metadata": {
            "bytecodeHash": profile.get("bytecode_hash", "ipfs"),
            "appendCBOR": profile.get("cbor_metadata", True),
            "useLiteralContent": False,
        },
        "evmVersion": profile["evm_version"],
        "viaIR": profile.get("via_ir", False),
        "outputSelection": {"*": {"*": ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "storageLayout"]}},
    }
    return result


def sources(foundry: dict[str, Any], root: Path = ROOT, first: Sequence[str] = ()) -> dict[str, str]:
    """The files `first` (none: all Solidity under `src`) and whatever they import: path from the root -> text."""
    profile = foundry["profile"]["default"]
    remappings = [tuple(entry.split("=", 1)) for entry in profile.get("remappings", [])]
    found: dict[str, str] = {}
    under_src = (path.relative_to(root).as_posix() for path in (root / profile["src"]).rglob("*.sol"))
    waiting = list(first) or sorted(under_src)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = (root / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BuildError(f"source {name} is missing (is node_modules installed? `make setup`)") from None
        for target in _imports(found[name]):
            waiting.append(_resolve(target, name, remappings))
    return dict(sorted(found.items()))


def artifacts(root: Path = ROOT) -> dict[str, Artifact]:
    """All contracts under `src`, by name; compiles only if a source, the set-up or the compiler changed."""
    text = (root / "foundry.toml").read_text(encoding="utf-8")
    foundry = tomllib.loads(text)
    inputs = sources(foundry, root)
    solc = root / foundry["profile"]["default"]["solc"]
    package = json.loads((root / "package.json").read_text(encoding="utf-8"))
    chosen = settings(foundry)
    digest = hashlib.sha256(
        json.dumps([chosen, inputs, solc.read_text(encoding="utf-8"), package["dependencies"]], sort_keys=True).encode()
    ).hexdigest()
    kept = root / "build" / "artifacts" / f"{digest}.json"
    if not kept.exists():
        compiled = _compile(
            {"language": "Solidity", "sources": {k: {"content": v} for k, v in inputs.items()}, "settings": chosen},
            solc,
            package["dependencies"]["solc"],
            root,
        )
        _write(kept, json.dumps(_flatten(compiled, foundry["profile"]["default"]["src"])))
    table = json.loads(kept.read_text(encoding="utf-8"))
    return {
        name: Artifact(
            name, entry["abi"], bytes.fromhex(entry["bytecode"]), bytes.fromhex(entry["deployed"]), entry["storage"]
        )
        for name, entry in table.items()
    }


def snapshot_texts(built: dict[str, Artifact]) -> dict[str, str]:
    """Path beneath contracts/snapshots -> text: the ABI and the storage layout of every deployed contract."""
    missing = [name for name in DEPLOYED if name not in built]
    if missing:
        raise BuildError(f"contracts/src lacks {', '.join(missing)}")
    texts = {f"abi/{name}.json": json.dumps(built[name].abi, indent=1) + "\n" for name in DEPLOYED}
    return texts | {f"storage/{name}.txt": "".join(line + "\n" for line in built[name].storage) for name in DEPLOYED}


def load_abi(name: str) -> list[dict[str, Any]]:
    """The committed ABI of one deployed contract."""
    path = ABI_FOLDER / f"{name}.json"
    if not path.exists():
        raise BuildError(f"no ABI for {name}: expected one of {', '.join(DEPLOYED)}; `make snapshots` writes them")
    loaded: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def write_snapshots(check: bool = False) -> list[str]:
    """Writes the committed ABIs and storage layouts; with `check` only compares. Returns the files that differed."""
    stale = []
    for name, text in snapshot_texts(artifacts()).items():
        path = SNAPSHOTS / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                _write(path, text)
    return stale


def _compile(request: dict[str, Any], solc: Path, version: str, root: Path) -> dict[str, Any]:
    folder = root / ".solcx"
    folder.mkdir(exist_ok=True)
    link = folder / f"solc-v{version}"
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(solc, folder))
    # py-solc-x reads the environment when it is imported; a native compiler put there under the same name is used
    # instead.
    os.environ["SOLCX_BINARY_PATH"] = str(folder)
    import solcx
    from solcx.exceptions import SolcError

    try:
        output: dict[str, Any] = solcx.compile_standard(request, solc_binary=link)
    except SolcError as error:
        raise BuildError(str(error).split("> command:", 1)[0].strip()) from None  # beneath it stands the whole JSON
    return output


def _flatten(compiled: dict[str, Any], src: str) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for path, contracts in compiled["contracts"].items():
        if not path.startswith(src + "/"):
            continue
        for name, output in contracts.items():
            if name in table:
                raise BuildError(f"two contracts are called {name}; the second is in {path}")
            table[name] = {
                "abi": output["abi"],
                "bytecode": _hex(name, output["evm"]["bytecode"]["object"]),
                "deployed": _hex(name, output["evm"]["deployedBytecode"]["object"]),
                "storage": _storage(output["storageLayout"]),
            }
    return table


def _hex(name: str, code: str) -> str:
    if "__$" in code:
        raise BuildError(f"{name} needs an external library to be linked; the project deploys none")
    return code


def _storage(layout: dict[str, Any]) -> list[str]:
    """Slots and types as words; solc's ids of syntax nodes, which move with every edit, are left out."""
    types = layout["types"] or {}
    lines = []
    for entry in layout["storage"]:
        lines.append(f"slot {entry['slot']} + {entry['offset']}: {entry['label']} {types[entry['type']]['label']}")
    for kind in sorted(types.values(), key=lambda kind: str(kind["label"])):
        for member in kind.get("members", ()):
            place = f"slot {member['slot']} + {member['offset']}"
            lines.append(f"{kind['label']}: {place}: {member['label']} {types[member['type']]['label']}")
    return lines


def _imports(text: str) -> list[str]:
    return _IMPORT.findall(_COMMENT.sub("", text))


def _resolve(target: str, importer: str, remappings: list[tuple[str, ...]]) -> str:
    if target.startswith("."):
        return os.path.normpath(os.path.join(os.path.dirname(importer), target)).replace(os.sep, "/")
    for prefix, path in remappings:
        if target.startswith(prefix):
            return path + target[len(prefix) :]
    return target


def _write(path: Path, text: str) -> None:
    """Atomically: two processes may build at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def main(arguments: list[str]) -> int:
    """`python -m contracts.build [--check]`: refreshes (or checks) contracts/snapshots."""
    if arguments not in ([], ["--check"]):
        print(f"usage: python -m contracts.build [--check]; got {' '.join(arguments)}")
        return 2
    stale = write_snapshots(check=bool(arguments))
    for name in stale:
        print(f"contracts/snapshots/{name}: {'stale, run `make snapshots`' if arguments else 'written'}")
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
