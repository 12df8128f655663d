// Reads and writes safetensors files (https://huggingface.co/docs/safetensors, "Format"):
//
//   8 bytes            N, the size of the header, little-endian
//   N bytes            JSON: {"__metadata__": {string: string}, NAME: {"dtype", "shape", "data_offsets"},
//   ...}
//                      padded with spaces to a multiple of 8
//   the rest           the tensors' elements, row-major and little-endian, without gaps; data_offsets are
//                      begin and end counted from the first byte after the header
//
// Tensors are written in the order of decreasing element size, so that each starts at a multiple of its
// element size, and streamed in pieces, so that tensors on a GPU pass through a small buffer.
//
// Errors are std::runtime_error with one line: the file, the tensor, the value seen and what was expected.
// The host is taken to be little-endian.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "regular_file.h"

namespace gdn {

// A tensor to be written. read copies bytes [offset, offset + bytes) of it to host memory; what it throws
// ends the writing.
struct TensorSource {
  std::string name, dtype;  // dtype: "F64", "F32", "BF16", "I64", "U8", ...
  std::vector<int64_t> shape;
  std::function<void(void* host, size_t offset, size_t bytes)> read;
};

// A tensor in host memory, which must live until it is written.
inline TensorSource from_host(std::string name, std::string dtype, std::vector<int64_t> shape,
                              const void* data) {
  const auto read = [data](void* host, size_t offset, size_t bytes) {
    std::memcpy(host, static_cast<const char*>(data) + offset, bytes);
  };
  return {std::move(name), std::move(dtype), std::move(shape), read};
}

// Size and XXH64 of all bytes of a file, as `xxhsum -H1` prints it.
struct FileDigest {
  uint64_t size = 0, checksum = 0;

  bool operator==(const FileDigest& other) const { return size == other.size && checksum == other.checksum; }
};

// Writes and fsyncs a file with the tensors and the metadata, replacing what was there. Throws on unknown
// dtypes, on negative dimensions, on a name given twice, and when the file cannot be written (a full disk);
// the incomplete file then stays.
FileDigest write_safetensors(const std::string& path, const std::vector<TensorSource>& tensors,
                             const std::map<std::string, std::string>& metadata);

// Writes and fsyncs a file with these bytes, replacing what was there. Throws when that fails.
FileDigest write_text_file(const std::string& path, const std::string& text);

// Reads a file and returns its digest. Throws when it cannot be read.
FileDigest digest_file(const std::string& path);

// A tensor in a file, which stays open as long as a view of it lives.
struct TensorView {
  std::string name, dtype;
  std::vector<int64_t> shape;
  uint64_t offset = 0;  // of its first byte in the file
  size_t bytes = 0;
  std::shared_ptr<const RegularFile> file;

  // Bytes [begin, begin + count) of the tensor. Throws when they cannot be read, and when the file changed
  // since it was opened.
  void read(void* to, size_t begin, size_t count) const { file->read(to, offset + begin, count); }
};

// ---------------------------------------------------------------------------------------------------------

namespace safetensors {

constexpr size_t kPiece = size_t{32} << 20;           // bytes of a tensor read and written at a time
constexpr uint64_t kMaxHeader = uint64_t{100} << 20;  // the format's own limit
constexpr char kMetadata[] = "__metadata__";

[[noreturn]] inline void fail(const std::string& path, const std::string& message) {
  throw std::runtime_error(path + ": " + message);
}

[[noreturn]] inline void fail_tensor(const std::string& path, const std::string& name,
                                     const std::string& message) {
  fail(path, "tensor '" + name + "': " + message);
}

[[noreturn]] inline void fail_errno(const std::string& path, const char* action) {
  fail(path, std::string("cannot ") + action + ": " + std::strerror(errno));
}

// XXH64 with seed 0 (Yann Collet, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md) of bytes
// that come in pieces of any size: four lanes each multiply and rotate every fourth 64-bit word.
class Xxh64 {
 public:
  void update(const void* data, size_t bytes) {
    const uint8_t* p = static_cast<const uint8_t*>(data);
    const size_t waiting = size_ % kStripe;
    size_ += bytes;
    if (waiting > 0) {
      const size_t taken = std::min(bytes, kStripe - waiting);
      std::memcpy(tail_ + waiting, p, taken);
      if (waiting + taken < kStripe) return;
      stripe(tail_);
      p += taken;
      bytes -= taken;
    }
    for (; bytes >= kStripe; p += kStripe, bytes -= kStripe) stripe(p);
    if (bytes > 0) std::memcpy(tail_, p, bytes);
  }

