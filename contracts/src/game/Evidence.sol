// SPDX-License-Identifier: MIT
pragma solidity 0.8.37;

import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";

import {Game, HandoffProof, IDisputes, Segment} from "../interfaces/IDisputes.sol";
import {Brief, IEscrow} from "../interfaces/IEscrow.sol";
import {Cell, IReferee, Model, Opening, Proof, Trace} from "../interfaces/IReferee.sol";
import {IWorkers, Stage} from "../interfaces/IWorkers.sol";
import {Codec, SegmentHeader} from "../referee/Codec.sol";
import {Floats} from "../referee/Floats.sol";
import {Tree} from "../referee/Tree.sol";
import {Descent} from "./Descent.sol";
import {Exact} from "./Exact.sol";
import {Records} from "./Records.sol";
import {Rows} from "./Rows.sol";

/// @notice What the evidence yields for a game: all of its state that segment and model do not tell.
struct Charge {
    address worker; // account of the accused
    bytes32 modelId;
    uint128 gasRate;
    uint32 clock;
    uint32 grace;
    uint32 token;
    uint32 steps; // instructions of the segment's program
    uint32 firstInstruction;
    bytes32 sampling; // SAMPLE: the request's parameters, as in a Cell
    uint64 index; // EMBED: the output token
    uint16 moves; // what the challenger has sent since its commitment, this included
    Trace trace;
    bytes32 list; // LINK at a boundary: leaf that holds the judged element, the last opening
    bool deflectable; // a signed hand-off may shift the blame
}

