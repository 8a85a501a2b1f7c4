// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Acceptance, Claim, Job, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Market} from "../Market.t.sol";

/// @title All parties at once, in any order: requester, workers, challengers and Disputes
/// @notice Fuzzed by forge. What it keeps track of is derived from the calls alone, never from the contracts.
contract Parties is Market {
    uint256 public constant STAGES = 3;
    uint256 public constant CHALLENGERS = 10;
    uint8 private constant NOBODY = 255;

    struct OpenGame {
        bytes32 id;
        uint8 stage;
    }

    bytes32[] public jobs;
    mapping(bytes32 id => uint256) public ends; // how often it reached an end
    mapping(bytes32 id => uint256) public releases;
    mapping(bytes32 id => uint256) public priceEscrowed;
    mapping(bytes32 id => mapping(uint256 stage => uint256)) public games;
    mapping(bytes32 id => mapping(uint256 stage => bool)) public guilty;
    mapping(address account => uint256) public expectedStake; // free, locked and leaving
    uint256 public wrongAnswers; // calls that succeeded though they should not have
    OpenGame[] private _games;
    bytes32 private _line;
    uint64 private _nonce;
    uint256 private _now = START;

    constructor() {
        _deploy(address(this));
        _line = _pipeline(STAGES);
        for (uint256 i; i < STAGES; ++i) {
            expectedStake[_account(i)] = STAKE;
        }
    }

    // ---- what the parties do ----

    function open(uint256 seed) public returns (bytes32 id) {
        vm.warp(_now);
        Job memory job = _job(_line);
        job.nonce = ++_nonce;
        job.promptPrice = uint128(seed % 1e18);
        job.tokenPrice = uint128((seed >> 64) % 1e18);
        job.gasRate = uint128(1 + (seed >> 128) % 1e12);
        uint256 maximum = uint256(job.promptPrice) * 100 + uint256(job.tokenPrice) * 50;
        job.lock = uint128(2 * (maximum + 2_000_000 * job.gasRate) + (seed >> 192) % 1e6);
        job.acceptBy = uint64(_now + 60);
        job.commitBy = uint64(_now + 120);
        id = _open(job);
        priceEscrowed[id] = maximum;
        jobs.push(id);
    }

    function accept(uint256 seed, uint256 mask) external {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        for (uint8 i; i < STAGES; ++i) {
            if (mask >> i & 3 == 0) continue; // one time in four a worker holds back
            _try(id, abi.encodeCall(escrow.accept, (id, _one(_acceptance(id, i, _key(i))))));
        }
    }

    function commit(uint256 seed, uint256 mask, uint64 tokens) external {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        for (uint8 i; i < STAGES; ++i) {
            if (mask >> i & 3 == 0) continue;
            bool last = i + 1 == STAGES;
            Claim memory claim = _claim(id, i, _root(i), last ? _root(9) : bytes32(0), last ? tokens % 51 : 0, _key(i));
            _try(id, abi.encodeCall(escrow.commit, (id, _one(claim))));
        }
    }

    /// @notice A job that gets as far as its window, so that games are frequent.
    function serve(uint256 seed) external {
        bytes32 id = open(seed);
        _try(id, abi.encodeCall(escrow.accept, (id, _acceptances(id, STAGES))));
        _try(id, abi.encodeCall(escrow.commit, (id, _claims(id, STAGES, uint64(seed % 51)))));
    }

    /// @notice A job that one or more stages abandon.
    function abandon(uint256 seed, uint256 mask) external {
        bytes32 id = open(seed);
        _try(id, abi.encodeCall(escrow.accept, (id, _acceptances(id, STAGES))));
        Claim[] memory claims = _claims(id, STAGES, uint64(seed % 51));
        for (uint256 i; i < STAGES; ++i) {
            if (i != seed % STAGES && mask >> i & 1 == 1) {
                _try(id, abi.encodeCall(escrow.commit, (id, _one(claims[i]))));
            }
        }
    }

    function challenge(uint256 seed, uint8 stage) external {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        stage = uint8(stage % STAGES);
        if (_try(id, abi.encodeCall(escrow.gameOpened, (id, stage)))) {
            if (_now > escrow.windowEnd(id)) ++wrongAnswers;
            _games.push(OpenGame(id, stage));
            games[id][stage] += 1;
        }
    }

    function decide(uint256 seed, uint8 verdict, uint64 committedAt, uint32 gasUnits) external {
        vm.warp(_now);
        if (_games.length == 0) return;
        OpenGame memory game = _games[seed % _games.length];
        _games[seed % _games.length] = _games[_games.length - 1];
        _games.pop();
        // Half of the challengers lose; now and then a hand-off shifts the blame to another stage.
        uint8 convicted = verdict % 2 == 0 ? NOBODY : verdict % 8 == 7 ? uint8(verdict / 8 % STAGES) : game.stage;
        address challenger = _challenger(seed % CHALLENGERS);
        bytes memory call = abi.encodeCall(
            escrow.gameClosed, (game.id, game.stage, convicted, challenger, committedAt, gasUnits % 3_000_000)
        );
        if (!_try(game.id, call)) ++wrongAnswers; // an open game can always be closed
        games[game.id][game.stage] -= 1;
        if (convicted != NOBODY) guilty[game.id][convicted] = true;
    }

    function settle(uint256 seed) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        bool waiting = _playing(id) || _now <= escrow.windowEnd(id);
        if (_try(id, abi.encodeCall(escrow.settle, (id))) && waiting) ++wrongAnswers;
    }

    function expire(uint256 seed) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        if (escrow.status(id) == Status.Accepted && _now > escrow.job(id).commitBy) {
            uint256 fee = priceEscrowed[id] / 100;
            uint256 broken;
            while (escrow.root(id, uint8(broken)) != 0) ++broken;
            if (broken == 0) {
                expectedStake[_account(0)] -= fee;
            } else {
                expectedStake[_account(broken - 1)] -= fee / 2;
                expectedStake[_account(broken)] -= fee - fee / 2;
            }
        }
        _try(id, abi.encodeCall(escrow.expire, (id)));
    }

    function release(uint256 seed) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        bool waiting = _playing(id) || _now <= escrow.windowEnd(id);
        if (!_try(id, abi.encodeCall(escrow.release, (id)))) return;
        if (waiting) ++wrongAnswers;
        releases[id] += 1;
        for (uint256 i; i < STAGES; ++i) {
            if (guilty[id][i]) expectedStake[_account(i)] -= escrow.job(id).lock;
        }
    }

    /// @notice The time comes at which a job may end, and somebody ends it.
    function finish(uint256 seed) external {
        bytes32 id = _pick(seed);
        if (id == 0) return;
        uint256 due = escrow.windowEnd(id) != 0 ? escrow.windowEnd(id) : escrow.job(id).commitBy;
        if (_now <= due) _now = due + 1;
        settle(seed);
        release(seed);
        expire(seed);
    }

    function refund(uint256 seed) external {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        bool void_ = escrow.status(id) == Status.Void;
        if (_try(id, abi.encodeCall(escrow.refund, (id))) != void_ || escrow.refunded(id) != void_) ++wrongAnswers;
    }

    function withdraw(uint256 seed) external {
        vm.warp(_now);
        address account = party(seed % parties());
        uint256 due = escrow.credit(account);
        uint256 before = token.balanceOf(account);
        vm.prank(account);
        (bool done,) = address(escrow).call(abi.encodeCall(escrow.withdraw, ()));
        if (done != (due != 0) || token.balanceOf(account) != before + due) ++wrongAnswers;
    }

    function askBack(uint256 seed, uint256 amount) external {
        vm.warp(_now);
        address account = _account(seed % STAGES);
        (uint256 leaving,) = workers.withdrawalOf(account);
        amount = bound(amount, 0, (workers.freeStake(account) + leaving) / 2);
        vm.prank(account);
        workers.requestWithdrawal(amount);
    }

    function takeStake(uint256 seed) external {
        vm.warp(_now);
        address account = _account(seed % STAGES);
        (uint256 leaving, uint64 availableAt) = workers.withdrawalOf(account);
        vm.prank(account);
        (bool done,) = address(workers).call(abi.encodeCall(workers.withdraw, ()));
        if (done != (availableAt != 0 && _now >= availableAt)) ++wrongAnswers;
        if (done) expectedStake[account] -= leaving;
    }

    function wait(uint256 seconds_) external {
        _now += seconds_ % 16 == 0 ? 1 days : bound(seconds_, 1, 30);
        vm.warp(_now);
    }

    // ---- what the invariants ask ----

    function jobCount() external view returns (uint256) {
        return jobs.length;
    }

    function parties() public pure returns (uint256) {
        return 1 + STAGES + CHALLENGERS;
    }

    function party(uint256 i) public pure returns (address) {
        if (i == 0) return REQUESTER;
        return i <= STAGES ? _account(i - 1) : _challenger(i - 1 - STAGES);
    }

    function contracts() external view returns (address token_, address workers_, address escrow_) {
        return (address(token), address(workers), address(escrow));
    }

    function _challenger(uint256 i) private pure returns (address) {
        return address(uint160(0xCA11E4 + i));
    }

    function _playing(bytes32 id) private view returns (bool) {
        for (uint256 i; i < STAGES; ++i) {
            if (games[id][i] != 0) return true;
        }
        return false;
    }

    /// @notice One of the newest jobs, so that the fuzzer meets the same one often.
    function _pick(uint256 seed) private view returns (bytes32) {
        if (jobs.length == 0) return 0;
        uint256 recent = jobs.length < 4 ? jobs.length : 4;
        return jobs[jobs.length - 1 - seed % recent];
    }

    function _try(bytes32 id, bytes memory call) private returns (bool done) {
        Status before = escrow.status(id);
        (done,) = address(escrow).call(call);
        Status present = escrow.status(id);
        if (_ended(before) && present != before) ++wrongAnswers;
        if (!_ended(before) && _ended(present)) ends[id] += 1;
    }

    function _ended(Status status) private pure returns (bool) {
        return status == Status.Paid || status == Status.Void || status == Status.Refunded;
    }
}
