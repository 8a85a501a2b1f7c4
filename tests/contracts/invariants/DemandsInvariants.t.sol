// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Demand, Demanded} from "../../../contracts/src/interfaces/IDemands.sol";
import {Job, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {Base} from "../Base.t.sol";
import {Archive} from "../Demands.t.sol";

/// @title Demanders, a worker that answers at times, and whoever calls the clock
/// @notice Fuzzed by forge. What it keeps track of is derived from the calls alone, never from the contracts.
contract DemandsParties is Archive {
    struct Live {
        bytes32 id;
        Demanded demanded;
    }

    Live[] public live;
    mapping(address account => uint256) public earned; // and not drawn
    mapping(uint8 stage => bool) public silent; // let a deadline pass
    mapping(uint8 stage => uint256) public open;
    uint256 public wrongAnswers; // calls that succeeded though they should not have, or failed though they should
    uint64 private _first;
    uint256 private _now = START;
    uint256 private _windowEnd = START + 60;

    constructor() {
        Archive.setUp();
    }

    function setUp() public override {}

    function demand(uint256 seed, uint8 stage, uint32 count) external {
        vm.warp(_now);
        stage %= 2;
        address who = seed % 2 == 0 ? ALICE : BOB;
        // A range of its own each time; of stage 1 the test holds the outputs alone.
        uint8 kind = stage == 1 ? OUTPUT : LEAVES;
        Demand memory asked = _ask(stage, kind, 0, _first++, uint32(bound(count, 1, 128)));
        uint256 price = demands.priceOf(asked, _model());
        vm.prank(who);
        (bool done, bytes memory result) =
            address(demands).call(abi.encodeCall(demands.demand, (asked, _model(), price)));
        Status status = escrow.status(id);
        bool may = _now <= START + 60 && (status == Status.Committed || status == Status.Void);
        if (done != may) ++wrongAnswers;
        if (!done) return;
        uint128 pay = uint128(GAS_RATE * (250_000 + asked.count * (2_000 + 40 * 512)));
        uint64 deadline = uint64(_now + 30 + 5 * open[stage]);
        Demanded memory demanded = Demanded(asked, who, uint64(_now), deadline, pay, uint128(price - pay));
        live.push(Live(abi.decode(result, (bytes32)), demanded));

        open[stage] += 1;
    }

    function answer(uint256 seed) external {
        _close(seed, true);
    }

    function lapse(uint256 seed) external {
        _close(seed, false);
    }

    function settle() external {
        vm.warp(_now);
        (bool done,) = address(escrow).call(abi.encodeCall(escrow.settle, (id)));
        if (done && (live.length != 0 || silent[0] || silent[1] || _now <= _windowEnd)) ++wrongAnswers;
    }

    function release() external {
        vm.warp(_now);
        (bool done,) = address(escrow).call(abi.encodeCall(escrow.release, (id)));
        if (done && (live.length != 0 || !(silent[0] || silent[1]) || _now <= _windowEnd)) ++wrongAnswers;
    }

    function withdraw(uint256 seed) external {
        address[4] memory all = [ALICE, BOB, _account(0), _account(1)];
        address account = all[seed % 4];
        uint256 before = token.balanceOf(account);
        vm.prank(account);
        (bool done,) = address(demands).call(abi.encodeCall(demands.withdraw, ()));
        if (done != (earned[account] != 0) || token.balanceOf(account) - before != earned[account]) ++wrongAnswers;
        earned[account] = 0;
    }

    function wait(uint256 seconds_) external {
        _now += bound(seconds_, 1, 12);
        vm.warp(_now);
    }

    // ---- what the invariants ask

    function liveCount() external view returns (uint256) {
        return live.length;
    }

    function payOf(uint256 i) external view returns (uint256) {
        return live[i].demanded.pay;
    }

    function balanceOf(address account) external view returns (uint256) {
        return token.balanceOf(account);
    }

    function creditsHeld() external view returns (uint256) {
        return demands.credit(ALICE) + demands.credit(BOB) + demands.credit(_account(0)) + demands.credit(_account(1));
    }

    function creditsEarned() external view returns (uint256) {
        return earned[ALICE] + earned[BOB] + earned[_account(0)] + earned[_account(1)];
    }

    function held() external view returns (uint256) {
        return token.balanceOf(address(demands));
    }

    function counted(uint8 stage) external view returns (uint256) {
        return demands.openDemands(id, stage);
    }

    function convicted(uint8 stage) external view returns (bool) {
        return escrow.convicted(id, stage);
    }

    function lockHeld(uint8 stage) external view returns (bool) {
        return escrow.lockHeld(id, stage);
    }

    function _close(uint256 seed, bool byAnswer) private {
        vm.warp(_now);
        if (live.length == 0) return;
        uint256 place = seed % live.length;
        Live memory picked = live[place];
        Demand memory asked = picked.demanded.demand;
        bool late = _now > picked.demanded.deadline;
        bool done;
        if (byAnswer) {
            Opening[] memory openings = _openings(asked);
            vm.prank(_account(asked.stage));
            (done,) =
                address(demands).call(abi.encodeCall(demands.answer, (picked.id, picked.demanded, _model(), openings)));
        } else {
            (done,) = address(demands).call(abi.encodeCall(demands.lapse, (picked.id, picked.demanded)));
        }
        if (done != (byAnswer != late)) ++wrongAnswers;
        if (!done) return;
        live[place] = live[live.length - 1];
        live.pop();
        open[asked.stage] -= 1;
        if (byAnswer) {
            earned[_account(asked.stage)] += picked.demanded.pay;
            if (_now + 30 > _windowEnd) _windowEnd = _now + 30;
        } else {
            earned[picked.demanded.demander] += picked.demanded.pay;
            silent[asked.stage] = true;
        }
    }
}

/// forge-config: default.invariant.runs = 8
/// @title The laws of demands, whoever does what in whatever order
contract DemandsInvariants is Base {
    DemandsParties private all;

    function setUp() public {
        all = new DemandsParties();
    }

    /// @dev Read by forge: only the parties act.
    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(all);
    }

    /// @dev Equal, not just at least: what nobody is owed would be trapped.
    function invariant_demandsHoldsWhatItOwes() public view {
        uint256 owed = all.creditsHeld();
        for (uint256 i; i < all.liveCount(); ++i) {
            owed += all.payOf(i);
        }
        assertEq(all.held(), owed, "balance of Demands");
        assertEq(all.creditsHeld(), all.creditsEarned(), "credits");
    }

    function invariant_onlyTheSilentAreConvicted() public view {
        for (uint8 stage; stage < 2; ++stage) {
            assertEq(all.convicted(stage), all.silent(stage), "convicted");
        }
    }

    function invariant_locksLiveOnWhileADemandIsOpen() public view {
        for (uint8 stage; stage < 2; ++stage) {
            assertEq(all.counted(stage), all.open(stage), "open demands");
            if (all.liveCount() != 0) assertTrue(all.lockHeld(stage), "lock held");
        }
    }

    function invariant_nothingSucceedsThatShouldNot() public view {
        assertEq(all.wrongAnswers(), 0, "wrong answers");
    }
}
