// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";

import {Demands} from "../../contracts/src/Demands.sol";
import {Grids} from "../../contracts/src/demands/Grid.sol";
import {Demand, Demanded, IDemands} from "../../contracts/src/interfaces/IDemands.sol";
import {IEscrow, Job, Status} from "../../contracts/src/interfaces/IEscrow.sol";
import {Model, Opening} from "../../contracts/src/interfaces/IReferee.sol";
import {IWorkers} from "../../contracts/src/interfaces/IWorkers.sol";
import {Tree} from "../../contracts/src/referee/Tree.sol";
import {Market} from "./Market.t.sol";

/// @title A committed job whose data the test holds, leaf by leaf
/// @dev Two stages, three requests. Request 1 has 20 positions, 150 prompt tokens and 130 output tokens; the others' records stand for themselves.
abstract contract Archive is Market {
    uint8 internal constant PROMPT = 0;
    uint8 internal constant OUTPUT = 1;
    uint8 internal constant TENSORS = 2;
    uint8 internal constant LEAVES = 3;
    uint32 internal constant R = 1;
    uint256 internal constant POSITIONS = 20;
    uint256 internal constant STAGE_TENSORS = 192; // of stage 0
    uint32 internal constant H = 0; // 300 columns: two leaves a row
    uint32 internal constant V = 3; // 40 columns: two tiles across, three bands
    address internal constant ALICE = address(0xA1);
    address internal constant BOB = address(0xB0B);
    uint128 internal constant GAS_RATE = 2;

    Demands internal demands;
    bytes32 internal id;
    bytes[] internal requests;
    bytes[] internal outputs;
    bytes[] internal nodes; // of stage 0
    bytes[] internal promptLeaves;
    bytes[] internal outputLeaves;
    bytes[] internal roots; // of the tensors of request R at stage 0
    bytes[] internal rows;
    bytes[] internal tiles;

    function setUp() public virtual {
        // Token, Models, Workers, Escrow, Demands: the fifth contract of this one.
        address predicted = address(uint160(uint256(keccak256(abi.encodePacked(hex"d694", address(this), hex"05")))));
        _deploy(address(this), predicted);
        demands = new Demands(IERC20(token), IEscrow(escrow), IWorkers(workers));
        assertEq(address(demands), predicted, "address of Demands");
        _write();
        bytes32 pipeline = _pipeline(2);
        Job memory job = _job(pipeline);
        (job.requests, job.requestsRoot) = (3, _rootOf(requests));
        id = _open(job);
        escrow.accept(id, _acceptances(id, 2));
        _commit();
        for (uint256 i; i < 2; ++i) {
            address account = i == 0 ? ALICE : BOB;
            token.mint(account, 1e30);
            vm.prank(account);
            token.approve(address(demands), type(uint256).max);
        }
    }

    function _model() internal pure virtual override returns (Model memory model) {
        model = super._model();
        (model.hidden, model.kvWidth, model.maxPositions) = (300, 40, 100);
    }

    function _commit() internal virtual {
        escrow.commit(id, _one(_claim(id, 0, _rootOf(nodes), 0, 0, _key(0))));
        escrow.commit(id, _one(_claim(id, 1, _root(1), _rootOf(outputs), 20, _key(1))));
    }

    /// @notice The data: every leaf's bytes follow from its place.
    function _write() internal virtual {
        promptLeaves = [_noise("prompt", 0, 512), _noise("prompt", 1, 88)];
        outputLeaves = [_noise("output", 0, 512), _noise("output", 1, 8)];
        for (uint256 i; i < 2 * POSITIONS; ++i) {
            rows.push(_noise("h", i, i % 2 == 0 ? 512 : 88));
        }
        for (uint256 i; i < 6; ++i) {
            tiles.push(_noise("v", i, uint256(2) * (i < 4 ? 8 : 4) * (i % 2 == 1 ? 8 : 32)));
        }
        for (uint256 i; i < STAGE_TENSORS; ++i) {
            bytes32 root = i == H ? _rootOf(rows) : i == V ? _rootOf(tiles) : keccak256(abi.encode("root", i));
            roots.push(bytes.concat(root));
        }
        for (uint32 r; r < 3; ++r) {
            bytes32 prompt = r == R ? _rootOf(promptLeaves) : keccak256("prompt");
            bytes32 tokens = r == R ? _rootOf(outputLeaves) : keccak256("tokens");
            bytes32 tensors = r == R ? _rootOf(roots) : keccak256("tensors");
            bytes memory head = abi.encodePacked(r, uint32(150), uint32(200), uint32(0), uint32(0), uint32(65536));
            requests.push(abi.encodePacked(head, uint64(0), uint32(0), new bytes(32), prompt));
            outputs.push(abi.encodePacked(r, uint64(0), uint32(130), uint32(1), tokens));
            nodes.push(abi.encodePacked(r, uint32(POSITIONS), tensors));
        }
    }

    function _noise(string memory what, uint256 place, uint256 size) internal pure returns (bytes memory data) {
        data = new bytes(size);
        for (uint256 i; i < size; ++i) {
            data[i] = bytes1(uint8(uint256(keccak256(abi.encode(what, place, i / 32))) >> 8 * (i % 32)) | 1);
        }
    }

    // ---- demands and their answers

    function _ask(uint8 stage, uint8 kind, uint32 tensor, uint64 first, uint32 count)
        internal
        view
        returns (Demand memory)
    {
        return Demand(id, stage, kind, R, tensor, first, count);
    }

    function _demand(Demand memory asked) internal returns (bytes32 key, Demanded memory demanded) {
        return _demand(asked, ALICE);
    }

    /// @notice Demands, and predicts the state from the law.
    function _demand(Demand memory asked, address who) internal returns (bytes32 key, Demanded memory demanded) {
        uint256 price = demands.priceOf(asked, _model());
        uint256 before = token.balanceOf(who);
        uint256 burned = token.balanceOf(BURN);
        uint64 open = uint64(demands.openDemands(id, asked.stage));
        vm.prank(who);
        key = demands.demand(asked, _model(), price);
        assertEq(before - token.balanceOf(who), price, "price");
        uint64 deadline = uint64(block.timestamp) + 30 + 5 * open;
        burned = token.balanceOf(BURN) - burned;
        demanded = Demanded(asked, who, uint64(block.timestamp), deadline, uint128(price - burned), uint128(burned));
        assertEq(demands.stateOf(key), keccak256(abi.encode(demanded)), "state");
    }

    /// @notice What an honest worker posts.
    function _openings(Demand memory asked) internal view returns (Opening[] memory list) {
        bytes[] memory records = asked.kind == PROMPT ? requests : asked.kind == OUTPUT ? outputs : nodes;
        bytes[] memory leaves = asked.kind == PROMPT
            ? promptLeaves
            : asked.kind == OUTPUT ? outputLeaves : asked.kind == TENSORS ? roots : asked.tensor == H ? rows : tiles;
        bool beyond = asked.first >= leaves.length;
        list = new Opening[](beyond ? 1 : 2);
        list[0] = Opening(records[asked.request], _prove(records, asked.request, 1));
        if (beyond) return list;
        uint256 count = leaves.length - asked.first;
        if (asked.count < count) count = asked.count;
        bytes memory data;
        for (uint256 i; i < count; ++i) {
            data = bytes.concat(data, leaves[asked.first + i]);
        }
        bytes32[] memory siblings = _prove(leaves, asked.first, count);
        if (asked.kind == LEAVES) {
            bytes32[] memory above = _prove(roots, asked.tensor, 1);
            bytes32[] memory both = new bytes32[](siblings.length + above.length);
            for (uint256 i; i < both.length; ++i) {
                both[i] = i < siblings.length ? siblings[i] : above[i - siblings.length];
            }
            siblings = both;
        }
        list[1] = Opening(data, siblings);
    }

    function _answer(bytes32 key, Demanded memory demanded, Opening[] memory openings) internal {
        address worker = _account(demanded.demand.stage);
        vm.prank(worker);
        demands.answer(key, demanded, _model(), openings);
    }

    // ---- trees

    function _hashes(bytes[] memory leaves) internal pure returns (bytes32[] memory hashes) {
        hashes = new bytes32[](leaves.length);
        for (uint256 i; i < leaves.length; ++i) {
            hashes[i] = Tree.leaf(leaves[i]);
        }
    }

    function _rootOf(bytes[] memory leaves) internal pure returns (bytes32) {
        return Tree.fold(_hashes(leaves));
    }

    function _prove(bytes[] memory leaves, uint256 first, uint256 count) internal pure returns (bytes32[] memory) {
        bytes32[] memory level = _hashes(leaves);
        bytes32[] memory found = new bytes32[](64);
        uint256 used;
        uint256 end = first + count;
        while (level.length > 1) {
            if (first % 2 == 1) found[used++] = level[first - 1];
            if (end % 2 == 1 && end < level.length) found[used++] = level[end];
            bytes32[] memory above = new bytes32[]((level.length + 1) / 2);
            for (uint256 i; i < above.length; ++i) {
                above[i] = 2 * i + 1 < level.length ? Tree.node(level[2 * i], level[2 * i + 1]) : level[2 * i];
            }
            (level, first, end) = (above, first / 2, (end + 1) / 2);
        }
        assembly ("memory-safe") {
            mstore(found, used)
        }
        return found;
    }
}

