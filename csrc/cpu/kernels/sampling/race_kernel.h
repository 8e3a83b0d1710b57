// A draw from each row of probabilities by an exponential race, argmax(p / E), the lowest index
// among equals. E is the noise of decoder/sampling/rng.py, the same bits but for the logarithm's
// last.
//
// Few columns need a logarithm: E = -log(1 - u) is at least u, so a column whose p / u does not
// exceed the best p / E so far has lost.
#pragma once

#include <cmath>
#include <cstring>

#include "../row_kernels.h"

namespace moesd::MOESD_ISA {

class RaceKernel {
    static constexpr int kSpan = 8 * kLanes;  // columns whose uniform numbers exist at once
    // By which u exceeds no E, whatever a logarithm's last bits are.
    static constexpr float kBelow = 1.0f - 0x1p-20f;

public:
    explicit RaceKernel(const RaceArgs& a) : a_(a), rows_(a.rows, a.threads) {}

    void run() {
        a_.run(a_.threads, [](void* self) { static_cast<RaceKernel*>(self)->work(); }, this);
    }

private:
    void work() {
        rows_.share([this](int64_t r) {
            a_.ids[r] = winner(a_.probs + r * a_.width, static_cast<uint64_t>(a_.keys[r]));
        });
    }

    int64_t winner(const float* probs, uint64_t key) const {
        int64_t index = 0;
        float best = -1.0f;  // any probability exceeds it
        alignas(64) float u[kSpan], last[kSpan] = {};
        for (int64_t start = 0; start < a_.width; start += kSpan) {
            const int64_t left = a_.width - start, count = left < kSpan ? left : kSpan;
            const float* p = probs + start;
            if (count < kSpan) p = static_cast<float*>(std::memcpy(last, p, count * sizeof(float)));
            uniforms(key, static_cast<uint32_t>(start), u);
            const float limit = best * kBelow;
            if (!some_may_win(p, u, limit)) continue;
            for (int64_t i = 0; i < count; ++i) {
                if (!(p[i] > limit * u[i])) continue;
                const float score = p[i] / -std::log1p(-u[i]);
                if (score > best) best = score, index = start + i;
            }
        }
        return index;
    }

    static bool some_may_win(const float* p, const float* u, float limit) {
        Vec most = splat(-1.0f);
        for (int i = 0; i < kSpan; i += kLanes) {
            most = max(sub(load(p + i), mul(load(u + i), splat(limit))), most);
        }
        return max_lanes(most) > 0.0f;
    }

    // Of columns first .. first + kSpan, below one and not zero.
    static void uniforms(uint64_t key, uint32_t first, float* u) {
        constexpr uint32_t kGolden = 0x9E3779B9, kPositive = 0x7FFFFFFF;
        const auto lower = static_cast<uint32_t>(key), upper = static_cast<uint32_t>(key >> 32);
        for (int i = 0; i < kSpan; ++i) {
            uint32_t x = (first + i) * kGolden + lower;
            x = (x ^ x >> 17) * 0xED5AD4BB + upper;
            x = (x ^ x >> 11) * 0xAC4C1B51;
            x = (x ^ x >> 15) * 0x31848BAB;
            x ^= x >> 14;
            const auto low = static_cast<int32_t>(((x * kGolden ^ upper) & kPositive) | 1);
            const auto high = static_cast<float>(static_cast<int32_t>(x & kPositive));
            const float value = (high + static_cast<float>(low) * 0x1p-31f) * 0x1p-31f;
            u[i] = value < 1.0f ? value : 1.0f - 0x1p-24f;
        }
    }

    const RaceArgs& a_;
    Rows rows_;
};

}  // namespace moesd::MOESD_ISA
