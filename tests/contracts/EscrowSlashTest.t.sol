// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Counts} from "../../contracts/src/game/Counts.sol";
import {IEscrow, Job, Status} from "../../contracts/src/interfaces/IEscrow.sol";
import {Market} from "./Market.t.sol";

/// @title Games, convictions and what becomes of the locks. The test plays Disputes.
contract EscrowSlashTest is Market {
    uint256 private constant COUNT = 3;
    uint256 private constant LOCK = 8_001_300; // 2 * (650 + 2,000,000 * 2)
    uint8 private constant NOBODY = 255;
    address private constant ALICE = address(0xA1);
    address private constant BOB = address(0xB0B);

    bytes32 private id;

    function setUp() public {
        _deploy(address(this));
        bytes32 pipeline = _pipeline(COUNT);
        id = _open(_job(pipeline));
        escrow.accept(id, _acceptances(id, COUNT));
        escrow.commit(id, _claims(id, COUNT, 20)); // price 440, pays of 146; window until START + 60
    }

    // ---- gameOpened ----

    function test_games_revertForAnyoneButDisputes() public {
        vm.startPrank(ALICE);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotDisputes.selector, ALICE));
        escrow.gameOpened(id, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotDisputes.selector, ALICE));
        escrow.gameClosed(id, 0, NOBODY, ALICE, 1, 1);
        vm.stopPrank();
    }

    function test_gameOpened_revertsOutsideTheWindow() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, bytes32(0), Status.Committed, Status.None));
        escrow.gameOpened(0, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.UnknownStage.selector, 3));
        escrow.gameOpened(id, 3);
        vm.warp(START + 61);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, START + 60));
        escrow.gameOpened(id, 0);
        vm.warp(START + 60);
        escrow.gameOpened(id, 0);
        escrow.gameClosed(id, 0, NOBODY, ALICE, 1, 1);
        vm.warp(START + 61);
        escrow.settle(id);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Committed, Status.Paid));
        escrow.gameOpened(id, 0);
    }

    function test_gameOpened_countsByStage() public {
        assertEq(escrow.gameOpened(id, 0), 0, "first");
        assertEq(escrow.gameOpened(id, 0), 1, "second");
        assertEq(escrow.gameOpened(id, 1), 0, "first of another");
        assertEq(escrow.openGames(id, 0), 2, "open");
        escrow.gameClosed(id, 0, NOBODY, ALICE, 1, 1);
        assertEq(escrow.openGames(id, 0), 1, "open");
        assertEq(escrow.openGames(id, 1), 1, "open");
    }

    function testFuzz_counts(uint64 counts, uint256 stage) public {
        stage = bound(stage, 0, 63);
        uint256 before = Counts.against(counts, stage);
        if (before == 255) {
            vm.expectRevert(abi.encodeWithSelector(Counts.CountOutOfRange.selector, stage));
            this.opened(counts, stage);
            return;
        }
        uint64 more = Counts.opened(counts, stage);
        assertEq(Counts.closed(more, stage), counts, "there and back");
        assertEq(Counts.total(more), Counts.total(counts) + 1, "one more in all");
        for (uint256 i; i < 8; ++i) {
            assertEq(Counts.against(more, i), Counts.against(counts, i) + (i == stage % 8 ? 1 : 0), "of its own count");
        }
    }

    function opened(uint64 counts, uint256 stage) external pure returns (uint64) {
        return Counts.opened(counts, stage);
    }

    // ---- gameClosed ----

    function test_gameClosed_revertsForAGameThatIsNotOpen() public {
        escrow.gameOpened(id, 0);
        vm.expectRevert();
        escrow.gameClosed(id, 1, NOBODY, ALICE, 1, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.UnknownStage.selector, 3));
        escrow.gameClosed(id, 0, 3, ALICE, 1, 1);
    }

    function test_gameClosed_acquittalChangesNothing() public {
        escrow.gameOpened(id, 1);
        vm.warp(START + 61);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.GamesOpen.selector, 1));
        escrow.settle(id);
        escrow.gameClosed(id, 1, NOBODY, ALICE, 1, 1);
        assertTrue(!escrow.convicted(id, 1), "convicted");
        escrow.settle(id);
        assertEq(uint256(escrow.status(id)), uint256(Status.Paid), "status");
    }

    function test_refund_followsTheFirstConviction() public {
        escrow.gameOpened(id, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Void, Status.Committed));
        escrow.refund(id);
        vm.expectEmit();
        emit IEscrow.StageConvicted(id, 1, ALICE);
        vm.expectEmit();
        emit IEscrow.JobVoided(id);
        escrow.gameClosed(id, 1, 1, ALICE, START, 1);
        assertEq(uint256(escrow.status(id)), uint256(Status.Void), "status");
        assertTrue(escrow.convicted(id, 1) && !escrow.convicted(id, 0), "convicted");
        assertTrue(!escrow.refunded(id), "not yet");
        vm.expectEmit();
        emit IEscrow.Credited(REQUESTER, 650, id);
        vm.prank(ALICE); // anyone
        escrow.refund(id);
        // Again, and after other convictions: nothing is refunded twice, and games go on.
        escrow.refund(id);
        _convict(1, BOB, START - 1, 1);
        _convict(2, BOB, START - 1, 1);
        escrow.refund(id);
        assertTrue(escrow.refunded(id), "once");
        assertEq(escrow.credit(REQUESTER), 650, "refund");
        assertEq(escrow.winners(id, 1).length, 2, "winners");
        vm.warp(START + 61);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Committed, Status.Void));
        escrow.settle(id);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Open, Status.Void));
        escrow.expire(id);
    }

    function test_gameClosed_mayConvictAnotherStage() public {
        escrow.gameOpened(id, 1);
        escrow.gameClosed(id, 1, 0, ALICE, 1, 1);
        assertTrue(escrow.convicted(id, 0) && !escrow.convicted(id, 1), "the sender, not the receiver");
        assertEq(escrow.openGames(id, 1), 0, "closed");
    }

    // ---- release ----

    function test_release_revertsBeforeItsTime() public {
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Void, Status.Committed));
        escrow.release(id);
        escrow.gameOpened(id, 0);
        _convict(1, ALICE, START, 1);
        vm.warp(START + 60);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, START + 61));
        escrow.release(id);
        vm.warp(START + 61);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.GamesOpen.selector, 1));
        escrow.release(id);
        escrow.gameClosed(id, 0, NOBODY, BOB, 1, 1);
        escrow.release(id);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.AlreadyDone.selector, NOBODY));
        escrow.release(id);
    }

    function test_release_sharesOutTheLock() public {
        _convict(1, BOB, START + 5, 250_000);
        _convict(1, ALICE, START + 4, 500_000); // later, but committed before
        vm.warp(START + 61);
        // 8,001,300 - 292 of pay - 1,500,000 of gas = 6,501,008, halved.
        vm.expectEmit();
        emit IEscrow.StageSlashed(id, 1, 292, 1_500_000, 3_250_504, 3_250_504);
        escrow.release(id);
        assertEq(escrow.credit(_account(0)), 146, "stage 0");
        assertEq(escrow.credit(_account(1)), 0, "stage 1");
        assertEq(escrow.credit(_account(2)), 146, "stage 2");
        assertEq(escrow.credit(ALICE), 1_000_000 + 3_250_504, "the oldest commitment");
        assertEq(escrow.credit(BOB), 500_000, "gas");
        assertEq(token.balanceOf(BURN), 3_250_504, "burned");
        assertEq(token.balanceOf(address(escrow)), 650 + LOCK - 3_250_504, "the escrow holds what it owes");
        assertEq(workers.freeStake(_account(1)), STAKE - LOCK, "slashed");
        assertEq(workers.freeStake(_account(0)), STAKE, "freed");
        assertEq(workers.lockedStake(_account(0)) + workers.lockedStake(_account(1)), 0, "locked");
    }

    function test_release_takesThePayOnlyOnce() public {
        _convict(2, ALICE, START, 0);
        _convict(0, BOB, START, 0);
        vm.warp(START + 61);
        vm.expectEmit();
        emit IEscrow.StageSlashed(id, 0, 146, 0, (LOCK - 146) / 2, (LOCK - 146) / 2);
        vm.expectEmit();
        emit IEscrow.StageSlashed(id, 2, 0, 0, LOCK / 2, LOCK / 2);
        escrow.release(id);
        assertEq(escrow.credit(_account(1)), 146, "pay");
    }

    function test_release_oddRemainderBurns() public {
        _convict(0, ALICE, START, 0);
        _convict(1, ALICE, START, 0);
        _convict(2, ALICE, START, 0);
        vm.warp(START + 61);
        escrow.release(id);
        assertEq(escrow.credit(ALICE), 3 * (LOCK / 2), "challenger");
        assertEq(token.balanceOf(BURN), 3 * (LOCK - LOCK / 2), "burned");
    }

    function test_release_equallyOldCommitmentsGoToTheFirstWinner() public {
        _convict(1, BOB, START, 0);
        _convict(1, ALICE, START, 0);
        vm.warp(START + 61);
        escrow.release(id);
        assertEq(escrow.credit(ALICE), 0, "second");
        assertTrue(escrow.credit(BOB) > 0, "first");
    }

    function test_release_selfConvictionLosesAQuarter() public {
        for (uint160 i; i < 8; ++i) {
            _convict(1, address(0xC0DE00 + i), START, 100_000_000);
        }
        vm.warp(START + 61);
        escrow.release(id);
        // (8,001,300 - 292) / 2 of gas at most, and half of the other half.
        assertEq(token.balanceOf(BURN), 2_000_252, "burned");
    }

    function test_release_eightWinnersTheOldestOnes() public {
        for (uint160 i; i < 8; ++i) {
            _convict(1, address(0xC0DE00 + i), START + 10 + uint64(i), 1);
        }
        _convict(1, BOB, START + 30, 1); // too young: no more than its bond
        assertEq(escrow.winners(id, 1).length, 8, "winners");
        _convict(1, ALICE, START + 9, 1); // takes the place of the youngest
        assertEq(escrow.winners(id, 1).length, 8, "winners");
        vm.warp(START + 61);
        escrow.release(id);
        assertEq(escrow.credit(BOB), 0, "too young");
        assertEq(escrow.credit(address(0xC0DE07)), 0, "displaced");
        assertEq(escrow.credit(address(0xC0DE06)), 2, "gas");
        assertTrue(escrow.credit(ALICE) > LOCK / 3, "the oldest");
    }

    function testFuzz_release_sharesOutEveryLock(uint256 seed, uint8 convictions) public {
        convictions = uint8(bound(convictions, 1, 12));
        uint256 guilty;
        for (uint256 i; i < convictions; ++i) {
            seed = uint256(keccak256(abi.encode(seed)));
            uint8 stage = uint8(seed % COUNT);
            guilty |= 1 << stage;
            _convict(stage, address(uint160(0xC0DE00 + i)), START + uint64(seed >> 8) % 100, uint32(seed >> 80));
        }
        vm.warp(START + 61);
        escrow.release(id);
        uint256 lost;
        for (uint256 i; i < COUNT; ++i) {
            bool convicted = guilty >> i & 1 == 1;
            assertEq(escrow.credit(_account(i)), convicted ? 0 : 146, "pay");
            if (convicted) lost += LOCK;
        }
        uint256 credits = escrow.credit(REQUESTER);
        for (uint256 i; i < convictions; ++i) {
            credits += escrow.credit(address(uint160(0xC0DE00 + i)));
        }
        for (uint256 i; i < COUNT; ++i) {
            credits += escrow.credit(_account(i));
        }
        assertEq(credits, token.balanceOf(address(escrow)), "the escrow holds what it owes");
        assertEq(credits + token.balanceOf(BURN), 650 + lost, "nothing is lost");
        assertTrue(token.balanceOf(BURN) * 4 >= lost - 292, "a quarter burns");
    }

    function _convict(uint8 stage, address challenger, uint64 committedAt, uint256 gasUnits) private {
        escrow.gameOpened(id, stage);
        escrow.gameClosed(id, stage, stage, challenger, committedAt, gasUnits);
    }
}
