// A JSON value, a strict reader and a writer (RFC 8259), as small as checkpoints and configurations need.
//
// Strict: no comments, no trailing commas, no NaN, no bytes after the value, no key twice in an object, at
// most kMaxJsonDepth levels. Objects keep the order of their members. Numbers without fraction and exponent
// are int64, all others double, and both are written so that they read back as the same type and value.
// Strings are bytes taken to be UTF-8 and passed through unchanged; \u escapes are decoded. The program is
// taken to be in the C locale, in which it starts.
//
// Errors are std::runtime_error with one line. The reader's names the source and the byte offset; those of
// Json's accessors name the key, the value seen and the type expected, and the caller adds the file.
#pragma once

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "regular_file.h"

namespace gdn {

constexpr int kMaxJsonDepth = 100;

struct Json {
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  Json() : value(nullptr) {}
  Json(bool b) : value(b) {}
  Json(int i) : value(int64_t{i}) {}
  Json(int64_t i) : value(i) {}
  Json(double x) : value(x) {}
  Json(const char* s) : value(std::string(s)) {}
  Json(std::string s) : value(std::move(s)) {}
  Json(Array items) : value(std::move(items)) {}
  Json(Object members) : value(std::move(members)) {}

  bool operator==(const Json& other) const { return value == other.value; }
  bool operator!=(const Json& other) const { return !(value == other.value); }

  template <class T>
  bool is() const {
    return std::holds_alternative<T>(value);
  }

  // Sets a member, in place where the key exists and else at the end. A null value becomes an object first;
  // throws on any other type.
  void set(const std::string& key, Json member);

  // The member, or nullptr where the key is missing or this is no object.
  const Json* find(const std::string& key) const;

  // The member; throws when it is missing.
  const Json& at(const std::string& key) const;

  // The member as the type the name says; throws when it is missing or of another type. number takes an
  // integer, too.
  bool boolean(const std::string& key) const { return typed<bool>(key, "true or false"); }
  int64_t integer(const std::string& key) const { return typed<int64_t>(key, "an integer"); }
  double number(const std::string& key) const;
  const std::string& string(const std::string& key) const { return typed<std::string>(key, "a string"); }
  const Array& array(const std::string& key) const { return typed<Array>(key, "an array"); }
  const Object& object(const std::string& key) const { return typed<Object>(key, "an object"); }

  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value;

 private:
  template <class T>
  const T& typed(const std::string& key, const char* expected) const;
};

// The value that the text holds. `source` names the text in errors: a path. Throws on everything that is not
// JSON, and on numbers beyond int64 or double.
Json parse_json(const std::string& text, const std::string& source);

// JSON text on one line or, indented, with a line for each object member and arrays on one line. Throws on
// NaN and infinity, which JSON cannot hold.
std::string json_text(const Json& json, bool indented = false);

// The JSON value in a file, which may begin with UTF-8's byte order mark. Throws when the file cannot be read
// or holds something else.
inline Json read_json_file(const std::string& path) {
  const std::string text = read_text_file(path);
  return parse_json(text.compare(0, 3, "\xef\xbb\xbf") == 0 ? text.substr(3) : text, path);
}

// ---------------------------------------------------------------------------------------------------------

namespace json {

// A value for an error message: scalars in full up to 60 bytes, containers by their type.
inline std::string described(const Json& json) {
  if (json.is<Json::Array>()) return "an array";
  if (json.is<Json::Object>()) return "an object";
  if (json.is<double>() && !std::isfinite(std::get<double>(json.value))) return "a number that is not finite";
  const std::string text = json_text(json);
  return text.size() <= 60 ? text : text.substr(0, 60) + "...";
}

class Reader {
 public:
  Reader(const std::string& text, const std::string& source) : text_(text), source_(source) {}

  Json document() {
    Json value = this->value(0);
    skip_space();
    if (position_ < text_.size()) fail("expected the end of the text");
    return value;
  }

 private:
  [[noreturn]] void fail(const std::string& expected) const {
    std::string found = "the end of the text";
    if (position_ < text_.size()) {
      const unsigned char c = text_[position_];
      char name[16];
      std::snprintf(name, sizeof name, c > 0x20 && c < 0x7f ? "'%c'" : "byte 0x%02x", c);
      found = name;
    }
    fail_with(expected + ", found " + found);
  }

  [[noreturn]] void fail_with(const std::string& message) const {
    throw std::runtime_error(source_ + ": JSON byte " + std::to_string(position_) + ": " + message);
  }

  // The next byte, or 0 at the end; a 0 in the text is no JSON either.
  char peek() const { return position_ < text_.size() ? text_[position_] : '\0'; }

