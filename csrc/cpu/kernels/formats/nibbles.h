// The orders in which bytes hold weights of fewer bits.
#pragma once

namespace moesd {

enum class Nibbles {
    kAdjacent,  // byte i of sixteen: weights 2i (low half) and 2i + 1
    kSplit,     // byte i of sixteen: weights i (low half) and 16 + i
    kLow,       // byte i of thirty-two: weight i in the low half
    kHigh,      // the same in the high half
};

// How a run's codes lie: a byte each, in halves of bytes, or in halves and quarters of others.
enum class Packing {
    kBytes,            // signed, so that 128 more is not negative
    kAdjacent,         // see Nibbles
    kSplit,            // likewise
    kAlternating,      // two runs share 32 bytes: the first has the low halves, the second the high
    kFiveBits,         // as kSplit, with the upper bits in a word, weight i's in bit i
    kFiveBitsOfBlock,  // as kAlternating, with the upper bits of eight runs in 32 bytes
    kSixBits,          // four share 64 + 32, see Q6_K
};

// What a product of integers is multiplied by, and what is added to it.
enum class Scaling {
    kOne,       // a scale
    kAndLeast,  // and the sum of the activations times the least
    kHalves,    // a scale for each half of a run
};

}  // namespace moesd
