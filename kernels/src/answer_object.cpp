#include "answer_object.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <locale>
#include <sstream>
#include <string>

#ifdef __cpp_lib_to_chars
#define MR_HAS_FROM_CHARS
#endif
#ifdef MR_TEST_WITHOUT_FROM_CHARS
#undef MR_HAS_FROM_CHARS
#endif

namespace medreasoner {
namespace {

constexpr int kMaxDepth = 64;  // a hostile answer must not exhaust the stack

// The number that `text` is, which the caller has checked; NaN where it is beyond a double.
double to_double(std::string_view text) {
    double number = NAN;
#ifdef MR_HAS_FROM_CHARS
    std::from_chars(text.data(), text.data() + text.size(), number);
#else  // libstdc++ before GCC 11, as on JetPack 5, and older libc++
    std::istringstream stream{std::string(text)};
    stream.imbue(std::locale::classic());
    double read;
    if (stream >> read && std::isfinite(read)) number = read;
#endif
    return number;
}

class Reader {
public:
    explicit Reader(std::string_view text) : rest_(text) {}

    bool object(AnswerObject* found) {
        if (!take('{')) return false;
        if (take('}')) return at_end();
        do {
            std::string_view key;
            if (!string(&key) || !take(':')) return false;
            Coordinates ignored;
            if (!value(slot(found, key, &ignored), 1)) return false;
        } while (take(','));
        return take('}') && at_end();
    }

private:
    static Coordinates* slot(AnswerObject* found, std::string_view key, Coordinates* otherwise) {
        if (key == "bbox") return &found->bbox;
        if (key == "points_1") return &found->points_1;
        return key == "points_2" ? &found->points_2 : otherwise;
    }

    void skip_space() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size())); }

    bool at_end() {
        skip_space();
        return rest_.empty();
    }

    char next() {
        skip_space();
        return rest_.empty() ? '\0' : rest_[0];
    }

    bool take(char c) {
        if (next() != c || rest_.empty()) return false;
        rest_.remove_prefix(1);
        return true;
    }

    bool take_word(std::string_view word) {
        if (rest_.substr(0, word.size()) != word) return false;
        rest_.remove_prefix(word.size());
        return true;
    }

    bool string(std::string_view* content) {
        const char quote = next();
        if (quote != '"' && quote != '\'') return false;
        for (size_t i = 1; i < rest_.size(); ++i) {
            if (rest_[i] == '\\') {
                ++i;
            } else if (rest_[i] == quote) {
                *content = rest_.substr(1, i - 1);
                rest_.remove_prefix(i + 1);
                return true;
            }
        }
        return false;
    }

    size_t digits(size_t from) const {
        size_t i = from;
        while (i < rest_.size() && rest_[i] >= '0' && rest_[i] <= '9') ++i;
        return i - from;
    }

    // RFC 8259, section 6.
    bool number(double* out) {
        const auto at = [this](size_t i) { return i < rest_.size() ? rest_[i] : '\0'; };
        size_t i = at(0) == '-';
        const size_t whole = digits(i);
        if (whole == 0 || (whole > 1 && at(i) == '0')) return false;
        i += whole;
        if (at(i) == '.') {
            const size_t n = digits(i + 1);
            if (n == 0) return false;
            i += n + 1;
        }
        if (at(i) == 'e' || at(i) == 'E') {
            const size_t sign = at(i + 1) == '-' || at(i + 1) == '+';
            const size_t n = digits(i + 1 + sign);
            if (n == 0) return false;
            i += n + 1 + sign;
        }
        *out = to_double(rest_.substr(0, i));
        rest_.remove_prefix(i);
        return true;
    }

    // A list of plain finite numbers fills `out->numbers`; null sets `out->is_null`; all else leaves it empty.
    bool value(Coordinates* out, int depth) {
        *out = {};
        if (depth > kMaxDepth) return false;
        std::string_view text;
        double ignored;
        switch (next()) {
            case '[': return array(out, depth);
            case '{': return inner_object(depth);
            case '"':
            case '\'': return string(&text);
            case 'n': return out->is_null = take_word("null");
            case 't': return take_word("true");
            case 'f': return take_word("false");
            default: return number(&ignored);
        }
    }

    bool array(Coordinates* out, int depth) {
        take('[');
        std::vector<double> numbers;
        bool plain = true;
        if (!take(']')) {
            do {
                double x = NAN;
                const char c = next();
                if (c == '-' || (c >= '0' && c <= '9')) {
                    if (!number(&x)) return false;
                } else {
                    Coordinates ignored;
                    if (!value(&ignored, depth + 1)) return false;
                }
                plain = plain && std::isfinite(x);
                numbers.push_back(x);
            } while (take(','));
            if (!take(']')) return false;
        }
        if (plain) out->numbers = std::move(numbers);
        return true;
    }

    bool inner_object(int depth) {
        take('{');
        if (take('}')) return true;
        do {
            std::string_view key;
            Coordinates ignored;
            if (!string(&key) || !take(':') || !value(&ignored, depth + 1)) return false;
        } while (take(','));
        return take('}');
    }

    std::string_view rest_;
};

}  // namespace

std::optional<AnswerObject> read_answer_object(std::string_view text) {
    AnswerObject found;
    if (!Reader(text).object(&found)) return std::nullopt;
    return found;
}

}  // namespace medreasoner
