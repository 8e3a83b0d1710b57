"""Many ranks: the limits that any model of them must have, published times, the command line."""

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from decoder.__main__ import main
from decoder.perf_model.forward_model import ForwardModel
from decoder.perf_model.hardware.machine import named_machine
from decoder.perf_model.parallel.network import NETWORKS, Network
from decoder.perf_model.parallel.ranks import EXCHANGES, Exchange, Ranks
from decoder.perf_model.planning.planner import make_plan
from decoder.perf_model.presets import preset_spec

FREE = Network("free", math.inf, 0.0)
IB = NETWORKS["ib-400"]
E = 128
MODEL = ForwardModel(preset_spec("qwen3-30b-a3b"), named_machine("h200"))


def on(count: int, network: Network = IB, exchange: Exchange = "all-reduce") -> ForwardModel:
    return replace(MODEL, ranks=Ranks(count, network, exchange))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_rank_is_no_parallelism(exchange: Exchange) -> None:
    grid = {"alpha": 0.8, "batches": [1, 8, 64], "gammas": [1, 4], "context": 512}
    plain, one = make_plan(MODEL, **grid), make_plan(on(1, IB, exchange), **grid)
    for before, after in zip(plain.batches, one.batches, strict=True):
        assert after.ar_seconds == before.ar_seconds
        for a, b in zip(before.cells, after.cells, strict=True):
            assert asdict(b) == {**asdict(a), "collective_share": 0.0}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_free_network_leaves_the_work(exchange: Exchange) -> None:
    assert on(8, FREE, exchange).rank_times(64, 4).collective == 0.0
    times = [on(n, FREE, exchange).rank_times(512, 4).forward for n in (1, 2, 8, 32, 128)]
    assert times == sorted(times, reverse=True) and times[-1] < times[0]


def test_one_expert_per_rank() -> None:
    """At most one expert is read in each layer, and some rank gets at least the mean rows."""
    active, rows = on(E).expert_load(MODEL.target.layers[0], 64, 5)
    assert active == 1.0
    assert 64 * 5 * 8 / E < rows < 64 * 5
    attention = on(E, FREE).rank_times(1, 0).forward
    assert attention > 0.5 * MODEL.forward_time(MODEL.target, 1, 1)  # every rank's own


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_costs_grow_with_latency_and_shrink_with_bandwidth(exchange: Exchange) -> None:
    for changed in (
        [replace(IB, latency=us * 1e-6) for us in (0, 1, 10, 1000)],
        [replace(IB, bandwidth=gb * 1e9) for gb in (400, 40, 4, 0.4)],
    ):
        times = [on(16, network, exchange).rank_times(32, 4) for network in changed]
        assert all(a.collective < b.collective and a.forward < b.forward
                   for a, b in pairwise(times))  # fmt: skip


def test_collectives_are_what_the_forward_is_charged() -> None:
    for exchange in EXCHANGES:
        free, real = (on(4, network, exchange).rank_times(8, 3) for network in (FREE, IB))
        assert real.forward - free.forward == pytest.approx(real.collective)
    size = 8 * 4 * MODEL.target.hidden * 2  # B (gamma + 1) rows of 16 bits
    per_layer = 2 * (2 * IB.latency + 3 / 4 * size / IB.bandwidth)
    assert on(4).rank_times(8, 3).collective == pytest.approx(48 * per_layer)
    gathered = on(4, IB, "all-gather").rank_times(8, 3).collective
    assert gathered == pytest.approx(48 * 3 * (IB.latency + size / IB.bandwidth))
    in_fp32 = replace(on(4), dtype="fp32").rank_times(8, 3).collective
    assert in_fp32 > on(4).rank_times(8, 3).collective


@pytest.mark.parametrize(("exchange", "rows"), [("all-reduce", 64), ("all-to-all", 4)])
def test_a_draft_is_whole_on_every_rank(exchange: Exchange, rows: int) -> None:
    """Also one with experts; it drafts for the sequences whose attention its rank computes."""
    draft = preset_spec("olmoe")
    alone = replace(MODEL, draft=draft).round_times(rows, 2).draft
    assert replace(on(16, IB, exchange), draft=draft).round_times(64, 2).draft == alone


def test_attention_is_divided_by_all_to_all_only() -> None:
    context = 100_000  # where caches are most of the time
    alone = MODEL.rank_times(64, 0, context).forward
    assert on(16, FREE, "all-to-all").rank_times(64, 0, context).forward < 0.2 * alone
    for exchange in ("all-reduce", "all-gather"):
        assert on(16, FREE, exchange).rank_times(64, 0, context).forward > 0.8 * alone


@pytest.mark.parametrize(("ranks", "seconds"), [(64, 314e-6), (128, 369e-6), (256, 360e-6)])
def test_all_to_all_against_published_times(ranks: int, seconds: float) -> None:
    """DeepEP's low-latency combine: 128 tokens a rank to 8 experts, H = 7168, bf16, 400 Gb/s."""
    rows = Ranks(ranks, IB).busiest(ranks, ranks * 128 * 8, 1.0, 256)[1]
    assert IB.all_to_all(ranks, rows * 7168 * 2) == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, r"ranks must be in \[1, 65536\], got 0"), (10**6, "got 1000000")],
)
def test_counts(count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranks(count, IB)


def test_networks_and_exchanges_are_checked() -> None:
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        Network("none", 0.0, 0.0)
    with pytest.raises(ValueError, match="latency must be finite and >= 0, got -1"):
        Network("early", 1e9, -1.0)
    with pytest.raises(ValueError, match=r"exchange must be one of .* got 'gossip'"):
        Ranks(2, IB, "gossip")  # type: ignore[arg-type]


PLAN = ["plan", "--target", "deepseek-v3", "--machine", "h200", "--batch-sizes", "256,1024"]


def test_plan_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PLAN, "--ranks", "64", "--exchange", "all-to-all", "--gammas", "2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for piece in (
        "64 ranks of h200 (prediction)", "Share of collectives", "no run over ranks stands behind",
        "4 of 256 experts per layer", "attention is data-parallel", "ib-400, 45 GB/s and 5 µs",
    ):  # fmt: skip
        assert piece in out
    assert "do not fit" not in out  # a 64th of the experts does


def test_plan_takes_a_link(capsys: pytest.CaptureFixture[str]) -> None:
    shares = []
    for link in (["--link", "nvlink"], [], ["--link-bandwidth", "1", "--link-latency", "50"]):
        assert main([*PLAN, "--ranks", "8", *link, "--format", "json"]) == 0
        cells = json.loads(capsys.readouterr().out)["batches"][0]["cells"]
        shares.append(cells[4]["collective_share"])
    assert 0 < shares[0] < shares[1] < shares[2] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "257"], "ranks must be at most the 256 experts of a layer, got 257"),
        (["--ranks", "0"], "--ranks: expected an integer >= 1, got '0'"),
        (["--ranks", "many"], "--ranks"),
        (["--ranks", "8", "--link", "wire"], "--link"),
        (["--ranks", "8", "--link-bandwidth", "0"], "--link-bandwidth"),
        (["--ranks", "8", "--link-latency", "nan"], "--link-latency"),
        (["--ranks", "8", "--exchange", "ring"], "--exchange"),
        (["--link", "nvlink"], "--link is read with --ranks only"),
        (["--link-latency", "0"], "--link-latency is read with --ranks only"),
        (["--target", "opt-30b", "--ranks", "2"], "needs a model with experts to spread"),
    ],
)
def test_what_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*PLAN, *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and len(err.splitlines()) == 1
