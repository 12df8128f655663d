// One file of tokens: what it holds, by its first bytes and its name, and its tokens by their place.
//
// - token shards: 256 little-endian int32 (magic, version, token count, zeros), then the tokens.
//     magic 20240520, version 1: uint16, the format of llm.c and modded-nanogpt; GPT-2's 50257 tokens, or the
//                                vocabulary that -vocab_size gives
//     magic 20240801, version 7: uint32, llm.c's shards of Llama 3's 128256 tokens
//   A file is a shard when it begins with such a magic number, under whatever name, and must be one when its
//   name ends in .bin.
// - raw text: one token per byte; vocabulary 256. What is known not to be text (compressed files, parquet,
//   UTF-16, ...) is refused by what it is, JSON unless its name ends in .txt, and so is what looks binary.
//
// Errors are std::runtime_error with one line: the file, the value seen, what was expected. Numbers are read
// in the host's byte order, which is taken to be little-endian.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "json.h"
#include "regular_file.h"
#include "safetensors.h"

namespace gdn {
namespace data {

// A token that is not in the vocabulary, in a file that can be read: a training may step over it.
struct BadToken : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

constexpr int64_t kShardHeaderBytes = 256 * sizeof(int32_t);
constexpr int kByteVocabulary = 256;
constexpr int64_t kHeadBytes = int64_t{1} << 16;  // of a file, looked at to tell what it holds

// A kind of token shards. separator: the token that begins a document.
struct ShardFormat {
  int32_t magic, version;
  int token_bytes, vocabulary, separator;
};
constexpr ShardFormat kShardFormats[] = {{20240520, 1, 2, 50257, 50256}, {20240801, 7, 4, 128256, 128000}};

struct TokenFile {
  std::shared_ptr<const RegularFile> file;
  int64_t start = 0;    // bytes before the first token
  int64_t tokens = 0;   // how many
  int token_bytes = 1;  // 1: text
  int vocabulary = kByteVocabulary, separator = -1;

