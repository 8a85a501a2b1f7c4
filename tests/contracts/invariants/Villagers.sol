// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {Games} from "../../../contracts/src/game/Games.sol";
import {Game, IDisputes, Phase, Segment} from "../../../contracts/src/interfaces/IDisputes.sol";
import {Opening} from "../../../contracts/src/interfaces/IReferee.sol";
import {Job, Status} from "../../../contracts/src/interfaces/IEscrow.sol";
import {Batch, Batches, Lie} from "../village/Batches.sol";
import {Case, Cases} from "../village/Cases.sol";
import {Plan} from "../village/Plan.sol";
import {Board, Solver} from "../village/Solver.sol";
import {Village} from "../village/Village.sol";

/// @notice As forge tells it.
struct Spent {
    uint64 gasLimit;
    uint64 gasTotalUsed;
    uint64 gasMemoryUsed;
    int64 gasRefunded;
    uint64 gasRemaining;
}

interface Meter {
    function lastCallGas() external view returns (Spent memory);
}

/// @title Everybody who may touch a game, in any order: honest and lying stages, an honest watch, a challenger of what is right, a copier and
/// a stranger
/// @dev Over 400 lines: what everybody may do is one state machine, and its clock one argument.
/// @notice Fuzzed by forge against all the real contracts. An honest party moves when it must and not a second before: exactly when its time is
/// used up. What must never happen is counted, by law.
contract Villagers is Village {
    uint256 private constant MOST_PLAYS = 24;
    uint256 private constant MOST_EVENTS = 400;
    /// @dev Moves of the longest game on this model, and some to spare.
    uint256 private constant MOST_MOVES = 8;

    struct Play {
        bytes32 id;
        bytes32 job;
        Lie lie; // of the batch
        bool accuser; // the challenger is honest
        bool accused; // the worker is honest
        bool over;
        uint64 opened;
        uint256 alreadyOpen;
        uint256 due; // when the mover has its last second; if it is silent, the second after
        bool silent;
        uint256 temper; // how the dishonest side lies
    }

    struct Served {
        bytes32 id;
        Lie lie;
        bool audited;
        uint256 windowEnd;
        uint256 gamesOver; // when the last game ended
        uint256 latest; // when the last game had to be over
    }

    Served[] public jobs;
    Play[] public plays;
    mapping(bytes32 job => uint256) private _number;
    mapping(bytes32 game => bytes) private _states;
    mapping(bytes32 game => bytes) private _lists;
    mapping(bytes32 game => bytes) private _roots;
    address[] private _blobs;
    uint256[] private _going; // the open games, by their place in `plays`
    bytes private _lastCall;
    address private _lastSender;
    uint256 private _now = START;

    // What the invariants read.
    uint256 public bonds; // of open games
    uint256 public burned; // what lost bonds left
    uint256 public honestWorkersConvicted; // law 2
    uint256 public honestChallengersBeaten; // law 3
    uint256 public honestMovesRefused; // laws 2, 3 and 10
    uint256 public endedTwice; // law 4
    uint256 public endedLate; // law 5
    uint256 public silenceUnpunished; // law 6
    uint256 public wrongClocks; // law 7
    uint256 public copiesAccepted; // laws 8 and 10
    uint256 public placesTaken; // law 2: in a job, by or from whoever had not agreed
    uint256 public largestMoveGas; // law 9
    mapping(uint8 reason => uint256) public endings; // how far the fuzzer got
    mapping(bytes32 job => mapping(uint256 stage => bool)) public found; // convicted, as the games said

    function settleIn() external {
        _settleIn();
        _hireSpare();
        for (uint8 lie = 0; lie < Batches.LIES; ++lie) {
            this.keep(Lie(lie));
        }
    }

    /// @notice Builds a batch once and keeps it as the code of an account: the cheapest thing to read.
    function keep(Lie lie) external {
        bytes memory data = abi.encode(Batches.build(lie));
        bytes memory code = abi.encodePacked(hex"62", uint24(data.length), hex"80600d6000396000f3", data);
        address blob;
        assembly ("memory-safe") {
            blob := create(0, add(code, 32), mload(code))
        }
        _blobs.push(blob);
    }

    // ---- what the parties do

    function serve(uint256 seed) public {
        vm.warp(_now);
        // Every second batch is right.
        Lie lie = seed % 2 == 0 ? Lie.NONE : Lie(1 + (seed >> 8) % (Batches.LIES - 1));
        bytes32 id = _open(_order(_now));
        escrow.accept(id, _acceptances(id, STAGES));
        // Of some jobs the last stage is lost, and its spare serves. One consent less would be too few.
        if ((seed >> 16) % 3 == 0) {
            if (_move(id, (seed >> 24) % 3)) ++placesTaken;
            if (_move(id, NOBODY)) pipelineOf[id] = spareLine;
            else ++honestMovesRefused;
        }
        _commitTo(id, _batch(lie));
        _number[id] = jobs.length;
        jobs.push(Served(id, lie, false, escrow.windowEnd(id), 0, 0));
    }

    /// @notice The honest watch opens its games early. Otherwise it does so in the window's last second.
    function audit(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length == 0) return;
        _audit(_recent(seed), seed);
    }

    /// @notice A challenge of what is right.
    function accuse(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length == 0 || _going.length >= MOST_PLAYS) return;
        Served memory job = jobs[_recent(seed)];
        if (_now > job.windowEnd) return;
        uint8[3] memory kinds = [Plan.K, Plan.MLP, Plan.TOKEN];
        uint8 kind = kinds[(seed >> 16) % 3];
        uint8 stage = kind == Plan.TOKEN ? 1 : uint8((seed >> 24) % 2);
        uint32 position = uint32((seed >> 32) % 2);
        uint32 unit = uint32((seed >> 40) % Plan.units(kind));
        Segment memory s = Segment(job.id, stage, kind, 0, stage, position, unit);
        Case memory c = Cases.truth(_batch(job.lie), s);
        if (Cases.verdict(c)) return;
        Cases.lie(c, seed >> 64, seed >> 72, true);
        _begin(LIAR, job.id, s, _steps(c), seed);
    }

    /// @notice A fault is shown where there is none.
    function frame(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length == 0) return;
        Served memory job = jobs[_recent(seed)];
        if (job.lie != Lie.NONE) return;
        Batch memory b = _batch(job.lie);
        b.lie =
            [Lie.EMBED, Lie.LINK_RECEIVER, Lie.OUT, Lie.STOP, Lie.BILL, Lie.LENGTH, Lie.TOKEN_SENDER][(seed >> 8) % 7];
        Segment memory s = _fault(job.id, b, 0);
        bytes32 salt = _commit(LIAR, s, 0);
        _prepare(LIAR, b, s);
        (bool done,) = _send(LIAR, _openingCall(b, s, salt, ""));
        if (done) ++honestWorkersConvicted;
    }

    /// @notice Anybody prepares any LINK, from what was committed or from what was not. What is right cannot be shown to be wrong by that.
    function prepare(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length == 0) return;
        Served memory job = jobs[_recent(seed)];
        uint32 column = seed >> 8 & 1 == 0 ? uint32(Plan.ALTERED_COLUMN) : uint32((seed >> 16) % Plan.WIDTH);
        Segment memory s = Segment(job.id, 1, Plan.LINK, 0, uint32((seed >> 32) % 2), uint32((seed >> 40) % 2), column);
        Batch memory b = _batch(job.lie);
        _prepareAnyhow(b, s, seed >> 48);
        Segment memory fault = _fault(job.id, b, 0);
        fault.stage = s.stage;
        if (keccak256(abi.encode(fault)) == keccak256(abi.encode(s))) return;
        bytes32 salt = _commit(LIAR, s, 1);
        (bool done,) = _send(LIAR, _openingCall(b, s, salt, ""));
        if (done) ++honestWorkersConvicted;
    }

    function _prepareAnyhow(Batch memory b, Segment memory s, uint256 seed) private {
        Opening[] memory premises = Solver.premises(b, s);
        bool untrue = seed % 3 == 0;
        if (untrue) premises[1 + (seed >> 8) % 2].data[(seed >> 16) % 128] ^= 0x01;
        bytes memory call = abi.encodeCall(IDisputes.prepare, (s, model, premises));
        bool done = _sendQuietly(party((seed >> 24) % parties()), call);
        if (done && untrue) ++copiesAccepted;
        if (!done && !untrue) ++honestMovesRefused;
    }

    /// @notice A job that is committed to goes to nobody else, whoever agrees.
    function relieve(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length == 0) return;
        Served memory job = jobs[_recent(seed)];
        if (pipelineOf[job.id] == line && _move(job.id, NOBODY)) ++placesTaken;
    }

    /// @notice Whoever is to move may do so before it must.
    function move(uint256 seed) external {
        vm.warp(_now);
        if (_going.length > 0) _answer(_going[seed % _going.length], seed);
    }

    /// @notice Everybody who is not to move tries to; the stranger calls the flag; what was sent last is sent again.
    function interfere(uint256 seed) external {
        vm.warp(_now);
        if (_going.length == 0) return;
        Play memory play = plays[_going[seed % _going.length]];
        Game memory game = _game(play.id);
        bytes32 before = disputes.stateOf(play.id);
        bytes memory call = _callOf(play, game, true, 0);
        if (call.length > 0) {
            address[3] memory others = [STRANGER, COPIER, game.workerTurn ? game.challenger : game.worker];
            for (uint256 i = 0; i < others.length; ++i) {
                if (_sendQuietly(others[i], call)) ++copiesAccepted;
            }
        }
        if (_sendQuietly(STRANGER, abi.encodeCall(IDisputes.flag, (play.id, Games.pack(game))))) ++wrongClocks;
        if (_sendQuietly(_lastSender, _lastCall)) ++copiesAccepted;
        if (_sendQuietly(COPIER, _lastCall)) ++copiesAccepted;
        if (disputes.stateOf(play.id) != before) ++copiesAccepted;
    }

    function finish(uint256 seed) external {
        vm.warp(_now);
        if (jobs.length > 0) _finish(_recent(seed));
    }

    function withdraw(uint256 seed) external {
        vm.warp(_now);
        _withdraw(party(seed % parties()));
    }

    /// @notice Time passes. On its way the honest do what they must in the last second in which they may; of the others some do, some are
    /// silent, and a second later the stranger calls their flag.
    function pass(uint256 seed) external {
        _pass(1 + seed % 40, seed);
    }

    /// @notice To the end: everything is played, settled and withdrawn.
    function end() external {
        for (uint256 i = 0; i < 12; ++i) {
            _pass(60, i);
        }
        silenceUnpunished += _going.length;
        for (uint256 i = 0; i < jobs.length; ++i) {
            _finish(i);
            Served memory job = jobs[i];
            Status status = escrow.status(job.id);
            if (status != (Batches.guilty(job.lie) == 0 ? Status.Paid : Status.Void)) ++endedLate;
            if (job.gamesOver > job.latest) ++endedLate;
        }
        for (uint256 i = 0; i < parties(); ++i) {
            _withdraw(party(i));
        }
    }

    // ---- games

    function _audit(uint256 number, uint256 seed) private {
        Served storage job = jobs[number];
        if (Batches.guilty(job.lie) == 0 || job.audited || _now > job.windowEnd) return;
        job.audited = true;
        Batch memory b = _batch(job.lie);
        for (uint256 which = 0; which < (job.lie == Lie.BOTH ? 2 : 1); ++which) {
            Segment memory s = _fault(job.id, b, which);
            bytes memory steps = _shown(s.kind) ? bytes("") : _steps(Cases.truth(b, s));
            _begin(WATCH, job.id, s, steps, seed);
        }
    }

    /// @dev Commitment, then the opening in a later block, with a copier before each.
    function _begin(address challenger, bytes32 job, Segment memory s, bytes memory steps, uint256 seed) private {
        Lie lie = jobs[_number[job]].lie;
        bytes32 salt = _commit(challenger, s, seed);
        bytes32 id = _gameId(challenger, s, salt);
        uint256 alreadyOpen = escrow.openGames(job, s.stage);
        _prepare(seed % 2 == 0 ? COPIER : challenger, _batch(lie), s);
        bytes memory call = _openingCall(_batch(lie), s, salt, steps);
        if (_sendQuietly(COPIER, call)) ++copiesAccepted;
        (bool done,) = _send(challenger, call);
        if (!done) {
            if (challenger == WATCH) ++honestMovesRefused;
            return;
        }
        (_lastCall, _lastSender) = (call, challenger);
        bool accused = Batches.guilty(lie) >> s.stage & 1 == 0;
        plays.push(Play(id, job, lie, challenger == WATCH, accused, false, uint64(_now), alreadyOpen, 0, false, seed));
        _going.push(plays.length - 1);
        _roots[id] = steps;
        _note(plays.length - 1);
        bonds += plays[plays.length - 1].over ? 0 : _game(id).bond;
    }

    function _commit(address challenger, Segment memory s, uint256 seed) private returns (bytes32 salt) {
        salt = bytes32(++salts);
        bytes32 id = _gameId(challenger, s, salt);
        // A copier may send the hash first: it is there, and names who may open it.
        if (seed % 3 == 0) _sendQuietly(COPIER, abi.encodeCall(IDisputes.commit, (id)));
        _sendQuietly(challenger, abi.encodeCall(IDisputes.commit, (id)));
        vm.roll(block.number + 1);
    }

    /// @dev Whoever is to move, moves, if it has a move.
    function _answer(uint256 number, uint256 seed) private {
        Play memory play = plays[number];
        Game memory game = _game(play.id);
        bool honest = game.workerTurn ? play.accused : play.accuser;
        bytes memory call = _callOf(play, game, honest, seed);
        if (call.length == 0) {
            if (honest) ++honestMovesRefused;
            return;
        }
        (bool done,) = _send(game.workerTurn ? game.worker : game.challenger, call);
        uint256 gas = Meter(address(vm)).lastCallGas().gasTotalUsed;
        if (honest && !done) ++honestMovesRefused;
        if (done && _now > _deadline(game)) ++wrongClocks;
        if (!done) return;
        if (gas > largestMoveGas) largestMoveGas = gas;
        (_lastCall, _lastSender) = (call, game.workerTurn ? game.worker : game.challenger);
        _note(number);
    }

    /// @dev The call of whoever is to move, honest or not; empty if it has none.
    function _callOf(Play memory play, Game memory game, bool honest, uint256 seed)
        private
        view
        returns (bytes memory)
    {
        Batch memory b = _batch(play.lie);
        if (game.phase == Phase.Handoff) {
            return b.handoff.length > 0 ? _deflectionCall(play.id, game, b) : bytes("");
        }
        Case memory c = Cases.truth(b, game.segment);
        uint256 scribble = 0;
        if (!honest) {
            Cases.lie(c, play.temper >> 64, play.temper >> 72, !game.workerTurn);
            if (play.temper >> 128 & 1 == 1) scribble = seed | 1;
        }
        return _answerCall(play.id, Board(game, _lists[play.id], _roots[play.id], scribble), c);
    }

    /// @dev What Disputes said about a game's last move.
    function _note(uint256 number) private {
        Play storage play = plays[number];
        Seen memory seen = _seen();
        if (seen.moved) {
            _states[play.id] = abi.encode(seen.game);
            _lists[play.id] = seen.list;
            (play.due, play.silent) = (_deadline(seen.game), false);
            bool running = seen.game.phase != Phase.None && !seen.ended;
            if (running && play.due < seen.game.turnStarted + escrow.job(play.job).grace) ++wrongClocks;
        }
        if (!seen.ended) return;
        if (!seen.moved) bonds -= _game(play.id).bond;
        play.over = true;
        endings[seen.reason] += 1;
        _judge(play, seen.convicted);
        for (uint256 i = 0; i < _going.length; ++i) {
            if (_going[i] != number) continue;
            _going[i] = _going[_going.length - 1];
            _going.pop();
            break;
        }
    }

    function _judge(Play memory play, uint8 convicted) private {
        uint8 guilty = Batches.guilty(play.lie);
        if (convicted == NOBODY) {
            _burn(_game(play.id));
            if (play.accuser) ++honestChallengersBeaten;
        } else {
            if (guilty >> convicted & 1 == 0) ++honestWorkersConvicted;
            found[play.job][convicted] = true;
        }
        Job memory terms = escrow.job(play.job);
        Served storage job = jobs[_number[play.job]];
        uint256 latest =
            escrow.windowEnd(play.job) + 2 * uint256(terms.clock) + (play.alreadyOpen + MOST_MOVES) * terms.grace + 1;
        job.gamesOver = _now;
        if (latest > job.latest) job.latest = latest;
    }

    /// @dev The last state of a game that its challenger lost: a proof that ended it was one more move of the worker.
    function _burn(Game memory game) private {
        uint256 moves = (game.workerMoves + (game.workerTurn ? 1 : 0)) * disputes.MOVE_GAS() * game.gasRate;
        if (moves < game.bond) burned += game.bond - moves;
    }

    // ---- time

    function _pass(uint256 seconds_, uint256 seed) private {
        uint256 target = _now + seconds_;
        // Each event in a call of its own: memory is never given back within one.
        for (uint256 i = 0; i < MOST_EVENTS && this.tick(target, uint256(keccak256(abi.encode(seed, i)))); ++i) {}
        _now = target;
        vm.warp(_now);
    }

    /// @notice The next thing that has to happen up to `target`; false if there is none.
    function tick(uint256 target, uint256 seed) external returns (bool) {
        if (msg.sender != address(this)) return false;
        (uint256 when, uint256 number, bool watch) = _next(target);
        if (when > target) return false;
        if (when > _now) _now = when;
        vm.warp(_now);
        if (watch) _audit(number, seed);
        else if (plays[number].silent) _callFlag(number);
        else _lastSecond(number, seed);
        return true;
    }

    /// @dev The mover moves now or never; a flag is too early.
    function _lastSecond(uint256 number, uint256 seed) private {
        Play memory play = plays[number];
        bool honest = _honestTurn(play);
        if (_sendQuietly(STRANGER, abi.encodeCall(IDisputes.flag, (play.id, Games.pack(_game(play.id)))))) {
            ++wrongClocks;
        }
        bytes32 before = disputes.stateOf(play.id);
        if (honest || seed % 4 != 0) _answer(number, seed);
        if (disputes.stateOf(play.id) != before) return;
        if (honest) ++honestMovesRefused;
        (plays[number].due, plays[number].silent) = (_now + 1, true);
    }

    /// @dev What comes next: a game whose mover has its last second, or had it, or a window in which the watch has to act.
    function _next(uint256 target) private view returns (uint256 when, uint256 number, bool watch) {
        when = target + 1;
        for (uint256 i = 0; i < _going.length; ++i) {
            uint256 due = plays[_going[i]].due;
            if (due < when) (when, number, watch) = (due, _going[i], false);
        }
        for (uint256 i = 0; i < jobs.length; ++i) {
            if (jobs[i].audited || Batches.guilty(jobs[i].lie) == 0) continue;
            uint256 due = jobs[i].windowEnd;
            if (due < when) (when, number, watch) = (due, i, true);
        }
    }

    function _callFlag(uint256 number) private {
        Play memory play = plays[number];
        Game memory game = _game(play.id);
        bytes memory late = _callOf(play, game, true, 0);
        if (late.length > 0 && _sendQuietly(game.workerTurn ? game.worker : game.challenger, late)) ++wrongClocks;
        (bool done,) = _send(STRANGER, abi.encodeCall(IDisputes.flag, (play.id, Games.pack(game))));
        if (!done) {
            ++silenceUnpunished;
            return;
        }
        _note(number);
    }

    function _deadline(Game memory game) private pure returns (uint256) {
        return game.turnStarted + (game.workerTurn ? game.workerSeconds : game.challengerSeconds);
    }

    // ---- jobs and money

    function _finish(uint256 number) private {
        Served memory job = jobs[number];
        Status before = escrow.status(job.id);
        bool waits = _now <= job.windowEnd;
        for (uint8 stage = 0; stage < STAGES; ++stage) {
            waits = waits || escrow.openGames(job.id, stage) > 0;
        }
        (bool settled,) = address(escrow).call(abi.encodeCall(escrow.settle, (job.id)));
        (bool expired,) = address(escrow).call(abi.encodeCall(escrow.expire, (job.id)));
        if (expired || (settled && (waits || before != Status.Committed))) ++endedTwice;
        bool held = escrow.lockHeld(job.id, 0);
        (bool released,) = address(escrow).call(abi.encodeCall(escrow.release, (job.id)));
        if (released && (waits || before != Status.Void || !held)) ++endedTwice;
    }

    function _withdraw(address account) private {
        vm.prank(account);
        (bool fromEscrow,) = address(escrow).call(abi.encodeCall(escrow.withdraw, ()));
        vm.prank(account);
        (bool fromDisputes,) = address(disputes).call(abi.encodeCall(disputes.withdraw, ()));
        fromEscrow = fromDisputes; // either may have nothing
    }

    // ---- what the invariants ask

    function jobCount() external view returns (uint256) {
        return jobs.length;
    }

    function gamesOpen() external view returns (uint256) {
        return _going.length;
    }

    function parties() public pure returns (uint256) {
        return 8;
    }

    function party(uint256 i) public pure returns (address) {
        return [REQUESTER, _account(0), _account(1), WATCH, LIAR, COPIER, STRANGER, _account(SPARE)][i];
    }

    function contracts() external view returns (address, address, address, address) {
        return (address(token), address(workers), address(escrow), address(disputes));
    }

    function now_() external view returns (uint256) {
        return _now;
    }

    /// @notice The account that has a stage of job `i`.
    function holder(uint256 i, uint256 stage) external view returns (address) {
        return _account(_holder(jobs[i].id, stage));
    }

    function worker(uint256 i) external pure returns (address) {
        return _account(i);
    }

    // ---- reading

    function _batch(Lie lie) private view returns (Batch memory) {
        return abi.decode(_blobs[uint8(lie)].code, (Batch));
    }

    function _game(bytes32 id) private view returns (Game memory) {
        return abi.decode(_states[id], (Game));
    }

    function _honestTurn(Play memory play) private view returns (bool) {
        return _game(play.id).workerTurn ? play.accused : play.accuser;
    }

    function _recent(uint256 seed) private view returns (uint256) {
        uint256 recent = jobs.length < 3 ? jobs.length : 3;
        return jobs.length - 1 - seed % recent;
    }

    function _move(bytes32 id, uint256 missing) private returns (bool done) {
        (done,) = address(escrow).call(_moveCall(id, missing));
    }

    function _sendQuietly(address sender, bytes memory call) private returns (bool done) {
        vm.prank(sender);
        (done,) = address(disputes).call(call);
    }
}
