// The 16-bit forms of floating point, number by number.
#pragma once

#include <cstdint>
#include <cstring>

namespace medreasoner {

struct Float16 {
    uint16_t bits;
};
struct Bfloat16 {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float to_float(float value) { return value; }

inline float to_float(Bfloat16 value) { return from_bits(uint32_t{value.bits} << 16); }

inline float to_float(Float16 value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | rest << 13);  // infinities and NaN
    const float magnitude = from_bits(rest << 13) * 0x1p112f;
    return sign ? -magnitude : magnitude;
}

inline void narrow(float value, float* to) { *to = value; }

// Rounds to the nearest, ties to even, as IEEE 754 has it; what is too large becomes infinite.
inline void narrow(float value, Float16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {  // NaN
        to->bits = static_cast<uint16_t>(sign | 0x7e00u);
    } else if (rest >= 0x47800000u) {  // 2^16 and above
        to->bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (rest < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the subnormal number in the last bits
        const float moved = from_bits(rest) + 0.5f;
        uint32_t low;
        std::memcpy(&low, &moved, sizeof low);
        to->bits = static_cast<uint16_t>(sign | (low - 0x3f000000u));
    } else {
        const uint32_t rounded = rest + 0xfffu + (rest >> 13 & 1u) - 0x38000000u;
        to->bits = static_cast<uint16_t>(sign | rounded >> 13);
    }
}

// Rounds to the nearest, ties to even; what is not a number stays so.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace medreasoner
