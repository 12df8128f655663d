// Tests of json.h, safetensors.h and checkpoint.h: what is written reads back, what is malformed is refused
// with a message, and no damage, kill or full disk costs more than the checkpoint being written.
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../checkpoint.h"
#include "../json.h"
#include "../safetensors.h"
#include "files.h"

namespace {

using namespace gdn;
using namespace gdn_tests;
namespace fs = std::filesystem;

inline std::string parse_error(const std::string& text) {
  return error_of([&] { parse_json(text, "a.json"); });
}

// A safetensors file of this header, unpadded, and so many bytes of data.
inline std::string safetensors_bytes(const std::string& header, size_t data_bytes) {
  const uint64_t size = header.size();
  return std::string(reinterpret_cast<const char*>(&size), 8) + header + std::string(data_bytes, 'x');
}

// The elements of a float tensor in a checkpoint of this step.
inline float element(int64_t step, size_t i) { return float(step) + 0.001f * float(i); }

inline TensorSource float_tensor(const std::string& name, int64_t step, size_t count) {
  const auto read = [step](void* host, size_t offset, size_t bytes) {
    for (size_t done = 0; done < bytes; done += sizeof(float)) {
      const float x = element(step, (offset + done) / sizeof(float));
      std::memcpy(static_cast<char*>(host) + done, &x, sizeof x);
    }
  };
  return {name, "F32", {int64_t(count)}, read};
}

inline CheckpointContents contents_of(int64_t step, size_t count = 8) {
  CheckpointContents contents;
  contents.step = step;
  contents.model = {float_tensor("weight", step, count)};
  contents.training_state = {float_tensor("moment", -step, count)};
  contents.config = Json::Object{{"hidden_size", 64}};
  contents.counters = Json::Object{{"step", step}, {"loss", 0.1 * double(step)}};
  contents.metadata = {{"format", "pt"}};
  return contents;
}

// All bytes of a tensor in a file.
inline std::string bytes_of(const TensorView& view) {
  std::string bytes(view.bytes, '\0');
  view.read(bytes.data(), 0, bytes.size());
  return bytes;
}

inline bool holds(const SafetensorsFile& file, const std::string& name, int64_t step) {
  const TensorView& view = file.at(name);
  const std::string bytes = bytes_of(view);
  for (size_t i = 0; i < view.bytes / sizeof(float); i++) {
    float x;
    std::memcpy(&x, bytes.data() + i * sizeof x, sizeof x);
    if (x != element(step, i)) return false;
  }
  return true;
}

// Whether a checkpoint opens and holds what contents_of(step) says.
inline bool is_checkpoint_of(const std::string& path, int64_t step) {
  const Checkpoint c = open_checkpoint(path);
  return c.has_training_state && c.counters.integer("step") == step &&
         c.config.integer("hidden_size") == 64 && holds(c.model, "weight", step) &&
         holds(c.training_state, "moment", -step);
}

// The newest checkpoint, and the warnings on the way, one a line.
inline std::pair<std::string, std::string> newest(const std::string& folder) {
  std::string warnings;
  const std::string path =
      find_newest_checkpoint(folder, [&](const std::string& line) { warnings += line + "\n"; });
  return {path, warnings};
}

// Changes one byte of a file.
inline void flip(const std::string& path, size_t position, char mask) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekg(std::streamoff(position));
  const char changed = char(file.get() ^ mask);
  file.seekp(std::streamoff(position));
  file.put(changed);
}

// Runs the function in a forked process, which exits with its result; returns the process id.
inline pid_t start_child(const std::function<int()>& function) {
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("cannot fork");
  if (child > 0) return child;
  int result = 125;
  try {
    result = function();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "child: %s\n", e.what());
  }
  _exit(result);
}