  const std::string& path() const { return file->path(); }
  bool is_bytes() const { return token_bytes == 1; }
};

inline bool ends_in(const std::string& path, std::string_view ending) {
  const auto same = [](char a, char b) { return std::tolower(static_cast<unsigned char>(a)) == b; };
  return path.size() >= ending.size() && std::equal(ending.begin(), ending.end(), path.end() - ending.size(),
                                                    [&](char b, char a) { return same(a, b); });
}

// What a file is that begins with these bytes and is no text, "" where that is not known. Formats that
// someone may take for training data, and those that data are kept and sent in.
inline std::string known_format(std::string_view head) {
  const struct {
    std::string_view begin;
    const char* name;
  } formats[] = {
      {"\x1f\x8b", "gzip"},
      {{"\x28\xb5\x2f\xfd", 4}, "zstd"},
      {{"\xfd\x37\x7a\x58\x5a\x00", 6}, "xz"},
      {{"\x04\x22\x4d\x18", 4}, "lz4"},
      {{"\x1f\x9d", 2}, "compress"},
      {"PK\x03\x04", "zip"},
      {{"7z\xbc\xaf\x27\x1c", 6}, "7z"},
      {"Rar!\x1a\x07", "rar"},
      {"PAR1", "parquet"},
      {"ARROW1", "Arrow"},
      {{"\xff\xff\xff\xff", 4}, "an Arrow stream"},
      {"FEA1", "Feather"},
      {"Obj\x01", "Avro"},
      {"\x93NUMPY", "numpy"},
      {"\x89HDF", "HDF5"},
      {"SQLite format 3", "SQLite"},
      {"GGUF", "GGUF"},
      {"%PDF-", "PDF"},
      {"\x7f"
       "ELF",
       "a program"},
      {"\x89PNG", "PNG"},
      {"\xff\xd8\xff", "JPEG"},
      {{"\xff\xfe\x00\x00", 4}, "UTF-32"},
      {{"\x00\x00\xfe\xff", 4}, "UTF-32"},
      {"\xff\xfe", "UTF-16"},
      {"\xfe\xff", "UTF-16"},
      {"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the data (git lfs pull)"}};
  for (const auto& format : formats)
    if (head.substr(0, format.begin.size()) == format.begin) return format.name;
  if (head.size() > 10 && head.substr(0, 3) == "BZh" && head.substr(4, 6) == "1AY&SY") return "bzip2";
  if (head.size() > 4 && head[0] >= 0x50 && head[0] < 0x60 && head.substr(1, 3) == "\x2a\x4d\x18")
    return "zstd";
  if (head.size() > 13 && head.substr(0, 3) == std::string_view("\x5d\x00\x00", 3) &&
      (head[12] == 0 || head[12] == '\xff'))
    return "lzma";
  if (head.size() > 262 && head.substr(257, 5) == "ustar") return "tar";
  if (head.size() > 2 && head[0] == '\x80' && head[1] >= 2 && head[1] <= 5) return "pickle";
  if (head.size() > 10 && head.substr(8, 2) == "{\"" && head.substr(5, 3) == std::string_view("\0\0\0", 3))
    return "safetensors";
  // UTF-16 without its mark: every other byte is zero in text of mostly Latin letters.
  size_t zeros[2] = {};
  const size_t pairs = std::min<size_t>(head.size(), 4096) / 2;
  for (size_t i = 0; i < 2 * pairs; i++) zeros[i % 2] += head[i] == 0;
  for (int side : {0, 1})
    if (pairs >= 8 && zeros[side] * 10 > pairs * 4 && zeros[1 - side] * 50 < pairs) return "UTF-16";
  return "";
}

// How what a known_format is becomes training data.
inline const char* remedy(const std::string& format) {
  if (format == "UTF-16") return "; convert it: iconv -f UTF-16 -t UTF-8";
  if (format == "UTF-32") return "; convert it: iconv -f UTF-32 -t UTF-8";
  for (const char* packed : {"gzip", "zstd", "xz", "bzip2", "lz4", "zip", "7z", "lzma", "tar"})
    if (format == packed) return "; unpack it first";
  return format == "parquet" ? "; scripts/tokenize_text.py makes shards of it" : "";
}

// Whether the text is objects of JSON: one a line, or a list of them.
inline bool looks_like_json(std::string_view head) {
  const size_t begin = head.find_first_not_of(" \t\r\n");
  if (begin == std::string_view::npos) return false;
  head.remove_prefix(begin);
  if (head[0] == '[') {
    const size_t item = head.find_first_not_of(" \t\r\n", 1);
    return item != std::string_view::npos && head[item] == '{' && looks_like_json(head.substr(item));
  }
  if (head[0] != '{') return false;
  const size_t key = head.find_first_not_of(" \t\r\n", 1);
  if (key == std::string_view::npos || head[key] != '"') return false;
  const size_t end = head.find('"', key + 1),
               colon = end == std::string_view::npos ? end : head.find_first_not_of(" \t\r\n", end + 1);
  return colon != std::string_view::npos && head[colon] == ':';
}

// Whether more than one in twenty bytes is a control character that text does not have.
inline bool looks_binary(std::string_view head, int64_t& controls) {
  const auto is_control = [](char c) {
    return uint8_t(c) < 0x20 && !std::strchr("\t\n\v\f\r\x1b", c ? c : 'x');
  };
  controls = std::count_if(head.begin(), head.end(), is_control);
  return controls * 20 > int64_t(head.size());
}

// What a file is whose name says that it is a shard and whose first bytes say otherwise, "" where that is not
// known.
inline std::string what_is_no_shard(std::string_view head) {
  if (const std::string format = known_format(head); !format.empty()) return "is " + format + remedy(format);
  if (looks_like_json(head)) return "is JSON; scripts/tokenize_text.py makes shards of its texts";
  int64_t controls;
  const auto high = std::count_if(head.begin(), head.end(), [](char c) { return uint8_t(c) >= 0x80; });
  if (!looks_binary(head, controls) && high * 4 < int64_t(head.size()))
    return "looks like text, which is read as such under a name that does not end in .bin";
  return "";
}

// Throws where a file whose tokens would be its bytes is no text. A name that ends in .txt says that JSON, or
// whatever bytes, are meant as they are.
inline void require_text(const std::string& path, std::string_view head) {
  if (const std::string format = known_format(head); !format.empty())
    fail(path + ": is " + format + ", expected text or a token shard" + remedy(format));
  if (ends_in(path, ".txt")) return;
  bool json = looks_like_json(head);
  for (const char* ending : {".json", ".jsonl", ".ndjson"}) json = json || ends_in(path, ending);
  if (json)
    fail(path +
         ": is JSON, expected text or a token shard; scripts/tokenize_text.py makes shards of its texts "
         "(named .txt its bytes are the tokens)");
  int64_t controls;
  if (looks_binary(head, controls))
    fail(path + ": " + std::to_string(controls) + " of the first " + std::to_string(head.size()) +
         " bytes are control characters, expected text or a token shard with its header (named .txt its "
         "bytes are "
         "the tokens)");
}

// The shard whose first bytes these are. Throws unless header and size agree.
inline TokenFile shard(std::shared_ptr<const RegularFile> file, std::string_view head) {
  const std::string& path = file->path();
  const int64_t size = int64_t(file->size());
  if (size < kShardHeaderBytes) {
    const std::string other = what_is_no_shard(head);
    fail(path + ": " + std::to_string(size) + " bytes, shorter than the shard header of " +
         std::to_string(kShardHeaderBytes) + (other.empty() ? "" : "; it " + other));
  }
  int32_t header[3];
  std::memcpy(header, head.data(), sizeof(header));
  const auto [magic, version, tokens] = header;
  const auto format = std::find_if(std::begin(kShardFormats), std::end(kShardFormats),
                                   [magic = magic](const ShardFormat& f) { return f.magic == magic; });
  if (format == std::end(kShardFormats)) {
    const std::string other = what_is_no_shard(head);
    const bool swapped = __builtin_bswap32(uint32_t(magic)) == uint32_t(kShardFormats[0].magic);
    fail(path + ": magic number " + std::to_string(magic) + ", expected " +
         std::to_string(kShardFormats[0].magic) +
         (!other.empty() ? "; it " + other
          : swapped
              ? "; it is big-endian"
              : "; a file of tokens without a header (nanoGPT's) needs the shard header of 1024 bytes"));
  }
  if (version != format->version)
    fail(path + ": shard version " + std::to_string(version) + ", expected " +
         std::to_string(format->version));
  if (tokens < 0)
    fail(path + ": its header has " + std::to_string(tokens) + " tokens, expected at least one");
  const int64_t expected = kShardHeaderBytes + int64_t{tokens} * format->token_bytes;
  if (size != expected) {
    const bool wide = tokens > 0 && size == kShardHeaderBytes + 4 * int64_t{tokens};
    fail(path + ": " + std::to_string(size) + " bytes, expected " + std::to_string(expected) + " for the " +
         std::to_string(tokens) + " tokens of its header" +
         (wide ? ", uint16 in this version; these are uint32" : ""));
  }
  if (tokens == 0) fail(path + ": empty shard (0 tokens), expected at least one token");
  return {std::move(file),     kShardHeaderBytes,  tokens,
          format->token_bytes, format->vocabulary, format->separator};
}

// Opens a file and tells what it holds. vocabulary: that of shards where it is not the format's, else 0.
inline TokenFile open_tokens(const std::string& path, int vocabulary = 0, bool keep_open = true) {
  auto file = std::make_shared<const RegularFile>(path, keep_open, Change::by_content);
  if (file->size() == 0) fail(path + ": empty file, expected at least one token");
  std::string head(size_t(std::min<int64_t>(int64_t(file->size()), kHeadBytes)), '\0');
  file->read(head.data(), 0, head.size());
  int32_t magic = 0;
  std::memcpy(&magic, head.data(), std::min(head.size(), sizeof(magic)));
  bool is_shard = ends_in(path, ".bin");
  for (const ShardFormat& format : kShardFormats) is_shard = is_shard || magic == format.magic;
  if (!is_shard) {
    require_text(path, head);
    if (vocabulary) fail(path + ": is text, whose bytes are tokens: expected no -vocab_size");
    TokenFile text;
    text.tokens = int64_t(file->size());
    text.file = std::move(file);
    return text;
  }
  TokenFile tokens = shard(std::move(file), head);
  if (vocabulary && vocabulary != tokens.vocabulary) {
    tokens.vocabulary = vocabulary;
    tokens.separator = -1;  // known of the format's own tokenizer alone
  }
  return tokens;
}

// The numbers that these bytes hold, Token by Token; `largest` becomes the largest of them.
template <class Token>
std::vector<int32_t> numbers(const std::vector<uint8_t>& bytes, uint32_t& largest) {
  std::vector<int32_t> numbers(bytes.size() / sizeof(Token));
  for (size_t i = 0; i < numbers.size(); ++i) {
    Token token;
    std::memcpy(&token, bytes.data() + i * sizeof(Token), sizeof(Token));
    largest = std::max(largest, uint32_t{token});
    numbers[i] = int32_t(token);
  }
  return numbers;
}

// Tokens [first, first + count) of a file. Throws when the file is not as it was when it was opened, and
// where a token is not in the vocabulary.
inline std::vector<int32_t> read_tokens(const TokenFile& file, int64_t first, int64_t count) {
  std::vector<uint8_t> bytes(size_t(count * file.token_bytes));
  file.file->read(bytes.data(), uint64_t(file.start + first * file.token_bytes), bytes.size());
  uint32_t largest = 0;
  std::vector<int32_t> tokens = file.token_bytes == 1   ? numbers<uint8_t>(bytes, largest)
                                : file.token_bytes == 2 ? numbers<uint16_t>(bytes, largest)
                                                        : numbers<uint32_t>(bytes, largest);
  if (largest < uint32_t(file.vocabulary)) return tokens;
  const auto outside = std::find_if(tokens.begin(), tokens.end(), [&](int32_t token) {
    return uint32_t(token) >= uint32_t(file.vocabulary);
  });
  throw BadToken(file.path() + ": token " + std::to_string(first + (outside - tokens.begin())) + " is " +
                 std::to_string(uint32_t(*outside)) + ", expected less than the vocabulary of " +
                 std::to_string(file.vocabulary));
}

// What tells a file from another one, as far as reading its ends shows: size and XXH64 of its first and last MiB.
inline std::string fingerprint(const TokenFile& file) {
  const uint64_t size = file.file->size(), piece = std::min<uint64_t>(size, uint64_t{1} << 20);
  std::vector<char> bytes(2 * piece);
  file.file->read(bytes.data(), 0, piece);
  file.file->read(bytes.data() + piece, size - piece, piece);
  safetensors::Xxh64 hash;
  hash.update(bytes.data(), bytes.size());
  char text[64];
  std::snprintf(text, sizeof text, "%llu bytes, xxh64 of its ends %016llx",
                static_cast<unsigned long long>(size), static_cast<unsigned long long>(hash.digest()));
  return text;
}

}  // namespace data
}  // namespace gdn
