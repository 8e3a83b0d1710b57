"""Products compiled without a GPU: no spills, wide loads, and one matrix instruction a device."""


def test_compiled_products(facts_of):
    facts = facts_of("linear_child.py")
    assert {fact["arch"] for fact in facts} == {80, 90, 100}
    assert {fact["constexprs"]["PARTS"] for fact in facts} == {1, 8}
    problems = [problem for fact in facts for problem in problems_of(fact)]
    assert not problems, "\n".join(problems)


def problems_of(fact):
    """What is wrong with one compiled kernel, in words."""
    name = f"sm_{fact['arch']} {fact['constexprs']}"
    if fact["stack"] or fact["local"]:
        yield f"{name}: spills {fact['stack']} + {fact['local']} bytes"
    if fact["shared"] > fact["shared_limit"]:
        yield f"{name}: {fact['shared']} bytes of shared memory, limit {fact['shared_limit']}"
    if fact["copy_bytes"] != [16]:
        yield f"{name}: loads of {fact['copy_bytes']} bytes, expected only 16"
    half = fact["constexprs"]["dtype"] != "torch.float32"
    expected = ["wgmma.mma_async" if fact["arch"] == 90 else "mma.sync"] if half else []
    if fact["mma"] != expected:
        yield f"{name}: matrix instructions {fact['mma']}, expected {expected}"
    # Of weights, which no launch of a step writes.
    if fact["arch"] >= 90 and fact["early"] != ["prefetch"]:
        yield f"{name}: {fact['early']} before the dependency wait, expected a prefetch alone"