// A killed child's signal is negative.
inline int wait_for(pid_t child) {
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

TEST_CASE("json: values read back as they were written") {
  const Json value = Json::Object{
      {"null", {}},
      {"yes", true},
      {"smallest", std::numeric_limits<int64_t>::min()},
      {"largest", std::numeric_limits<int64_t>::max()},
      {"whole double", 3.0},
      {"tenth", 0.1},
      {"tiny", std::numeric_limits<double>::denorm_min()},
      {"huge", -std::numeric_limits<double>::max()},
      {"text", "quote \" backslash \\ line \n bell \x07 gr\xc3\xbc\xc3\x9f"},
      {"empty", Json::Object{}},
      {"list", Json::Array{1, "two", Json::Array{}, Json::Object{{"k", 3}}}},
  };
  CHECK(parse_json(json_text(value), "one line") == value);
  CHECK(parse_json(json_text(value, true), "indented") == value);
  CHECK(parse_json(" [3, 3.0, -0, 1e2] ", "").is<Json::Array>());
  CHECK(parse_json("3", "") == Json(3));
  CHECK(parse_json("3.0", "") == Json(3.0));
  CHECK(parse_json("3", "") != Json(3.0));
  CHECK(json_text(Json::Object{{"b", 1}, {"a", Json::Array{1, 2.5}}}, true) ==
        "{\n  \"b\": 1,\n  \"a\": [1, 2.5]\n}");
  CHECK(error_of([] { json_text(NAN); }) == "JSON cannot hold nan, expected a finite number");
}

TEST_CASE("json: escapes become UTF-8") {
  const Json value = parse_json(R"("\u0041\u00e9\u20AC\ud83d\ude00\/\b\f\r\t\u0000")", "");
  CHECK(value == Json(std::string("A\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80/\b\f\r\t\0", 16)));
}

TEST_CASE("json: members by key, and errors that name it") {
  Json json;
  json.set("layers", 8);
  json.set("rate", 0.5);
  json.set("layers", 9);
  CHECK(json_text(json) == R"({"layers":9,"rate":0.5})");
  CHECK(json.integer("layers") == 9);
  CHECK(json.number("layers") == 9.0);
  CHECK(json.number("rate") == 0.5);
  CHECK(json.find("depth") == nullptr);
  CHECK(error_of([&] { json.at("depth"); }) == "'depth': missing");
  CHECK(error_of([&] { json.integer("rate"); }) == "'rate': expected an integer, found 0.5");
  CHECK(error_of([&] { json.string("layers"); }) == "'layers': expected a string, found 9");
  CHECK(error_of([&] { json.at("rate").at("x"); }) == "'x': missing, expected an object, found 0.5");
  CHECK(error_of([&] { Json(3).set("x", 1); }) == "'x': expected an object to set it in, found 3");
}

TEST_CASE("json: malformed text is refused with the byte where it goes wrong") {
  CHECK(parse_error("") == "a.json: JSON byte 0: expected a value, found the end of the text");
  CHECK(parse_error("{\"a\":1,}") == "a.json: JSON byte 7: expected a key in quotes, found '}'");
  CHECK(parse_error("{\"a\" 1}") == "a.json: JSON byte 5: expected ':' after a key, found '1'");
  CHECK(parse_error("{\"a\":1") ==
        "a.json: JSON byte 6: expected ',' or '}' in an object, found the end of the text");
  CHECK(parse_error("{\"a\":1,\"a\":2}") == "a.json: JSON byte 10: key \"a\" appears twice");
  CHECK(parse_error("[1,]") == "a.json: JSON byte 3: expected a value, found ']'");
  CHECK(parse_error("[1 2]") == "a.json: JSON byte 3: expected ',' or ']' in an array, found '2'");
  CHECK(parse_error("1 x") == "a.json: JSON byte 2: expected the end of the text, found 'x'");
  CHECK(parse_error(std::string("1\0", 2)) ==
        "a.json: JSON byte 1: expected the end of the text, found byte 0x00");
  for (const char* number : {"01", "-", "+1", ".5", "1.", "1e", "1e+", "0x1", "NaN", "Infinity", "--1"})
    CHECK_MESSAGE(parse_error(number) != "", number);
  CHECK(contains(parse_error("9223372036854775808"), "integer 9223372036854775808 is outside of 64 bits"));
  CHECK(contains(parse_error("1e999"), "number 1e999 is outside of double's range"));
  for (const char* text : {"nul", "True", "'a'", "{a:1}", "/**/1",
                           "\xef\xbb\xbf"
                           "1"})
    CHECK_MESSAGE(contains(parse_error(text), "expected"), text);
  CHECK(contains(parse_error("\"abc"), "expected '\"' at the end of a string, found the end of the text"));
  CHECK(contains(parse_error("\"a\nb\""), "found byte 0x0a"));
  CHECK(contains(parse_error(R"("\x")"), "after a backslash, found 'x'"));
  CHECK(contains(parse_error("\"\\"), "after a backslash, found the end of the text"));
  CHECK(contains(parse_error(R"("\u12g4")"), "expected four hexadecimal digits after \\u, found 'g'"));
  for (const char* text : {R"("\ud800")", R"("\ud800x")", R"("\ud800\u0041")", R"("\udc00")"})
    CHECK_MESSAGE(contains(parse_error(text), "half of a surrogate pair"), text);
  CHECK(parse_error(std::string(100, '[') + "1" + std::string(100, ']')) == "");
  CHECK(contains(parse_error(std::string(1 << 20, '[')), "nested deeper than 100 levels"));
}

TEST_CASE("checksum: XXH64 of known texts, in pieces of any size") {
  const auto xxh64 = [](const std::string& text, size_t piece) {
    safetensors::Xxh64 hash;
    for (size_t i = 0; i < text.size(); i += piece) hash.update(&text[i], std::min(piece, text.size() - i));
    return hash.digest();
  };
  std::string bytes;
  for (int i = 0; i < 100; i++) bytes += char(i);
  for (const size_t piece : {1, 3, 8, 31, 32, 33, 100}) {
    CHECK(xxh64("", piece) == 0xef46db3751d8e999);
    CHECK(xxh64(bytes.substr(0, 3), piece) == 0xe5c7bb4533bc65dd);
    CHECK(xxh64(bytes.substr(0, 31), piece) == 0xc346d2b59b4d8ee1);
    CHECK(xxh64(bytes.substr(0, 32), piece) == 0xcbf59c5116ff32b4);
    CHECK(xxh64(bytes.substr(0, 33), piece) == 0x0c535d1acafb8ead);
    CHECK(xxh64(bytes, piece) == 0x6ac1e58032166597);
  }
}

TEST_CASE("safetensors: tensors of all kinds read back") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  const std::vector<uint8_t> bytes = {1, 2, 3};
  const std::vector<uint16_t> bf16 = {0x3f80, 0x4000, 0xc040, 0x0001};
  const double scalar = 0.1;
  const size_t large = (safetensors::kPiece + 12) / sizeof(float);
  const FileDigest digest = write_safetensors(
      path,
      {from_host("bytes", "U8", {3}, bytes.data()), from_host("half", "BF16", {2, 2}, bf16.data()),
       float_tensor("large", 7, large), from_host("empty", "F32", {0, 5}, nullptr),
       from_host("scalar \"\xc3\xbc\"", "F64", {}, &scalar)},
      {{"format", "pt"}, {"note", "a\nb"}});
  CHECK(digest_file(path) == digest);
  CHECK(fs::file_size(path) == digest.size);

  const SafetensorsFile file(path);
  CHECK(file.names() == std::vector<std::string>{"scalar \"\xc3\xbc\"", "large", "empty", "half", "bytes"});
  CHECK(file.metadata() == std::map<std::string, std::string>{{"format", "pt"}, {"note", "a\nb"}});
  CHECK(file.at("bytes").dtype == "U8");
  CHECK(std::memcmp(bytes_of(file.at("bytes")).data(), bytes.data(), 3) == 0);
  CHECK(file.at("half").shape == std::vector<int64_t>{2, 2});
  CHECK(std::memcmp(bytes_of(file.at("half")).data(), bf16.data(), 8) == 0);
  CHECK(file.at("empty").bytes == 0);
  CHECK(file.at("large").bytes == large * sizeof(float));
  CHECK(holds(file, "large", 7));
  CHECK(std::memcmp(bytes_of(file.at("scalar \"\xc3\xbc\"")).data(), &scalar, 8) == 0);
  for (const char* name : {"large", "half"}) CHECK(file.at(name).offset % 4 == 0);
  CHECK(file.find("other") == nullptr);
  CHECK(error_of([&] { file.at("other"); }) == path + ": tensor 'other' is missing");

  write_safetensors(path, {}, {});
  CHECK(SafetensorsFile(path).names().empty());
}

