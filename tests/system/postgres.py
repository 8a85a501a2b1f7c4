"""A PostgreSQL server on loopback, started and ended by a test: Debian's package `postgresql`, no skip without it."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.devnet import free_port


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    assert initdb, "expected PostgreSQL: apt-get install postgresql"
    folder, port = Path(tempfile.mkdtemp(prefix="plumb-postgres-")), free_port()
    root = os.geteuid() == 0  # the server refuses to run as root
    if root:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)

    def call(*command: str) -> None:
        whole = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", *command]
        done = subprocess.run(whole if root else command, capture_output=True, text=True, cwd=folder, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    data, control = str(folder / "data"), str(Path(initdb).with_name("pg_ctl"))
    call(initdb, "-D", data, "-U", "plumb", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call(control, "-D", data, "-w", "-t", "120", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql+psycopg://plumb@127.0.0.1:{port}/postgres"
    finally:
        call(control, "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)