  bool take(char c) {
    if (peek() != c || c == '\0') return false;
    position_++;
    return true;
  }

  bool take_word(const char* word) {
    if (text_.compare(position_, std::strlen(word), word) != 0) return false;
    position_ += std::strlen(word);
    return true;
  }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') position_++;
  }

  Json value(int depth) {
    skip_space();
    if (depth > kMaxJsonDepth) fail_with("nested deeper than " + std::to_string(kMaxJsonDepth) + " levels");
    if (peek() == '{') return object(depth);
    if (peek() == '[') return array(depth);
    if (peek() == '"') return string();
    if ((peek() == '-' && text_.compare(position_, 2, "-I") != 0) || is_digit()) return number();
    if (take_word("true")) return true;
    if (take_word("false")) return false;
    if (take_word("null")) return {};
    for (const char* word : {"NaN", "Infinity", "-Infinity"})
      if (text_.compare(position_, std::strlen(word), word) == 0)
        fail_with(std::string("expected a value, found ") + word + ", which JSON does not have");
    fail("expected a value");
  }

  Json object(int depth) {
    Json::Object members;
    std::set<std::string> keys;
    position_++;
    skip_space();
    if (take('}')) return members;
    do {
      skip_space();
      if (peek() != '"') fail("expected a key in quotes");
      std::string key = string();
      if (!keys.insert(key).second) fail_with("key " + json_text(key) + " appears twice");
      skip_space();
      if (!take(':')) fail("expected ':' after a key");
      members.emplace_back(std::move(key), value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take('}')) fail("expected ',' or '}' in an object");
    return members;
  }

  Json array(int depth) {
    Json::Array items;
    position_++;
    skip_space();
    if (take(']')) return items;
    do {
      items.push_back(value(depth + 1));
      skip_space();
    } while (take(','));
    if (!take(']')) fail("expected ',' or ']' in an array");
    return items;
  }

  bool is_digit() const { return peek() >= '0' && peek() <= '9'; }

  void digits() {
    if (!is_digit()) fail("expected a digit");
    while (is_digit()) position_++;
  }

  Json number() {
    const size_t start = position_;
    take('-');
    if (!take('0')) digits();
    bool whole = true;
    if (take('.')) {
      whole = false;
      digits();
    }
    if (take('e') || take('E')) {
      whole = false;
      if (!take('+')) take('-');
      digits();
    }
    const std::string literal = text_.substr(start, position_ - start);
    errno = 0;
    if (whole) {
      const int64_t i = std::strtoll(literal.c_str(), nullptr, 10);
      if (errno == ERANGE) fail_with("integer " + literal + " is outside of 64 bits");
      return i;
    }
    const double x = std::strtod(literal.c_str(), nullptr);
    if (std::isinf(x)) fail_with("number " + literal + " is outside of double's range");
    return x;
  }

  std::string string() {
    std::string out;
    position_++;
    while (!take('"')) {
      if (position_ == text_.size() || static_cast<unsigned char>(peek()) < 0x20)
        fail("expected '\"' at the end of a string");
      if (take('\\'))
        escape(out);
      else
        out += text_[position_++];
    }
    return out;
  }

  void escape(std::string& out) {
    static constexpr char names[] = "\"\\/bfnrt", bytes[] = "\"\\/\b\f\n\r\t";
    if (take('u')) return append_utf8(out, code_point());
    const char* name = peek() == '\0' ? nullptr : std::strchr(names, peek());
    if (!name) fail("expected one of \"\\/bfnrtu after a backslash");
    out += bytes[name - names];
    position_++;
  }

  // After \u: one UTF-16 unit, or a pair of surrogates.
  uint32_t code_point() {
    const uint32_t unit = hex4();
    if (unit < 0xd800 || unit > 0xdfff) return unit;
    if (unit < 0xdc00 && take_word("\\u")) {
      const uint32_t low = hex4();
      if (low >= 0xdc00 && low <= 0xdfff) return 0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
    }
    fail_with("a \\u escape is half of a surrogate pair");
  }

  uint32_t hex4() {
    uint32_t unit = 0;
    for (int i = 0; i < 4; i++, position_++) {
      const char c = peek();
      const int lower = c | 0x20;
      if (is_digit())
        unit = unit << 4 | uint32_t(c - '0');
      else if (lower >= 'a' && lower <= 'f')
        unit = unit << 4 | uint32_t(lower - 'a' + 10);
      else
        fail("expected four hexadecimal digits after \\u");
    }
    return unit;
  }

  static void append_utf8(std::string& out, uint32_t c) {
    if (c < 0x80) {
      out += char(c);
      return;
    }
    const int tail = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
    const uint32_t lead = tail == 1 ? 0xc0 : tail == 2 ? 0xe0 : 0xf0;
    out += char(lead | c >> (6 * tail));
    for (int i = tail - 1; i >= 0; i--) out += char(0x80 | (c >> (6 * i) & 0x3f));
  }

  const std::string& text_;
  const std::string& source_;
  size_t position_ = 0;
};

inline void write_string(std::string& out, const std::string& s) {
  out += '"';
  for (const char c : s) {
    if (c == '"' || c == '\\') {
      (out += '\\') += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", unsigned(c));
      out += escape;
    } else {
      out += c;
    }
  }
  out += '"';
}

// The shortest of 15 to 17 digits that reads back as x, with a fraction or an exponent.
inline void write_double(std::string& out, double x) {
  if (!std::isfinite(x))
    throw std::runtime_error("JSON cannot hold " + std::to_string(x) + ", expected a finite number");
  char text[32];
  for (int digits = 15; digits <= 17; digits++) {
    std::snprintf(text, sizeof text, "%.*g", digits, x);
    if (std::strtod(text, nullptr) == x) break;
  }
  out += text;
  if (!std::strpbrk(text, ".e")) out += ".0";
}

// indent: spaces before the members of the next object, negative for one line.
inline void write(std::string& out, const Json& json, int indent) {
  if (json.is<std::nullptr_t>()) {
    out += "null";
  } else if (const bool* b = std::get_if<bool>(&json.value)) {
    out += *b ? "true" : "false";
  } else if (const int64_t* i = std::get_if<int64_t>(&json.value)) {
    out += std::to_string(*i);
  } else if (const double* x = std::get_if<double>(&json.value)) {
    write_double(out, *x);
  } else if (const std::string* s = std::get_if<std::string>(&json.value)) {
    write_string(out, *s);
  } else if (const Json::Array* items = std::get_if<Json::Array>(&json.value)) {
    const char* separator = "[";
    for (const Json& item : *items) {
      out += separator;
      write(out, item, -1);
      separator = indent < 0 ? "," : ", ";
    }
    out += items->empty() ? "[]" : "]";
  } else {
    const Json::Object& members = std::get<Json::Object>(json.value);
    const std::string line = indent < 0 ? "" : "\n" + std::string(indent, ' ');
    const char* separator = "{";
    for (const auto& [key, member] : members) {
      (out += separator) += line;
      write_string(out, key);
      out += indent < 0 ? ":" : ": ";
      write(out, member, indent < 0 ? -1 : indent + 2);
      separator = ",";
    }
    if (members.empty()) out += '{';
    if (indent >= 0 && !members.empty()) (out += '\n') += std::string(indent - 2, ' ');
    out += '}';
  }
}

}  // namespace json

inline Json parse_json(const std::string& text, const std::string& source) {
  return json::Reader(text, source).document();
}

inline std::string json_text(const Json& json, bool indented) {
  std::string out;
  json::write(out, json, indented ? 2 : -1);
  return out;
}

inline void Json::set(const std::string& key, Json member) {
  if (is<std::nullptr_t>()) value = Object{};
  if (!is<Object>())
    throw std::runtime_error("'" + key + "': expected an object to set it in, found " +
                             json::described(*this));
  Object& members = std::get<Object>(value);
  for (auto& [name, present] : members) {
    if (name != key) continue;
    present = std::move(member);
    return;
  }
  members.emplace_back(key, std::move(member));
}

inline const Json* Json::find(const std::string& key) const {
  if (const Object* members = std::get_if<Object>(&value))
    for (const auto& [name, member] : *members)
      if (name == key) return &member;
  return nullptr;
}

inline const Json& Json::at(const std::string& key) const {
  if (const Json* member = find(key)) return *member;
  throw std::runtime_error("'" + key + "': missing" +
                           (is<Object>() ? "" : ", expected an object, found " + json::described(*this)));
}

inline double Json::number(const std::string& key) const {
  const Json& member = at(key);
  if (const int64_t* i = std::get_if<int64_t>(&member.value)) return double(*i);
  return typed<double>(key, "a number");
}

template <class T>
const T& Json::typed(const std::string& key, const char* expected) const {
  const Json& member = at(key);
  if (const T* typed = std::get_if<T>(&member.value)) return *typed;
  throw std::runtime_error("'" + key + "': expected " + expected + ", found " + json::described(member));
}

}  // namespace gdn
