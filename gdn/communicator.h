// The ranks of a run: one process a GPU (or a share of a CPU), started by mpirun or srun. What the host says
// to the other ranks goes over MPI (gdn/communicator.cpp; built where make found MPI); what lies on a device
// travels by an Exchange, which the training step and the optimizer call:
//
//   Cpu     MPI, straight from and to the arrays                                       (this file)
//   Cuda    NCCL, or staged through host memory and MPI where ranks share a GPU (gdn/communicator_cuda.h)
//
// The number of ranks is a power of two. Every sum over them is taken in the order of a binary tree over the
// ranks (neighbours first), so that it goes on where the tree over a rank's micro-batches ends
// (training_step.h).
//
// Every rank has to make the same calls in the same order. A rank that cannot go on says why in one line and
// ends all (abort). One that dies, or is not heard of for a while, is named by another, and all end (Watch,
// in communicator.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.h"

namespace gdn {

// What this rank throws where another one cannot go on, and says why.
struct OtherRankFailed : std::runtime_error {
  OtherRankFailed() : std::runtime_error("another rank failed") {}
};

class Communicator {
 public:
  Communicator();  // one process, no other rank
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // How many ranks mpirun or srun started with this one, by the environment; 1 where nobody did.
  static int launched();
  // Which of them this one is, by the environment, before it has joined the others; 0 where nobody did.
  static int launched_rank();
  static bool has_launcher();
  // Throws one line where several were started and this program was built without MPI.
  static void require_mpi_if_launched();
  // Joins the ranks that were started; nothing where that is one. A rank that is not heard of for `timeout`
  // seconds ends all. Throws one line where MPI sees other ranks than were started.
  void join(double timeout);
  // Waits for all ranks and leaves. No calls afterwards.
  void leave();

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  bool first() const { return rank_ == 0; }
  // Among the ranks on this host.
  int local_rank() const { return local_rank_; }
  int local_ranks() const { return local_ranks_; }

  void barrier();
  void broadcast(void* data, size_t bytes);  // from rank 0
  std::string broadcast(const std::string& text);
  // The largest number of all ranks, for each of several.
  std::vector<int64_t> agree(std::vector<int64_t> numbers);
  int64_t agree(int64_t number) { return agree(std::vector<int64_t>{number})[0]; }
  // Every rank's number, by rank.
  std::vector<double> gather(double number);
  // Their mean, summed in tree order.
  double mean(double number);
  // The numbers' sum over the ranks, of which all but one have 0 at each place.
  void add_up(std::vector<double>& numbers);

  // Throws one line, naming rank, thing and both values, where a rank has another value than rank 0 under a
  // name.
  void compare(const std::vector<std::pair<std::string, std::string>>& values);

  // Host memory. Sends `pieces` pieces of `bytes` bytes, the first at `data`, each `stride` bytes behind the
  // last, and receives as many from the partner, one behind the other.
  void swap(int partner, void* received, const void* data, int pieces, size_t bytes, size_t stride);
  // Every rank's part, `bytes` at data + rank * bytes, becomes all ranks'.
  void gather_parts(void* data, size_t bytes);
  void send(int to, const void* data, size_t bytes);
  void receive(int from, void* data, size_t bytes);

  // Seconds that this rank has waited in these calls.
  double seconds_waited() const { return seconds_; }
  // A step of the training that takes longer than this without waiting for others hangs, and ends all; 0: no
  // limit.
  void limit_step(double seconds);

  // Says "rank R: line" (the first rank: the line) and ends all ranks, with exit code 1. Where all fail for
  // the same reason rank 0 is the one to say it.
  [[noreturn]] void abort(const std::string& line);
  // The same, for a rank that leaves it to another to say why (OtherRankFailed).
  [[noreturn]] void abort_after_another();

 private:
  [[noreturn]] void abort_silently();

  template <class Call>
  void timed(const Call& call);

  int rank_ = 0, ranks_ = 1, local_rank_ = 0, local_ranks_ = 1;
  double seconds_ = 0;
  struct Watch;
  std::unique_ptr<Watch> watch_;
};

// The number of ranks that divides a step into equal subtrees: throws one line naming the next that do.
void require_ranks(int ranks, int64_t micro_batches);

// The sum of `numbers` [a power of two] in the order of a binary tree.
inline double tree_sum(std::vector<double> numbers) {
  for (size_t n = numbers.size() / 2; n > 0; n /= 2)
    for (size_t i = 0; i < n; i++) numbers[i] = numbers[2 * i] + numbers[2 * i + 1];
  return numbers[0];
}

// ---- arrays on a device -----------------------------------------------------------------------------------

// How arrays on a GPU travel: by NCCL, staged through host memory, or by NCCL where that is possible.
enum class ExchangeBy { automatic, nccl, host };
inline const char* name(ExchangeBy by) {
  constexpr const char* names[] = {"auto", "nccl", "host"};
  return names[int(by)];
}

template <class Device>
class Exchange;

template <class Real>
class Exchange<Cpu<Real>> {
 public:
  // Throws one line where NCCL is asked for.
  Exchange(Cpu<Real>&, Communicator& c, ExchangeBy by) : c_(c) {
    if (by == ExchangeBy::nccl) throw std::runtime_error("-comm nccl: needs GPUs, this run is on the CPU");
  }

  // Whether its calls may be recorded in a graph (device.h).
  static constexpr bool in_graph() { return true; }
  static std::string description() { return "data by MPI"; }

  // Sends `pieces` pieces of `piece` numbers, the first at `data`, each `stride` numbers behind the last, and
  // receives as many from the partner, one behind the other.
  void swap(int partner, Real* received, const Real* data, int pieces, size_t piece, size_t stride) {
    c_.swap(partner, received, data, pieces, piece * sizeof(Real), stride * sizeof(Real));
  }
  // Every rank's part, `part` numbers at data + rank * part, becomes all ranks'.
  template <class T>
  void gather_parts(T* data, size_t part) {
    c_.gather_parts(data, part * sizeof(T));
  }
  // Calls of gather_parts that may go at once.
  template <class Calls>
  void together(const Calls& calls) {
    calls();
  }
  // On a GPU calls may go on beside the layers; here they are done at once.
  template <class Calls>
  void beside(const Calls& calls) {
    calls();
  }
  void join() {}

 private:
  Communicator& c_;
};

// data [ranks * part]: of this rank's part the sum over the ranks, in the order of a binary tree over them;
// what lies in the other parts is lost. received [ranks / 2 * part] is work space. Recursive halving:
// neighbours exchange one half of the array each, then pairs of neighbours a quarter, and so on: (ranks - 1)
// / ranks of the array in all, most of it between ranks that lie near each other.
template <class Device>
void sum_parts(Device& dev, Exchange<Device>& exchange, int rank, int ranks, typename Device::real* data,
               size_t part, typename Device::real* received) {
  for (int bit = 1; bit < ranks; bit *= 2) {
    const int partner = rank ^ bit, step = 2 * bit, pieces = ranks / step;
    // The parts p that this rank is left with are those with p % step = rank % step.
    exchange.swap(partner, received, data + size_t(partner % step) * part, pieces, part, size_t(step) * part);
    add_pieces(dev, data + size_t(rank % step) * part, received, pieces, part, size_t(step) * part);
  }
}

}  // namespace gdn
