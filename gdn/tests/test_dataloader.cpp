// Tests of dataloader.h: which sequences come in which order, what files are taken for, and what malformed
// ones report. The stories have tests of their own (test_stories.cpp).
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../dataloader.h"
#include "../safetensors.h"

namespace {

using namespace gdn;
namespace fs = std::filesystem;

// A new folder for temporary files, removed with all it holds.
struct TemporaryFolder {
  TemporaryFolder() {
    std::string name = (fs::temp_directory_path() / "gdn_dataloader_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make " + name);
    path = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  std::string file(const std::string& name) const { return (path / name).string(); }

  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream(file(name), std::ios::binary) << bytes;
    return file(name);
  }

  // A shard whose header may disagree with its tokens.
  std::string write_shard(const std::string& name, const std::vector<uint16_t>& tokens, int32_t header_tokens,
                          int32_t magic = 20240520, int32_t version = 1) const {
    std::vector<int32_t> header(256, 0);
    header[0] = magic;
    header[1] = version;
    header[2] = header_tokens;
    std::string bytes(reinterpret_cast<const char*>(header.data()), 1024);
    bytes.append(reinterpret_cast<const char*>(tokens.data()), 2 * tokens.size());
    return write(name, bytes);
  }
  std::string write_shard(const std::string& name, const std::vector<uint16_t>& tokens) const {
    return write_shard(name, tokens, static_cast<int32_t>(tokens.size()));
  }

