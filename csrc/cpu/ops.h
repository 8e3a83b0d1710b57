// What the op boundary files share: the chosen kernels, dtype names, scratch memory and the thread team.
#pragma once

#include <ATen/core/Tensor.h>

#include "types.h"

namespace moesd {

// The best table this processor runs, or the one MOESD_CPU_ISA names; decided at the first call.
const KernelTable& kernels();

// Raises TypeError-like errors naming `what` for dtypes the kernels do not store.
DType storage_dtype(const at::Tensor& t, const char* what);

// Raises ValueError or TypeError unless t is contiguous, of these sizes, and of the dtype of `like`; names both.
void check_like(const at::Tensor& t, const char* name, at::IntArrayRef sizes, const at::Tensor& like,
                const char* like_name);

// Raises ValueError for names the kernels do not know.
Activation parse_activation(c10::string_view name);

// Grow-only memory of the calling thread, valid until its next call.
void* scratch(size_t bytes);

// Threads worth waking for this many multiply-adds, at most torch.get_num_threads().
int team_size(int64_t multiply_adds);

void run_team(int threads, void (*body)(void*), void* ctx);

}  // namespace moesd