  // Of all bytes so far.
  uint64_t digest() const {
    uint64_t hash = kPrime5;
    if (size_ >= kStripe) {
      hash = rotate(lanes_[0], 1) + rotate(lanes_[1], 7) + rotate(lanes_[2], 12) + rotate(lanes_[3], 18);
      for (const uint64_t lane : lanes_) hash = (hash ^ round(0, lane)) * kPrime1 + kPrime4;
    }
    hash += size_;
    const uint8_t* p = tail_;
    const uint8_t* const end = tail_ + size_ % kStripe;
    for (; end - p >= 8; p += 8) hash = rotate(hash ^ round(0, load<uint64_t>(p)), 27) * kPrime1 + kPrime4;
    for (; end - p >= 4; p += 4) hash = rotate(hash ^ load<uint32_t>(p) * kPrime1, 23) * kPrime2 + kPrime3;
    for (; p < end; p++) hash = rotate(hash ^ *p * kPrime5, 11) * kPrime1;
    hash = (hash ^ hash >> 33) * kPrime2;
    hash = (hash ^ hash >> 29) * kPrime3;
    return hash ^ hash >> 32;
  }

  uint64_t size() const { return size_; }

 private:
  static constexpr uint64_t kPrime1 = 0x9e3779b185ebca87, kPrime2 = 0xc2b2ae3d27d4eb4f,
                            kPrime3 = 0x165667b19e3779f9, kPrime4 = 0x85ebca77c2b2ae63,
                            kPrime5 = 0x27d4eb2f165667c5;
  static constexpr size_t kStripe = 32;

  template <class T>
  static uint64_t load(const uint8_t* p) {
    T word;
    std::memcpy(&word, p, sizeof word);
    return word;
  }
  static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
  static uint64_t round(uint64_t lane, uint64_t word) { return rotate(lane + word * kPrime2, 31) * kPrime1; }

  void stripe(const uint8_t* p) {
    for (int i = 0; i < 4; i++) lanes_[i] = round(lanes_[i], load<uint64_t>(p + 8 * i));
  }

  uint64_t lanes_[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
  uint8_t tail_[kStripe] = {};  // the bytes after the last whole stripe
  uint64_t size_ = 0;
};

// An open file, closed with its owner.
struct OpenFile {
  // Throws when the file cannot be opened.
  OpenFile(const std::string& path, int flags) : path(path), descriptor(open(path.c_str(), flags, 0666)) {
    if (descriptor < 0) fail_errno(path, "open");
  }
  ~OpenFile() { close(descriptor); }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const std::string path;
  const int descriptor;
};

// A file being written, and the digest of what was.
class Writer {
 public:
  explicit Writer(const std::string& path) : file_(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC) {}

  // Throws when not all bytes could be written.
  void write(const void* data, size_t bytes) {
    hash_.update(data, bytes);
    const char* p = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::write(file_.descriptor, p, bytes);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail_errno(file_.path, "write");
      p += written;
      bytes -= size_t(written);
    }
  }

  // Throws when the bytes did not reach the disk.
  FileDigest finish() {
    if (fsync(file_.descriptor) != 0) fail_errno(file_.path, "write");
    return {hash_.size(), hash_.digest()};
  }

