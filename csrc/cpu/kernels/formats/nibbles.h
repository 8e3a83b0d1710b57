// The orders in which the two halves of a byte hold weights.
#pragma once

namespace moesd {

enum class Nibbles {
    kAdjacent,  // byte i of sixteen: weights 2i (low half) and 2i + 1
    kSplit,     // byte i of sixteen: weights i (low half) and 16 + i
    kLow,       // byte i of thirty-two: weight i in the low half
    kHigh,      // the same in the high half
};

// How a run's codes lie: a byte each, or in halves of bytes.
enum class Packing {
    kBytes,        // signed, so that 128 more is not negative
    kAdjacent,     // see Nibbles
    kSplit,        // likewise
    kAlternating,  // two runs share 32 bytes: the first has the low halves, the second the high
};

}  // namespace moesd
