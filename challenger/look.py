"""One job looked at: as the strategy says, and where its tokens are suspicious, again at whole requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from challenger.evidence import Evidence
from challenger.judge import Findings

FEW = 4  # requests that are seen whole at first: whoever lies openly is convicted by those that lie farthest off

Fetch = Callable[[tuple[int, ...], float], Evidence]  # requests to be seen whole (none: by the strategy), seconds
Audit = Callable[[Evidence], Findings]


@dataclass
class Look:
    """What was seen so far. Where something did not come, `go_on` goes on later with the round that broke off.

    SAFETY: all that is suspicious is looked at, for whoever bends some requests to just within the tolerance puts them
    in front of the one that is wrong. A round takes as many as all before it, so rounds are few, and with them the
    canonical runs that near misses cost (challenger/judge.py).
    """

    found: Findings | None = None
    missing: tuple[str, ...] = ()

    def go_on(self, fetch: Fetch, audit: Audit, seconds: float, final: bool) -> tuple[Evidence, Findings | None]:
        """The last round's evidence, and what was found in all. seconds: that all downloads together may take.

        final: whether what is missing is not waited for any more; else findings are None where something is. Raises
        what `fetch` and `audit` raise.
        """
        while True:
            started = time.monotonic()
            evidence = fetch(self._next(final), seconds)
            seconds = max(seconds - (time.monotonic() - started), 0.0)
            if evidence.missing and not final:
                return evidence, None
            self.missing = tuple(dict.fromkeys((*self.missing, *evidence.missing)))
            findings = audit(evidence)
            self.found = self.found.joined(findings, evidence.closer) if self.found else findings
            if not self.found.closer:
                return (replace(evidence, missing=self.missing) if self.missing else evidence), self.found

    def _next(self, final: bool) -> tuple[int, ...]:
        """final: all at once, for a stage that is slow then costs its own trace alone."""
        if self.found is None:
            return ()
        return self.found.closer if final else self.found.closer[: max(FEW, self.found.looked_closer)]
