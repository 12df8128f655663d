// GPT-2's byte-level BPE: text to tokens and back, with the same tokens as tiktoken's encode_ordinary.
//
// Text is split by GPT-2's pattern (Radford et al. 2019), the first alternative that matches at each place:
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// A piece that is a token stands for itself. Else it starts as its single bytes, and the two neighbours whose
// concatenation is the token of the smallest number, the leftmost on ties, become one until no two are a
// token.
//
// Which characters are \p{L}, \p{N} and \s is in the vocabulary's file, where scripts/tokenize_text.py wrote
// what tiktoken's own expressions match; nothing is approximated. A byte that is not UTF-8, which a Python
// string cannot hold, counts as a character of none of these classes.
//
// The file has these lines: "train_gdn vocabulary 1"; "letters ", "numbers " and "spaces ", each with ranges
// of code points as first-last in hexadecimal, separated by commas; then token 0, 1, 2, ... by its bytes in
// hexadecimal, a line each. One more token, the end of text, follows the last one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <queue>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "regular_file.h"

namespace gdn {

class Vocabulary {
 public:
  // Throws one line that names the file, and the line of it, where it is not as described above.
  explicit Vocabulary(const std::string& path) : path_(path) {
    std::istringstream file(read_text_file(path));
    if (next_line(file) != "train_gdn vocabulary 1")
      fail("expected 'train_gdn vocabulary 1', as scripts/tokenize_text.py writes it");
    letters_ = ranges(next_line(file), "letters ");
    numbers_ = ranges(next_line(file), "numbers ");
    spaces_ = ranges(next_line(file), "spaces ");
    for (std::string line; file.peek() != EOF;) {
      line = next_line(file);
      tokens_.push_back(bytes(line));
      if (!ids_.emplace(tokens_.back(), int32_t(tokens_.size()) - 1).second)
        fail("token " + line + " is there a second time");
    }
    for (int b = 0; b < 256; b++)
      if (!ids_.count(std::string(1, char(b))))
        throw std::runtime_error(path + ": byte " + std::to_string(b) + " is no token, expected all 256");
  }

  int size() const { return int(tokens_.size()) + 1; }  // with the end of text
  int32_t end_of_text() const { return int32_t(tokens_.size()); }

  // The bytes of a token; a character may take several tokens.
  std::string text(int32_t token) const {
    return token == end_of_text() ? "<|endoftext|>" : tokens_[size_t(token)];
  }

  // "<|endoftext|>" is text like any other here.
  std::vector<int32_t> encode(std::string_view text) const {
    std::vector<int32_t> ids;
    for (size_t at = 0; at < text.size();) {
      const size_t end = piece_end(text, at);
      encode_piece(text.substr(at, end - at), ids);
      at = end;
    }
    return ids;
  }

 private:
  using Ranges = std::vector<std::pair<uint32_t, uint32_t>>;
  enum class Class { none, letter, number, space, other };  // none: past the end of the text
  struct Character {
    Class kind;
    size_t bytes;
  };