TEST_CASE("safetensors: a file from Python's package reads") {
  const TemporaryFolder folder;
  // save_file({"w": [1.0, -2.0] as bfloat16, "b": arange(3) as uint8}, metadata={"format": "np"})
  const std::string header =
      R"({"__metadata__":{"format":"np"},"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},)"
      R"("b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}})";
  std::string bytes = safetensors_bytes(header + std::string(8 - header.size() % 8, ' '), 0);
  bytes += std::string("\x80\x3f\x00\xc0\x00\x01\x02", 7);
  const SafetensorsFile file(folder.write("python.safetensors", bytes));
  CHECK(std::memcmp(bytes_of(file.at("w")).data(), "\x80\x3f\x00\xc0", 4) == 0);
  CHECK(bytes_of(file.at("b"))[2] == 2);
}

TEST_CASE("safetensors: malformed files are refused with file, tensor and value") {
  const TemporaryFolder folder;
  const auto error = [&](const std::string& bytes) {
    const std::string path = folder.write("bad.safetensors", bytes);
    const std::string message = error_of([&] { SafetensorsFile file(path); });
    CHECK(contains(message, path));
    CHECK(!contains(message, "\n"));
    return message;
  };
  const auto entry_error = [&](const std::string& entry, size_t data_bytes = 8) {
    const std::string message = error(safetensors_bytes("{\"w\":" + entry + "}", data_bytes));
    CHECK(contains(message, "tensor 'w': "));
    return message;
  };
  CHECK(contains(error(""), "0 bytes, expected at least the 8"));
  CHECK(contains(error("1234567"), "7 bytes, expected at least the 8"));
  CHECK(contains(error(safetensors_bytes("{}", 0).substr(0, 9)), "header size 2, expected at most 1"));
  CHECK(
      contains(error(std::string(8, '\xff') + "{}"), "header size 18446744073709551615, expected at most 2"));
  CHECK(contains(error(safetensors_bytes("", 0)), "JSON byte 0"));
  CHECK(contains(error(safetensors_bytes("{\"w\":", 0)), "JSON byte 5"));
  CHECK(contains(error(safetensors_bytes("[]", 0)), "header is an array, expected an object"));
  CHECK(contains(error(safetensors_bytes("{}", 3)), "3 bytes of data, expected 0"));
  CHECK(contains(error(safetensors_bytes(R"({"__metadata__":3})", 0)),
                 "__metadata__ is 3, expected an object"));
  CHECK(contains(error(safetensors_bytes(R"({"__metadata__":{"a":3}})", 0)), "'a' is 3, expected a string"));

  CHECK(contains(entry_error("3"), "'dtype': missing, expected an object, found 3"));
  CHECK(contains(entry_error(R"({"shape":[2],"data_offsets":[0,8]})"), "'dtype': missing"));
  CHECK(
      contains(entry_error(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})"), "dtype 'F33', expected"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"),
                 "'shape': expected an array"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "'shape' holds -2"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), "'shape' holds 2.0"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]})"),
                 "shape [4294967296,4294967296] is too large"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[2],"data_offsets":[8]})"), "expected begin and end"));
  CHECK(
      contains(entry_error(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "expected begin and end"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[2],"data_offsets":[0,16]})"),
                 "the file has 8 bytes of data"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
                 "'data_offsets' [0,8], expected a span of 12 bytes for F32 [3]"));
  CHECK(contains(entry_error(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
                 "data start at byte 4, expected 0"));
  CHECK(contains(error(safetensors_bytes(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                         R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                                         12)),
                 "tensor 'b': data start at byte 4, expected 8"));
  CHECK(contains(error(safetensors_bytes(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                         R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                                         8)),
                 "key \"a\" appears twice"));
  CHECK(contains(error_of([&] { SafetensorsFile(folder.file("none")); }), "none: cannot open: No such file"));
  CHECK(
      contains(error_of([&] { SafetensorsFile file(folder.path); }), "is a folder, expected a regular file"));
}

