#include "answer_parser.h"

#include <algorithm>

#include "answer_object.h"

namespace medreasoner {
namespace {

constexpr std::string_view kThinkOpen = "<think>", kThinkClose = "</think>";
constexpr std::string_view kAnswerOpen = "<answer>", kAnswerClose = "</answer>";

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Of a text that was cut at a bound, the part that is whole characters.
std::string whole_characters(std::string text) {
    size_t start = text.size();
    while (start > 0 && text.size() - start < 4 && (text[start - 1] & 0xc0) == 0x80) --start;
    if (start == 0 || (text[start - 1] & 0xc0) != 0xc0) return text;
    const auto lead = static_cast<unsigned char>(text[start - 1]);
    const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (start - 1 + length > text.size()) text.resize(start - 1);
    return text;
}

template <size_t N>
std::optional<std::array<double, N>> exactly(const Coordinates& found) {
    if (!found.numbers || found.numbers->size() != N) return std::nullopt;
    std::array<double, N> numbers{};
    std::copy(found.numbers->begin(), found.numbers->end(), numbers.begin());
    return numbers;
}

}  // namespace

void BoundedText::append(std::string_view text) {
    if (size_ < bound_) text_.append(text.substr(0, bound_ - size_));
    size_ += text.size();
}

void BoundedText::drop(size_t n) {
    size_ -= std::min(n, size_);
    text_.resize(std::min(text_.size(), size_));
}

void BoundedText::clear() {
    size_ = 0;
    text_.clear();
}

// Every tag ends in '>', so the text is read in pieces that do.
void AnswerParser::feed(std::string_view text) {
    while (!text.empty()) {
        const size_t n = std::min(text.find('>'), text.size() - 1) + 1;
        read(text.substr(0, n));
        text.remove_prefix(n);
    }
}

void AnswerParser::read(std::string_view piece) {
    if (thought_part_ == Part::open) thought_.append(piece);
    if (answer_part_ == Part::open) answer_.append(piece);
    tail_.append(piece.substr(piece.size() - std::min(piece.size(), kAnswerClose.size())));
    if (tail_.size() > kAnswerClose.size()) tail_.erase(0, tail_.size() - kAnswerClose.size());
    if (piece.back() == '>') see_tag();
}

void AnswerParser::see_tag() {
    if (thought_part_ == Part::none && ends_with(tail_, kThinkOpen)) {
        thought_part_ = Part::open;
    } else if (thought_part_ == Part::open && ends_with(tail_, kThinkClose)) {
        thought_part_ = Part::closed;
        thought_.drop(kThinkClose.size());
    } else if (ends_with(tail_, kAnswerOpen)) {
        answer_part_ = Part::open;
        answer_.clear();
    } else if (answer_part_ == Part::open && ends_with(tail_, kAnswerClose)) {
        answer_part_ = Part::closed;
        answer_.drop(kAnswerClose.size());
    }
}

ParsedAnswer AnswerParser::result() const {
    ParsedAnswer parsed;
    if (thought_part_ != Part::none) parsed.thought = whole_characters(thought_.text());
    AnswerObject object;
    if (answer_part_ != Part::closed) {
        parsed.status = answer_part_ == Part::open ? "incomplete" : "no_answer";
    } else {
        parsed.status = "malformed";
        if (!answer_.overflowed()) object = read_answer_object(answer_.text()).value_or(AnswerObject{});
    }
    parsed.bbox = exactly<4>(object.bbox);
    parsed.points_1 = exactly<2>(object.points_1);
    parsed.points_2 = exactly<2>(object.points_2);
    parsed.absent = object.bbox.is_null && object.points_1.is_null && object.points_2.is_null;
    if (parsed.absent) {
        parsed.status = "absent";
        return parsed;
    }
    if (!parsed.bbox) parsed.missing.emplace_back("bbox");
    if (!parsed.points_1) parsed.missing.emplace_back("points_1");
    if (!parsed.points_2) parsed.missing.emplace_back("points_2");
    if (parsed.missing.empty()) parsed.status = "ok";
    return parsed;
}

}  // namespace medreasoner
