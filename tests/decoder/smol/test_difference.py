"""The difference file: what its 8 bits lose, and that the experts are what the format says."""

import pytest
import torch

from decoder.smol.difference import (
    MATRICES,
    Difference,
    LowRank,
    experts,
    quantized,
    write_difference,
)

E, I, H, R = 4, 96, 32, 4


def factors(spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ones whose components are of very different sizes on the two sides."""
    generator = torch.Generator().manual_seed(3)
    sizes = spread ** torch.arange(R).float()
    left = torch.randn(E, I, R, generator=generator) * sizes
    return left, torch.randn(E, R, H, generator=generator) / sizes[:, None]


@pytest.mark.parametrize("spread", [1.0, 10.0, 1e3])
def test_eight_bits_lose_little_however_the_sides_share_a_components_size(spread: float) -> None:
    left, right = factors(spread)
    low = quantized(left, right)
    assert (low.left.dtype, low.right.dtype) == (torch.int8, torch.int8)
    kept = low.scale[:, None, None] * (low.left.float() @ low.right.float())
    lost = (kept - left @ right).norm(dim=(1, 2)) / (left @ right).norm(dim=(1, 2))
    assert lost.max() < 0.02


def test_no_difference_stays_none() -> None:
    left, right = factors()
    left[1], left[2, :, 0] = 0, 0
    low = quantized(left, right)
    assert torch.isfinite(low.scale).all()
    assert not (low.left[1].float() @ low.right[1].float()).any()
    assert not low.left[2, :, 0].any()


def test_an_expert_is_the_dense_matrix_plus_its_difference_turned() -> None:
    dense = torch.randn(I, H, generator=torch.Generator().manual_seed(5))
    low = quantized(*factors())
    exact = low.left.double() @ low.right.double()  # integers: exact in fp32, too
    for neurons, matrix in ((0, dense), (1, dense.mT.contiguous())):
        part = low if neurons == 0 else LowRank(low.right.mT, low.left.mT, low.scale)
        made = experts(matrix, part, neurons)
        for e in range(E):
            wanted = dense + low.scale[e] * exact[e].float()
            wanted = torch.cat([wanted[-e * I // E :], wanted[: -e * I // E]]) if e else wanted
            wanted = wanted if neurons == 0 else wanted.mT
            assert torch.equal(made[e], wanted.bfloat16()), (neurons, e)


def test_turning_changes_no_output() -> None:
    """Gate, up and down turn together: experts without a difference all are the dense network."""
    generator = torch.Generator().manual_seed(7)
    gate, up = torch.randn(2, I, H, generator=generator).bfloat16().float()
    down = torch.randn(H, I, generator=generator).bfloat16().float()
    none = [
        quantized(torch.zeros(E, matrix.shape[0], R), torch.zeros(E, R, matrix.shape[1]))
        for matrix in (gate, up, down)
    ]
    made = [
        experts(matrix, low, neurons).double()
        for matrix, low, neurons in zip((gate, up, down), none, MATRICES.values(), strict=True)
    ]
    x = torch.randn(H, generator=generator).double()
    outputs = [
        d @ (torch.nn.functional.silu(g @ x) * (u @ x)) for g, u, d in zip(*made, strict=True)
    ]
    wanted = down.double() @ (torch.nn.functional.silu(gate.double() @ x) * (up.double() @ x))
    assert all(torch.allclose(output, wanted, rtol=1e-12, atol=0) for output in outputs)
    assert not torch.equal(made[0][1], made[0][2])


def test_the_file_gives_back_what_was_written(tmp_path) -> None:
    left, right = factors()
    router = torch.randn(E, H, requires_grad=True)
    trained = {"layers.0.router": router}
    for matrix, neurons in MATRICES.items():
        a, b = (left, right) if neurons == 0 else (right.mT, left.mT)
        trained |= {f"layers.0.{matrix}.left": a, f"layers.0.{matrix}.right": b}
    write_difference(tmp_path / "difference.safetensors", trained)
    read = Difference(tmp_path / "difference.safetensors")
    assert torch.equal(read.router(0), router.bfloat16())
    dense = torch.randn(I, H)
    wanted = experts(dense, quantized(left, right), 0)
    assert torch.equal(read.experts(0, "gate", dense), wanted)
    assert read.experts(0, "down", dense.mT.contiguous()).shape == (E, H, I)
