"""The recurrent layers' kernels compiled without a GPU: no spills, states by wide loads."""

from support.device.compiled import code_problems, title


def test_compiled_kernels(facts_of):
    facts = facts_of("recurrent/recurrent_child.py")
    assert {fact["arch"] for fact in facts} == {80, 90, 100} and len(facts) == 22
    problems = [problem for fact in facts for problem in problems_of(fact)]
    assert not problems, "\n".join(problems)


def problems_of(fact):
    """What is wrong with one compiled kernel, in words."""
    yield from code_problems(fact)
    if fact["kernel"] in ("delta_rule", "state_space") and fact["widest_load"] != 4:
        yield f"{title(fact)}: widest load is of {fact['widest_load']} words, expected 4"