TEST_CASE("safetensors: several files with an index read as one") {
  const TemporaryFolder folder;
  write_safetensors(folder.file("m-1.safetensors"), {float_tensor("a", 1, 3), float_tensor("b", 2, 4)},
                    {{"format", "pt"}});
  write_safetensors(folder.file("m-2.safetensors"), {float_tensor("c", 3, 5)}, {});
  const auto index = [&](const std::string& weight_map) {
    return folder.write("index.json",
                        "{\"metadata\": {\"total_size\": 48}, \"weight_map\": " + weight_map + "}");
  };
  const std::string good =
      index(R"({"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})");
  const SafetensorsFile file = SafetensorsFile::sharded(good);
  CHECK(holds(file, "a", 1));
  CHECK(holds(file, "b", 2));
  CHECK(holds(file, "c", 3));
  CHECK(file.names().size() == 3);
  const auto error = [&](const std::string& weight_map) {
    const std::string path = index(weight_map);
    return error_of([&] { SafetensorsFile::sharded(path); });
  };
  const std::string one = folder.file("m-1.safetensors"), two = folder.file("m-2.safetensors");
  CHECK(error(R"({"a": "m-1.safetensors"})") == one + ": tensor 'b': is not in " + good);
  CHECK(error(R"({"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"})") ==
        one + ": tensor 'b': is in m-2.safetensors by " + good);
  CHECK(error(R"({"a": "m-1.safetensors", "b": "m-1.safetensors", "d": "m-1.safetensors"})") ==
        one + ": tensor 'd': is missing, expected it by " + good);
  CHECK(error(R"({"a": "none.safetensors"})") ==
        folder.file("none.safetensors") + ": cannot open: No such file or directory");
  CHECK(error(R"({"a": "../m-1.safetensors"})") ==
        good + ": 'weight_map' has \"../m-1.safetensors\" for 'a', expected the name of a file beside it");
  CHECK(contains(error(R"({"a": 1})"), "'weight_map' has 1 for 'a'"));
  CHECK(contains(error("[]"), "'weight_map': expected an object"));
  fs::copy_file(one, folder.file("m-3.safetensors"));
  CHECK(contains(error(R"({"a": "m-1.safetensors", "b": "m-1.safetensors", "x": "m-3.safetensors"})"),
                 "tensor 'a': is in another file"));
}

