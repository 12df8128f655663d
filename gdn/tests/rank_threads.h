// Ranks as threads of one process: what they have in common, and an exchange (communicator.h) that copies from
// one thread's arrays to another's.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace gdn_tests {

// What ranks in threads have in common.
struct Together {
  explicit Together(int ranks) : ranks(ranks), pointers(size_t(ranks)) {}
  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const int64_t mine = round;
    if (++here == ranks) {
      here = 0;
      round++;
      all_here.notify_all();
    }
    all_here.wait(lock, [&] { return round != mine; });
  }
  const int ranks;
  std::vector<const void*> pointers;
  std::mutex mutex;
  std::condition_variable all_here;
  int here = 0;
  int64_t round = 0;
};

class ThreadExchange {
 public:
  ThreadExchange(Together& all, int rank) : all_(all), rank_(rank) {}

  void swap(int partner, float* received, const float* data, int pieces, size_t piece, size_t stride) {
    all_.pointers[size_t(rank_)] = data;
    all_.barrier();
    const float* const from = static_cast<const float*>(all_.pointers[size_t(partner)]);
    for (int p = 0; p < pieces; p++)
      std::copy_n(from + size_t(p) * stride, piece, received + size_t(p) * piece);
    all_.barrier();
  }
  template <class T>
  void gather_parts(T* data, size_t part) {
    all_.pointers[size_t(rank_)] = data;
    all_.barrier();
    for (int r = 0; r < all_.ranks; r++)
      if (r != rank_)
        std::copy_n(static_cast<const T*>(all_.pointers[size_t(r)]) + size_t(r) * part, part,
                    data + size_t(r) * part);
    all_.barrier();
  }
  template <class Calls>
  void together(const Calls& calls) {
    calls();
  }

 private:
  Together& all_;
  const int rank_;
};

// Calls rank(number) in a thread for each rank, and waits for them.
template <class Rank>
void in_threads(int ranks, const Rank& rank) {
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; r++) threads.emplace_back([&rank, r] { rank(r); });
  for (std::thread& t : threads) t.join();
}

}  // namespace gdn_tests