 private:
  OpenFile file_;
  Xxh64 hash_;
};

// Bytes of an element, 0 for dtypes unknown here.
inline int64_t element_size(const std::string& dtype) {
  static const std::map<std::string, int64_t> sizes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
      {"BF16", 2}, {"U32", 4}, {"I32", 4}, {"F32", 4},     {"U64", 8},     {"I64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  return found == sizes.end() ? 0 : found->second;
}

inline std::string shape_text(const std::vector<int64_t>& shape) {
  return json_text(Json::Array(shape.begin(), shape.end()));
}

// Bytes of a tensor. Throws, naming neither file nor tensor, on unknown dtypes, negative dimensions and more
// than 2^63 - 1 bytes.
inline int64_t tensor_bytes(const std::string& dtype, const std::vector<int64_t>& shape) {
  int64_t bytes = element_size(dtype);
  if (bytes == 0)
    throw std::runtime_error("dtype '" + dtype + "', expected F64, F32, F16, BF16, I64, ..., U8 or BOOL");
  bool overflow = false;
  for (const int64_t size : shape) {
    if (size < 0) throw std::runtime_error("shape " + shape_text(shape) + ", expected sizes from 0");
    overflow = __builtin_mul_overflow(bytes, size, &bytes) || overflow;
  }
  if (overflow) throw std::runtime_error("shape " + shape_text(shape) + " is too large");
  return bytes;
}

// The header's entry of a tensor whose data start at `begin`, which moves to their end.
inline Json header_entry(const TensorSource& tensor, int64_t& begin) {
  int64_t end;
  if (__builtin_add_overflow(begin, tensor_bytes(tensor.dtype, tensor.shape), &end))
    throw std::runtime_error("shape " + shape_text(tensor.shape) + " is too large");
  return Json::Object{{"dtype", tensor.dtype},
                      {"shape", Json::Array(tensor.shape.begin(), tensor.shape.end())},
                      {"data_offsets", Json::Array{std::exchange(begin, end), end}}};
}

// The first bytes of a file with these tensors in this order: N and the padded header.
inline std::string header_bytes(const std::string& path, const std::vector<TensorSource>& tensors,
                                const std::map<std::string, std::string>& metadata) {
  Json::Object header;
  if (!metadata.empty()) header.emplace_back(kMetadata, Json::Object(metadata.begin(), metadata.end()));
  std::set<std::string> names = {kMetadata};
  int64_t end = 0;
  for (const TensorSource& tensor : tensors) {
    if (!names.insert(tensor.name).second)
      fail_tensor(path, tensor.name, "this name is taken, expected a new one");
    try {
      header.emplace_back(tensor.name, header_entry(tensor, end));
    } catch (const std::runtime_error& e) {
      fail_tensor(path, tensor.name, e.what());
    }
  }
  std::string text = json_text(header);
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t size = text.size();
  if (size > kMaxHeader)
    fail(path,
         "header of " + std::to_string(size) + " bytes, expected at most " + std::to_string(kMaxHeader));
  return std::string(reinterpret_cast<const char*>(&size), sizeof size) + text;
}

}  // namespace safetensors

// The tensors of a safetensors file, or of several that an index names. The files stay open as long as the
// object, one it was copied to, or a view lives.
class SafetensorsFile {
 public:
  // No file: holds no tensors.
  SafetensorsFile() = default;

  // Throws unless the header is right in everything: its size, its JSON, known dtypes, each name once, sizes
  // that match shapes, and data that fill the file without gap or overlap.
  explicit SafetensorsFile(const std::string& path) : path_(path) { add(path); }

  // The tensors of the files in which `index` (Hugging Face's model.safetensors.index.json) says they are.
  // Throws where a file holds other tensors than the index says, and as above.
  static SafetensorsFile sharded(const std::string& index) {
    SafetensorsFile all;
    all.path_ = index;
    const Json json = read_json_file(index);
    const size_t folder = index.rfind('/') + 1;
    std::map<std::string, std::string> weight_map;
    std::set<std::string> files;
    try {
      for (const auto& [name, file] : json.object("weight_map")) {
        const std::string* text = std::get_if<std::string>(&file.value);
        if (!text || text->empty() || text->find('/') != std::string::npos)
          throw std::runtime_error("'weight_map' has " + json::described(file) + " for '" + name +
                                   "', expected the name of a file beside it");
        weight_map[name] = *text;
        files.insert(*text);
      }
    } catch (const std::runtime_error& e) {
      all.fail(e.what());
    }
    for (const std::string& file : files) {
      const std::string path = index.substr(0, folder) + file;
      const size_t before = all.names_.size();
      all.add(path);
      for (size_t i = before; i < all.names_.size(); i++)
        if (const auto at = weight_map.find(all.names_[i]); at == weight_map.end() || at->second != file)
          safetensors::fail_tensor(
              path, all.names_[i],
              at == weight_map.end() ? "is not in " + index : "is in " + at->second + " by " + index);
    }
    for (const auto& [name, file] : weight_map)
      if (!all.find(name))
        safetensors::fail_tensor(index.substr(0, folder) + file, name, "is missing, expected it by " + index);
    return all;
  }

