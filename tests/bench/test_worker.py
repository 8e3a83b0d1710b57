"""The pipe to a peer: answers, errors of the peer, and why it died."""

import sys

import pytest

from bench.peers.worker import Worker

ECHO = """
from bench.peers.worker import serve
def answer(message):
    if message["command"] == "fail":
        raise ValueError("not this one")
    return {"said": message["command"]}
serve(answer)
"""


def test_answers_and_errors_come_back():
    worker = Worker([sys.executable, "-c", ECHO], threads=1)
    assert worker.ask(command="hello")["said"] == "hello"
    with pytest.raises(RuntimeError, match="ValueError: not this one"):
        worker.ask(command="fail")
    assert worker.ask(command="again")["said"] == "again"
    worker.close()


def test_a_dead_peer_says_why():
    worker = Worker([sys.executable, "-c", "raise SystemExit('no such library')"], threads=1)
    with pytest.raises(RuntimeError, match="exit code 1: no such library"):
        worker.ask(command="hello")
    worker.close()
