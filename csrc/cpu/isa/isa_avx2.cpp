// The kernels for one instruction set; compiled with its own flags, so it includes nothing of
// torch.
#define MOESD_ISA avx2
#include "vec_avx2.h"

#include "table.h"

namespace moesd {

extern const KernelTable kAvx2Table;
constexpr KernelTable kAvx2Table = avx2::make_table("avx2");

}  // namespace moesd
