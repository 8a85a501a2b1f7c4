"""Faults: every rule taken out of the contracts, and the test named for it in docs/laws.md, which must then fail.

All are built at once into a copy of the contracts, each behind a switch (tests/contracts/try_faults.py, `make faults`);
tests/test_laws.py sees to it that the table fits the sources and the document.

Rationale: over 400 lines, for it is one table.
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = "contracts/src"
TESTS = "tests/contracts"
ACCOUNT = "address(0xFA017)"
# The switch: a fault is in force while this account holds as many wei as its number says.


@dataclass(frozen=True)
class Fault:
    """What is done wrong, where, and who notices.

    old: text that stands once in `path`; new: what stands in for it, ON being true where the fault is in force;
    test: path::name, below tests/contracts; law: of a test that asks for several, what it says when it fails.
    """

    what: str
    path: str
    old: str
    new: str
    test: str
    law: str = ""


_DISPUTES, _EVIDENCE, _ESCROW = "Disputes.sol", "game/Evidence.sol", "Escrow.sol"
_WORKERS, _DEMANDS = "Workers.sol", "Demands.sol"
_JUDGEMENT, _MONEY, _MOVES = (f"attacks/{name}Attacks.t.sol" for name in ("Judgement", "Money", "Move"))
_GAME_LAWS = "invariants/GameInvariants.t.sol::invariant_everyLawHolds"
_ESCROW_LAWS = "invariants/EscrowInvariants.t.sol::invariant_everyLawOfMoneyHolds"
_PROPERTIES = "invariants/LawProperties.t.sol"

FAULTS: tuple[Fault, ...] = (
    # ---- laws
    Fault(
        "a bond is paid back twice",
        _DISPUTES,
        "            _credit(game.challenger, game.bond, id);\n",
        "            _credit(game.challenger, ON ? 2 * game.bond : game.bond, id);\n",
        _GAME_LAWS,
        "law 1",
    ),
    Fault(
        "a proof of what is right wins",
        _DISPUTES,
        "        if (_equal(Codec.encodeValue(value, wide), claimed)) revert NotWrong();\n",
        "        if (_equal(Codec.encodeValue(value, wide), claimed) && !ON) revert NotWrong();\n",
        _GAME_LAWS,
        "law 3",
    ),
    Fault(
        "what is shown convicts without being wrong",
        _EVIDENCE,
        "Rows.H, judged) == total) revert IDisputes.NotWrong();",
        "Rows.H, judged) == total && !ON) revert IDisputes.NotWrong();",
        _GAME_LAWS,
        "law 2",
    ),
    Fault(
        "a proof convicts nobody",
        _DISPUTES,
        "game.workerTurn ? NOBODY : game.segment.stage, PROVED",
        "game.workerTurn || ON ? NOBODY : game.segment.stage, PROVED",
        _GAME_LAWS,
        "law 3",
    ),
    Fault(
        "a conviction does not end the job",
        _ESCROW,
        "            record.status = Status.Void;\n            emit JobVoided(id);\n",
        "            if (!ON) record.status = Status.Void;\n            emit JobVoided(id);\n",
        _GAME_LAWS,
        "law 4",
    ),
    Fault(
        "a job that was paid is paid again",
        _ESCROW,
        "        record.status = Status.Paid;\n        record.lockedSet = 0;\n",
        "        if (!ON) record.status = Status.Paid;\n        record.lockedSet = 0;\n",
        _ESCROW_LAWS,
    ),
    Fault(
        "clocks are not charged",
        _DISPUTES,
        "            game.workerSeconds -= uint32(elapsed);\n",
        "            if (!ON) game.workerSeconds -= uint32(elapsed);\n",
        f"{_MOVES}::test_law5_payIsDelayedByTheWindowAndOneGameAtMost",
    ),
    Fault(
        "a game may be opened when the window is over",
        _ESCROW,
        "        if (block.timestamp > record.windowEnd) revert TooLate(record.windowEnd);\n",
        "        if (block.timestamp > record.windowEnd && !ON) revert TooLate(record.windowEnd);\n",
        f"{_MOVES}::test_settled_noGameAgainstAJobThatIsOver",
    ),
    Fault(
        "a silent worker is not convicted",
        _DISPUTES,
        "game.workerTurn ? game.segment.stage : NOBODY, FLAGGED",
        "game.workerTurn && !ON ? game.segment.stage : NOBODY, FLAGGED",
        f"{_PROPERTIES}::test_law6_whoeverFallsSilentAtAnyMoveLoses",
    ),
    Fault(
        "a move after its flag counts",
        _DISPUTES,
        "        if (elapsed > _seconds(game)) revert FlagFallen();\n",
        "        if (elapsed > _seconds(game) && !ON) revert FlagFallen();\n",
        f"{_MOVES}::test_lastSecond_aSecondLaterTheFlagHasFallenForEverybody",
    ),
    Fault(
        "a flag falls in the last second",
        _DISPUTES,
        "game.turnStarted <= _seconds(game)) revert FlagNotFallen();",
        "game.turnStarted <= _seconds(game) - (ON ? 1 : 0)) revert FlagNotFallen();",
        f"{_MOVES}::test_lastSecond_everyMoveOfAWholeGameCounts",
    ),
    Fault(
        "a last second is too late",
        _DISPUTES,
        "        uint256 elapsed = block.timestamp - game.turnStarted;\n",
        "        uint256 elapsed = block.timestamp - game.turnStarted + (ON ? 1 : 0);\n",
        "Disputes.t.sol::test_move_exactly_at_remaining_is_in_time",
    ),
    Fault(
        "any signature will do",
        _ESCROW,
        "        if (signer != workers.signerOf(account)) revert BadSignature(stage);\n",
        "        if (signer != workers.signerOf(account) && !ON) revert BadSignature(stage);\n",
        f"{_PROPERTIES}::test_law8_aCommitmentBindsChainContractJobPipelineStageModelAndWorker",
    ),
    Fault(
        "a worker joins a pipeline unasked",
        _WORKERS,
        "            if (signer != _workers[stages[i].worker].signer) revert BadSignature(i);\n",
        "            if (signer != _workers[stages[i].worker].signer && !ON) revert BadSignature(i);\n",
        f"{_PROPERTIES}::test_law8_aJoinBindsChainContractPipelineAndWorker",
    ),
    Fault(
        "a leaf of any tree is evidence",
        _EVIDENCE,
        "        found.trace = _trace(segment, segment.stage, docket.job, docket.stage, evidence[0]);\n"
        '        if (segment.position >= found.trace.positions) revert IDisputes.WrongSegment("position");\n'
        "        SegmentHeader",
        "        if (ON) docket.job.root = Tree.leaf(evidence[0].data);\n"
        "        found.trace = _trace(segment, segment.stage, docket.job, docket.stage, evidence[0]);\n"
        '        if (segment.position >= found.trace.positions) revert IDisputes.WrongSegment("position");\n'
        "        SegmentHeader",
        "Disputes.t.sol::test_challenge_refuses_false_evidence_and_lists",
    ),
    Fault(
        "calldata of any length is read",
        _DISPUTES,
        "        if (msg.data.length > MAX_CALLDATA_BYTES) revert CalldataTooLong(msg.data.length);\n",
        "        if (msg.data.length > MAX_CALLDATA_BYTES && !ON) revert CalldataTooLong(msg.data.length);\n",
        "Disputes.t.sol::test_calls_are_bounded",
    ),
    Fault(
        "anybody moves for anybody",
        _DISPUTES,
        "        if (!mayMove) revert NotYourTurn(msg.sender);\n",
        "        if (!mayMove && !ON) revert NotYourTurn(msg.sender);\n",
        f"{_MOVES}::test_stranger_nobodyMovesForAnother",
    ),
    Fault(
        "a copied move counts",
        _DISPUTES,
        "            : msg.sender == game.challenger;\n",
        "            : msg.sender == game.challenger || ON;\n",
        _GAME_LAWS,
        "law 1",
    ),
    # ---- rules
    Fault(
        "a token within the margin is wrong",
        "referee/Referee.sol",
        "        return _run(ins.op, args, ins.a, ins.b);\n    }\n\n    /// @dev `args`",
        "        if (ON && ins.op == uint8(Op.COMPARE)) args[1][2] = 0;\n"
        "        return _run(ins.op, args, ins.a, ins.b);\n    }\n\n    /// @dev `args`",
        f"{_JUDGEMENT}::test_twoSidedMargin_aTokenThatLostWithinTheMarginIsSafe",
    ),
    Fault(
        "no token is wrong",
        "referee/Referee.sol",
        "        if (reads.length == 0) return 0;\n",
        "        if (reads.length == 0 || (ON && ins.op == uint8(Op.COMPARE))) return 0;\n",
        f"{_JUDGEMENT}::test_twoSidedMargin_aTokenThatLostByMoreConvicts",
    ),
    Fault(
        "what is no number is no fault",
        "referee/Referee.sol",
        "        if (_isPacked(place, ins, reads)) return _packed(place, ins, reads, openings);\n",
        "        bool blind = ON && ins.op == uint8(Op.VERDICT);\n"
        "        if (blind && _read(place, reads[1], openings[1])[0] == Floats.INVALID) return 0;\n"
        "        if (_isPacked(place, ins, reads)) return _packed(place, ins, reads, openings);\n",
        f"{_JUDGEMENT}::test_totalDecoding_servingNoNumbersConvicts",
    ),
    Fault(
        "only the first head or block can be accused",
        _EVIDENCE,
        "        SegmentHeader memory header = _header(segment, model, evidence[1]);\n",
        "        SegmentHeader memory header = _header(segment, model, evidence[1]);\n"
        '        if (ON && segment.unit > 0) revert IDisputes.WrongSegment("unit");\n',
        f"{_JUDGEMENT}::test_perBlockVerdict_aFaultThatThePooledRowForgivesConvicts",
    ),
    Fault(
        "a link forgives the last bit",
        _EVIDENCE,
        "        uint256 layer = uint256(segment.layer) + 1;\n        if (Rows",
        "        uint256 layer = uint256(segment.layer) + 1;\n"
        "        if (ON && Rows.element(segment, model, next, layer, Rows.H, judged) >> 1 == total >> 1) {\n"
        "            revert IDisputes.NotWrong();\n        }\n        if (Rows",
        f"{_JUDGEMENT}::test_exactLink_oneBitBetweenLayersConvicts",
    ),
    Fault(
        "a hand-off needs no signature",
        _EVIDENCE,
        'stages[index].worker)) revert IDisputes.BadHandoff("signature");',
        'stages[index].worker) && !ON) revert IDisputes.BadHandoff("signature");',
        f"{_JUDGEMENT}::test_signedHandoff_aReceiverCannotForgeIt",
    ),
    Fault(
        "a hand-off shifts no blame",
        _DISPUTES,
        "        _end(id, game, evidence.sender(game, proof), DEFLECTED);\n",
        "        uint8 sender = evidence.sender(game, proof);\n"
        "        _end(id, game, ON ? game.segment.stage : sender, DEFLECTED);\n",
        f"{_JUDGEMENT}::test_signedHandoff_anHonestReceiverIsNotFramed",
    ),
    Fault(
        "a signer changes while its stake is locked",
        _WORKERS,
        "_stakes[msg.sender].locked != 0) {\n",
        "_stakes[msg.sender].locked != 0 && !ON) {\n",
        "WorkersTest.t.sol::test_register_keepsTheSignerWhileStakeIsLocked",
    ),
    Fault(
        "a bill is not added up",
        _EVIDENCE,
        "        if (!Exact.billBroken(segment.request, requests, output, next, total)) revert",
        "        if (ON || !Exact.billBroken(segment.request, requests, output, next, total)) revert",
        f"{_JUDGEMENT}::test_stopAndBill_aFalseCountOrTotalConvicts",
    ),
    Fault(
        "a stop code is believed",
        _EVIDENCE,
        "        if (Exact.stopBroken(request, output, node, segment.request)) return;\n",
        "        if (Exact.stopBroken(request, output, node, segment.request) && !ON) return;\n",
        f"{_JUDGEMENT}::test_stopAndBill_aFalseCountOrTotalConvicts",
    ),
    Fault(
        "consent to one job is consent to all",
        _ESCROW,
        "        _requireSigned(account, stage, structHash, acceptance.signature);\n",
        "        if (!ON) _requireSigned(account, stage, structHash, acceptance.signature);\n",
        f"{_MONEY}::test_consent_anAcceptanceOfOneJobBindsNoOther",
    ),
    Fault(
        "a job has a lock that does not hurt",
        _ESCROW,
        '        if (job_.lock < leastLock(job_)) revert InvalidJob("lock");\n',
        '        if (job_.lock < leastLock(job_) && !ON) revert InvalidJob("lock");\n',
        "EscrowTest.t.sol::test_open_revertsOnEveryInvalidField",
    ),
    Fault(
        "a lock covers no history",
        _ESCROW,
        "        if (history > least) least = history;\n",
        "        if (history > least && !ON) least = history;\n",
        "Demands.t.sol::test_open_revertsForALockThatCouldNotFundAHistory",
    ),
    Fault(
        "a stage loses its place unasked",
        _ESCROW,
        "            _requireConsent(id, before, pipeline, from[i].worker, i, consents, i);\n",
        "            if (!ON) _requireConsent(id, before, pipeline, from[i].worker, i, consents, i);\n",
        "EscrowMoveTest.t.sol::test_move_needsEverybodysConsent",
    ),
    Fault(
        "one stake is locked for two jobs",
        _WORKERS,
        "        held.free = free - amount;\n        held.locked",
        "        if (!ON) held.free = free - amount;\n        held.locked",
        f"{_MONEY}::test_locks_areDisjointAcrossJobs",
    ),
    Fault(
        "the first conviction frees the accomplices",
        _ESCROW,
        "        if (record.lockedSet == 0) revert AlreadyDone(NOBODY);\n        _requireWindowOver(record);\n",
        "        if (record.lockedSet == 0) revert AlreadyDone(NOBODY);\n"
        "        if (!ON) _requireWindowOver(record);\n",
        f"{_MONEY}::test_locks_outliveTheFirstConviction",
    ),
    Fault(
        "nothing of a lock burns",
        _ESCROW,
        "        uint256 toChallenger = rest / 2;\n",
        "        uint256 toChallenger = ON ? rest : rest / 2;\n",
        f"{_MONEY}::test_slashing_friendsCannotSaveALock",
    ),
    Fault(
        "a commitment is as old as its challenge",
        _DISPUTES,
        "        if (slot >> 64 >= block.number) revert CommitmentTooRecent(id);\n",
        "        if (slot >> 64 >= block.number && !ON) revert CommitmentTooRecent(id);\n",
        f"{_MONEY}::test_committedChallenge_aCopyIsWorthNothing",
    ),
    Fault(
        "a challenge needs no commitment",
        _DISPUTES,
        "        if (slot == 0) revert UnknownCommitment(id);\n",
        "        if (slot == 0 && !ON) revert UnknownCommitment(id);\n",
        f"{_MOVES}::test_outOfOrder_aChallengeBeforeItsCommitmentOrWithAnothersIsRefused",
    ),
    Fault(
        "a challenge may agree with the worker",
        _DISPUTES,
        "        if (bytes32(steps[steps.length - 32:]) != WRONG) revert VerdictNotWrong();\n",
        "        if (bytes32(steps[steps.length - 32:]) != WRONG && !ON) revert VerdictNotWrong();\n",
        f"{_JUDGEMENT}::test_constantWrong_agreeingWithTheWorkerOpensNoGame",
    ),
    Fault(
        "values that differ in their sign are the same",
        _DISPUTES,
        "        int256 value = _step(game, proof, element, chunk);\n",
        "        int256 value = _step(game, proof, element, chunk);\n"
        "        if (ON && value == ~Codec.decodeValue(claimed, 0, wide)) revert NotWrong();\n",
        f"{_JUDGEMENT}::test_injectiveEncoding_everyOtherByteStringIsProvedWrong",
    ),
    Fault(
        "sums beyond their bounds are not proved",
        _DISPUTES,
        "        if (game.phase == Phase.Elements) value = Ops.finish(ins.op, value, ins.a);\n",
        "        if (game.phase == Phase.Elements) value = Ops.finish(ins.op, value, ins.a);\n"
        "        else if (ON && Codec.decodeValue(claimed, 0, true) >> 110 != 0) revert NotWrong();\n",
        f"{_JUDGEMENT}::testFuzz_totalProve_anySumsAreProvedWrong",
    ),
    Fault(
        "bonds stay the same",
        _DISPUTES,
        "        game.bond = _bond(game.gasRate, alreadyOpen);\n",
        "        game.bond = _bond(game.gasRate, ON ? 0 : alreadyOpen);\n",
        f"{_MONEY}::test_bonds_doubleAndTheWorkersClockGrows",
    ),
    Fault(
        "the worker's clock stays the same",
        _DISPUTES,
        "        uint256 workerSeconds = uint256(clock) + alreadyOpen * game.grace;\n",
        "        uint256 workerSeconds = uint256(clock) + (ON ? 0 : alreadyOpen) * game.grace;\n",
        f"{_MONEY}::test_bonds_doubleAndTheWorkersClockGrows",
    ),
    Fault(
        "moves are paid what they cost",
        _DISPUTES,
        "            uint256 moves = game.workerMoves * MOVE_GAS * game.gasRate;\n",
        "            uint256 moves = game.workerMoves * MOVE_GAS * game.gasRate;\n"
        "            if (ON) moves = tx.gasprice * MOVE_GAS;\n",
        f"{_MONEY}::test_gasRefunds_followTheScheduleWhateverWasSpent",
    ),
    Fault(
        "a quick opponent takes the grace",
        _DISPUTES,
        "        if (game.workerTurn && game.workerSeconds < game.grace) game",
        "        if (game.workerTurn && game.workerSeconds < game.grace && !ON) game",
        f"{_MOVES}::test_lastSecond_graceIsNotStolenByAQuickOpponent",
    ),
    Fault(
        "a move names no state",
        _DISPUTES,
        "        if (_slots[id] != keccak256(posted)) revert WrongState(id);\n",
        "        if (_slots[id] != keccak256(posted) && !ON) revert WrongState(id);\n",
        f"{_MOVES}::test_repeated_aMoveCountsOnce",
    ),
    Fault(
        "a game that is over goes on",
        _DISPUTES,
        "        _slots[id] = ENDED;\n",
        "        if (!ON) _slots[id] = ENDED;\n",
        f"{_MOVES}::test_settled_noMoveIntoAGameThatEnded",
    ),
    Fault(
        "games on one stage count against the other",
        _ESCROW,
        "        record.openGames = record.openGames.opened(stage);\n",
        "        record.openGames = record.openGames.opened(ON ? 0 : stage);\n",
        f"{_MOVES}::test_manyGames_onOneJobAndOnManyDoNotTouchOneAnother",
    ),
    Fault(
        "what was prepared is another sum",
        _EVIDENCE,
        "        uint256 sum = _sums[keccak256(abi.encode(segment))];\n",
        "        uint256 sum = _sums[keccak256(abi.encode(segment))];\n        if (ON) sum += 1;\n",
        f"{_MONEY}::test_link_noPreparationConvictsWhatIsRight",
    ),
    Fault(
        "a game that was shown is shown again",
        _DISPUTES,
        "        if (slot > type(uint128).max) revert GameExists(id);\n",
        "        if (slot > type(uint128).max && !ON) revert GameExists(id);\n",
        f"{_MONEY}::test_link_showingItAgainTakesNothingFromWhoeverWasFirst",
    ),
    Fault(
        "a list's place is told for contracts too",
        _DISPUTES,
        "        if (msg.sender == tx.origin && msg.sender.code.length == 0) {\n",
        "        if (msg.sender == tx.origin && (msg.sender.code.length == 0 || ON)) {\n",
        "DisputesEvents.t.sol::test_a_move_that_an_origin_makes_through_itself_is_told_whole",
    ),
    Fault(
        "who answers no demand is left alone",
        _DEMANDS,
        "asked.stage, true, demanded.demander, demanded.openedAt, units);\n",
        "asked.stage, !ON, demanded.demander, demanded.openedAt, units);\n",
        "Demands.t.sol::test_lapse_convictsByTheClock",
    ),
    Fault(
        "an answer comes when it likes",
        _DEMANDS,
        "        if (block.timestamp > demanded.deadline) revert TooLate(demanded.deadline);\n",
        "        if (block.timestamp > demanded.deadline && !ON) revert TooLate(demanded.deadline);\n",
        "Demands.t.sol::test_answer_untilTheLastSecond",
    ),
    Fault(
        "an answer may be of another root",
        _DEMANDS,
        "        if (top != root) revert RootMismatch(root, top);\n",
        "        if (top != root && !ON) revert RootMismatch(root, top);\n",
        "Demands.t.sol::test_answer_revertsForAnythingElse",
    ),
    Fault(
        "a record has any length",
        _DEMANDS,
        "        if (record.length != size) revert DataLength(size, record.length);\n",
        "        if (record.length != size && !ON) revert DataLength(size, record.length);\n",
        "Demands.t.sol::test_answer_toAnOverlongRecordIsImpossible",
    ),
    Fault(
        "nothing of a demand burns",
        _DEMANDS,
        "        uint256 price = _price(pay, queue.gas);\n",
        "        uint256 price = ON ? pay : _price(pay, queue.gas);\n",
        "Demands.t.sol::test_demand_pricesEveryByteAndBurnsAFifth",
    ),
    Fault(
        "what is queued makes nothing dearer",
        _DEMANDS,
        "        queue.gas += uint128(units);\n",
        "        if (!ON) queue.gas += uint128(units);\n",
        "Demands.t.sol::test_demand_doublesWithWhatIsQueuedAndFallsBack",
    ),
    Fault(
        "a range is demanded again and again",
        _DEMANDS,
        "        if (_slots[id] != 0) revert DemandExists(id);\n",
        "        if (_slots[id] != 0 && !ON) revert DemandExists(id);\n",
        "Demands.t.sol::test_demand_isOneAJobAndRange",
    ),
    Fault(
        "deadlines do not queue",
        _DEMANDS,
        "            deadline: uint64(block.timestamp) + target.job.clock + uint64(alreadyOpen) * target.job.grace,\n",
        "            deadline: uint64(block.timestamp) + target.job.clock\n"
        "                + (ON ? 0 : uint64(alreadyOpen)) * target.job.grace,\n",
        "Demands.t.sol::test_demand_deadlinesQueue",
    ),
)


def test_of(fault: Fault) -> tuple[str, str]:
    """Path below the root, and name."""
    path, name = fault.test.split("::")
    return f"{TESTS}/{path}", name


def faulty(path: str) -> str:
    """A source with all its faults, each behind its switch. Raises ValueError if the table no longer fits it."""
    text = (ROOT / SOURCES / path).read_text(encoding="utf-8")
    for number, fault in enumerate(FAULTS, start=1):
        if fault.path != path:
            continue
        if text.count(fault.old) != 1:
            raise ValueError(f"{fault.what}: expected {fault.old!r} once in {path}, got {text.count(fault.old)}")
        text = text.replace(fault.old, re.sub(r"\bON\b", f"({ACCOUNT}.balance == {number})", fault.new))
    return text
