// Reads a box and two points out of text that a model wrote freely, in chunks as they come.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace medreasoner {

struct ParsedAnswer {
    std::optional<std::string> thought;
    std::optional<std::array<double, 4>> bbox;
    std::optional<std::array<double, 2>> points_1, points_2;
    bool absent = false;
    std::vector<std::string> missing;
    std::string status;  // ok, absent, no_answer, malformed, incomplete
};

// UTF-8 text that stops being stored, but not counted, at a bound.
class BoundedText {
public:
    explicit BoundedText(size_t bound) : bound_(bound) {}
    void append(std::string_view text);
    void drop(size_t n);  // the last n bytes
    void clear();
    bool overflowed() const { return size_ > bound_; }
    const std::string& text() const { return text_; }

private:
    size_t bound_, size_ = 0;
    std::string text_;
};

// The thought is what stands between the first <think> and the next </think>; the answer is what stands between the last
// <answer> and the next </answer>.
class AnswerParser {
public:
    void feed(std::string_view text);  // UTF-8, cut anywhere
    ParsedAnswer result() const;

private:
    enum class Part : uint8_t { none, open, closed };
    void read(std::string_view piece);
    void see_tag();

    Part thought_part_ = Part::none, answer_part_ = Part::none;
    BoundedText thought_{1 << 20}, answer_{1 << 16};
    std::string tail_;  // the last bytes, long enough to hold any tag
};

}  // namespace medreasoner