  // ---- the file

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ": line " + std::to_string(line_) + ": " + what);
  }

  std::string next_line(std::istringstream& file) {
    std::string line;
    line_++;
    std::getline(file, line);
    return line;
  }

  // "NAME1-2,3-4" -> {{1,2},{3,4}}, ascending
  Ranges ranges(const std::string& line, const std::string& name) const {
    Ranges ranges;
    if (line.rfind(name, 0) != 0) fail("expected '" + name + "' and ranges of characters");
    const char* at = line.c_str() + name.size();
    for (char* end = nullptr; *at; at = end) {
      const unsigned long first = std::strtoul(at, &end, 16);
      if (end == at || *end != '-') fail("expected ranges of characters as first-last in hexadecimal");
      at = end + 1;
      const unsigned long last = std::strtoul(at, &end, 16);
      if (end == at || last < first || last > 0x10FFFF || (!ranges.empty() && first <= ranges.back().second))
        fail("expected ranges of characters that ascend");
      ranges.emplace_back(uint32_t(first), uint32_t(last));
      if (*end == ',') end++;
    }
    return ranges;
  }

  std::string bytes(const std::string& hexadecimal) const {
    const auto digit = [&](char c) {
      const size_t at = std::string_view("0123456789abcdef").find(c);
      if (at == std::string_view::npos) fail("expected a token's bytes in hexadecimal");
      return int(at);
    };
    if (hexadecimal.empty() || hexadecimal.size() % 2) fail("expected a token's bytes in hexadecimal");
    std::string bytes;
    for (size_t i = 0; i < hexadecimal.size(); i += 2)
      bytes += char(16 * digit(hexadecimal[i]) + digit(hexadecimal[i + 1]));
    return bytes;
  }

  // ---- splitting

  static bool among(const Ranges& ranges, uint32_t code) {
    const auto after = std::upper_bound(ranges.begin(), ranges.end(), code,
                                        [](uint32_t c, const auto& range) { return c < range.first; });
    return after != ranges.begin() && code <= std::prev(after)->second;
  }

  // The character that begins at byte `at`.
  Character character(std::string_view text, size_t at) const {
    if (at >= text.size()) return {Class::none, 0};
    const auto byte = [&](size_t i) { return i < text.size() ? uint32_t(uint8_t(text[i])) : 0; };
    const uint32_t lead = byte(at);
    const size_t bytes = lead < 0x80   ? 1
                         : lead < 0xC2 ? 0
                         : lead < 0xE0 ? 2
                         : lead < 0xF0 ? 3
                         : lead < 0xF5 ? 4
                                       : 0;
    uint32_t code = bytes < 2 ? lead : lead & (0x7F >> bytes);
    bool valid = bytes > 0;
    for (size_t i = 1; i < bytes; i++) {
      valid = valid && (byte(at + i) & 0xC0) == 0x80;
      code = code << 6 | (byte(at + i) & 0x3F);
    }
    const uint32_t shortest = bytes == 4 ? 0x10000 : bytes == 3 ? 0x800 : 0;
    if (!valid || code < shortest || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000))
      return {Class::other, 1};
    return {among(letters_, code)   ? Class::letter
            : among(numbers_, code) ? Class::number
            : among(spaces_, code)  ? Class::space
                                    : Class::other,
            bytes};
  }

  // Where the piece that begins at `at` ends.
  size_t piece_end(std::string_view text, size_t at) const {
    if (text[at] == '\'')
      for (const std::string_view suffix : {"s", "d", "m", "t", "ll", "ve", "re"})
        if (text.substr(at + 1, suffix.size()) == suffix) return at + 1 + suffix.size();
    const size_t word = text[at] == ' ' ? at + 1 : at;
    const Class kind = character(text, word).kind;
    if (kind != Class::space && kind != Class::none) return run_end(text, word, kind).first;
    const auto [end, last] = run_end(text, at, Class::space);
    return end == text.size() || last == at ? end : last;  // the space before a word is the word's
  }

  // Where the characters of this class from `at` on end, and where the last of them begins.
  std::pair<size_t, size_t> run_end(std::string_view text, size_t at, Class kind) const {
    size_t last = at;
    for (Character c = character(text, at); c.kind == kind; c = character(text, at)) {
      last = at;
      at += c.bytes;
    }
    return {at, last};
  }

  // ---- merging

  // Appends the tokens of one piece. A part is known by its first byte; the pairs wait in a heap, those that
  // a merge has changed in the meantime are passed over.
  void encode_piece(std::string_view piece, std::vector<int32_t>& ids) const {
    if (const auto whole = ids_.find(std::string(piece)); whole != ids_.end()) {
      ids.push_back(whole->second);
      return;
    }
    const size_t n = piece.size();
    std::vector<size_t> end(n), before(n);  // of the part that begins here; where the part before it begins
    for (size_t i = 0; i < n; i++) end[i] = i + 1, before[i] = i - 1;
    using Pair = std::tuple<int32_t, size_t, size_t, size_t>;  // its token, begin, middle, end
    std::priority_queue<Pair, std::vector<Pair>, std::greater<Pair>> pairs;
    const auto offer = [&](size_t begin) {
      const size_t middle = end[begin];
      if (middle == n) return;
      const auto merged = ids_.find(std::string(piece.substr(begin, end[middle] - begin)));
      if (merged != ids_.end()) pairs.emplace(merged->second, begin, middle, end[middle]);
    };
    for (size_t i = 0; i < n; i++) offer(i);
    std::vector<bool> starts(n, true);  // a part begins here
    while (!pairs.empty()) {
      const auto [token, begin, middle, last] = pairs.top();
      pairs.pop();
      if (!starts[begin] || end[begin] != middle || end[middle] != last) continue;
      starts[middle] = false;
      end[begin] = last;
      if (last < n) before[last] = begin;
      offer(begin);
      if (begin > 0) offer(before[begin]);
    }
    for (size_t i = 0; i < n; i = end[i]) ids.push_back(ids_.at(std::string(piece.substr(i, end[i] - i))));
  }

  std::string path_;
  int line_ = 0;
  Ranges letters_, numbers_, spaces_;
  std::vector<std::string> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
};

}  // namespace gdn
