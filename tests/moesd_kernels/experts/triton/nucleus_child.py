"""Child of test_nucleus_static.py: compiles the top-p search for three architectures, no GPU."""

import json
import re

import triton
from compile_child import resources
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesd_kernels.dense.nucleus_kernel import BLOCK, NUM_WARPS, _nucleus_kernel

SIGNATURE = {"bits_ptr": "*i32", "top_p_ptr": "*fp64", "out_ptr": "*i32", "V": "i32"}


def main() -> None:
    for arch in (80, 90, 100):
        # Vocabularies are multiples of 16, as the launcher finds out by itself.
        attributes = {(index,): [["tt.divisibility", 16]] for index in range(4)}
        source = ASTSource(
            _nucleus_kernel, SIGNATURE | {"BLOCK": "constexpr"}, {(4,): BLOCK}, attributes
        )
        done = triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={"num_warps": NUM_WARPS}
        )
        loads = set(re.findall(r"ld\.global(?:\.v(\d))?\.b32", done.asm["ptx"]))
        facts = {"arch": arch, "loads": sorted(loads), "warps": NUM_WARPS}
        print(json.dumps(facts | resources(done.asm["cubin"])))


if __name__ == "__main__":
    main()
