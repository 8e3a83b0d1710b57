"""Norms, rope, activation, routers and argmax compiled without a GPU: no spills, wide loads."""

from support.device.compiled import code_problems, title

# Of 16 bytes: four of 32 bits.
WIDE = {"norm", "rope", "act", "part"}


def test_compiled_kernels(facts_of):
    facts = facts_of("small_child.py")
    assert {fact["arch"] for fact in facts} == {80, 90, 100} and len(facts) == 28
    problems = [problem for fact in facts for problem in problems_of(fact)]
    assert not problems, "\n".join(problems)


def problems_of(fact):
    """What is wrong with one compiled kernel, in words."""
    name = title(fact)
    # Weights of a norm, which no launch of a step writes.
    early = ["prefetch"] if fact["kernel"] in ("norm", "norm_route") else []
    yield from code_problems(fact, early)
    if fact["kernel"] in WIDE and fact["widest_load"] != 4:
        yield f"{name}: widest load is of {fact['widest_load']} words, expected 4"
    if fact["kernel"] == "rope" and fact["fused"]:
        yield f"{name}: a product is added unrounded"
    if fact["kernel"] == "topk" and not fact["warp_reductions"]:
        yield f"{name}: the largest is found by shuffles"
