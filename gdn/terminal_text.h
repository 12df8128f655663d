// Text for a terminal: what is not printable is escaped, so that neither a model's bytes nor a file's name
// can move the cursor, change the title or the colours, or hide what stands beside it.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace gdn {

// Takes bytes in pieces of any size and gives back text: UTF-8 of printable characters as it is, new lines
// and tabs too, every other byte as \xNN. Bytes of a character that is not complete yet wait for the next
// piece.
class TerminalText {
 public:
  std::string operator()(const std::string& bytes) {
    waiting_ += bytes;
    std::string text;
    size_t at = 0;
    while (at < waiting_.size()) {
      const size_t length = length_of(uint8_t(waiting_[at]));
      size_t have = 1;
      while (have < length && at + have < waiting_.size() && (uint8_t(waiting_[at + have]) & 0xC0) == 0x80)
        have++;
      if (have < length && at + have == waiting_.size()) break;
      if (length && have == length && printable(&waiting_[at], length)) {
        text += waiting_.substr(at, length);
        at += length;
      } else {
        text += escaped(waiting_[at++]);
      }
    }
    waiting_.erase(0, at);
    return text;
  }

  // What still waits, when no more follows.
  std::string rest() {
    std::string text;
    for (const char c : waiting_) text += escaped(c);
    waiting_.clear();
    return text;
  }

 private:
  // Bytes of the UTF-8 character that begins so; 0 where none does.
  static size_t length_of(uint8_t byte) {
    return byte < 0x80                   ? 1
           : byte >= 0xC2 && byte < 0xE0 ? 2
           : byte >= 0xE0 && byte < 0xF0 ? 3
           : byte >= 0xF0 && byte < 0xF5 ? 4
                                         : 0;
  }

  static bool printable(const char* bytes, size_t length) {
    if (length == 1) return bytes[0] == '\n' || bytes[0] == '\t' || (bytes[0] >= 0x20 && bytes[0] < 0x7F);
    uint32_t code = uint8_t(bytes[0]) & (0xFF >> (length + 1));
    for (size_t i = 1; i < length; i++) code = code << 6 | (uint8_t(bytes[i]) & 0x3F);
    const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const auto within = [code](uint32_t low, uint32_t high) { return code >= low && code <= high; };
    return code >= least[length] && code <= 0x10FFFF && !within(0xD800, 0xDFFF) &&  // as UTF-8 has them
           !within(0x80, 0x9F) && (code & 0xFFFE) != 0xFFFE &&
           !within(0xFDD0, 0xFDEF) &&  // controls, no characters
           !within(0x200B, 0x200F) && !within(0x2028, 0x202E) &&
           !within(0x2060, 0x206F) &&  // invisible, directions
           code != 0xAD && code != 0x61C && code != 0xFEFF && !within(0xFFF9, 0xFFFB) &&
           !within(0xE0000, 0xE0FFF);
  }

  static std::string escaped(char c) {
    char text[8];
    std::snprintf(text, sizeof text, "\\x%02x", unsigned(uint8_t(c)));
    return text;
  }

  std::string waiting_;
};

// A whole text for the file: escaped where that is a terminal.
inline std::string for_terminal(const std::string& text, int descriptor) {
  if (!isatty(descriptor)) return text;
  TerminalText terminal;
  std::string shown = terminal(text);
  return shown + terminal.rest();
}

// One line of a warning or an error on standard error, whatever a name in it holds.
inline void warn(std::string line) {
  for (size_t at; (at = line.find_first_of("\n\r")) != std::string::npos;)
    line.replace(at, 1, line[at] == '\n' ? "\\n" : "\\r");
  std::fprintf(stderr, "train_gdn: %s\n", for_terminal(line, STDERR_FILENO).c_str());
}

}  // namespace gdn