/// @title Demands: what may be demanded, what answers it, what it costs
contract DemandsTest is Archive {
    // ---- demand ----

    function test_demand_revertsForWhatNoTreeHas() public {
        _refused(Demand(id, 0, LEAVES, 3, H, 0, 1), "request");
        _refused(Demand(id, 0, 4, R, 0, 0, 1), "kind");
        _refused(Demand(id, 0, LEAVES, R, 192, 0, 1), "tensor");
        _refused(Demand(id, 1, LEAVES, R, 193, 0, 1), "tensor");
        _refused(Demand(id, 0, TENSORS, R, 1, 0, 1), "tensor");
        _refused(Demand(id, 0, PROMPT, R, 1, 0, 1), "tensor");
        _refused(Demand(id, 0, OUTPUT, R, 0, 0, 1), "stage");
        _refused(Demand(id, 0, LEAVES, R, H, 0, 0), "count");
        _refused(Demand(id, 0, LEAVES, R, H, 0, 129), "count"); // of 512 bytes
        _refused(Demand(id, 0, TENSORS, R, 0, 0, 2049), "count");
        Model memory other = _model();
        other.hidden = 301;
        bytes32 expected = modelId;
        vm.expectRevert(abi.encodeWithSelector(IDemands.WrongModel.selector, expected, keccak256(abi.encode(other))));
        demands.demand(_ask(0, LEAVES, H, 0, 1), other, type(uint256).max);
    }

    function test_demand_revertsOutsideTheWindow() public {
        Demand memory asked = _ask(0, LEAVES, H, 0, 1);
        vm.warp(START + 61);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooLate.selector, START + 60));
        vm.prank(ALICE);
        demands.demand(asked, _model(), type(uint256).max);
        vm.warp(START + 60);
        _demand(asked);
        Demand memory unknown = asked;
        unknown.job = bytes32(uint256(1));
        vm.expectRevert(abi.encodeWithSelector(IDemands.WrongModel.selector, bytes32(0), modelId));
        demands.demand(unknown, _model(), type(uint256).max);
    }

    function test_demand_revertsForASettledJob() public {
        vm.warp(START + 61);
        escrow.settle(id);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.WrongStatus.selector, id, Status.Committed, Status.Paid));
        vm.prank(ALICE);
        demands.demand(_ask(0, LEAVES, H, 0, 1), _model(), type(uint256).max);
    }

    function test_demand_isOneAJobAndRange() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        vm.expectRevert(abi.encodeWithSelector(IDemands.DemandExists.selector, key));
        vm.prank(BOB);
        demands.demand(demanded.demand, _model(), type(uint256).max);
        _answer(key, demanded, _openings(demanded.demand));
        vm.expectRevert(abi.encodeWithSelector(IDemands.DemandExists.selector, key));
        vm.prank(BOB);
        demands.demand(demanded.demand, _model(), type(uint256).max);
    }

    function test_demand_pricesEveryByteAndBurnsAFifth() public {
        (, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 2));
        assertEq(demanded.pay, GAS_RATE * (250_000 + 2 * (2_000 + 40 * 512)), "pay");
        assertEq(demanded.burned, demanded.pay / 4 + 1, "burned");
    }

    function test_demand_doublesWithWhatIsQueuedAndFallsBack() public {
        Demanded[] memory list = new Demanded[](4);
        bytes32[] memory key = new bytes32[](4);
        for (uint64 i; i < 4; ++i) {
            // 3,127,440 gas each: the fourth makes 12 million.
            (key[i], list[i]) = _demand(_ask(0, LEAVES, H, i, 128));
            assertEq(list[i].burned, list[i].pay / 4 + 1, "no doubling yet");
        }
        Demand memory next = _ask(0, LEAVES, H, 9, 128);
        assertEq(demands.priceOf(next, _model()), 2 * (uint256(list[0].pay) + list[0].pay / 4 + 1), "doubled");
        assertEq(demands.priceOf(_ask(1, LEAVES, H, 9, 128), _model()), 7_818_601, "another stage");
        vm.expectRevert(abi.encodeWithSelector(IDemands.PriceTooHigh.selector, 15_637_202, 15_637_201));
        vm.prank(BOB);
        demands.demand(next, _model(), 15_637_201);
        _answer(key[0], list[0], _openings(list[0].demand));
        assertEq(demands.priceOf(next, _model()), 7_818_601, "fell back");
    }

    // ---- answer ----

    function test_answer_everyKind() public {
        _served(_ask(0, PROMPT, 0, 0, 2));
        _served(_ask(1, PROMPT, 0, 1, 1)); // every stage holds the prompts
        _served(_ask(1, OUTPUT, 0, 0, 2));
        _served(_ask(0, TENSORS, 0, 0, 192));
        _served(_ask(0, TENSORS, 0, 7, 5));
        _served(_ask(0, LEAVES, H, 0, 40));
        _served(_ask(0, LEAVES, H, 3, 2));
        _served(_ask(0, LEAVES, V, 0, 6));
        _served(_ask(0, LEAVES, V, 2, 2));
    }

    function test_answer_isCutOffAtTheTreesEnd() public {
        _served(_ask(0, LEAVES, H, 39, 2));
        _served(_ask(0, LEAVES, H, 40, 1)); // the record alone
        _served(_ask(0, LEAVES, V, 5, 100));
        _served(_ask(1, OUTPUT, 0, type(uint64).max, 1));
        _served(_ask(0, TENSORS, 0, 192, 1));
    }

    function testFuzz_answer_anyRange(uint64 first, uint32 count, uint256 what) public {
        uint8 kind = uint8(what % 5);
        uint32 tensor = kind == 4 ? V : H;
        if (kind == 4) kind = LEAVES;
        first = uint64(bound(first, 0, 45));
        count = uint32(bound(count, 1, 128));
        _served(Demand(id, kind == OUTPUT ? 1 : 0, kind, R, kind == LEAVES ? tensor : 0, first, count));
    }

    function test_answer_isTheWorkersOrItsSigners() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        Opening[] memory openings = _openings(demanded.demand);
        vm.expectRevert(abi.encodeWithSelector(IDemands.NotYourTurn.selector, BOB));
        vm.prank(BOB);
        demands.answer(key, demanded, _model(), openings);
        vm.expectRevert(abi.encodeWithSelector(IDemands.NotYourTurn.selector, _account(1)));
        vm.prank(_account(1));
        demands.answer(key, demanded, _model(), openings);
        vm.prank(vm.addr(_key(0)));
        demands.answer(key, demanded, _model(), openings);
        assertEq(demands.credit(_account(0)), demanded.pay, "the account's");
        _answerReverts(key, demanded, openings, abi.encodeWithSelector(IDemands.WrongState.selector, key)); // repeated
    }

    function test_answer_untilTheLastSecond() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        uint256 snapshot = vm.snapshotState();
        vm.warp(START + 31);
        bytes memory late = abi.encodeWithSelector(IDemands.TooLate.selector, START + 30);
        _answerReverts(key, demanded, _openings(demanded.demand), late);
        vm.revertToState(snapshot);
        vm.warp(START + 30);
        _answer(key, demanded, _openings(demanded.demand));
    }

    function test_answer_revertsForAnythingElse() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 3, 2));
        Opening[] memory openings = _openings(demanded.demand);
        Demanded memory altered = abi.decode(abi.encode(demanded), (Demanded));
        altered.deadline += 1;
        _answerReverts(key, altered, openings, abi.encodeWithSelector(IDemands.WrongState.selector, key));

        _answerReverts(key, demanded, new Opening[](0), abi.encodeWithSelector(IDemands.OpeningCount.selector, 1, 0));
        Opening[] memory record = new Opening[](1);
        record[0] = openings[0];
        _answerReverts(key, demanded, record, abi.encodeWithSelector(IDemands.OpeningCount.selector, 2, 1));

        bytes memory data = openings[1].data; // 88 + 512 bytes
        openings[1].data = bytes.concat(data, hex"00");
        _answerReverts(key, demanded, openings, abi.encodeWithSelector(Grids.DataLength.selector, 600, 601));
        openings[1].data = _noise("short", 0, 599);
        _answerReverts(key, demanded, openings, abi.encodeWithSelector(Grids.DataLength.selector, 600, 599));
        openings[1].data = _noise("other", 0, 600);
        _answerReverts(key, demanded, openings, "");
        openings[1].data = data;

        bytes32[] memory siblings = openings[1].siblings;
        openings[1].siblings = new bytes32[](siblings.length - 1);
        _answerReverts(
            key,
            demanded,
            openings,
            abi.encodeWithSelector(Tree.ProofLength.selector, siblings.length, siblings.length - 1)
        );
        openings[1].siblings = new bytes32[](siblings.length + 1);
        _answerReverts(
            key,
            demanded,
            openings,
            abi.encodeWithSelector(Tree.ProofLength.selector, siblings.length, siblings.length + 1)
        );
        openings[1].siblings = siblings;

        openings[0] = Opening(nodes[0], _prove(nodes, 0, 1));
        _answerReverts(key, demanded, openings, abi.encodeWithSelector(IDemands.WrongRecord.selector, 1, 0));
        openings[0] = Opening(bytes.concat(nodes[1], hex"00"), _prove(nodes, 1, 1));
        _answerReverts(key, demanded, openings, abi.encodeWithSelector(IDemands.DataLength.selector, 40, 41));
        openings[0] = Opening(nodes[1], _prove(nodes, 0, 1));
        _answerReverts(key, demanded, openings, "");
        openings[0] = Opening(new bytes(80_000), new bytes32[](0));
        vm.prank(_account(0));
        vm.expectRevert();
        demands.answer(key, demanded, _model(), openings);

        _answer(key, demanded, _openings(demanded.demand));
    }

    function test_answer_leavesTimeForAGameButNotForDemands() public {
        vm.warp(START + 60);
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        vm.warp(START + 90); // the last second
        bytes memory waiting = abi.encodeWithSelector(IEscrow.GamesOpen.selector, 1);
        vm.expectRevert(waiting);
        escrow.settle(id);
        _answer(key, demanded, _openings(demanded.demand));
        assertEq(escrow.windowEnd(id), START + 120, "a clock more");
        vm.expectRevert(abi.encodeWithSelector(IDemands.TooLate.selector, START + 60));
        vm.prank(ALICE);
        demands.demand(_ask(0, LEAVES, H, 1, 1), _model(), type(uint256).max);
        vm.warp(START + 120);
        escrow.gameOpened(id, 0);
        escrow.gameClosed(id, 0, 255, ALICE, START, 1);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.TooEarly.selector, START + 121));
        escrow.settle(id);
        vm.warp(START + 121);
        escrow.settle(id);
    }

    function test_answer_earlyMovesNoWindow() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        _answer(key, demanded, _openings(demanded.demand));
        assertEq(escrow.windowEnd(id), START + 60, "window");
    }

    /// @dev Every later demand waits `grace` more, so whoever posts one answer in that time is never late.
    function test_demand_deadlinesQueue() public {
        for (uint64 i; i < 5; ++i) {
            (, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, i, 1));
            assertEq(demanded.deadline, START + 30 + 5 * i, "deadline");
        }
        (, Demanded memory other) = _demand(_ask(1, LEAVES, H, 0, 1));
        assertEq(other.deadline, START + 30, "another stage's");
    }

    // ---- lapse ----

    function test_lapse_convictsByTheClock() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(1, LEAVES, 192, 0, 1)); // `out`
        vm.warp(START + 30);
        vm.expectRevert(abi.encodeWithSelector(IDemands.TooEarly.selector, START + 31));
        demands.lapse(key, demanded);
        vm.warp(START + 31);
        vm.expectEmit();
        emit IDemands.DemandLapsed(key, id, 1, ALICE);
        vm.prank(BOB); // anyone
        demands.lapse(key, demanded);
        assertTrue(escrow.convicted(id, 1) && !escrow.convicted(id, 0), "convicted");
        assertEq(uint256(escrow.status(id)), uint256(Status.Void), "status");
        escrow.refund(id);
        assertEq(escrow.credit(REQUESTER), 650, "refund");
        assertEq(demands.credit(ALICE), demanded.pay, "what did not burn");
        vm.expectRevert(abi.encodeWithSelector(IDemands.WrongState.selector, key));
        demands.lapse(key, demanded);
        _answerReverts(key, demanded, new Opening[](0), abi.encodeWithSelector(IDemands.WrongState.selector, key));

        vm.warp(START + 61);
        escrow.release(id);
        // The demander is made whole from the lock before it is shared.
        uint256 gasUnits = 350_000 + demanded.burned / GAS_RATE;
        uint256 rest = uint256(escrow.job(id).lock) - 220; // stage 0's half of 440, the price
        assertEq(escrow.credit(ALICE), gasUnits * GAS_RATE + (rest - gasUnits * GAS_RATE) / 2, "reward");
        vm.prank(ALICE);
        demands.withdraw();
        assertEq(token.balanceOf(address(demands)), 0, "nothing stays");
        vm.expectRevert(IDemands.NothingToWithdraw.selector);
        demands.withdraw();
    }

    function test_lapse_otherDemandsGoOnAfterAConviction() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(1, OUTPUT, 0, 0, 1));
        (bytes32 second, Demanded memory also) = _demand(_ask(0, LEAVES, H, 0, 1), BOB);
        vm.warp(START + 31);
        demands.lapse(key, demanded);
        bytes memory late = abi.encodeWithSelector(IDemands.TooLate.selector, START + 30);
        _answerReverts(second, also, _openings(also.demand), late);
        _demand(_ask(0, LEAVES, H, 1, 1)); // the job is void; its other stages are not free yet
        vm.warp(START + 62);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.GamesOpen.selector, 2));
        escrow.release(id);
        demands.lapse(second, also);
        assertTrue(escrow.convicted(id, 0) && escrow.convicted(id, 1), "both");
    }

    function test_hooks_revertForAnyoneButDemands() public {
        vm.startPrank(ALICE);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotDemands.selector, ALICE));
        escrow.demandOpened(id, 0);
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotDemands.selector, ALICE));
        escrow.demandClosed(id, 0, true, ALICE, 1, 1);
        vm.stopPrank();
        vm.expectRevert(abi.encodeWithSelector(IEscrow.NotDisputes.selector, address(demands)));
        vm.prank(address(demands));
        escrow.gameOpened(id, 0);
    }

    // ---- locks ----

    function test_open_revertsForALockThatCouldNotFundAHistory() public {
        Job memory job = _job(escrow.job(id).pipeline);
        job.nonce = 2;
        // 100 positions of 160 bytes: below what a game takes.
        assertEq(escrow.leastLock(job), 2 * (650 + 4_000_000), "a game's");
        vm.prank(REQUESTER);
        escrow.open(job);

        Model memory long = _model();
        (long.kvWidth, long.maxPositions) = (1024, 8192);
        assertEq(_leastLock(long, 100, 50), 4 * 60 * 4096 * 150 * 2, "as long as the tokens");
        assertEq(_leastLock(long, 100_000, 50), 4 * 60 * 4096 * 8192 * 2, "as long as a request may be");
        long.servedDtype = 2;
        assertEq(_leastLock(long, 100, 50), 4 * 60 * 8192 * 150 * 2, "float32");
    }

    function _leastLock(Model memory model, uint64 prompt, uint64 tokens) private returns (uint256) {
        Job memory job = _job(bytes32(0));
        (job.model, job.promptTokens, job.maxTokens) = (models.register(model), prompt, tokens);
        return escrow.leastLock(job);
    }

    // ---- forms ----

    function _refused(Demand memory asked, string memory what) private {
        vm.expectRevert(abi.encodeWithSelector(IDemands.WrongDemand.selector, what));
        vm.prank(ALICE);
        demands.demand(asked, _model(), type(uint256).max);
    }

    function _served(Demand memory asked) private {
        (bytes32 key, Demanded memory demanded) = _demand(asked);
        Opening[] memory openings = _openings(asked);
        uint256 before = demands.credit(_account(asked.stage));
        vm.expectEmit();
        emit IDemands.DemandAnswered(key, id, openings);
        _answer(key, demanded, openings);
        assertEq(demands.credit(_account(asked.stage)) - before, demanded.pay, "pay");
        assertEq(demands.openDemands(id, asked.stage), 0, "open");
    }

    function _answerReverts(bytes32 key, Demanded memory demanded, Opening[] memory openings, bytes memory reason)
        private
    {
        vm.prank(_account(demanded.demand.stage));
        if (reason.length == 0) vm.expectRevert();
        else vm.expectRevert(reason);
        demands.answer(key, demanded, _model(), openings);
    }
}

