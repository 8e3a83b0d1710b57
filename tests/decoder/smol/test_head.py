"""The EAGLE head's asset: rows in 8 bits, and what comes from the target."""

import torch

from decoder.smol.head import read_head, write_head

V, H, DRAFT = 40, 16, 8


def test_the_published_layout_comes_back(tmp_path) -> None:
    generator = torch.Generator().manual_seed(11)
    targets = torch.tensor([0, 3, 4, 9, 17, 20, 33, 39])
    weight = torch.randn(H, 3 * H, generator=generator) * torch.logspace(-3, 2, H)[:, None]
    weight[2] = 0
    output = torch.randn(V, H, generator=generator)
    state = {
        "fc.weight": weight.clone().requires_grad_(),
        "norm.weight": torch.rand(H, generator=generator),
        "d2t": targets - torch.arange(DRAFT),
        "lm_head.weight": torch.zeros(DRAFT, H),
        "t2d": torch.zeros(V, dtype=torch.bool),
    }
    file = tmp_path / "eagle.safetensors"
    write_head(file, state, {"hidden_size": H})
    read, config = read_head(file, output)
    assert config == {"hidden_size": H}
    assert read.keys() == state.keys()
    assert torch.equal(read["d2t"], state["d2t"])
    assert torch.equal(read["t2d"].nonzero().flatten(), targets)
    assert torch.equal(read["lm_head.weight"], output[targets].bfloat16())
    assert torch.equal(read["norm.weight"], state["norm.weight"].bfloat16())
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    rounding = weight.abs() * 2**-8  # of bf16
    assert ((read["fc.weight"].float() - weight).abs() <= 0.51 * steps + rounding).all()
    assert file.stat().st_size < H * 3 * H + 4 * H + 2 * H + 4 * DRAFT + 600
