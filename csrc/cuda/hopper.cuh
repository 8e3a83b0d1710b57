// sm_90a instructions as inline PTX: barriers, tensor copies, and the 64-row matrix instruction.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace moesd {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Waits until the phase of the given parity is complete.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra WAIT;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Weights are used once per launch and should leave the cache first; rows of tokens are read by
// every tile.
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t evict_last_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Starts the copy of one box at (column, row) into shared memory; `barrier` counts its bytes.
__device__ __forceinline__ void tensor_copy(void* target, const CUtensorMap* map, int column,
                                            int row, uint64_t* barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(target)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void prefetch_descriptor(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d [64, N] (+)= a [64, 16] * b [N, 16]^T in bf16 with fp32 sums; `add` = 0 overwrites d.
#define MOESD_WGMMA(N, REGISTERS, A, B, P)                                               \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " P                                                \
    ", 0;\n"                                                                             \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" REGISTERS "}, " A ", " B \
    ", p, 1, 1, 0, 0;\n}\n"
#define MOESD_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOESD_D16(i) MOESD_D4(i), MOESD_D4(i + 4), MOESD_D4(i + 8), MOESD_D4(i + 12)

__device__ __forceinline__ void wgmma(float (&d)[4], uint64_t a, uint64_t b, int add) {
    asm volatile(MOESD_WGMMA("8", "%0,%1,%2,%3", "%4", "%5", "%6")
                 : MOESD_D4(0)
                 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[8], uint64_t a, uint64_t b, int add) {
    asm volatile(MOESD_WGMMA("16", "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", "%10")
                 : MOESD_D4(0), MOESD_D4(4)
                 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile(MOESD_WGMMA("32", "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16",
                             "%17", "%18")
                 : MOESD_D16(0)
                 : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(MOESD_WGMMA("64",
                             "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                             "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                             "%32", "%33", "%34")
                 : MOESD_D16(0), MOESD_D16(16)
                 : "l"(a), "l"(b), "r"(add));
}

#undef MOESD_D16
#undef MOESD_D4
#undef MOESD_WGMMA

}  // namespace moesd
