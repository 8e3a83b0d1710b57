// The kernels for one instruction set; compiled with its own flags, so it includes nothing of
// torch.
#define MOESD_ISA portable
#include "vec_portable.h"

#include "table.h"

namespace moesd {

extern const KernelTable kPortableTable;
constexpr KernelTable kPortableTable = portable::make_table("portable");

}  // namespace moesd
