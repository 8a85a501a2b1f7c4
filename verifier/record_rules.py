"""The rules of a job's records, exact: how a request ends, what is billed, how many positions each stage has."""

from collections.abc import Sequence

from verifier.audit import NO_TOKEN, WRONG, Verdict
from verifier.commit import LIMITED, STOPPED, Output, Request, TraceNode
from verifier.program import Kind
from verifier.referee.codec import TOKENS_A_LEAF


def audit_stop(stage: int, r: int, request: Request, output: Output, positions: int, vocabulary: int) -> Verdict | None:
    """The rule of STOP on one request (docs/protocol.md); None where it is kept. positions: T of the last stage."""

    def broken(unit: int, reason: str) -> Verdict:
        return Verdict(WRONG, stage, Kind.STOP, r, 0, 0, unit, reason=reason)

    count, code, tokens = output.count, output.code, output.tokens
    if code not in (STOPPED, LIMITED):
        return broken(NO_TOKEN, f"expected code 1 or 2, got {code}")
    if not 1 <= count <= request.limit:
        return broken(NO_TOKEN, f"expected 1 .. {request.limit} tokens, got {count}")
    if code == LIMITED and count != request.limit:
        return broken(NO_TOKEN, f"expected {request.limit} tokens under code 2, got {count}")
    if positions != len(request.prompt) + count - 1:
        return broken(NO_TOKEN, f"expected {len(request.prompt) + count - 1} positions, got {positions}")
    if len(tokens) != count:
        return broken((count - 1) // TOKENS_A_LEAF * TOKENS_A_LEAF, f"expected {count} tokens, got {len(tokens)}")
    for i, token in enumerate(tokens):
        if token >= vocabulary:
            return broken(i, f"expected tokens below {vocabulary}, got {token}")
        must_stop = code == STOPPED and i == count - 1
        if (token in request.stops) != must_stop:
            return broken(i, f"expected {'a' if must_stop else 'no'} stop id, got {token}")
    return None


def audit_bill(stage: int, outputs: Sequence[Output], total_tokens: int) -> list[Verdict]:
    """Every break of BILL: the first output starts at 0, each where its predecessor ends, the last ends the total."""
    found = []
    for r, output in enumerate(outputs):
        end = outputs[r + 1].start if r + 1 < len(outputs) else total_tokens
        starts_right = r > 0 or output.start == 0
        if not starts_right or output.start + output.count != end:
            reason = f"expected {output.start} + {output.count} to be {end}" if starts_right else "expected start 0"
            found.append(Verdict(WRONG, stage, Kind.BILL, r, 0, 0, 0, reason=reason))
    return found


def audit_length(nodes: Sequence[Sequence[TraceNode]]) -> list[Verdict]:
    """Every receiver that has more positions than its sender. nodes: by stage, then by request."""
    found = []
    for stage in range(1, len(nodes)):
        for r, (sent, held) in enumerate(zip(nodes[stage - 1], nodes[stage], strict=True)):
            if held.positions > sent.positions:
                reason = f"expected at most {sent.positions} positions, got {held.positions}"
                found.append(Verdict(WRONG, stage, Kind.LENGTH, r, 0, sent.positions, 0, reason=reason))
    return found
