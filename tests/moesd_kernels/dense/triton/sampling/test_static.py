"""The sampler's kernels compiled without a GPU, for a vocabulary of 151,936: no spills."""

from support.device.compiled import code_problems, title

# Those that stream the vocabulary, by loads of 16 bytes: four of 32 bits.
WIDE = {"probs", "race", "mass", "residual"}
# Their products and sums round one by one, as in PyTorch.
UNFUSED = {"mass", "accept"}


def test_compiled_kernels(facts_of):
    facts = facts_of("sampling/sampling_child.py")
    assert {fact["arch"] for fact in facts} == {80, 90, 100} and len(facts) == 24
    problems = [problem for fact in facts for problem in problems_of(fact)]
    assert not problems, "\n".join(problems)


def problems_of(fact):
    """What is wrong with one compiled kernel, in words."""
    name = title(fact)
    yield from code_problems(fact)
    if fact["kernel"] in WIDE and fact["widest_load"] != 4:
        yield f"{name}: widest load is of {fact['widest_load']} words, expected 4"
    if fact["kernel"] in UNFUSED and fact["fused"]:
        yield f"{name}: a product is added unrounded"
    if fact["approximate_log"]:
        yield f"{name}: the logarithm of a number near 1 has no precision"
