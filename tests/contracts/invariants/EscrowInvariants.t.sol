// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Escrow} from "../../../contracts/src/Escrow.sol";
import {Workers} from "../../../contracts/src/Workers.sol";
import {Token} from "../../../contracts/src/dev/Token.sol";
import {Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Base} from "../Base.t.sol";
import {Parties} from "./Parties.sol";

/// forge-config: default.invariant.runs = 8
/// forge-config: nightly.invariant.runs = 500
/// @title The laws of money and stake, whoever does what in whatever order
/// @dev One invariant for all, because forge plays a campaign for each, and the same one.
contract EscrowInvariants is Base {
    uint256 private constant STAGES = 3;
    uint256 private constant WORKERS = 5;

    Parties private all;
    Token private token;
    Workers private workers;
    Escrow private escrow;

    function setUp() public {
        all = new Parties();
        (address token_, address workers_, address escrow_) = all.contracts();
        (token, workers, escrow) = (Token(token_), Workers(workers_), Escrow(escrow_));
    }

    /// @dev Read by forge: only the parties act.
    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(all);
    }

    function invariant_everyLawOfMoneyHolds() public view {
        escrowHoldsWhatItOwes();
        workersHoldsAllStake();
        aJobEndsExactlyOnce();
        locksAreDisjoint();
        locksLiveAsLongAsTheJob();
        onlyTheGuiltyAndTheAbsentLoseStake();
        whoeverServedIsPaidOnceAndNobodyElse();
        nobodyAnswersForAnothersPieces();
        gamesAreCountedAndConvictionsStay();
        nothingSucceedsThatShouldNot();
    }

    /// @dev Equal, not just at least: what nobody is owed would be trapped.
    function escrowHoldsWhatItOwes() public view {
        uint256 owed;
        for (uint256 i; i < all.parties(); ++i) {
            owed += escrow.credit(all.party(i));
        }
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            Status status = escrow.status(id);
            bool unpaid = status == Status.Open || status == Status.Accepted || status == Status.Committed;
            if (unpaid || (status == Status.Void && !escrow.refunded(id))) owed += all.priceEscrowed(id);
        }
        assertEq(token.balanceOf(address(escrow)), owed, "balance of the escrow");
    }

    function workersHoldsAllStake() public view {
        uint256 stake;
        for (uint256 i; i < WORKERS; ++i) {
            stake += _stake(all.party(1 + i));
        }
        assertEq(token.balanceOf(address(workers)), stake, "balance of Workers");
    }

    function aJobEndsExactlyOnce() public view {
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            Status status = escrow.status(id);
            bool ended = status == Status.Paid || status == Status.Void || status == Status.Refunded;
            assertEq(all.ends(id), ended ? 1 : 0, "ends");
            assertTrue(all.releases(id) <= 1, "released at most once");
        }
    }

    function locksAreDisjoint() public view {
        uint256[WORKERS] memory held;
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            for (uint8 stage; stage < STAGES; ++stage) {
                if (escrow.lockHeld(id, stage)) held[all.holder(id, stage)] += escrow.job(id).lock;
            }
        }
        for (uint256 i; i < WORKERS; ++i) {
            assertEq(workers.lockedStake(all.party(1 + i)), held[i], "locked stake");
        }
    }

    function locksLiveAsLongAsTheJob() public view {
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            Status status = escrow.status(id);
            if (status == Status.Open) continue;
            bool held = status == Status.Accepted || status == Status.Committed
                || (status == Status.Void && all.releases(id) == 0);
            for (uint8 stage; stage < STAGES; ++stage) {
                assertEq(escrow.lockHeld(id, stage), held, "lock held");
            }
        }
    }

    function onlyTheGuiltyAndTheAbsentLoseStake() public view {
        for (uint256 i; i < WORKERS; ++i) {
            address account = all.party(1 + i);
            assertEq(_stake(account), all.expectedStake(account), "stake");
        }
    }

    /// @dev Not who left, and not twice, however often a job moved.
    function whoeverServedIsPaidOnceAndNobodyElse() public view {
        for (uint256 i; i < WORKERS; ++i) {
            address account = all.party(1 + i);
            assertEq(escrow.credit(account) + all.withdrawn(account), all.earned(account), "pay");
        }
    }

    /// @dev A stage's lock and blame are of whoever committed there: nobody has its place but by its own signature.
    function nobodyAnswersForAnothersPieces() public view {
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            for (uint8 stage; stage < STAGES; ++stage) {
                address there = workers.pipelineStage(escrow.job(id).pipeline, stage).worker;
                assertEq(there, all.party(1 + all.holder(id, stage)), "whose stage it is");
                if (escrow.root(id, stage) != 0) assertEq(there, all.committed(id, stage), "who committed");
            }
        }
    }

    function gamesAreCountedAndConvictionsStay() public view {
        for (uint256 i; i < all.jobCount(); ++i) {
            bytes32 id = all.jobs(i);
            bool anyGuilty;
            for (uint8 stage; stage < STAGES; ++stage) {
                assertEq(escrow.openGames(id, stage), all.games(id, stage), "open games");
                assertEq(escrow.convicted(id, stage), all.guilty(id, stage), "convicted");
                anyGuilty = anyGuilty || all.guilty(id, stage);
            }
            assertEq(escrow.status(id) == Status.Void, anyGuilty, "void exactly if somebody is guilty");
        }
    }

    function nothingSucceedsThatShouldNot() public view {
        assertEq(all.wrongAnswers(), 0, "wrong answers");
    }

    function _stake(address account) private view returns (uint256) {
        (uint256 leaving,) = workers.withdrawalOf(account);
        return workers.freeStake(account) + workers.lockedStake(account) + leaving;
    }
}
