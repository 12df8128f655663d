#include "communicator_cuda.h"

#include <set>
#include <stdexcept>
#include <string>

#ifdef GDN_NCCL
#include <nccl.h>
#endif

namespace gdn {

#ifdef GDN_NCCL

namespace {

void throw_if_failed(ncclResult_t status, const char* expression, const char* file, int line) {
  if (status == ncclSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + expression + ": " +
                           ncclGetErrorString(status));
}
#define nccl_check(expression) throw_if_failed((expression), #expression, __FILE__, __LINE__)

}  // namespace

struct Exchange<Cuda>::Nccl {
  explicit Nccl(Communicator& c) {
    ncclUniqueId id = {};
    if (c.first()) nccl_check(ncclGetUniqueId(&id));
    c.broadcast(&id, sizeof id);
    nccl_check(ncclCommInitRank(&comm, c.ranks(), id, c.rank()));
  }
  ~Nccl() { ncclCommDestroy(comm); }
  ncclComm_t comm = nullptr;
};

#else

struct Exchange<Cuda>::Nccl {
  explicit Nccl(Communicator&) {}
};

#endif

namespace {

#ifdef GDN_NCCL
constexpr bool kHasNccl = true;
#else
constexpr bool kHasNccl = false;
#endif

}  // namespace

// Whether any two ranks have the same GPU.
static bool shares_gpu(const Cuda& dev, Communicator& c) {
  const size_t size = dev.uuid.size();
  std::string all(size * size_t(c.ranks()), '\0');
  all.replace(size * size_t(c.rank()), size, dev.uuid);
  c.gather_parts(all.data(), size);
  std::set<std::string> different;
  for (int r = 0; r < c.ranks(); r++) different.insert(all.substr(size * size_t(r), size));
  return int(different.size()) < c.ranks();
}

Exchange<Cuda>::Exchange(Cuda& dev, Communicator& c, ExchangeBy by) : dev_(dev), c_(c) {
  const bool shared = shares_gpu(dev, c);
  if (by == ExchangeBy::nccl && !kHasNccl)
    throw std::runtime_error(
        "-comm nccl: this train_gdn was built without NCCL; install libnccl-dev and run make");
  if (by == ExchangeBy::nccl && shared)
    throw std::runtime_error(
        "-comm nccl: several ranks have the same GPU (" + std::to_string(c.local_ranks()) + " ranks here, " +
        std::to_string(dev.device_count) + " GPUs), expected one for each; -comm host lets them share");
  if (by == ExchangeBy::nccl || (by == ExchangeBy::automatic && kHasNccl && !shared))
    nccl_ = std::make_unique<Nccl>(c);
  // Of the highest priority: an exchange has few blocks, and the sooner they run, the sooner the other ranks
  // go on.
  int least = 0, greatest = 0;
  cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cuda_check(cudaStreamCreateWithPriority(&beside_, cudaStreamNonBlocking, greatest));
  cuda_check(cudaEventCreateWithFlags(&before_, cudaEventDisableTiming));
  cuda_check(cudaEventCreateWithFlags(&after_, cudaEventDisableTiming));
}

Exchange<Cuda>::~Exchange() {
  nccl_.reset();
  if (after_) cudaEventDestroy(after_);
  if (before_) cudaEventDestroy(before_);
  if (beside_) cudaStreamDestroy(beside_);
}

std::string Exchange<Cuda>::description() const {
#ifdef GDN_NCCL
  if (nccl_) {
    int version = 0;
    ncclGetVersion(&version);
    return "GPU data by NCCL " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) +
           "." + std::to_string(version % 100);
  }
#endif
  return std::string("GPU data staged through host memory and MPI") +
         (kHasNccl ? "" : " (built without NCCL)");
}

void* Exchange<Cuda>::host(std::unique_ptr<HostBuffer<Cuda, unsigned char>>& buffer, size_t& size,
                           size_t bytes) {
  if (bytes > size) {
    buffer.reset();
    buffer = std::make_unique<HostBuffer<Cuda, unsigned char>>(dev_, bytes);
    size = bytes;
  }
  return buffer->get();
}

void Exchange<Cuda>::swap(int partner, float* received, const float* data, int pieces, size_t piece,
                          size_t stride) {
#ifdef GDN_NCCL
  if (nccl_) {
    nccl_check(ncclGroupStart());
    for (int p = 0; p < pieces; p++) {
      nccl_check(ncclSend(data + size_t(p) * stride, piece, ncclFloat, partner, nccl_->comm, dev_.stream));
      nccl_check(ncclRecv(received + size_t(p) * piece, piece, ncclFloat, partner, nccl_->comm, dev_.stream));
    }
    nccl_check(ncclGroupEnd());
    return;
  }
#endif
  const size_t width = piece * sizeof(float), bytes = width * size_t(pieces);
  void *const out = host(out_, out_size_, bytes), *const in = host(in_, in_size_, bytes);
  cuda_check(cudaMemcpy2DAsync(out, width, data, stride * sizeof(float), width, size_t(pieces),
                               cudaMemcpyDeviceToHost, dev_.stream));
  dev_.synchronize();  // what was staged before has left, too
  c_.swap(partner, in, out, 1, bytes, bytes);
  dev_.upload(received, in, bytes);
}

void Exchange<Cuda>::gather_bytes(void* data, size_t bytes) {
  unsigned char* const mine = static_cast<unsigned char*>(data) + size_t(c_.rank()) * bytes;
#ifdef GDN_NCCL
  if (nccl_) {
    nccl_check(ncclAllGather(mine, data, bytes, ncclUint8, nccl_->comm, dev_.stream));
    return;
  }
#endif
  const size_t all = bytes * size_t(c_.ranks());
  void* const in = host(in_, in_size_, all);
  dev_.synchronize();
  dev_.download(static_cast<unsigned char*>(in) + size_t(c_.rank()) * bytes, mine, bytes);
  c_.gather_parts(in, bytes);
  dev_.upload(data, in, all);
}

void Exchange<Cuda>::begin_group() {
#ifdef GDN_NCCL
  if (nccl_) nccl_check(ncclGroupStart());
#endif
}

void Exchange<Cuda>::end_group() {
#ifdef GDN_NCCL
  if (nccl_) nccl_check(ncclGroupEnd());
#endif
}

}  // namespace gdn