TEST_CASE("safetensors: a file that changes while it is read fails, and does not end the program") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.safetensors");
  write_safetensors(path, {float_tensor("w", 1, 100000)}, {});
  const SafetensorsFile file(path);
  CHECK(holds(file, "w", 1));
  fs::resize_file(path, 1000);
  CHECK(contains(error_of([&] { bytes_of(file.at("w")); }), path + ": has 1000 bytes, expected the "));
}

TEST_CASE("safetensors: pointers of Git LFS, pipes and devices are refused by what they are") {
  const TemporaryFolder folder;
  const std::string pointer =
      folder.write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  CHECK(error_of([&] { SafetensorsFile file(pointer); }) ==
        pointer + ": is a Git LFS pointer, not the weights; fetch them with git lfs pull");
  const std::string pipe = folder.file("pipe");
  REQUIRE(mkfifo(pipe.c_str(), 0600) == 0);
  for (const auto& open : {std::function<void()>([&] { SafetensorsFile file(pipe); }),
                           std::function<void()>([&] { digest_file(pipe); }),
                           std::function<void()>([&] { read_json_file(pipe); })})
    CHECK(error_of(open) == pipe + ": is a pipe, expected a regular file");
  CHECK(error_of([] { read_json_file("/dev/zero"); }) == "/dev/zero: is a device, expected a regular file");
  CHECK(error_of([&] { read_text_file(pointer, 10); }) == pointer + ": has 63 bytes, expected at most 10");
}

