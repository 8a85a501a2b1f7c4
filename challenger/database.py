"""Opens a watchtower's database: reachable, of a version that this program knows, and brought up to the newest one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

BACKENDS = ("sqlite", "postgresql")
CONNECT_SECONDS = 10
BUSY_SECONDS = 60  # a writer waits so long for another one
MIGRATION_LOCK = 0x706C756D62  # of PostgreSQL: "plumb"
UNNUMBERED = "0001"  # databases from before there were versions


class StoreError(Exception):
    """A database that cannot be used; says which one, without its password.

    StoreError
      Unreachable   nobody answers, or it cannot be opened
      WrongSchema   its tables are of a version that this program does not know
    """


class Unreachable(StoreError):
    pass


class WrongSchema(StoreError):
    pass


def open_database(url: str) -> Engine:
    """url: SQLAlchemy's, for SQLite or PostgreSQL (postgresql+psycopg://...). Raises StoreError.

    Nothing is changed in a database whose version is not known; an older one is migrated in one transaction.
    """
    try:
        place = make_url(url)
        if place.get_backend_name() not in BACKENDS:
            raise ValueError(f"one of {', '.join(BACKENDS)}, got {place.get_backend_name()}")
        sqlite = place.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"timeout": BUSY_SECONDS} if sqlite else {"connect_timeout": CONNECT_SECONDS}
        engine = create_engine(place, connect_args=options, pool_pre_ping=not sqlite)
    except (ArgumentError, ImportError, ValueError) as error:
        raise Unreachable(f"expected a database URL of SQLAlchemy: {error}") from error
    shown = place.render_as_string(hide_password=True)
    if sqlite:
        _be_transactional(engine)
    try:
        with engine.begin() as connection:
            if not sqlite:  # two processes that start together: one migrates, the other finds it done
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": MIGRATION_LOCK})
            _migrate(connection, shown)
    except SQLAlchemyError as error:
        engine.dispose()
        raise Unreachable(f"cannot use the database {shown}: {getattr(error, 'orig', None) or error}") from error
    except StoreError:
        engine.dispose()
        raise
    return engine


def _migrate(connection: Connection, shown: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    newest = scripts.get_current_head()
    found = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    if len(found) > 1 or set(found) - known:
        raise WrongSchema(
            f"the database {shown} has schema {', '.join(found)}, this program knows up to {newest}: "
            "use the program that made it, or another database"
        )
    if not found:
        tables = set(inspect(connection).get_table_names())
        if {"jobs", "games", "cursor"} <= tables:
            command.stamp(config, UNNUMBERED)
        elif tables & {"jobs", "games", "cursor", "moves", "evidence", "blocks"}:
            raise WrongSchema(
                f"the database {shown} has no schema of a watchtower, expected version {newest}, "
                f"but tables of the same names: {', '.join(sorted(tables))}"
            )
    if tuple(found) != (newest,):
        command.upgrade(config, "head")


def _be_transactional(engine: Engine) -> None:
    """SQLite as other databases are: migrations in transactions too, readers beside a writer, writers that wait."""

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # Python's own would begin no transaction before DDL
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def began(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
