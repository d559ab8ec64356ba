#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "mask.h"

namespace medreasoner {
namespace {

struct Change {
    int64_t x, y;
};

// Pixels that differ from the one above, row by row; in the top row all pixels that are set.
std::vector<Change> changes_down_columns(const uint8_t* mask, int64_t height, int64_t width) {
    const std::vector<uint8_t> zeros(static_cast<size_t>(width));
    const uint8_t* above = zeros.data();
    std::vector<Change> changes;
    for (int64_t y = 0; y < height; ++y, above = mask + (y - 1) * width) {
        const uint8_t* row = mask + y * width;
        for (int64_t x = 0; x < width;) {
            uint64_t a, b;
            if (x + 8 <= width) {  // eight pixels at once: few differ
                std::memcpy(&a, above + x, 8);
                std::memcpy(&b, row + x, 8);
                if (a == b) {
                    x += 8;
                    continue;
                }
            }
            for (const int64_t end = std::min(x + 8, width); x < end; ++x) {
                if ((above[x] != 0) != (row[x] != 0)) changes.push_back({x, y});
            }
        }
    }
    return changes;
}

}  // namespace

std::vector<int64_t> run_lengths(const uint8_t* mask, int64_t height, int64_t width) {
    const std::vector<Change> changes = changes_down_columns(mask, height, width);
    // Counting sort by column; rows stay in order.
    std::vector<size_t> next(static_cast<size_t>(width) + 1);
    for (const Change& change : changes) ++next[static_cast<size_t>(change.x) + 1];
    for (size_t x = 0; x < static_cast<size_t>(width); ++x) next[x + 1] += next[x];
    std::vector<int64_t> positions(changes.size());
    std::vector<size_t> ends(next.begin() + 1, next.end());
    for (const Change& change : changes) positions[next[static_cast<size_t>(change.x)]++] = change.x * height + change.y;

    std::vector<int64_t> runs;
    int64_t start = 0;
    bool inside = false;  // value of the run that is being counted
    size_t k = 0;
    for (int64_t x = 0; x < width; ++x) {
        const size_t end = ends[static_cast<size_t>(x)];
        // A column was compared with an empty pixel above its top; the run goes on from the last column's foot instead.
        const bool top = k < end && positions[k] == x * height;
        if (top) ++k;
        if (top != inside) {
            runs.push_back(x * height - start);
            start = x * height;
            inside = top;
        }
        for (; k < end; ++k) {
            runs.push_back(positions[k] - start);
            start = positions[k];
            inside = !inside;
        }
    }
    runs.push_back(width * height - start);
    return runs;
}

void fill_runs(const std::vector<int64_t>& runs, int64_t height, int64_t width, uint8_t* mask) {
    // Mark where a column changes from the pixel above, then add the marks up from row to row.
    int64_t at = 0;
    for (size_t k = 0; k < runs.size(); ++k) {
        const int64_t end = at + runs[k];
        if (k % 2 == 0) at = end;
        while (at < end) {
            const int64_t x = at / height, y = at % height, n = std::min(end - at, height - y);
            mask[y * width + x] ^= 1;
            if (y + n < height) mask[(y + n) * width + x] ^= 1;
            at += n;
        }
    }
    for (int64_t y = 1; y < height; ++y) {
        uint8_t* row = mask + y * width;
        for (int64_t x = 0; x < width; ++x) row[x] = row[x] ^ row[x - width];
    }
}

std::string encode_counts(const std::vector<int64_t>& runs) {
    std::string text;
    for (size_t k = 0; k < runs.size(); ++k) {
        int64_t value = k > 2 ? runs[k] - runs[k - 2] : runs[k];
        for (bool more = true; more;) {  // five bits a character, least significant first, the fifth is the sign
            int64_t bits = value & 0x1f;
            value >>= 5;
            more = bits & 0x10 ? value != -1 : value != 0;
            text.push_back(static_cast<char>(48 + (more ? bits | 0x20 : bits)));
        }
    }
    return text;
}

std::vector<int64_t> decode_counts(std::string_view text, int64_t total) {
    std::vector<int64_t> runs;
    int64_t sum = 0;
    for (size_t i = 0; i < text.size();) {
        int64_t value = 0;
        int shift = 0;
        for (bool more = true; more; shift += 5) {
            if (i == text.size()) throw std::invalid_argument("RLE counts end within a number");
            const int64_t bits = static_cast<unsigned char>(text[i++]) - 48;
            if (bits < 0 || bits > 63 || shift > 50) throw std::invalid_argument("RLE counts hold a bad character or number");
            value |= (bits & 0x1f) << shift;
            more = bits & 0x20;
            if (!more && bits & 0x10) value -= int64_t{1} << (shift + 5);
        }
        if (runs.size() > 2) value += runs[runs.size() - 2];
        if (value < 0 || value > total - sum) throw std::invalid_argument("RLE counts do not fit the mask's size");
        sum += value;
        runs.push_back(value);
    }
    if (sum != total) throw std::invalid_argument("RLE counts do not sum to the mask's size");
    return runs;
}

}  // namespace medreasoner
