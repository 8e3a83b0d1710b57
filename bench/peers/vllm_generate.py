"""vLLM on the CPU as a peer: its engine in its own virtual environment, driven over pipes.

The engine runs in one process with as many threads as we have. vLLM's default, a process each for
the front, the engine and the worker that wait for one another in loops, and a core kept from the
worker, would cost it half of two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from bench.peers.worker import Worker

WORKER = Path(__file__).with_name("vllm_worker.py")
OUR_EXPERTS = "MoesdCpuExperts"  # the class in vLLM's layers where our plugin has taken over

Tokens = list[list[int]]  # of each sequence


class VllmSetup(NamedTuple):
    """What an engine is started with.

    Attributes:
        model: a folder.
        max_batch_size: sequences decoded at once.
        plugin: whether our experts may take the place of vLLM's, where the plugin is installed.
        draft: folder of a draft model, the number of whose drafts our plugin then chooses.
        max_gamma: most drafts of a step.
    """

    model: str
    max_batch_size: int
    plugin: bool = False
    draft: str | None = None
    max_gamma: int = 0


class VllmGenerate:
    """Greedy decoding by vLLM of a model saved on disk."""

    def __init__(self, python: str, setup: VllmSetup, threads: int) -> None:
        command = [python, str(WORKER), json.dumps(setup._asdict())]
        self.worker = Worker(command, threads, _environment(python, setup))
        hello = self.worker.ask(command="hello")
        self.version: str = hello["version"]
        self.experts: list[str] = hello["experts"]  # classes that compute the layers' experts
        if hello["threads"] != threads:
            raise RuntimeError(f"expected vLLM to have {threads} threads, got {hello['threads']}")

    def run(self, prompts: Tokens, max_new_tokens: int) -> tuple[float, Tokens]:
        """Seconds of one call as the worker saw it, and the new tokens of each prompt."""
        answer = self.worker.ask(command="run", prompts=prompts, max_new_tokens=max_new_tokens)
        return answer["seconds"], answer["tokens"]

    def choose(self, gamma: int | str, kept: list[float]) -> None:
        """How calls draft from now on.

        Args:
            gamma: drafts of every step, or "auto": as many as our controller chooses, which goes on
                learning from one such call to the next.
            kept: of each draft token the probability to be left as it is, which imposes an
                acceptance: one for each part of a call, in turn.
        """
        self.worker.ask(command="choose", gamma=gamma, kept=kept)

    def explain(self) -> str:
        """Why our controller chose as it did last."""
        return self.worker.ask(command="explain")["why"]

    def close(self) -> None:
        """End the worker."""
        self.worker.close()


def _environment(python: str, setup: VllmSetup) -> dict[str, str]:
    """One process, all threads, and what vLLM's manual advises for CPUs and its wheels bring."""
    variables = {
        "MOESD_VLLM": "experts" if setup.plugin else "off",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    openmp = Path(python).absolute().parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        variables |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "5"}
    return variables