  // The tensor, or nullptr where there is none of that name.
  const TensorView* find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }

  // The tensor; throws when there is none of that name.
  const TensorView& at(const std::string& name) const {
    if (const TensorView* view = find(name)) return *view;
    fail("tensor '" + name + "' is missing");
  }

  const std::string& path() const { return path_; }                 // of the file, or of the index
  const std::vector<std::string>& names() const { return names_; }  // in the order of the data
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  [[noreturn]] void fail(const std::string& message) const { safetensors::fail(path_, message); }

  void add(const std::string& path) { Reader(*this, path).read(); }

  // Reads the header of one file.
  class Reader {
   public:
    Reader(SafetensorsFile& all, const std::string& path)
        : all_(all), path_(path), file_(std::make_shared<const RegularFile>(path)) {}

    void read() {
      const uint64_t header_size = read_header_size();
      std::string text(size_t(header_size), '\0');
      file_->read(text.data(), 8, text.size());
      const Json header = parse_json(text, path_ + " (header)");
      if (!header.is<Json::Object>()) fail("header is " + json::described(header) + ", expected an object");
      start_ = 8 + header_size;
      data_bytes_ = file_->size() - start_;
      index(read_header(header));
    }

   private:
    [[noreturn]] void fail(const std::string& message) const { safetensors::fail(path_, message); }

    uint64_t read_header_size() const {
      const uint64_t file_size = file_->size();
      char begin[64] = {};
      file_->read(begin, 0, size_t(std::min<uint64_t>(file_size, sizeof begin)));
      if (std::string(begin, sizeof begin).rfind("version https://git-lfs.github.com/spec/", 0) == 0)
        fail("is a Git LFS pointer, not the weights; fetch them with git lfs pull");
      if (file_size < 8)
        fail(std::to_string(file_size) + " bytes, expected at least the 8 of the header's size");
      uint64_t size;
      std::memcpy(&size, begin, sizeof size);
      const uint64_t limit = std::min<uint64_t>(file_size - 8, safetensors::kMaxHeader);
      if (size > limit)
        fail("header size " + std::to_string(size) + ", expected at most " + std::to_string(limit) +
             " in a file of " + std::to_string(file_size) + " bytes");
      return size;
    }

    void read_metadata(const Json& entries) {
      if (!entries.is<Json::Object>())
        fail("__metadata__ is " + json::described(entries) + ", expected an object");
      for (const auto& [key, value] : std::get<Json::Object>(entries.value)) {
        if (!value.is<std::string>())
          fail("__metadata__ '" + key + "' is " + json::described(value) + ", expected a string");
        all_.metadata_[key] = std::get<std::string>(value.value);
      }
    }

    // The integers of an array in a header entry; throws, naming neither file nor tensor, unless all are at
    // least 0.
    static std::vector<int64_t> read_sizes(const Json& entry, const std::string& key) {
      std::vector<int64_t> sizes;
      for (const Json& item : entry.array(key)) {
        const int64_t* size = std::get_if<int64_t>(&item.value);
        if (!size || *size < 0)
          throw std::runtime_error("'" + key + "' holds " + json::described(item) +
                                   ", expected integers from 0");
        sizes.push_back(*size);
      }
      return sizes;
    }

