// The answers that a reasoner may give, as an automaton over token ids.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

namespace medreasoner {

using Tokens = std::vector<int32_t>;

// literal 0, number 0, literal 1, ..., number 7, literal 8; or the absent answer as a whole. The numbers are the box
// x1, y1, x2, y2 and two points x, y.
class AnswerGrammar {
public:
    static constexpr int kNumbers = 8;

    // Throws std::invalid_argument where the next token would not tell which way an answer goes on.
    AnswerGrammar(std::vector<Tokens> literals, const std::vector<Tokens>& numbers, std::optional<Tokens> absent);

    // A way on from a node of the tree, and the range of the numbers that lie there.
    struct Edge {
        int32_t token;
        int child, lowest, highest;
    };

    // Prefix tree of the numbers' tokens.
    struct Node {
        std::map<int32_t, int> children;
        std::vector<Edge> edges;       // the same, in one piece: a choice looks at hundreds of them
        int value = -1;                // the number that ends here
        std::vector<int> values;       // all numbers at or below, ascending
        bool reaches(int low, int high) const;
    };

    const Tokens& literal(int i) const { return literals_[static_cast<size_t>(i)]; }
    const Node& node(int i) const { return nodes_[static_cast<size_t>(i)]; }
    const std::optional<Tokens>& absent() const { return absent_; }
    size_t fork() const { return fork_; }  // how many tokens the absent answer shares with literal 0
    int limit() const { return limit_; }

private:
    void add_number(const Tokens& tokens, int value);
    void check_literals() const;
    void find_fork();
    void lay_out();

    std::vector<Tokens> literals_;
    std::optional<Tokens> absent_;
    std::vector<Node> nodes_;
    size_t fork_ = 0;
    int limit_;
};

// A place in one answer for an image of width x height model pixels.
class AnswerState {
public:
    AnswerState(std::shared_ptr<const AnswerGrammar> grammar, int width, int height);

    Tokens allowed() const;      // ascending; empty when done
    void accept(int32_t token);  // throws std::invalid_argument when not allowed
    Tokens forced();             // moves over all tokens that have no alternative and returns them

    bool done() const { return done_; }
    bool absent() const { return absent_; }
    bool at_absent_choice() const;
    const std::vector<int>& values() const { return values_; }

private:
    struct Range {
        int low, high;
    };
    Range range() const;                           // of the number that is next or being read
    std::optional<int32_t> number_end() const;     // the token that ends the number being read, if it may end here
    template <class Visit>
    void each_allowed(Visit visit) const;          // until visit(token) returns false
    void step(int32_t token);

    std::shared_ptr<const AnswerGrammar> grammar_;
    int width_, height_;
    std::vector<int> values_;
    size_t position_ = 0;   // in the literal, or in the absent answer
    int node_ = 0;          // in the tree of numbers
    bool in_number_ = false, absent_ = false, done_ = false;
};

}  // namespace medreasoner
