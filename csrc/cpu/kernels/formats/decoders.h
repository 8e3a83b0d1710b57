// The decoder of each weight format.
#pragma once

#include "integers.h"

namespace moesd::MOESD_ISA {

// Null for weights that are stored as X.
template <class X>
inline Decode<X>* decoder_of(WeightFormat format) {
    switch (format) {
        case WeightFormat::kInt8: return decode_int8<X>;
        case WeightFormat::kInt4: return decode_int4<X>;
        default: return nullptr;
    }
}

}  // namespace moesd::MOESD_ISA