TEST_CASE("json: a byte order mark is no part of a file; NaN is named") {
  const TemporaryFolder folder;
  CHECK(read_json_file(folder.write("bom.json", "\xef\xbb\xbf{\"a\": 1}")).integer("a") == 1);
  CHECK(contains(parse_error("{\"a\": NaN}"),
                 "JSON byte 6: expected a value, found NaN, which JSON does not have"));
  CHECK(contains(parse_error("[-Infinity]"), "found -Infinity, which JSON does not have"));
}

TEST_CASE("safetensors: what cannot be written is refused before the file is touched") {
  const TemporaryFolder folder;
  const std::string path = folder.write("a.safetensors", "before");
  const float x = 0;
  const auto error = [&](const std::vector<TensorSource>& tensors) {
    return error_of([&] { write_safetensors(path, tensors, {}); });
  };
  CHECK(contains(error({from_host("w", "F33", {1}, &x)}), path + ": tensor 'w': dtype 'F33', expected"));
  CHECK(contains(error({from_host("w", "F32", {-1}, &x)}), "tensor 'w': shape [-1], expected sizes from 0"));
  CHECK(contains(error({from_host("w", "F32", {1}, &x), from_host("w", "F32", {1}, &x)}),
                 "tensor 'w': this name"));
  CHECK(contains(error({from_host("__metadata__", "F32", {1}, &x)}), "tensor '__metadata__': this name"));
  CHECK(read_text_file(path) == "before");
  CHECK(contains(error_of([&] { write_safetensors(folder.file("none/a"), {}, {}); }),
                 "none/a: cannot open: No such file or directory"));
}

TEST_CASE("checkpoint: what is saved opens again") {
  const TemporaryFolder folder;
  const std::string out = folder.file("run/nested");
  CHECK(newest(out).first == "");
  const std::string path = save_checkpoint(out, contents_of(1000), 0);
  CHECK(path == out + "/step_00001000");
  CHECK(is_checkpoint_of(path, 1000));
  const Checkpoint checkpoint = open_checkpoint(path);
  CHECK(checkpoint.counters.number("loss") == 0.1 * 1000);
  CHECK(checkpoint.model.metadata().at("format") == "pt");
  CHECK(newest(out) == std::make_pair(path, std::string()));
  CHECK(
      contains(error_of([&] { save_checkpoint(out, contents_of(-1), 0); }), "expected a step of at least 0"));
}

TEST_CASE("checkpoint: a folder of weights opens without training state") {
  const TemporaryFolder folder;
  fs::remove(save_checkpoint(folder.path, contents_of(5), 0) + "/checkpoint.json");
  const std::string path = folder.file("step_00000005");
  CHECK(contains(error_of([&] { open_checkpoint(path); }), "checkpoint.json: cannot open: No such file"));
  fs::remove(path + "/training_state.safetensors");
  const Checkpoint weights = open_checkpoint(path);
  CHECK(!weights.has_training_state);
  CHECK(holds(weights.model, "weight", 5));
  CHECK(weights.config.integer("hidden_size") == 64);
  CHECK(weights.training_state.names().empty());
  CHECK(newest(folder.path).first == "");
  CHECK(contains(error_of([&] { open_checkpoint(folder.file("none")); }), "no such folder"));
  fs::rename(path + "/model.safetensors", path + "/part.safetensors");
  std::ofstream(path + "/model.safetensors.index.json")
      << R"({"weight_map": {"weight": "part.safetensors"}})";
  CHECK(holds(open_checkpoint(path).model, "weight", 5));
  fs::remove(path + "/model.safetensors.index.json");
  fs::rename(path + "/part.safetensors", path + "/pytorch_model.bin");
  CHECK(contains(error_of([&] { open_checkpoint(path); }),
                 "pytorch_model.bin: PyTorch's format is not read, expected model.safetensors"));
  CHECK(contains(error_of([&] { open_checkpoint(folder.path); }), "config.json: cannot open"));
}