/// @title A worker that committed to records of a form that the law does not have
contract DemandsMalformedTest is Archive {
    function _write() internal override {
        super._write();
        nodes[R] = bytes.concat(nodes[R], hex"00");
        outputLeaves[1] = bytes.concat(outputLeaves[1], hex"00");
        outputs[R] = abi.encodePacked(R, uint64(0), uint32(130), uint32(1), _rootOf(outputLeaves));
    }

    function test_answer_toAnOverlongRecordIsImpossible() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(0, LEAVES, H, 0, 1));
        Opening[] memory openings = _openings(demanded.demand);
        vm.expectRevert(abi.encodeWithSelector(IDemands.DataLength.selector, 40, 41));
        vm.prank(_account(0));
        demands.answer(key, demanded, _model(), openings);
    }

    function test_answer_toAnOverlongLeafIsImpossible() public {
        (bytes32 key, Demanded memory demanded) = _demand(_ask(1, OUTPUT, 0, 1, 1));
        Opening[] memory openings = _openings(demanded.demand);
        vm.expectRevert(abi.encodeWithSelector(Grids.DataLength.selector, 8, 9));
        vm.prank(_account(1));
        demands.answer(key, demanded, _model(), openings);
        vm.warp(START + 31);
        demands.lapse(key, demanded);
        assertTrue(escrow.convicted(id, 1), "lost by the clock");
    }
}
