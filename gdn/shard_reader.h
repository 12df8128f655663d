// Arrays that lie in shards on all ranks (master weights, moments), read by rank 0 while it writes a
// checkpoint, a piece at a time: rank 0 asks, those that have some of it send, until it says that it is done.
// So a checkpoint is written by one rank, with memory for one piece, and does not know how many there were.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "communicator.h"
#include "optimizer.h"
#include "parameters.h"

namespace gdn {

template <class Device>
class ShardReader {
 public:
  using real = typename Device::real;
  enum Array : int64_t { nothing, master, moment1, moment2 };

  ShardReader(Communicator& c, const Parameters<Device>& p, const Optimizer<Device>& optimizer)
      : c_(c), p_(p), optimizer_(optimizer) {}

  // Rank 0: bytes [begin, end) of an array as if it were whole, to host memory.
  void read(Array array, void* host, size_t begin, size_t end) {
    int64_t request[] = {array, int64_t(begin), int64_t(end)};
    c_.broadcast(request, sizeof request);
    for (int r = 0; r < p_.ranks; r++)
      each_piece(r, begin, end, [&](const ShardPart&, size_t from, size_t to) {
        char* const there = static_cast<char*>(host) + (from - begin);
        if (r == 0)
          download(there, array, from, to);
        else
          c_.receive(r, there, to - from);
      });
  }
  // Rank 0, when it has read all it wants, or has failed.
  void done() {
    int64_t request[] = {nothing, 0, 0};
    c_.broadcast(request, sizeof request);
  }
  // The other ranks, until rank 0 is done.
  void serve() {
    std::vector<char> host;
    for (;;) {
      int64_t request[3];
      c_.broadcast(request, sizeof request);
      if (request[0] == nothing) return;
      each_piece(p_.rank, size_t(request[1]), size_t(request[2]),
                 [&](const ShardPart&, size_t from, size_t to) {
                   host.resize(std::max(host.size(), to - from));
                   download(host.data(), Array(request[0]), from, to);
                   c_.send(0, host.data(), to - from);
                 });
    }
  }

 private:
  // Calls with what of bytes [begin, end) lies in each part of a rank's shard.
  template <class Call>
  void each_piece(int rank, size_t begin, size_t end, const Call& call) const {
    for (const ShardPart& part : p_.table.shard(rank, p_.ranks)) {
      const size_t from = std::max(begin, part.range.begin * sizeof(real)),
                   to = std::min(end, part.range.end * sizeof(real));
      if (from < to) call(part, from, to);
    }
  }

  // Of this rank's shard.
  void download(void* host, Array array, size_t begin, size_t end) const {
    each_piece(p_.rank, begin, end, [&](const ShardPart& part, size_t from, size_t to) {
      const real* const numbers = array == master    ? p_.master(part)
                                  : array == moment1 ? optimizer_.moment1(part.at)
                                                     : optimizer_.moment2(part.at);
      p_.dev.download(static_cast<char*>(host) + (from - begin),
                      reinterpret_cast<const char*>(numbers) + (from - part.range.begin * sizeof(real)),
                      to - from);
    });
  }

  Communicator& c_;
  const Parameters<Device>& p_;
  const Optimizer<Device>& optimizer_;
};

}  // namespace gdn
