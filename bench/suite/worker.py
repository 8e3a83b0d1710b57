"""The process in which pieces run, one after the other, until all are done or time is up."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence

from bench.suite.progress import Lines
from bench.suite.session import OutOfTimeError, Piece, Session
from bench.suite.supervisor import RESTART

# A piece is not begun with less than this left.
LEAST_S = 3.0
# A piece stops itself at its limit, between two points; so much later it hangs.
HARD = 1.5
# A piece may lose the device at so many of its points; another process goes on behind each.
LOSSES = 2


def work(session: Session, pieces: Sequence[Piece], seconds: float, scale: float = 1.0) -> None:
    """Run every piece that is not settled; those cut short share the time left at the end.

    Args:
        seconds: for all of them.
        scale: factor on every piece's share.
    """
    end = time.monotonic() + seconds
    for piece in pieces:
        if not is_settled(session.lines, piece.name):
            run_piece(session, piece, min(scale * piece.seconds, end - time.monotonic()))
    for piece in pieces:
        if session.lines.states().get(piece.name, {}).get("state") == "cut":
            run_piece(session, piece, end - time.monotonic())


def is_settled(lines: Lines, name: str) -> bool:
    """Whether a piece is done, or was tried in this start; earlier troubles are tried again."""
    if lines.states().get(name, {}).get("state") == "done":
        return True
    return lines.states_of_this_start().get(name, {}).get("state") in ("cut", "failed", "not run")


def run_piece(session: Session, piece: Piece, seconds: float) -> None:
    """Run one piece for at most ``seconds``; nothing it raises gets out.

    Raises:
        SystemExit: the device is lost to this process; the code asks for another.
    """
    lines = session.lines
    reason = piece.refusal(session)
    if reason is not None:
        lines.write("piece", name=piece.name, state="not run", reason=reason)
        return
    if seconds < LEAST_S:
        return
    begin = time.monotonic()
    session.piece_end, session.point = begin + seconds, None
    hard = round(HARD * seconds + session.grace_s, 1)
    lines.write("piece", name=piece.name, state="begun", limit_s=round(seconds, 1), hard_s=hard)
    print(f"=== {piece.name}", flush=True)
    outcome = {"state": "done"}
    try:
        piece.run(session)
    except OutOfTimeError:
        outcome = {"state": "cut"}
    except Exception as error:  # whatever it is, the next piece must have its turn
        outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}"[:600]}
        traceback.print_exc()
    lost = outcome["state"] == "failed" and not session.usable()
    before = lines.lost_in_this_start(piece.name)
    if lost and session.point is not None and len(before) < LOSSES:
        outcome |= {"state": "lost", "lost_at": session.point}
    elif before and outcome["state"] == "done":
        outcome = {"state": "failed", "reason": f"lost the device at {', '.join(before)}"}
    lines.write("piece", name=piece.name, **outcome, took_s=round(time.monotonic() - begin, 1))
    if lost:
        raise SystemExit(RESTART)
