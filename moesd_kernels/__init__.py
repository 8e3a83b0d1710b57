"""The sparse-MoE expert layer: one op, its PyTorch reference, fast back-ends, transformers hooks.

Letters used throughout: ``T`` tokens entering the layer, ``E`` experts, ``K`` experts per token,
``H`` hidden size, ``I`` expert intermediate size, ``N`` = T * K routed pairs. Public signatures use
words.

Importing this package needs torch and nothing else: no Triton, no compiler, no CUDA, and no
transformers.
"""

from moesd_kernels.experts.api import fused_experts
from moesd_kernels.experts.backends import available_backends
from moesd_kernels.experts.routing import Routing, plan_routing
from moesd_kernels.experts.spec import ExpertsSpec
from moesd_kernels.hooks.accelerate import accelerate, decelerate
from moesd_kernels.hooks.experts import register
from moesd_kernels.hooks.loading import keep_quantized, load_gguf
from moesd_kernels.hooks.quantize import quantize, quantize_experts, use_int8_activations
from moesd_kernels.hooks.routers import RouterRule

from .moe import MoE, MoEConfig

__all__ = [
    "ExpertsSpec",
    "MoE",
    "MoEConfig",
    "RouterRule",
    "Routing",
    "accelerate",
    "available_backends",
    "decelerate",
    "fused_experts",
    "keep_quantized",
    "load_gguf",
    "plan_routing",
    "quantize",
    "quantize_experts",
    "register",
    "use_int8_activations",
]
