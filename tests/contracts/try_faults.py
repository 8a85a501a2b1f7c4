"""The test of the laws' tests (`make faults`): each is run once with every fault switched off, where it must pass, and
once with its own in force, where it must fail.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from deploy.devnet import foundry_binary
from tests.contracts.faults import ACCOUNT, FAULTS, ROOT, SOURCES, TESTS, faulty, test_of

BUILD = ROOT / "build" / "faults"
# Every test contract sets the switch by what the environment says, when it is deployed.
CONSTRUCTOR = f"""
    constructor() {{
        if (Switch(address(vm)).envOr("FAULT", uint256(0)) != 0) {{
            vm.deal({ACCOUNT}, Switch(address(vm)).envOr("FAULT", uint256(0)));
        }}
    }}
"""
SWITCH = "interface Switch { function envOr(string calldata name, uint256 otherwise) external returns (uint256); }\n\n"
BASE, VM, TITLE = f"{TESTS}/Base.t.sol", "    Vm internal constant vm = ", "/// @title Base of"
SIZE_LIMIT = 1 << 20  # the switches make contracts longer than a chain takes


def build() -> None:
    """The copy with all faults, compiled. Raises CalledProcessError."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("contracts", TESTS, "foundry.toml"):
        source, target = ROOT / name, BUILD / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        else:
            shutil.copy2(source, target)
    modules = BUILD / "node_modules"
    if not modules.exists():
        modules.symlink_to(ROOT / "node_modules")
    for path in {fault.path for fault in FAULTS}:
        (BUILD / SOURCES / path).write_text(faulty(path), encoding="utf-8")
    base = (BUILD / BASE).read_text(encoding="utf-8")
    lines = base.splitlines(keepends=True)
    (at,) = [i for i, line in enumerate(lines) if line.startswith(VM)]
    base = "".join([*lines[: at + 1], CONSTRUCTOR, *lines[at + 1 :]]).replace(TITLE, SWITCH + TITLE)
    (BUILD / BASE).write_text(base, encoding="utf-8")
    subprocess.run([foundry_binary("forge"), "build"], cwd=BUILD, check=True)


def failures(fault: int, path: str, names: Sequence[str]) -> dict[str, str]:
    """What those tests of a file said with that fault (0: none) in force; "" where a test passed."""
    for kept in ("invariant", "fuzz"):  # forge would begin with what failed before
        shutil.rmtree(BUILD / "build" / "cache" / kept, ignore_errors=True)
    command = [str(foundry_binary("forge")), "test", "--json", "--code-size-limit", str(SIZE_LIMIT)]
    command += ["--match-path", path, "--match-test", f"^({'|'.join(names)})\\("]
    # A campaign that failed is not made shorter: every call of it plays on the real referee.
    told = {"FAULT": str(fault), "FOUNDRY_INVARIANT_SHRINK_RUN_LIMIT": "0"}
    done = subprocess.run(command, cwd=BUILD, env=os.environ | told, capture_output=True, text=True)
    suites = json.loads(done.stdout[done.stdout.index("{") :])
    results = {name.split("(")[0]: each for suite in suites.values() for name, each in suite["test_results"].items()}
    if set(results) != set(names):
        raise ValueError(f"expected {names} of {path}, got {sorted(results)}")
    return {n: "" if r["status"] == "Success" else str(r["reason"] or "reverted") for n, r in results.items()}


def main() -> int:
    build()
    files: dict[str, set[str]] = {}
    for fault in FAULTS:
        path, name = test_of(fault)
        files.setdefault(path, set()).add(name)
    wrong = [
        f"{path}::{name} fails without a fault: {reason}"
        for path, names in files.items()
        for name, reason in failures(0, path, sorted(names)).items()
        if reason
    ]
    for number, fault in enumerate(FAULTS, start=1):
        path, name = test_of(fault)
        reason = failures(number, path, [name])[name]
        if not reason or fault.law not in reason:
            wrong.append(f"{fault.what}: {path}::{name} says {reason or 'nothing'}")
        print(f"{fault.what}: {reason or 'NOTHING'}", flush=True)
    print("\n".join(wrong) or f"all {len(FAULTS)} faults are seen")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