/// @title Evidence: from a named segment and its openings to what is judged
/// @notice docs/protocol.md, "Segments". Every opening is checked against a root that the chain already holds. Holds no more than sums that it
/// computed from such; apart from Disputes because of the size limit of a contract.
/// @dev Over 400 lines: each kind of segment has its evidence, and what they share would fall apart in two files.
/// INVARIANT: index < count for all a segment names: request, layer, position, unit, and the tokens these imply.
contract Evidence {
    /// @dev The evidence for this segment has `expected` openings (at least, where a program's own follow).
    error OpeningCount(uint256 expected, uint256 actual);

    // Segment kinds.
    uint8 private constant EMBED = 0;
    uint8 private constant Q = 1;
    uint8 private constant MLP = 5;
    uint8 private constant LINK = 6;
    uint8 private constant TOKEN = 7;
    uint8 private constant STOP = 8;
    uint8 private constant BILL = 9;
    uint8 private constant LENGTH = 10;
    uint8 private constant SAMPLE = 11;
    bytes32 public constant HANDOFF_TYPEHASH = keccak256("Handoff(bytes32 job,uint8 stage,bytes32 root,uint32 leaves)");
    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
    uint256 private constant KINDS = 12; // headers of a program; those of kinds that judge records have no units
    uint32 private constant NO_TOKEN = type(uint32).max;

    /// @dev Of a LINK that was prepared: 1 + raw bits of its first sum. It never changes, for nor do a stage's roots.
    mapping(bytes32 segment => uint256) private _sums;

    IEscrow public immutable escrow;
    IWorkers public immutable workers;
    IReferee public immutable referee;

    /// @dev The stage that a segment accuses, and what was found so far.
    struct Docket {
        Brief job;
        Stage stage;
        Charge charge;
    }

    constructor(IEscrow escrow_, IWorkers workers_, IReferee referee_) {
        escrow = escrow_;
        workers = workers_;
        referee = referee_;
    }

    /// @notice Q, K, V, ATTEND, MLP, TOKEN and SAMPLE: a game that can start, but for its list, its clocks and its bond.
    /// @dev The parameters of IDisputes.challenge.
    function charge(
        Segment calldata segment,
        bytes32,
        Model calldata model,
        Opening[] calldata evidence,
        bytes calldata
    ) external view returns (Charge memory) {
        bool token = segment.kind == TOKEN || segment.kind == SAMPLE;
        if (!token && (segment.kind < Q || segment.kind > MLP)) revert IDisputes.WrongSegment("kind");
        _requireCount(evidence, token ? 5 : 2);
        Docket memory docket = _accuse(segment, model);
        Charge memory found = docket.charge;
        _requireLayer(segment, docket.stage);
        found.trace = _trace(segment, segment.stage, docket.job, docket.stage, evidence[0]);
        if (segment.position >= found.trace.positions) revert IDisputes.WrongSegment("position");
        SegmentHeader memory header = _header(segment, model, evidence[1]);
        found.firstInstruction = header.first;
        found.steps = header.steps;
        if (token) _findToken(segment, docket, model, evidence);
        return found;
    }

    /// @dev What TOKEN and SAMPLE judge besides the row.
    function _findToken(
        Segment calldata segment,
        Docket memory docket,
        Model calldata model,
        Opening[] calldata evidence
    ) private view {
        Charge memory found = docket.charge;
        if (docket.stage.endLayer != model.layers) revert IDisputes.WrongSegment("stage");
        bytes memory request = _open(evidence[2], _requestsRoot(segment), segment.request, docket.job.requests);
        // A request that draws its tokens is judged by another program than a greedy one.
        found.sampling = Records.sampling(request, segment.request);
        if ((found.sampling != 0) != (segment.kind == SAMPLE)) revert IDisputes.WrongSegment("kind");
        // Position t yields the token that follows it: the first output token comes from the last prompt position.
        uint256 prompt = Records.promptCount(request);
        if (uint256(segment.position) + 1 < prompt) revert IDisputes.WrongSegment("position");
        uint256 place = uint256(segment.position) + 1 - prompt;
        (uint256 id,) = _outputToken(segment, docket, evidence[3], evidence[4], place);
        found.token = _known(id, model.vocabulary);
    }

    /// @notice LINK: adds up the first two numbers, for `find` to go on from. By anyone, once and for all: every opening is checked.
    function prepare(Segment calldata segment, Model calldata model, Opening[] calldata evidence) external {
        if (segment.kind != LINK) revert IDisputes.WrongSegment("kind");
        _requireCount(evidence, 3);
        Docket memory docket = _accuse(segment, model);
        _findSent(segment, docket, model, evidence[0]);
        Trace memory sent = docket.charge.trace;
        uint256 h = Rows.element(segment, model, sent, segment.layer, Rows.H, evidence[1]);
        uint256 attnOut = Rows.element(segment, model, sent, segment.layer, Rows.ATTN_OUT, evidence[2]);
        _sums[keccak256(abi.encode(segment))] = 1 + Floats.add(model.servedDtype, h, attnOut);
    }

    /// @notice EMBED, LINK, STOP, BILL and LENGTH: the same once the segment is proved wrong; reverts with NotWrong if it is right.
    /// @dev The parameters of IDisputes.show.
    function find(Segment calldata segment, bytes32, Model calldata model, Opening[] calldata evidence)
        external
        view
        returns (Charge memory)
    {
        Docket memory docket = _accuse(segment, model);
        if (segment.kind == EMBED) _findEmbed(segment, docket, model, evidence);
        else if (segment.kind == LINK) _findLink(segment, docket, model, evidence);
        else if (segment.kind == STOP) _findStop(segment, docket, model, evidence);
        else if (segment.kind == BILL) _findBill(segment, docket, model, evidence);
        else if (segment.kind == LENGTH) _findLength(segment, docket, evidence);
        else revert IDisputes.WrongSegment("kind");
        return docket.charge;
    }

    /// @dev Reverts with UnknownStage, of Workers, for a stage that the pipeline does not have.
    function _accuse(Segment calldata segment, Model calldata model) private view returns (Docket memory docket) {
        docket.job = escrow.brief(segment.job, segment.stage);
        bytes32 modelId = Descent.modelId(model);
        if (modelId != docket.job.model) revert IDisputes.WrongModel(docket.job.model, modelId);
        if (segment.request >= docket.job.requests) revert IDisputes.WrongSegment("request");
        docket.stage = workers.pipelineStage(docket.job.pipeline, segment.stage);

        Charge memory found = docket.charge;
        found.moves = 1;
        found.worker = docket.stage.worker;
        found.modelId = modelId;
        found.gasRate = docket.job.gasRate;
        found.clock = docket.job.clock;
        found.grace = docket.job.grace;
    }

    // ---- exact segments

    function _findEmbed(
        Segment calldata segment,
        Docket memory docket,
        Model calldata model,
        Opening[] calldata evidence
    ) private view {
        if (segment.stage != 0) revert IDisputes.WrongSegment("stage");
        if (segment.layer != 0) revert IDisputes.WrongSegment("layer");
        _requireAtLeast(evidence, 3);
        Charge memory found = docket.charge;
        found.trace = _trace(segment, 0, docket.job, docket.stage, evidence[0]);
        if (segment.position >= found.trace.positions) revert IDisputes.WrongSegment("position");

        bytes memory request = _open(evidence[1], _requestsRoot(segment), segment.request, docket.job.requests);
        uint256 prompt = Records.promptCount(request);
        uint256 used;
        if (segment.position < prompt) {
            used = 3;
            uint256 leaf = segment.position / Records.TOKENS_PER_LEAF;
            bytes memory tokens = _open(evidence[2], Records.promptRoot(request), leaf, Records.tokenLeaves(prompt));
            found.token = _known(Records.token(tokens, segment.position), model.vocabulary);
        } else {
            used = 4;
            _requireAtLeast(evidence, used);
            found.index = uint64(segment.position - prompt);
            (uint256 id, uint256 count) = _outputToken(segment, docket, evidence[2], evidence[3], found.index);
            // The last output token is not fed back, so no rule says what stands there.
            if (found.index + 1 == count) revert IDisputes.WrongSegment("position");
            found.token = _known(id, model.vocabulary);
            // Where one worker holds all layers, there is no other to blame.
            found.deflectable = docket.stage.endLayer != model.layers;
        }
        _judge(segment, found, model, evidence, used);
    }

    function _findLink(
        Segment calldata segment,
        Docket memory docket,
        Model calldata model,
        Opening[] calldata evidence
    ) private view {
        _requireAtLeast(evidence, 3);
        Charge memory found = docket.charge;
        found.moves = 2; // `prepare` and `show`
        found.deflectable = _findSent(segment, docket, model, evidence[0]);
        _requireCount(evidence, found.deflectable ? 4 : 3);
        Opening calldata judged = evidence[evidence.length - 1];
        Trace memory next = found.trace;
        if (found.deflectable) {
            next = _trace(segment, segment.stage, docket.job, docket.stage, evidence[1]);
            if (segment.position >= next.positions) revert IDisputes.WrongSegment("position");
            found.list = Tree.leaf(judged.data);
        }
        uint256 total = _total(segment, model, found.trace, evidence[evidence.length - 2]);
        uint256 layer = uint256(segment.layer) + 1;
        if (Rows.element(segment, model, next, layer, Rows.H, judged) == total) revert IDisputes.NotWrong();
    }

    /// @dev Finds the trace that holds the judged layer.
    /// @return received whether another stage holds the next layer. LINK of layer l judges the input of layer l + 1, so then the receiver is accused
    function _findSent(Segment calldata segment, Docket memory docket, Model calldata model, Opening calldata node)
        private
        view
        returns (bool received)
    {
        if (segment.unit >= model.hidden) revert IDisputes.WrongSegment("unit");
        Stage memory sent = docket.stage;
        uint8 index = segment.stage;
        received = uint256(segment.layer) + 1 == sent.firstLayer;
        if (received) {
            --index;
            sent = workers.pipelineStage(docket.job.pipeline, index);
        } else {
            _requireLayer(segment, sent);
            bool last = segment.layer + 1 == sent.endLayer && sent.endLayer != model.layers;
            if (last) revert IDisputes.WrongSegment("stage");
        }
        Trace memory trace = _trace(segment, index, docket.job, sent, node);
        if (segment.position >= trace.positions) revert IDisputes.WrongSegment("position");
        docket.charge.trace = trace;
    }

    /// @dev What LINK's three numbers add up to.
    function _total(Segment calldata segment, Model calldata model, Trace memory sent, Opening calldata mlpOut)
        private
        view
        returns (uint256)
    {
        uint256 sum = _sums[keccak256(abi.encode(segment))];
        if (sum == 0) revert IDisputes.NotPrepared();
        return
            Floats.add(
                model.servedDtype, sum - 1, Rows.element(segment, model, sent, segment.layer, Rows.MLP_OUT, mlpOut)
            );
    }

    function _findStop(
        Segment calldata segment,
        Docket memory docket,
        Model calldata model,
        Opening[] calldata evidence
    ) private view {
        if (docket.stage.endLayer != model.layers) revert IDisputes.WrongSegment("stage");
        bool token = segment.unit != NO_TOKEN;
        _requireCount(evidence, token ? 4 : 3);
        uint32 requests = docket.job.requests;
        bytes memory request = _open(evidence[0], _requestsRoot(segment), segment.request, requests);
        (bytes32 outputs,) = escrow.outputs(segment.job);
        bytes memory output = _open(evidence[1], outputs, segment.request, requests);
        bytes memory node = _open(evidence[2], docket.job.root, segment.request, requests);
        if (Exact.stopBroken(request, output, node, segment.request)) return;
        if (!token) revert IDisputes.NotWrong();

        bytes memory leaf = _tokenLeaf(output, evidence[3], segment.unit);
        if (!Exact.tokenBroken(request, output, leaf, segment.unit, model.vocabulary)) revert IDisputes.NotWrong();
    }

    function _findBill(
        Segment calldata segment,
        Docket memory docket,
        Model calldata model,
        Opening[] calldata evidence
    ) private view {
        if (docket.stage.endLayer != model.layers) revert IDisputes.WrongSegment("stage");
        uint32 requests = docket.job.requests;
        bool last = segment.request == requests - 1;
        _requireCount(evidence, last ? 1 : 2);
        (bytes32 outputs, uint64 total) = escrow.outputs(segment.job);
        bytes memory output = _open(evidence[0], outputs, segment.request, requests);
        bytes memory next;
        if (!last) next = _open(evidence[1], outputs, uint256(segment.request) + 1, requests);
        if (!Exact.billBroken(segment.request, requests, output, next, total)) revert IDisputes.NotWrong();
    }

    function _findLength(Segment calldata segment, Docket memory docket, Opening[] calldata evidence) private view {
        if (segment.stage == 0) revert IDisputes.WrongSegment("stage");
        _requireCount(evidence, 2);
        Charge memory found = docket.charge;
        Stage memory sent = workers.pipelineStage(docket.job.pipeline, segment.stage - 1);
        Trace memory next = _trace(segment, segment.stage, docket.job, docket.stage, evidence[0]);
        found.trace = _trace(segment, segment.stage - 1, docket.job, sent, evidence[1]);
        if (segment.position != found.trace.positions) revert IDisputes.WrongSegment("position");
        if (next.positions <= found.trace.positions) revert IDisputes.NotWrong();
        found.deflectable = true;
    }

    /// @dev Runs the single instruction of an exact program on the openings that follow its header and record.
    function _judge(
        Segment calldata segment,
        Charge memory found,
        Model calldata model,
        Opening[] calldata evidence,
        uint256 used
    ) private view {
        _requireAtLeast(evidence, used + 3);
        SegmentHeader memory header = _header(segment, model, evidence[used]);
        if (header.steps != 1) revert IDisputes.WrongSegment("kind");
        bytes memory record = _open(evidence[used + 1], model.programRoot, header.first, model.programLeaves);
        Opening[] memory openings = new Opening[](evidence.length - used - 2);
        for (uint256 i = 0; i < openings.length; ++i) {
            openings[i] = evidence[used + 2 + i];
        }
        Cell memory cell = Cell(segment.layer, segment.position, segment.unit, found.token, found.trace, 0);
        // No step comes before the first, so an operand that names one finds no root; and no list was claimed.
        bytes32[] memory none = new bytes32[](0);
        if (referee.judge(cell, 0, 0, Proof(model, record, 0, "", none, none, openings)) != 1) {
            revert IDisputes.NotWrong();
        }
    }

    // ---- hand-offs

    /// @notice The stage that signed a hand-off which contradicts its own commitment, about the very place that was shown.
    function sender(Game memory game, HandoffProof calldata proof) external view returns (uint8 index) {
        bytes32 root = Descent.rootOf(Tree.leaf(proof.record), proof.index, proof.leaves, proof.siblings);
        if (root != proof.root) revert IDisputes.BadHandoff("root");
        _requireContradiction(game, proof.record);
        Stage[] memory stages = workers.pipelineStages(escrow.job(game.segment.job).pipeline);
        index = game.segment.kind == EMBED ? uint8(stages.length - 1) : game.segment.stage - 1;

        bytes32 domain =
            keccak256(abi.encode(DOMAIN_TYPEHASH, keccak256("Plumb"), keccak256("1"), block.chainid, address(escrow)));
        bytes32 content = keccak256(abi.encode(HANDOFF_TYPEHASH, game.segment.job, index, proof.root, proof.leaves));
        bytes32 digest = keccak256(abi.encodePacked(hex"1901", domain, content));
        (address signer,,) = ECDSA.tryRecoverCalldata(digest, proof.signature);
        // A registered signer is never zero, so a failed recovery never matches.
        if (signer != workers.signerOf(stages[index].worker)) revert IDisputes.BadHandoff("signature");
    }

    function _requireContradiction(Game memory game, bytes calldata record) private pure {
        Segment memory segment = game.segment;
        uint256 head = Records.HANDOFF_HEAD_BYTES;
        if (Records.index(record) != segment.request) revert IDisputes.BadHandoff("request");
        uint256 place = Records.read(record, 4, 4);
        uint256 third = Records.read(record, 8, 4); // token or block
        if (segment.kind == EMBED) {
            if (record.length != head) revert IDisputes.BadHandoff("length");
            if (place != game.index) revert IDisputes.BadHandoff("position");
            if (third == game.token) revert IDisputes.BadHandoff("token");
            return;
        }
        if (record.length <= head) revert IDisputes.BadHandoff("length");
        if (place != segment.position) revert IDisputes.BadHandoff("position");
        // The sender has no such position, so any block of it contradicts.
        if (segment.kind == LENGTH) return;
        if (third != segment.unit / Codec.BLOCK) revert IDisputes.BadHandoff("block");
        if (Tree.leaf(record[head:]) != game.list) revert IDisputes.BadHandoff("values");
    }

    // ---- openings

    /// @dev Leaf `index` of a committed tree of `count` leaves.
    function _open(Opening calldata opening, bytes32 root, uint256 index, uint256 count)
        private
        pure
        returns (bytes memory data)
    {
        data = opening.data;
        bytes32 actual = Descent.rootOf(Tree.leaf(data), index, count, opening.siblings);
        if (actual != root) revert Rows.RootMismatch(root, actual);
    }

    function _trace(
        Segment calldata segment,
        uint8 index,
        Brief memory job,
        Stage memory stage,
        Opening calldata opening
    ) private view returns (Trace memory) {
        bytes32 root = index == segment.stage ? job.root : escrow.root(segment.job, index);
        bytes memory node = _open(opening, root, segment.request, job.requests);
        return Trace(Records.tensorsRoot(node), uint32(Records.positions(node)), stage.firstLayer, stage.endLayer);
    }

    function _requestsRoot(Segment calldata segment) private view returns (bytes32) {
        return escrow.job(segment.job).requestsRoot;
    }

    function _header(Segment calldata segment, Model calldata model, Opening calldata opening)
        private
        pure
        returns (SegmentHeader memory header)
    {
        if (segment.kind >= KINDS) revert IDisputes.WrongSegment("kind");
        header = Codec.header(_open(opening, model.programRoot, segment.kind, model.programLeaves));
        if (segment.unit >= header.units) revert IDisputes.WrongSegment("unit");
    }

    /// @return id output token `place`
    /// @return count how many there are
    function _outputToken(
        Segment calldata segment,
        Docket memory docket,
        Opening calldata record,
        Opening calldata leaf,
        uint256 place
    ) private view returns (uint256 id, uint256 count) {
        (bytes32 outputs,) = escrow.outputs(segment.job);
        bytes memory output = _open(record, outputs, segment.request, docket.job.requests);
        count = Records.count(output);
        if (place >= count) revert IDisputes.WrongSegment("position");
        id = Records.token(_tokenLeaf(output, leaf, place), place);
    }

    function _tokenLeaf(bytes memory output, Opening calldata leaf, uint256 place) private pure returns (bytes memory) {
        uint256 count = Records.count(output);
        if (place >= count) revert IDisputes.WrongSegment("unit");
        uint256 index = place / Records.TOKENS_PER_LEAF;
        return _open(leaf, Records.tokensRoot(output), index, Records.tokenLeaves(count));
    }

    // ---- bounds

    /// @dev A token beyond the vocabulary has no row to judge: STOP convicts it.
    function _known(uint256 token, uint32 vocabulary) private pure returns (uint32) {
        if (token >= vocabulary) revert IDisputes.WrongSegment("token");
        return uint32(token);
    }

    function _requireLayer(Segment calldata segment, Stage memory stage) private pure {
        if (segment.layer < stage.firstLayer || segment.layer >= stage.endLayer) {
            revert IDisputes.WrongSegment("layer");
        }
    }

    function _requireCount(Opening[] calldata evidence, uint256 expected) private pure {
        if (evidence.length != expected) revert OpeningCount(expected, evidence.length);
    }

    function _requireAtLeast(Opening[] calldata evidence, uint256 expected) private pure {
        if (evidence.length < expected) revert OpeningCount(expected, evidence.length);
    }
}
