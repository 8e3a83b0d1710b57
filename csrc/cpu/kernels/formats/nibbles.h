// The orders in which the two halves of a byte hold weights.
#pragma once

namespace moesd {

enum class Nibbles {
    kAdjacent,  // byte i of sixteen: weights 2i (low half) and 2i + 1
    kSplit,     // byte i of sixteen: weights i (low half) and 16 + i
    kLow,       // byte i of thirty-two: weight i in the low half
    kHigh,      // the same in the high half
};

}  // namespace moesd
