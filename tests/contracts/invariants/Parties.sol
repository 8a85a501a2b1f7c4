// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Claim, Consent, Job, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Stage} from "../../../contracts/src/interfaces/IWorkers.sol";
import {Market} from "../Market.t.sol";

/// @title All parties at once, in any order: requester, workers, challengers and Disputes
/// @notice Fuzzed by forge. What it keeps track of is derived from the calls alone, never from the contracts.
contract Parties is Market {
    uint256 public constant STAGES = 3;
    uint256 public constant WORKERS = STAGES + 2; // the others are spares
    uint256 public constant CHALLENGERS = 10;
    uint256 private constant BPS = 10_000;
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
    mapping(bytes32 id => mapping(uint256 stage => uint256)) public holder; // which worker is to serve it
    mapping(bytes32 id => mapping(uint256 stage => address)) public committed; // by whom
    mapping(address account => uint256) public expectedStake; // free, locked and leaving
    mapping(address account => uint256) public earned; // by serving
    mapping(address account => uint256) public withdrawn;
    uint256 public moves; // how far the fuzzer got
    uint256 public wrongAnswers; // calls that succeeded though they should not have
    OpenGame[] private _games;
    bytes32 private _line;
    mapping(bytes32 id => uint256) private _commits;
    mapping(bytes32 id => uint256) private _tokens;
    mapping(bytes32 workers => bytes32) private _lines;
    uint64 private _nonce;
    uint256 private _now = START;

    constructor() {
        _deploy(address(this));
        _line = _pipeline(STAGES);
        for (uint256 i = STAGES; i < WORKERS; ++i) {
            _hire(i);
        }
        for (uint256 i; i < WORKERS; ++i) {
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
        for (uint256 i; i < STAGES; ++i) {
            holder[id][i] = i;
        }
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
            // Now and then another worker commits in the place of whoever has it.
            _commitAs(id, i, mask >> (8 + i) & 7 == 0 ? mask >> 16 & 7 : holder[id][i], tokens % 51);
        }
    }

    /// @notice One stage or two go to others, a spare or whoever else, by everybody's consent, or nearly everybody's.
    function move(uint256 seed, uint256 who, uint256 fault) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        if (id == 0) return;
        uint256[] memory to = _holders(id);
        to[who % STAGES] = (who >> 8) % WORKERS;
        if (who >> 16 & 3 == 0) to[(who + 1) % STAGES] = (who >> 24) % WORKERS;
        bytes32 line = _lineOf(to);
        if (line == pipelineOf[id]) return;
        bool allowed = escrow.status(id) == Status.Accepted && _now <= escrow.job(id).commitBy && _commits[id] == 0;
        bool done = _try(id, abi.encodeCall(escrow.move, (id, line, _consents(id, to, fault))));
        bool agreed = fault & 3 != 1;
        if (done && !(allowed && agreed)) ++wrongAnswers;
        if (!done && allowed && agreed && _canLock(id, to)) ++wrongAnswers;
        if (!done) return;
        ++moves;
        pipelineOf[id] = line;
        for (uint256 i; i < STAGES; ++i) {
            holder[id][i] = to[i];
        }
    }

    /// @notice A job that gets as far as its window, so that games are frequent.
    function serve(uint256 seed) external {
        bytes32 id = open(seed);
        _try(id, abi.encodeCall(escrow.accept, (id, _acceptances(id, STAGES))));
        if (seed >> 200 & 1 == 1) move(0, seed >> 208, 0);
        for (uint8 i; i < STAGES; ++i) {
            _commitAs(id, i, holder[id][i], uint64(seed % 51));
        }
    }

    /// @notice A job that moved, and whose stages are then accused.
    function relieve(uint256 seed) external {
        seed = uint256(keccak256(abi.encode(seed))); // forge likes small numbers
        bytes32 id = open(seed);
        _try(id, abi.encodeCall(escrow.accept, (id, _acceptances(id, STAGES))));
        move(0, seed >> 208, 0);
        for (uint8 i; i < STAGES; ++i) {
            _commitAs(id, i, holder[id][i], uint64(seed % 51));
        }
        challenge(0, uint8(seed >> 128));
        if (_games.length == 0) return;
        decide(_games.length - 1, uint8(seed >> 136), uint64(_now), uint32(seed >> 144));
        if (seed >> 250 & 1 == 1) finish(0);
    }

    /// @notice A job that one or more stages abandon.
    function abandon(uint256 seed, uint256 mask) external {
        bytes32 id = open(seed);
        _try(id, abi.encodeCall(escrow.accept, (id, _acceptances(id, STAGES))));
        if (seed >> 200 & 1 == 1) move(0, seed >> 208, 0);
        for (uint8 i; i < STAGES; ++i) {
            if (i != seed % STAGES && mask >> i & 1 == 1) _commitAs(id, i, holder[id][i], uint64(seed % 51));
        }
    }

    function challenge(uint256 seed, uint8 stage) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        stage = uint8(stage % STAGES);
        if (_try(id, abi.encodeCall(escrow.gameOpened, (id, stage)))) {
            if (_now > escrow.windowEnd(id)) ++wrongAnswers;
            _games.push(OpenGame(id, stage));
            games[id][stage] += 1;
        }
    }

    function decide(uint256 seed, uint8 verdict, uint64 committedAt, uint32 gasUnits) public {
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
        if (!_try(id, abi.encodeCall(escrow.settle, (id)))) return;
        if (waiting) ++wrongAnswers;
        _earn(id);
    }

    function expire(uint256 seed) public {
        vm.warp(_now);
        bytes32 id = _pick(seed);
        if (escrow.status(id) == Status.Accepted && _now > escrow.job(id).commitBy) {
            uint256 fee = priceEscrowed[id] / 100;
            uint256 broken;
            while (escrow.root(id, uint8(broken)) != 0) ++broken;
            if (broken == 0) {
                expectedStake[_account(holder[id][0])] -= fee;
            } else {
                expectedStake[_account(holder[id][broken - 1])] -= fee / 2;
                expectedStake[_account(holder[id][broken])] -= fee - fee / 2;
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
            if (guilty[id][i]) expectedStake[committed[id][i]] -= escrow.job(id).lock;
        }
        _earn(id);
    }

    /// @notice The time comes at which a job may end, and somebody ends it.
    function finish(uint256 seed) public {
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
        withdrawn[account] += due;
    }

    function askBack(uint256 seed, uint256 amount) external {
        vm.warp(_now);
        address account = _account(seed % WORKERS);
        (uint256 leaving,) = workers.withdrawalOf(account);
        amount = bound(amount, 0, (workers.freeStake(account) + leaving) / 2);
        vm.prank(account);
        workers.requestWithdrawal(amount);
    }

    function takeStake(uint256 seed) external {
        vm.warp(_now);
        address account = _account(seed % WORKERS);
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
        return 1 + WORKERS + CHALLENGERS;
    }

    function party(uint256 i) public pure returns (address) {
        if (i == 0) return REQUESTER;
        return i <= WORKERS ? _account(i - 1) : _challenger(i - 1 - WORKERS);
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

    // ---- stages and who has them

    function _commitAs(bytes32 id, uint8 stage, uint256 who, uint64 tokens) private {
        bool last = stage + 1 == STAGES;
        Claim memory claim = _claim(id, stage, _root(stage), last ? _root(9) : bytes32(0), last ? tokens : 0, _key(who));
        bool fresh = committed[id][stage] == address(0) && escrow.root(id, stage) == 0;
        if (!_try(id, abi.encodeCall(escrow.commit, (id, _one(claim)))) || !fresh || escrow.root(id, stage) == 0) {
            return;
        }
        if (who != holder[id][stage]) ++wrongAnswers;
        committed[id][stage] = _account(who);
        _commits[id] += 1;
        if (last) _tokens[id] = tokens;
    }

    /// @dev What a job that is over pays: a share to everybody who served and is not guilty.
    function _earn(bytes32 id) private {
        Job memory job = escrow.job(id);
        uint256 price = uint256(job.promptPrice) * job.promptTokens + uint256(job.tokenPrice) * _tokens[id];
        for (uint256 i; i < STAGES; ++i) {
            if (!guilty[id][i]) earned[committed[id][i]] += price * _stages(STAGES)[i].shareBps / BPS;
        }
    }

    function _holders(bytes32 id) private view returns (uint256[] memory list) {
        list = new uint256[](STAGES);
        for (uint256 i; i < STAGES; ++i) {
            list[i] = holder[id][i];
        }
    }

    /// @dev The pipeline of these workers; made when it is first wanted.
    function _lineOf(uint256[] memory who) private returns (bytes32 line) {
        bytes32 name = keccak256(abi.encode(who));
        line = _lines[name];
        if (line != 0) return line;
        Stage[] memory stages = _stages(STAGES);
        for (uint256 i; i < STAGES; ++i) {
            stages[i].worker = _account(who[i]);
        }
        bytes32 joined = keccak256(abi.encode(keccak256("Join(bytes32 pipeline)"), _pipelineId(stages, 1)));
        bytes[] memory joins = new bytes[](STAGES);
        for (uint256 i; i < STAGES; ++i) {
            joins[i] = _sign(address(workers), _key(who[i]), joined);
        }
        line = workers.createPipeline(modelId, stages, 1, joins);
        _lines[name] = line;
    }

    /// @dev Of those who are there, then of those who come. fault & 3 == 1: one of them is a stranger's, late, or to another job.
    function _consents(bytes32 id, uint256[] memory to, uint256 fault) private returns (Consent[] memory consents) {
        uint256[] memory from = _holders(id);
        uint256 count = STAGES;
        for (uint256 i; i < STAGES; ++i) {
            if (to[i] != from[i]) ++count;
        }
        consents = new Consent[](count);
        count = STAGES;
        bytes32 line = _lineOf(to);
        for (uint256 i; i < STAGES; ++i) {
            consents[i] = _consent(id, line, from[i], uint64(_now + 30));
            if (to[i] != from[i]) consents[count++] = _consent(id, line, to[i], uint64(_now + 30));
        }
        if (fault & 3 != 1) return consents;
        uint256 which = (fault >> 8) % count;
        if (fault >> 2 & 3 == 0) consents[which].until -= 31; // another time than was signed
        else if (fault >> 2 & 3 == 1) consents[which] = _consent(id, line, WORKERS, uint64(_now + 30));
        else if (fault >> 2 & 3 == 2) consents[which] = _consent(id, pipelineOf[id], from[0], uint64(_now + 30));
        else consents[which] = _consent(keccak256(abi.encode(id)), line, from[0], uint64(_now + 30));
    }

    function _consent(bytes32 id, bytes32 line, uint256 who, uint64 until) private view returns (Consent memory) {
        bytes32 typehash = keccak256("Move(bytes32 job,bytes32 from,bytes32 pipeline,uint64 until)");
        bytes32 content = keccak256(abi.encode(typehash, id, pipelineOf[id], line, until));
        return Consent(until, _sign(address(escrow), _key(who), content));
    }

    /// @dev Whoever comes has free stake for every stage of the job.
    function _canLock(bytes32 id, uint256[] memory to) private view returns (bool) {
        for (uint256 i; i < STAGES; ++i) {
            bool comes = to[i] != holder[id][i];
            if (comes && workers.freeStake(_account(to[i])) < STAGES * uint256(escrow.job(id).lock)) return false;
        }
        return true;
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