TEST_CASE("checkpoint: with any byte changed the one before is found") {
  const TemporaryFolder folder;
  const std::string before = save_checkpoint(folder.path, contents_of(1), 0);
  const std::string damaged = save_checkpoint(folder.path, contents_of(2), 0);
  for (const char* name :
       {"model.safetensors", "training_state.safetensors", "config.json", "checkpoint.json"}) {
    const std::string path = damaged + "/" + name;
    int found = 0, named = 0;
    const size_t size = fs::file_size(path);
    for (size_t position = 0; position < size; position++) {
      const char mask = char(1 << (position % 8));
      flip(path, position, mask);
      const auto [newest_path, warnings] = newest(folder.path);
      found += newest_path == before;
      named += contains(warnings, path) && warnings.find('\n') == warnings.size() - 1;
      flip(path, position, mask);
    }
    CHECK_MESSAGE(size_t(found) == size, name);
    CHECK_MESSAGE(size_t(named) == size, name);
  }
  CHECK(newest(folder.path) == std::make_pair(damaged, std::string()));
}

TEST_CASE("checkpoint: with a file cut, grown or missing the one before is found") {
  for (const char* name :
       {"model.safetensors", "training_state.safetensors", "config.json", "checkpoint.json"}) {
    const TemporaryFolder folder;
    const std::string before = save_checkpoint(folder.path, contents_of(1), 0);
    const std::string path = save_checkpoint(folder.path, contents_of(2), 0) + "/" + name;
    const std::string bytes = read_text_file(path);
    for (const size_t size : {size_t{0}, bytes.size() / 2, bytes.size() - 1, bytes.size() + 1}) {
      fs::resize_file(path, size);
      const auto [newest_path, warnings] = newest(folder.path);
      CHECK(newest_path == before);
      CHECK(contains(warnings, path));
      std::ofstream(path, std::ios::binary) << bytes;
    }
    fs::remove(path);
    const auto [newest_path, warnings] = newest(folder.path);
    CHECK(newest_path == before);
    CHECK(contains(warnings, path));
  }
}

TEST_CASE("checkpoint: the newest `keep` stay, and nothing that is not ours is touched") {
  const TemporaryFolder folder;
  for (const int64_t step : {1, 2, 3}) save_checkpoint(folder.path, contents_of(step), 0);
  CHECK(folder.listing() == "step_00000001 step_00000002 step_00000003");
  for (const char* name : {"step_7", "step_00000009.tmp", "step_00000001.old.tmp", "other.tmp", "step_x.tmp"})
    fs::create_directories(folder.file(name));
  save_checkpoint(folder.path, contents_of(4), 2);
  CHECK(folder.listing() == "other.tmp step_00000003 step_00000004 step_7 step_x.tmp");

  SUBCASE("damaged checkpoints do not count") {
    fs::remove(folder.file("step_00000004/config.json"));
    save_checkpoint(folder.path, contents_of(5), 2);
    CHECK(folder.listing() == "other.tmp step_00000003 step_00000004 step_00000005 step_7 step_x.tmp");
  }
  SUBCASE("after going back, newer ones stay") {
    save_checkpoint(folder.path, contents_of(2), 1);
    CHECK(folder.listing() == "other.tmp step_00000002 step_00000003 step_00000004 step_7 step_x.tmp");
  }
}

TEST_CASE("checkpoint: one of the same step is replaced") {
  const TemporaryFolder folder;
  const std::string path = save_checkpoint(folder.path, contents_of(3), 1);
  CheckpointContents changed = contents_of(3);
  changed.config = Json::Object{{"hidden_size", 128}};
  const auto config_of = [](const std::string& folder) {
    return open_checkpoint(folder).config.integer("hidden_size");
  };

  SUBCASE("undisturbed") {}
  SUBCASE("after a kill before the new one was in place") {
    fs::rename(path, path + ".old");
    CHECK(newest(folder.path).first == path + ".old");
    CHECK(config_of(path + ".old") == 64);
  }
  SUBCASE("after a kill before the old one was deleted") {
    fs::copy(path, path + ".old");
    CHECK(newest(folder.path).first == path);
  }
  SUBCASE("after damage") { fs::remove(path + "/checkpoint.json"); }

  CHECK(save_checkpoint(folder.path, changed, 1) == path);
  CHECK(folder.listing() == "step_00000003");
  CHECK(config_of(path) == 128);
}

