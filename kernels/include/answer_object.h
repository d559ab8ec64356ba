// The object inside <answer>: JSON, with strings in single or double quotes.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <vector>

namespace medreasoner {

// What one key holds: nothing or the wrong thing, null, or as many finite numbers as it should.
struct Coordinates {
    bool is_null = false;
    std::optional<std::vector<double>> numbers;
};

struct AnswerObject {
    Coordinates bbox, points_1, points_2;
};

// Nothing where the text is no such object. Of a repeated key the last counts; unknown keys are skipped.
std::optional<AnswerObject> read_answer_object(std::string_view text);

}  // namespace medreasoner
