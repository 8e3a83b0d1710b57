// The kernels for one instruction set; compiled with its own flags, so it includes nothing of
// torch.
#define MOESD_ISA avx512_bf16
#define MOESD_AVX512_BF16
#include "vec_avx512.h"

#include "table.h"

namespace moesd {

extern const KernelTable kAvx512Bf16Table;
constexpr KernelTable kAvx512Bf16Table = avx512_bf16::make_table("avx512_bf16");

}  // namespace moesd