  fs::path path;
};

// Consecutive tokens first, first + 1, ...: a token then says where it stands.
inline std::vector<uint16_t> consecutive(uint16_t first, size_t count) {
  std::vector<uint16_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

struct Batch {
  std::vector<int32_t> inputs, targets;
  double entropy_floor = 0.0;

  bool operator==(const Batch& other) const { return inputs == other.inputs && targets == other.targets; }
};

inline Batch next_batch(DataLoader& loader, int seq_len) {
  Batch batch;
  batch.inputs.resize(loader.local_batch() * seq_len);
  batch.targets.resize(batch.inputs.size());
  batch.entropy_floor = loader.next(batch.inputs.data(), batch.targets.data());
  return batch;
}

inline Batch read_sequence(const DataLoader& loader, int64_t index, int seq_len) {
  Batch batch;
  batch.inputs.resize(seq_len);
  batch.targets.resize(seq_len);
  batch.entropy_floor = loader.read(index, batch.inputs.data(), batch.targets.data());
  return batch;
}

// First input of every sequence of the next `sequences` batches of one sequence.
inline std::vector<int32_t> first_tokens(DataLoader& loader, int seq_len, int64_t sequences) {
  std::vector<int32_t> first;
  for (int64_t i = 0; i < sequences; ++i) first.push_back(next_batch(loader, seq_len).inputs[0]);
  return first;
}

inline std::vector<int32_t> sorted(std::vector<int32_t> values) {
  std::sort(values.begin(), values.end());
  return values;
}

// The message that an action fails with; "" if it does not fail.
inline std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

inline std::string open_error(const std::string& spec, int seq_len = 4) {
  return error_of([&] { DataLoader(spec, seq_len, 1, 0); });
}

TEST_CASE("dataloader: sequences of several shards with ragged tails, in file order") {
  TemporaryFolder folder;
  folder.write_shard("a.bin", consecutive(1000, 9));   // two sequences of 4, no tail
  folder.write_shard("b.bin", consecutive(2000, 4));   // shorter than a sequence
  folder.write_shard("c.bin", consecutive(3000, 16));  // three sequences, tail of 3
  DataLoader loader(folder.file("*.bin"), 4, 1, 0);
  CHECK(loader.source().vocab_size() == 50257);
  CHECK_FALSE(loader.source().is_bytes());
  CHECK_FALSE(loader.source().is_builtin());
  CHECK(loader.source().tokens() == 29);
  REQUIRE(loader.sequences() == 5);
  const std::vector<int32_t> first{1000, 1004, 3000, 3004, 3008};
  for (int64_t i = 0; i < 5; ++i) {
    const Batch sequence = read_sequence(loader, i, 4);
    CHECK(std::isnan(sequence.entropy_floor));
    for (int t = 0; t < 4; ++t) {
      CHECK(sequence.inputs[t] == first[i] + t);
      CHECK(sequence.targets[t] == first[i] + t + 1);
    }
  }
  const std::string list = folder.file("c.bin") + "," + folder.file("a.bin");
  DataLoader listed(list, 4, 1, 0);
  REQUIRE(listed.sequences() == 5);
  CHECK(read_sequence(listed, 0, 4).inputs[0] == 3000);
  CHECK(read_sequence(listed, 3, 4).inputs[0] == 1000);
}

TEST_CASE("dataloader: text files are bytes") {
  TemporaryFolder folder;
  std::string bytes(256, '\0');
  std::iota(bytes.begin(), bytes.end(), '\0');
  folder.write("a.txt", bytes);
  folder.write("b.md", "ab");
  DataLoader loader(folder.file("*"), 1, 1, 0);
  CHECK(loader.source().vocab_size() == 256);
  CHECK(loader.source().is_bytes());
  CHECK_FALSE(loader.source().is_builtin());
  REQUIRE(loader.sequences() == 256);
  for (int64_t i = 0; i < 255; ++i) {
    CHECK(read_sequence(loader, i, 1).inputs[0] == i);
    CHECK(read_sequence(loader, i, 1).targets[0] == i + 1);
  }
  CHECK(read_sequence(loader, 255, 1).targets[0] == 'b');
  CHECK(std::isnan(next_batch(loader, 1).entropy_floor));
}

TEST_CASE("dataloader: every sequence once an epoch, in an order keyed by seed and epoch") {
  TemporaryFolder folder;
  for (int64_t n : {1, 2, 3, 5, 64, 65, 1000}) {
    const std::string path = folder.write_shard("n.bin", consecutive(0, 2 * n + 1));
    DataLoader loader(path, 2, 1, 7), twin(path, 2, 1, 7), other(path, 2, 1, 8);
    REQUIRE(loader.sequences() == n);
    CHECK(loader.epoch() == 0);
    const std::vector<int32_t> epoch0 = first_tokens(loader, 2, n);
    CHECK(loader.epoch() == 1);
    const std::vector<int32_t> epoch1 = first_tokens(loader, 2, n);
    std::vector<int32_t> all(n);
    for (int64_t i = 0; i < n; ++i) all[i] = static_cast<int32_t>(2 * i);
    CHECK(sorted(epoch0) == all);
    CHECK(sorted(epoch1) == all);
    CHECK(first_tokens(twin, 2, n) == epoch0);
    if (n >= 64) {
      CHECK(epoch0 != all);
      CHECK(epoch0 != epoch1);
      CHECK(first_tokens(other, 2, n) != epoch0);
    }
  }
}

TEST_CASE("dataloader: the order of the data and the stories stay what they were") {
  TemporaryFolder folder;
  const std::string shard = folder.write_shard("n.bin", consecutive(0, 50001));
  const auto digest_of_batches = [](const std::string& spec) {
    DataLoader loader(spec, 96, 7, 42);
    safetensors::Xxh64 hash;
    for (int step = 0; step < 200; ++step) {
      const Batch batch = next_batch(loader, 96);
      hash.update(batch.inputs.data(), batch.inputs.size() * sizeof(int32_t));
      hash.update(batch.targets.data(), batch.targets.size() * sizeof(int32_t));
    }
    return hash.digest();
  };
  CHECK(digest_of_batches(shard) == 0x955e467752a36fbaull);  // of commit 3a60858
  CHECK(digest_of_batches("") == 0x6767eb5950cfe222ull);
}

TEST_CASE("dataloader: the permutation is a bijection that moves each element uniformly") {
  for (uint64_t n = 1; n <= 70; ++n) {
    std::vector<int> hits(n, 0);
    for (uint64_t i = 0; i < n; ++i) ++hits.at(permuted(i, n, n * 31));
    CHECK(std::count(hits.begin(), hits.end(), 1) == static_cast<int64_t>(n));
  }
  const int keys = 20000;
  for (uint64_t i : {0, 3, 9}) {
    std::vector<double> images(10, 0.0);
    for (int key = 0; key < keys; ++key) images[permuted(i, 10, mix64(key))] += 1.0;
    double chi_squared = 0.0;
    for (double count : images) chi_squared += std::pow(count - keys / 10.0, 2) / (keys / 10.0);
    CHECK(chi_squared < 40.0);  // 9 degrees of freedom: p = 8e-6
  }
}

TEST_CASE("dataloader: the global batch does not depend on the number of ranks") {
  TemporaryFolder folder;
  const std::string shard = folder.write_shard("n.bin", consecutive(0, 3 * 21 + 1));  // 21 sequences of 3
  for (const std::string& spec : {shard, std::string()}) {
    DataLoader whole(spec, 3, 8, 5);
    std::vector<DataLoader> parts;
    for (int ranks : {2, 4}) {
      for (int rank = 0; rank < ranks; ++rank) parts.emplace_back(spec, 3, 8, 5, rank, ranks);
    }
    for (int step = 0; step < 6; ++step) {  // crosses epochs inside a batch
      const Batch batch = next_batch(whole, 3);
      for (size_t first : {0, 2}) {
        Batch joined;
        const size_t ranks = first == 0 ? 2 : 4;
        for (size_t rank = 0; rank < ranks; ++rank) {
          const Batch part = next_batch(parts[first + rank], 3);
          CHECK(part.inputs.size() == 24 / ranks);
          joined.inputs.insert(joined.inputs.end(), part.inputs.begin(), part.inputs.end());
          joined.targets.insert(joined.targets.end(), part.targets.begin(), part.targets.end());
          joined.entropy_floor += part.entropy_floor / static_cast<double>(ranks);
        }
        CHECK(joined == batch);
        if (spec.empty()) CHECK(joined.entropy_floor == doctest::Approx(batch.entropy_floor).epsilon(1e-12));
      }
      CHECK(parts[5].position() == whole.position());
    }
  }
}

TEST_CASE("dataloader: resuming from a position gives the batches that would have followed") {
  TemporaryFolder folder;
  const std::string shard = folder.write_shard("n.bin", consecutive(0, 3 * 10 + 1));
  for (const std::string& spec : {shard, std::string()}) {
    DataLoader loader(spec, 3, 4, 11);
    std::vector<Batch> batches;
    for (int step = 0; step < 12; ++step) batches.push_back(next_batch(loader, 3));
    CHECK(loader.position() == 48);
    for (uint64_t step : {5, 0, 11}) {
      DataLoader resumed(spec, 3, 4, 11);
      resumed.seek(4 * step);
      CHECK(resumed.position() == 4 * step);
      for (uint64_t s = step; s < 12; ++s) CHECK(next_batch(resumed, 3) == batches[s]);
    }
  }
  DataLoader loader(shard, 3, 4, 11);
  loader.seek(37);
  CHECK(loader.epoch() == 3);
}

TEST_CASE("dataloader: what malformed sources report") {
  TemporaryFolder folder;
  const std::string good = folder.write_shard("good.bin", consecutive(0, 100));
  const std::string text = folder.write("text.txt", "some text");
  const std::string none = folder.file("nothing*");
  CHECK(open_error(none) == "data: no file matches '" + none + "'");
  CHECK(open_error(good + ",") == "data: no file matches ''");

  const std::string dangling = folder.file("dangling.bin");
  fs::create_symlink(folder.file("absent"), dangling);
  CHECK(open_error(folder.file("dang*")) == dangling + ": cannot open: No such file or directory");
  fs::create_directory(folder.file("folder.bin"));
  CHECK(open_error(folder.file("folder.bin")) ==
        folder.file("folder.bin") + ": is a folder, expected a regular file");

  const std::string empty = folder.write("empty.txt", "");
  CHECK(open_error(empty) == empty + ": empty file, expected at least one token");
  const std::string stub = folder.write("stub.bin", std::string(1023, '\0'));
  CHECK(open_error(stub) == stub + ": 1023 bytes, shorter than the shard header of 1024");
  const std::string magic = folder.write_shard("magic.bin", {1, 2, 3}, 3, 20240802);
  CHECK(open_error(magic) ==
        magic +
            ": magic number 20240802, expected 20240520; a file of tokens without a header "
            "(nanoGPT's) needs the shard header of 1024 bytes");
  const std::string swapped = folder.write_shard("swapped.bin", {1, 2, 3}, 3, -1999096831);
  CHECK(open_error(swapped) == swapped + ": magic number -1999096831, expected 20240520; it is big-endian");
  const std::string wide = folder.write_shard("wide.bin", {1, 0, 2, 0}, 2);
  CHECK(open_error(wide) == wide +
                                ": 1032 bytes, expected 1028 for the 2 tokens of its header, uint16 in this "
                                "version; these are uint32");
  const std::string version = folder.write_shard("version.bin", {1, 2, 3}, 3, 20240520, 7);
  CHECK(open_error(version) == version + ": shard version 7, expected 1");
  const std::string truncated = folder.write_shard("truncated.bin", {1, 2, 3}, 5);
  CHECK(open_error(truncated) == truncated + ": 1030 bytes, expected 1034 for the 5 tokens of its header");
  const std::string negative = folder.write_shard("negative.bin", {1, 2, 3}, -1);
  CHECK(open_error(negative) == negative + ": its header has -1 tokens, expected at least one");
  const std::string hollow = folder.write_shard("hollow.bin", {});
  CHECK(open_error(hollow) == hollow + ": empty shard (0 tokens), expected at least one token");

  CHECK(open_error(good + "," + text) ==
        "data: '" + good + "' and '" + text + "' mix token shards and raw text, expected one kind");
  CHECK(open_error(text, 8) == "");
  CHECK(open_error(text, 9) ==
        "data: '" + text + "' has 9 tokens in 1 file(s), expected one of at least 10 tokens, one sequence");
}

TEST_CASE("dataloader: names with brackets, commas and blanks are files, before they are patterns or lists") {
  TemporaryFolder folder;
  const std::string brackets = folder.write("[ab].txt", "brackets"), a = folder.write("a.txt", "plain a");
  const std::string comma = folder.write("x,y.txt", "a comma"), x = folder.write("x", "an x!");
  const std::string blank = folder.write(" b c.txt", "blanks");
  const auto files = [](const std::string& list) { return data::list_files(list); };
  using Names = std::vector<std::string>;
  CHECK(files(brackets) == Names{brackets});
  CHECK(files(folder.file("[a].txt")) == Names{a});
  CHECK(files(comma) == Names{comma});
  CHECK(files(a + "," + comma + "," + x) == Names{a, comma, x});
  const std::string other = folder.write("p,q.txt", "another");
  CHECK(files(folder.file("p,*.txt")) == Names{other});
  CHECK(files(blank) == Names{blank});
  CHECK(files(a + ", " + x + " ,  " + comma) == Names{a, x, comma});
  CHECK(error_of([&] { files(a + ", ,"); }) == "data: no file matches ' '");
  CHECK(error_of([&] { files(x + ",y.md"); }) == "data: no file matches 'y.md'");
}

TEST_CASE("dataloader: a shard is one by its header, whatever its name") {
  TemporaryFolder folder;
  const std::string shard = folder.write_shard("n.bin", consecutive(300, 9));
  for (const char* name : {"upper.BIN", "blob", "shard.txt"}) {
    fs::copy_file(shard, folder.file(name));
    DataLoader loader(folder.file(name), 4, 1, 0);
    CHECK(loader.source().vocab_size() == 50257);
    CHECK(read_sequence(loader, 1, 4).targets[3] == 308);
  }
  CHECK(open_error(folder.write("text.BIN", "some text that is long enough")) ==
        folder.file("text.BIN") +
            ": 29 bytes, shorter than the shard header of 1024; it looks like text, which is read as such under "
            "a name that does not end in .bin");
}

TEST_CASE("dataloader: what is neither text nor a shard is named") {
  TemporaryFolder folder;
  const std::string padding(2000, 'x');
  const auto error = [&](const std::string& name, const std::string& bytes) {
    const std::string path = folder.write(name, bytes), message = open_error(path);
    return message.empty() ? message : message.substr(path.size());
  };
  using namespace std::string_literals;
  const std::pair<std::string, std::string> formats[] = {
      {"\x1f\x8b\x08", "gzip"},
      {"\x28\xb5\x2f\xfd", "zstd"},
      {"\xfd\x37zXZ\0"s, "xz"},
      {"BZh91AY&SY", "bzip2"},
      {"PK\x03\x04", "zip"},
      {"PAR1\x15", "parquet"},
      {"ARROW1", "Arrow"},
      {"\x93NUMPY", "numpy"},
      {"\x89HDF", "HDF5"},
      {"\xff\xfe\0\0"s, "UTF-32"},
      {"\xff\xfe", "UTF-16"},
      {"\xfe\xff", "UTF-16"},
      {"\x80\x04\x95", "pickle"},
      {"GGUF", "GGUF"},
      {"%PDF-1.4", "PDF"},
      {"\x04\x22\x4d\x18", "lz4"},
      {"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"},
      {"\x10\0\0\0\0\0\0\0{\"a"s, "safetensors"},
      {std::string(257, 'n') + "ustar", "tar"}};
  for (const auto& [begin, name] : formats) {
    CAPTURE(name);
    CHECK(error("data.txt", begin + padding).rfind(": is " + name, 0) == 0);
  }
  std::string utf16;
  for (char c : padding) utf16 += {c, '\0'};
  CHECK(error("marked.txt", utf16) ==
        ": is UTF-16, expected text or a token shard; convert it: iconv -f UTF-16 -t UTF-8");
  CHECK(error("marked32.txt", "\xff\xfe\0\0"s + padding) ==
        ": is UTF-32, expected text or a token shard; convert it: iconv -f UTF-32 -t UTF-8");
  // under a shard's name, longer and shorter than a shard's header
  CHECK(error("a.bin", "\x1f\x8b\x08" + padding).find("; it is gzip; unpack it first") != std::string::npos);
  CHECK(error("b.bin", "version https://git-lfs.github.com/spec/v1\nsize 5\n")
            .find("; it is a Git LFS pointer") != std::string::npos);
  CHECK(error("c.bin", "{\"text\": \"once\"}\n").find("; it is JSON; ") != std::string::npos);
  for (const char* name : {"d.bin", "e.bin"})
    CHECK(error(name, std::string(name[0] == 'd' ? 100 : 5000, 'n')).find("; it looks like text") !=
          std::string::npos);
  CHECK(error("f.bin", std::string(5000, '\x93')).find("; a file of tokens without a header") !=
        std::string::npos);
  // JSON by its name or its text; .txt says that bytes are meant
  for (const char* name : {"a.json", "a.jsonl", "a.NDJSON", "a"}) {
    CHECK(error(name, "{\"text\": \"once\"}\n{\"text\": \"upon\"}\n").rfind(": is JSON", 0) == 0);
  }
  CHECK(error("b", " [ {\"text\": 1}]").rfind(": is JSON", 0) == 0);
  CHECK(error("a.txt", "{\"text\": \"once\"}") == "");
  CHECK(error("c", "{\"name\", said he") == "");
  CHECK(error("d", "[{ or } and more]") == "");
  // tokens without header
  std::string tokens;
  for (int i = 0; i < 1000; i++) tokens += {char(i * 7), char(i % 5 ? i % 190 : 0)};
  CHECK(error("tokens.dat", tokens).find("are control characters") != std::string::npos);
  CHECK(error("tokens.txt", tokens) == "");
  CHECK(error("latin1", "caf\xe9 na\xefve, d\xe9j\xe0 vu\r\n\tand more") == "");
  CHECK(error("bom", "\xef\xbb\xbfwith UTF-8's mark") == "");
}

TEST_CASE("dataloader: pipes and devices are refused without waiting") {
  TemporaryFolder folder;
  for (const char* name : {"pipe.bin", "pipe.txt"}) {
    REQUIRE(mkfifo(folder.file(name).c_str(), 0600) == 0);
    CHECK(open_error(folder.file(name)) == folder.file(name) + ": is a pipe, expected a regular file");
  }
  CHECK(open_error("/dev/zero") == "/dev/zero: is a device, expected a regular file");
}

TEST_CASE("dataloader: a file that changes or is deleted fails the next read, one that is touched does not") {
  TemporaryFolder folder;
  const std::vector<uint16_t> tokens = consecutive(0, 4001);
  std::vector<uint16_t> others = tokens;
  others[2000] = 7;
  const std::string path = folder.write_shard("n.bin", tokens);
  const auto later = [&](const std::string& file) {
    fs::last_write_time(file, fs::last_write_time(file) + std::chrono::seconds(1));
  };
  for (const bool keep_open : {true, false}) {
    CAPTURE(keep_open);
    const auto error_after = [&](const std::function<void()>& change) {
      folder.write_shard("n.bin", tokens);
      const data::TokenFile file = data::open_tokens(path, 0, keep_open);
      CHECK(data::read_tokens(file, 7, 2) == std::vector<int32_t>{7, 8});
      change();
      std::vector<int32_t> read = {7, 8};
      const auto read_again = [&] { read = data::read_tokens(file, 7, 2); };
      const std::string error = error_of(read_again);
      CHECK(error_of(read_again) == error);
      CHECK(read == std::vector<int32_t>{7, 8});
      return error;
    };
    CHECK(error_after([&] { fs::resize_file(path, 0); }) ==
          path + ": has 0 bytes, expected the 9026 it had at the start");
    CHECK(error_after([&] { fs::resize_file(path, 9025); }) ==
          path + ": has 9025 bytes, expected the 9026 it had at the start");
    CHECK(error_after([&] { fs::resize_file(path, 9027); }) ==
          path + ": has 9027 bytes, expected the 9026 it had at the start");
    CHECK(error_after([&] { folder.write_shard("n.bin", others), later(path); }) ==
          path + ": was written to since the start, expected it to stay as it was");
    CHECK(error_after([&] {  // the old time put back
            const auto time = fs::last_write_time(path);
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            folder.write_shard("n.bin", others);
            fs::last_write_time(path, time);
          }) == path + ": was written to since the start, expected it to stay as it was");
    CHECK(error_after([&] { fs::remove(path); }) ==
          path + (keep_open ? ": was deleted, expected it to stay as it was"
                            : ": cannot open: No such file or directory"));
    CHECK(error_after([&] { fs::rename(folder.write_shard("m.bin", others), path); }) ==
          path + ": was replaced since the start, expected it to stay as it was");
    // what holds the same bytes is the same
    CHECK(error_after([&] { later(path); }) == "");
    CHECK(error_after([&] { folder.write_shard("n.bin", tokens), later(path); }) == "");
    CHECK(error_after([&] { fs::permissions(path, fs::perms::owner_read); }) == "");
    fs::permissions(path, fs::perms::owner_all);
    CHECK(error_after([&] { fs::rename(folder.write_shard("m.bin", tokens), path); }) == "");
  }
  DataLoader loader(folder.write_shard("n.bin", tokens), 4, 2, 0);
  CHECK(error_of([&] { next_batch(loader, 4); }) == "");
  fs::resize_file(path, 0);
  const uint64_t position = loader.position();
  CHECK(error_of([&] { next_batch(loader, 4); }) != "");
  CHECK(loader.position() == position);
}

TEST_CASE("dataloader: a large file is the same when a sample of it is; its first and last bytes are in it") {
  TemporaryFolder folder;
  const std::string path = folder.write("large.txt", "");
  const int64_t size = (int64_t{1} << 24) + 12345;
  const auto with = [&](int64_t place, char c) {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(place);
    file.put(c);
    file.close();
    fs::last_write_time(path, fs::last_write_time(path) + std::chrono::seconds(1));
  };
  for (const int64_t place : {int64_t{0}, size - 1}) {
    std::ofstream(path, std::ios::binary) << std::string(size_t(size), 'a');
    const data::TokenFile file = data::open_tokens(path);
    with(place, 'a');
    CHECK(error_of([&] { data::read_tokens(file, 5, 1); }) == "");
    with(place, 'b');
    CHECK(error_of([&] { data::read_tokens(file, 5, 1); }) != "");
  }
}

TEST_CASE("dataloader: more files than a process may have open") {
  TemporaryFolder folder;
  for (int i = 0; i < 1100; ++i)
    folder.write(std::to_string(10000 + i) + ".txt", std::string(5, char('a' + i % 26)));
  rlimit before, few;
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  few = before;
  few.rlim_cur = 500;
  REQUIRE(setrlimit(RLIMIT_NOFILE, &few) == 0);
  {
    DataLoader loader(folder.file("*.txt"), 4, 1, 0);
    REQUIRE(loader.sequences() == 1100);
    for (int64_t i : {0, 399, 400, 1099}) CHECK(read_sequence(loader, i, 4).inputs[0] == 'a' + i % 26);
  }
  CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST_CASE("dataloader: shards of other tokenizers, by their header or by the vocabulary that is given") {
  TemporaryFolder folder;
  std::vector<uint16_t> words;
  for (uint32_t token : {128000u, 65536u, 70001u, 3u, 128255u})
    words.insert(words.end(), {uint16_t(token), uint16_t(token >> 16)});
  const std::string llama = folder.write_shard("llama3.bin", words, 5, 20240801, 7);
  DataLoader loader(llama, 4, 1, 0);
  CHECK(loader.source().vocab_size() == 128256);
  CHECK(loader.source().separator() == 128000);
  CHECK(read_sequence(loader, 0, 4).inputs == std::vector<int32_t>{128000, 65536, 70001, 3});
  CHECK(read_sequence(loader, 0, 4).targets[3] == 128255);
  words[1] = 0xffff;
  const std::string bad = folder.write_shard("bad.bin", words, 5, 20240801, 7);
  DataLoader of_bad(bad, 4, 1, 0);
  CHECK(error_of([&] { read_sequence(of_bad, 0, 4); }) ==
        bad + ": token 0 is 4294964224, expected less than the vocabulary of 128256");

  const std::string other = folder.write_shard("other.bin", {1, 31999, 60000, 2, 1});
  const auto with_vocabulary = [&](int n) { return DataLoader(other, 4, 1, 0, 0, 1, Split::train, n); };
  CHECK(with_vocabulary(60001).source().vocab_size() == 60001);
  CHECK(with_vocabulary(60001).source().separator() == -1);
  CHECK(read_sequence(with_vocabulary(60001), 0, 4).inputs[2] == 60000);
  CHECK(error_of([&] { read_sequence(with_vocabulary(32000), 0, 4); }) ==
        other + ": token 2 is 60000, expected less than the vocabulary of 32000");
  CHECK(open_error(other + "," + llama) ==
        "data: '" + other + "' has a vocabulary of 50257, '" + llama + "' one of 128256, expected the same");
  const std::string text = folder.write("a.txt", "some text");
  CHECK(error_of([&] { DataLoader(text, 4, 1, 0, 0, 1, Split::train, 300); }) ==
        text + ": is text, whose bytes are tokens: expected no -vocab_size");
  CHECK(error_of([&] { DataLoader("", 4, 1, 0, 0, 1, Split::train, 300); }) ==
        "-vocab_size 300: the built-in stories are bytes");
}

TEST_CASE("dataloader: masking documents needs a token that separates them") {
  TemporaryFolder folder;
  std::vector<uint16_t> tokens = consecutive(0, 3000);
  folder.write_shard("a.bin", tokens);
  tokens.back() = 50256;
  folder.write_shard("b.bin", tokens);
  const std::string first = folder.file("a.bin");
  CHECK(error_of([&] { TokenSource(folder.file("*.bin")).require_separator(50256); }) == "");
  CHECK(error_of([&] { TokenSource(first).require_separator(2999); }) == "");
  CHECK(error_of([&] { TokenSource(first).require_separator(50256); }) ==
        "-mask_docs: none of the 3000 tokens of '" + first +
            "' is 50256, expected it at the start of every document (-separator)");
}

TEST_CASE("dataloader: short files of which much is dropped are said in one line") {
  TemporaryFolder folder;
  for (int i = 0; i < 10; ++i) folder.write(std::to_string(i) + ".txt", std::string(i < 5 ? 90 : 101, 'x'));
  const std::string spec = folder.file("*.txt");
  CHECK(TokenSource(spec).dropped(100) ==
        "data: '" + spec +
            "': 445 of 955 tokens in 10 file(s) are never read: a file's last ones that do not fill a "
            "sequence of 100; join the files into one, or lower -T");
  CHECK(TokenSource(spec).dropped(10) == "");  // 9 of each of the first five
  CHECK(TokenSource("").dropped(1000) == "");
}

TEST_CASE("dataloader: a token outside the vocabulary is reported when its sequence is read") {
  TemporaryFolder folder;
  std::vector<uint16_t> tokens = consecutive(0, 13);
  tokens[2] = 50256;
  tokens[8] = 50257;
  const std::string path = folder.write_shard("bad.bin", tokens);
  const std::string message = path + ": token 8 is 50257, expected less than the vocabulary of 50257";
  DataLoader loader(path, 4, 3, 0);
  CHECK(error_of([&] { read_sequence(loader, 0, 4); }) == "");
  CHECK(error_of([&] { read_sequence(loader, 1, 4); }) == message);  // as its last target
  CHECK(error_of([&] { read_sequence(loader, 2, 4); }) == message);  // as its first input
  CHECK(error_of([&] { next_batch(loader, 4); }) == message);
  CHECK(loader.position() == 0);
}

TEST_CASE("dataloader: what wrong arguments report") {
  CHECK(error_of([] { DataLoader("", 0, 1, 0); }) == "data: sequence length 0, expected at least 1");
  CHECK(error_of([] { DataLoader("", 4, 0, 0); }) == "data: global batch 0, expected at least 1");
  CHECK(error_of([] { DataLoader("", 4, 8, 0, 0, 3); }) ==
        "data: global batch 8 does not split over 3 ranks, expected a multiple");
  CHECK(error_of([] { DataLoader("", 4, 8, 0, 2, 2); }) == "data: rank 2 of 2, expected 0 <= rank < ranks");
  DataLoader loader("", 4, 8, 0);
  CHECK(error_of([&] { read_sequence(loader, -1, 4); }) ==
        "data: sequence -1, expected 0 <= sequence < 1048576");
  CHECK(error_of([&] { read_sequence(loader, 1 << 20, 4); }) ==
        "data: sequence 1048576, expected 0 <= sequence < 1048576");
}

TEST_CASE("built-in corpus: the same text for the same seed, another for another seed, split or index") {
  DataLoader loader("", 200, 2, 1), twin("", 200, 2, 1), other("", 200, 2, 2);
  DataLoader validation("", 200, 2, 1, 0, 1, Split::validation);
  CHECK(loader.source().is_builtin());
  CHECK(loader.source().is_bytes());
  CHECK(loader.source().vocab_size() == 256);
  CHECK(loader.sequences() == 1 << 20);
  CHECK(next_batch(loader, 200) == next_batch(twin, 200));
  std::set<std::vector<int32_t>> seen;
  for (int64_t i = 0; i < 200; ++i) {
    CHECK(read_sequence(loader, i, 200) == read_sequence(twin, i, 200));
    for (const DataLoader* source : {&loader, &other, &validation}) {
      seen.insert(read_sequence(*source, i, 200).inputs);
    }
  }
  CHECK(seen.size() == 600);
  stories::Writer writer = stories::sequence(1, Split::train, 0);
  writer.sentence();
  CHECK(writer.text == "Many years ago four friends lived in a quiet valley: Noah, Olive, Peter and Max.");
}

TEST_CASE(
    "built-in corpus: the floor is the mean of the targets' nats, the text is cut where the sequence ends") {
  DataLoader loader("", 1500, 1, 3);
  stories::Writer writer = stories::sequence(3, Split::train, 42);
  while (writer.text.size() < 1501) writer.sentence();
  const Batch batch = read_sequence(loader, 42, 1500);
  double sum = 0.0;
  for (int t = 0; t < 1500; ++t) {
    REQUIRE(batch.inputs[t] == writer.text[t]);
    REQUIRE(batch.targets[t] == writer.text[t + 1]);
    sum += writer.nats[t + 1];
  }
  CHECK(batch.entropy_floor == doctest::Approx(sum / 1500).epsilon(1e-12));
  CHECK(batch.entropy_floor > 0.1);
  CHECK(batch.entropy_floor < 0.3);
}

}  // namespace
