"""`python -m worker run --config stage.toml`."""

from worker.cli import app

app()
