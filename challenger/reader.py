"""Reading the chain: new events in order, and blocks that were read and are none any more."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from challenger.store import LIVE
from contracts.events import GameEnded, GameMoved, JobCommitted

if TYPE_CHECKING:
    from challenger.agent import Agent

log = logging.getLogger("plumb.challenger.reader")

EVENT_BLOCKS = 1_000
OVERLAP_BLOCKS = 16  # read again each time: nodes behind one URL differ
KEEP_BLOCKS = 64  # two epochs of Ethereum: no honest chain is reorganised deeper


class Reader:
    """Part of an Agent, which lends it store and chain."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.next_block = agent.store.next_block(agent.config.from_block)
        self.head = -1  # the last block that was read
        self._seen = agent.store.seen()

    def read(self) -> None:
        """Takes in new events."""
        agent = self.agent
        last = agent.chain.block_number()
        if last == self.head and self._seen.get(last) == agent.chain.transport.block_hash(last):
            return
        self._turn_back(last)
        if last < self.next_block - 1:
            if last < self.next_block - OVERLAP_BLOCKS:
                log.warning("the node is at block %d, this watchtower has read up to %d", last, self.next_block - 1)
            return  # this node lags behind another one; what it knows would turn games back
        # Asked before the events: if the block is replaced meanwhile, the next look finds another hash and reads again.
        hash = agent.chain.transport.block_hash(last)
        first = max(self.next_block - OVERLAP_BLOCKS, agent.config.from_block, 0)
        while first <= last:
            end = min(first + EVENT_BLOCKS - 1, last)
            self._take_in(first, end, {last: hash} if hash and end == last else {})
            first = end + 1
        self.next_block = max(self.next_block, last + 1)
        self.head = last
        agent.metrics.head.set(last)
        if hash is not None:
            self._seen[last] = hash
        old = [block for block in self._seen if block < last - KEEP_BLOCKS]
        if len(old) > KEEP_BLOCKS:
            self._seen = {block: hash for block, hash in self._seen.items() if block not in old}
            agent.store.unsee(last - KEEP_BLOCKS)

    def _take_in(self, first: int, end: int, seen: dict[int, bytes]) -> None:
        agent = self.agent
        events = list(agent.chain.events(first, end))
        agent.withheld.log.feed(events)
        moves = [event for event in events if isinstance(event, GameMoved | GameEnded)]
        if moves:
            ours = {bytes.fromhex(row.id) for row in agent.store.games(*LIVE)}
            agent.log.feed(event for event in moves if event.id in ours)
        committed = [(e.id.hex(), e.window_end, e.block) for e in events if isinstance(e, JobCommitted)]
        if committed or end >= self.next_block:
            agent.store.advance(max(end + 1, self.next_block), committed, seen)

    def _turn_back(self, last: int) -> None:
        """If blocks that were read were replaced, forgets what they said, and has the transactions in them sent again.

        A node that merely lags has the blocks it has.
        """
        agent = self.agent
        known = sorted((block for block in self._seen if block <= last), reverse=True)
        if not known or agent.chain.transport.block_hash(known[0]) == self._seen[known[0]]:
            return
        kept = (block for block in known if agent.chain.transport.block_hash(block) == self._seen[block])
        fork = next(kept, known[-1] - 1) + 1
        log.warning("the chain was reorganised: block %d and later ones are others now", fork)
        agent.metrics.reorgs.inc()
        agent.store.journal(agent.chain.chain_id, agent.chain.account).reopen(fork)
        for job in agent.store.rewind(fork):
            log.warning("job %s: to be committed anew", job)
            agent.forget(bytes.fromhex(job))  # what was seen may not be what is committed to then
        self._seen = {block: hash for block, hash in self._seen.items() if block < fork}
        agent.log.games.clear()
        agent.log.ended.clear()
        agent.withheld.log.jobs.clear()
        self.next_block, self.head = agent.store.next_block(agent.config.from_block), -1
        agent.resume()
