#pragma once

namespace moesd::MOESD_ISA {

// Calls f.template operator()<count>() for a count, 1 <= count <= M, that is known at run time
// only. Kernels are compiled for every size of a tile.
template <int M, class F>
inline void for_size(int count, const F& f) {
    if constexpr (M > 1) {
        if (count < M) return for_size<M - 1>(count, f);
    }
    f.template operator()<M>();
}

}  // namespace moesd::MOESD_ISA
