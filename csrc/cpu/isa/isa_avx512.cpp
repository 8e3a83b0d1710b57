// The kernels for one instruction set; compiled with its own flags, so it includes nothing of
// torch.
#define MOESD_ISA avx512
#include "vec_avx512.h"

#include "table.h"

namespace moesd {

extern const KernelTable kAvx512Table;
constexpr KernelTable kAvx512Table = avx512::make_table("avx512");

}  // namespace moesd