    // The view that an entry of the header describes; throws, naming neither file nor tensor, where its parts
    // contradict each other or the size of the data.
    TensorView read_entry(const std::string& name, const Json& entry) const {
      TensorView view{name, entry.string("dtype"), read_sizes(entry, "shape"), 0, 0, file_};
      view.bytes = size_t(safetensors::tensor_bytes(view.dtype, view.shape));
      const std::vector<int64_t> offsets = read_sizes(entry, "data_offsets");
      const std::string offsets_text = "'data_offsets' " + safetensors::shape_text(offsets);
      if (offsets.size() != 2 || offsets[0] > offsets[1])
        throw std::runtime_error(offsets_text + ", expected begin and end");
      if (uint64_t(offsets[1]) > data_bytes_)
        throw std::runtime_error(offsets_text + ", but the file has " + std::to_string(data_bytes_) +
                                 " bytes of data");
      if (size_t(offsets[1] - offsets[0]) != view.bytes)
        throw std::runtime_error(offsets_text + ", expected a span of " + std::to_string(view.bytes) +
                                 " bytes for " + view.dtype + " " + safetensors::shape_text(view.shape));
      view.offset = start_ + uint64_t(offsets[0]);
      return view;
    }

    std::vector<TensorView> read_header(const Json& header) {
      std::vector<TensorView> views;
      for (const auto& [name, entry] : std::get<Json::Object>(header.value)) {
        if (name == safetensors::kMetadata) {
          read_metadata(entry);
          continue;
        }
        try {
          views.push_back(read_entry(name, entry));
        } catch (const std::runtime_error& e) {
          safetensors::fail_tensor(path_, name, e.what());
        }
      }
      return views;
    }

    // Takes the views in the order of their data; throws unless these fill the file without gap or overlap.
    void index(std::vector<TensorView> views) {
      std::sort(views.begin(), views.end(), [](const TensorView& a, const TensorView& b) {
        return std::make_pair(a.offset, a.bytes) < std::make_pair(b.offset, b.bytes);
      });
      uint64_t end = start_;
      for (TensorView& view : views) {
        if (view.offset != end)
          safetensors::fail_tensor(path_, view.name,
                                   "data start at byte " + std::to_string(view.offset - start_) +
                                       ", expected " + std::to_string(end - start_) +
                                       ", where those before end");
        end += view.bytes;
        all_.names_.push_back(view.name);
        if (!all_.tensors_.emplace(view.name, view).second)
          safetensors::fail_tensor(path_, view.name, "is in another file of the same model, too");
      }
      if (end - start_ != data_bytes_)
        fail(std::to_string(data_bytes_) + " bytes of data, expected " + std::to_string(end - start_) +
             " from the header");
    }

    SafetensorsFile& all_;
    const std::string path_;
    const std::shared_ptr<const RegularFile> file_;
    uint64_t start_ = 0, data_bytes_ = 0;  // of the data
  };

  std::string path_;
  std::vector<std::string> names_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

inline FileDigest write_safetensors(const std::string& path, const std::vector<TensorSource>& tensors,
                                    const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSource> sorted = tensors;
  std::stable_sort(sorted.begin(), sorted.end(), [](const TensorSource& a, const TensorSource& b) {
    return safetensors::element_size(a.dtype) > safetensors::element_size(b.dtype);
  });
  const std::string header = safetensors::header_bytes(path, sorted, metadata);
  safetensors::Writer writer(path);
  writer.write(header.data(), header.size());
  std::vector<char> buffer;
  for (const TensorSource& tensor : sorted) {
    const size_t bytes = size_t(safetensors::tensor_bytes(tensor.dtype, tensor.shape));
    buffer.resize(std::max(buffer.size(), std::min(bytes, safetensors::kPiece)));
    for (size_t offset = 0; offset < bytes; offset += safetensors::kPiece) {
      const size_t piece = std::min(bytes - offset, safetensors::kPiece);
      tensor.read(buffer.data(), offset, piece);
      writer.write(buffer.data(), piece);
    }
  }
  return writer.finish();
}

inline FileDigest write_text_file(const std::string& path, const std::string& text) {
  safetensors::Writer writer(path);
  writer.write(text.data(), text.size());
  return writer.finish();
}

inline FileDigest digest_file(const std::string& path) {
  const RegularFile file(path);
  safetensors::Xxh64 hash;
  std::vector<char> buffer(size_t{1} << 20);
  for (uint64_t offset = 0; offset < file.size(); offset += buffer.size()) {
    const size_t piece = size_t(std::min<uint64_t>(buffer.size(), file.size() - offset));
    file.read(buffer.data(), offset, piece);
    hash.update(buffer.data(), piece);
  }
  return {hash.size(), hash.digest()};
}

}  // namespace gdn