constexpr size_t kKillCount = size_t{1} << 18;  // elements of a tensor: 2 MiB a checkpoint

// Saves checkpoints of steps first, first + 1, ..., each twice, writing each step to the pipe when it is
// saved; until killed.
inline int save_forever(const std::string& out_dir, int64_t first, int pipe) {
  for (int64_t step = first;; step++) {
    for (int round = 0; round < 2; round++) {
      save_checkpoint(out_dir, contents_of(step, kKillCount), 2);
      if (write(pipe, &step, sizeof step) != sizeof step) return 1;
    }
  }
}

TEST_CASE("checkpoint: a kill at any moment costs only the checkpoint being written") {
  const auto now = [] { return std::chrono::steady_clock::now(); };
  const TemporaryFolder folder;
  const auto start = now();
  save_checkpoint(folder.path, contents_of(1, kKillCount), 2);
  const std::chrono::duration<double> save_time = now() - start;
  int64_t reported = 1;
  uint64_t random = 1;
  for (int round = 0; round < 40 && now() - start < std::chrono::seconds(2); round++) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t child = start_child([&] { return save_forever(folder.path, reported + 1, ends[1]); });
    close(ends[1]);
    random = random * 6364136223846793005 + 1442695040888963407;
    std::this_thread::sleep_for(save_time * 4 * (double(random >> 32) / 0x1p32));
    kill(child, SIGKILL);
    CHECK(wait_for(child) == -SIGKILL);
    int64_t step;
    while (read(ends[0], &step, sizeof step) == sizeof step) reported = step;
    close(ends[0]);

    const auto [path, warnings] = newest(folder.path);
    CHECK(warnings == "");
    REQUIRE(path != "");
    const int64_t found = open_checkpoint(path).counters.integer("step");
    CHECK(found >= reported);
    for (const checkpoints::Folder& other : checkpoints::list_folders(folder.path))
      if (other.kind != checkpoints::Kind::temporary) CHECK(is_checkpoint_of(other.path, other.step));
    reported = found;
  }
  CHECK(reported > 1);
}

TEST_CASE("checkpoint: a full disk fails the save and leaves the earlier ones") {
  const TemporaryFolder folder;
  const std::string before = save_checkpoint(folder.path, contents_of(1), 1);
  // No file may grow beyond 64 KiB: writes beyond fail with EFBIG where a full disk gives ENOSPC.
  const auto save_too_much = [&](int64_t step) {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {1 << 16, 1 << 16};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 1;
    const std::string error = error_of([&] { save_checkpoint(folder.path, contents_of(step, 1 << 15), 1); });
    return contains(error, "/model.safetensors: cannot write: File too large") ? 0 : 2;
  };
  for (const int64_t step : {1, 2}) {
    CHECK(wait_for(start_child([&] { return save_too_much(step); })) == 0);
    CHECK(folder.listing() == "step_00000001");
    CHECK(newest(folder.path) == std::make_pair(before, std::string()));
    CHECK(is_checkpoint_of(before, 1));
  }
  if (fs::exists("/dev/full"))
    CHECK(error_of([] { write_safetensors("/dev/full", {}, {}); }) ==
          "/dev/full: cannot write: No space left on device");
}

TEST_CASE("checkpoint: an error while a tensor is read fails the save and leaves the earlier ones") {
  const TemporaryFolder folder;
  const std::string before = save_checkpoint(folder.path, contents_of(1), 1);
  CheckpointContents contents = contents_of(2);
  contents.training_state[0].read = [](void*, size_t, size_t) { throw std::runtime_error("device lost"); };
  CHECK(error_of([&] { save_checkpoint(folder.path, contents, 1); }) == "device lost");
  CHECK(folder.listing() == "step_00000001");
  CHECK(newest(folder.path).first == before);
}

}  // namespace
