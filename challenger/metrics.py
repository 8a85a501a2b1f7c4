"""What a watchtower tells Prometheus about itself."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from contracts.client import Receipt


class Metrics:
    """Counters of one watchtower, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.head = Gauge("plumb_head_block", "Last block that was read", registry=self.registry)
        self.reorgs = Counter("plumb_reorgs", "Reorganisations of blocks that were read", registry=self.registry)
        self.jobs = Counter("plumb_jobs", "Jobs that are done with, by state", ["state"], registry=self.registry)
        self.late = Counter("plumb_late_audits", "Audits that outlasted their job's window", registry=self.registry)
        self.waiting = Gauge("plumb_jobs_waiting", "Jobs that wait for an audit", registry=self.registry)
        self.deadline = Gauge(
            "plumb_next_deadline_seconds", "Seconds to the next window's end, of waiting jobs", registry=self.registry
        )
        self.audits = Histogram(
            "plumb_audit_seconds",
            "Seconds that an audit took",
            buckets=(0.1, 1, 10, 60, 600, 3600),
            registry=self.registry,
        )
        self.games = Counter("plumb_games", "Games that are over, by outcome", ["state"], registry=self.registry)
        self.moves = Counter(
            "plumb_transactions", "Transactions in a block, by method", ["method"], registry=self.registry
        )
        self.gas = Counter("plumb_gas", "Gas of those transactions, by method", ["method"], registry=self.registry)
        self.faults = Counter("plumb_faults", "Looks around that failed", registry=self.registry)
        self._sent = 0

    def count(self, receipts: Sequence[Receipt]) -> None:
        """Takes in a Chain's receipts, each once."""
        for receipt in receipts[self._sent :]:
            self.moves.labels(receipt.method).inc()
            self.gas.labels(receipt.method).inc(receipt.gas)
        self._sent = len(receipts)

    def serve(self, host: str, port: int) -> None:
        """At http://HOST:PORT/metrics, from a thread, until the process ends. Raises OSError."""
        start_http_server(port, host, self.registry)
