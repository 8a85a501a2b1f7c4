// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Disputes} from "../../../contracts/src/Disputes.sol";
import {Escrow} from "../../../contracts/src/Escrow.sol";
import {Workers} from "../../../contracts/src/Workers.sol";
import {Token} from "../../../contracts/src/dev/Token.sol";
import {Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Base} from "../Base.t.sol";
import {Batches, Lie} from "../village/Batches.sol";
import {Villagers} from "./Villagers.sol";

/// forge-config: default.invariant.runs = 6
/// forge-config: nightly.invariant.runs = 100
/// @title The laws of docs/laws.md, whoever plays whom in whatever order: real games, judged by the real Referee
/// @dev One invariant for all laws, because forge plays a campaign for each, and the same one.
contract GameInvariants is Base {
    uint256 private constant STAGES = 2;
    uint256 private constant WORKERS = 3; // one is a spare
    uint256 private constant STAKE = 1e30;
    /// @dev Of a move without its calldata. The dearest proves a verdict over 320 elements, wider than any real one, and ends the job.
    uint256 private constant MOST_GAS = 500_000;

    Villagers private all;
    Token private token;
    Workers private workers;
    Escrow private escrow;
    Disputes private disputes;

    function setUp() public {
        all = new Villagers();
        all.settleIn();
        (address token_, address workers_, address escrow_, address disputes_) = all.contracts();
        (token, workers, escrow, disputes) = (Token(token_), Workers(workers_), Escrow(escrow_), Disputes(disputes_));
    }

    /// @dev Read by forge: only the parties act, and not beyond the end.
    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(all);
    }

    struct FuzzSelector {
        address addr;
        bytes4[] selectors;
    }

    function targetSelectors() public view returns (FuzzSelector[] memory targets) {
        bytes4[11] memory chosen = [
            all.serve.selector,
            all.audit.selector,
            all.accuse.selector,
            all.frame.selector,
            all.prepare.selector,
            all.relieve.selector,
            all.move.selector,
            all.interfere.selector,
            all.finish.selector,
            all.withdraw.selector,
            all.pass.selector
        ];
        targets = new FuzzSelector[](1);
        targets[0].addr = address(all);
        targets[0].selectors = new bytes4[](chosen.length);
        for (uint256 i = 0; i < chosen.length; ++i) {
            targets[0].selectors[i] = chosen[i];
        }
    }

    function invariant_everyLawHolds() public view {
        law1_everyContractHoldsWhatItOwes();
        law2_anHonestWorkerNeverLosesItsLock();
        law3_oneHonestChallengerConvictsEveryViolation();
        law4_aJobEndsExactlyOnce();
        law7_noMoveAfterItsFlagAndNoFlagBeforeItsTime();
        law9_everyMoveCostsBoundedGas();
        law10_aCopiedOrRepeatedCallIsWorthNothing();
    }

    /// @dev Equal, not just at least: what nobody is owed would be trapped, but for the bonds that burned.
    function law1_everyContractHoldsWhatItOwes() public view {
        uint256 owedByEscrow;
        uint256 owedByDisputes = all.bonds() + all.burned();
        for (uint256 i; i < all.parties(); ++i) {
            owedByEscrow += escrow.credit(all.party(i));
            owedByDisputes += disputes.credit(all.party(i));
        }
        for (uint256 i; i < all.jobCount(); ++i) {
            Status status = escrow.status(_id(i));
            if (status == Status.Committed || (status == Status.Void && !escrow.refunded(_id(i)))) owedByEscrow += 17;
        }
        assertEq(token.balanceOf(address(escrow)), owedByEscrow, "law 1: Escrow");
        assertEq(token.balanceOf(address(disputes)), owedByDisputes, "law 1: Disputes");
        assertEq(token.balanceOf(address(workers)), _stake(0) + _stake(1) + _stake(2), "law 1: Workers");
    }

    function law2_anHonestWorkerNeverLosesItsLock() public view {
        assertEq(all.honestWorkersConvicted(), 0, "law 2: honest workers convicted");
        assertEq(all.honestMovesRefused(), 0, "law 2: honest moves refused");
        assertEq(all.placesTaken(), 0, "law 2: places taken without consent");
        uint256[WORKERS] memory lost;
        for (uint256 i; i < all.jobCount(); ++i) {
            (bytes32 id, Lie lie) = _job(i);
            for (uint8 stage; stage < STAGES; ++stage) {
                bool guilty = Batches.guilty(lie) >> stage & 1 == 1;
                assertTrue(guilty || !escrow.convicted(id, stage), "law 2: convicted though it served within tolerance");
                bool slashed = escrow.convicted(id, stage) && !escrow.lockHeld(id, stage);
                for (uint256 k; k < WORKERS; ++k) {
                    if (slashed && all.holder(i, stage) == all.worker(k)) lost[k] += escrow.job(id).lock;
                }
            }
        }
        for (uint256 k; k < WORKERS; ++k) {
            assertEq(_stake(k), STAKE - lost[k], "law 2: stake");
        }
    }

    function law3_oneHonestChallengerConvictsEveryViolation() public view {
        assertEq(all.honestChallengersBeaten(), 0, "law 3: honest challengers beaten");
        for (uint256 i; i < all.jobCount(); ++i) {
            (bytes32 id, Lie lie) = _job(i);
            bool judged = all.now_() > escrow.windowEnd(id) && escrow.openGames(id, 0) + escrow.openGames(id, 1) == 0;
            for (uint8 stage; stage < STAGES; ++stage) {
                assertEq(escrow.convicted(id, stage), all.found(id, stage), "law 3: convicted as the games said");
                if (!judged || Batches.guilty(lie) >> stage & 1 == 0) continue;
                assertTrue(escrow.convicted(id, stage), "law 3: a violation went unpunished");
            }
        }
    }

    function law4_aJobEndsExactlyOnce() public view {
        assertEq(all.endedTwice(), 0, "law 4: ended twice, or before its time");
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = _id(i);
            Status status = escrow.status(id);
            bool convicted = escrow.convicted(id, 0) || escrow.convicted(id, 1);
            assertEq(status == Status.Void, convicted, "law 4: void exactly if somebody is convicted");
            if (status == Status.Committed) {
                assertTrue(escrow.lockHeld(id, 0) && escrow.lockHeld(id, 1), "law 4: locks");
            }
            assertEq(escrow.lockHeld(id, 0), escrow.lockHeld(id, 1), "law 4: locks live and end together");
        }
    }

    function law7_noMoveAfterItsFlagAndNoFlagBeforeItsTime() public view {
        assertEq(all.wrongClocks(), 0, "law 7: moves and flags out of time");
    }

    function law9_everyMoveCostsBoundedGas() public view {
        assertTrue(all.largestMoveGas() <= MOST_GAS, "law 9: gas of a move");
    }

    function law10_aCopiedOrRepeatedCallIsWorthNothing() public view {
        assertEq(all.copiesAccepted(), 0, "law 10: accepted from somebody else, or twice");
    }

    /// @dev At the end of every run everything is played out, settled and withdrawn.
    function afterInvariant() public {
        all.end();
        law1_noTokenStaysBehind();
        law2_anHonestWorkerNeverLosesItsLock();
        law3_oneHonestChallengerConvictsEveryViolation();
        law5_everyJobEndsWithinItsWindowAndOneGame();
        law6_whoIsSilentIsBeatenByTheOtherAlone();
    }

    function law1_noTokenStaysBehind() public view {
        assertEq(token.balanceOf(address(escrow)), 0, "law 1: left in Escrow");
        assertEq(token.balanceOf(address(disputes)), all.burned(), "law 1: left in Disputes, beside what burned");
        for (uint256 k; k < WORKERS; ++k) {
            assertEq(workers.lockedStake(all.worker(k)), 0, "law 1: left locked");
        }
    }

    function law5_everyJobEndsWithinItsWindowAndOneGame() public view {
        assertEq(all.endedLate(), 0, "law 5: jobs that did not end as they must, when they must");
    }

    function law6_whoIsSilentIsBeatenByTheOtherAlone() public view {
        assertEq(all.silenceUnpunished(), 0, "law 6: games that nobody could end");
    }

    function _id(uint256 i) private view returns (bytes32 id) {
        (id,) = _job(i);
    }

    function _job(uint256 i) private view returns (bytes32 id, Lie lie) {
        (id, lie,,,,) = all.jobs(i);
    }

    function _stake(uint256 k) private view returns (uint256) {
        address account = all.worker(k);
        (uint256 leaving,) = workers.withdrawalOf(account);
        return workers.freeStake(account) + workers.lockedStake(account) + leaving;
    }
}
