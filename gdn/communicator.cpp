#include "communicator.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "terminal_text.h"

#ifdef GDN_MPI
#define OMPI_SKIP_MPICXX 1
#include <mpi.h>
#endif

namespace gdn {

namespace {

void sleep_for(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// The variables in which Open MPI, MPICH and its relatives, and Slurm (of the step, not of the whole
// allocation) say how many they started.
constexpr const char* kLaunched[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MV2_COMM_WORLD_SIZE",
                                     "SLURM_STEP_NUM_TASKS"};

}  // namespace

int Communicator::launched() {
  for (const char* variable : kLaunched)
    if (const char* text = std::getenv(variable))
      if (const int n = std::atoi(text); n > 0) return n;
  return 1;
}

int Communicator::launched_rank() {
  int rank = 0;
  for (const char* variable :
       {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID"})
    if (const char* text = std::getenv(variable)) rank = std::max(rank, std::atoi(text));
  return rank;
}

bool Communicator::has_launcher() {
  for (const char* variable : kLaunched)
    if (std::getenv(variable)) return true;
  return false;
}

void require_ranks(int ranks, int64_t micro_batches) {
  const auto fits = [&](int64_t r) { return (r & (r - 1)) == 0 && micro_batches % r == 0; };
  if (fits(ranks)) return;
  int64_t below = ranks - 1, above = ranks + 1;
  while (!fits(below)) below--;
  while (above <= micro_batches && !fits(above)) above++;
  throw std::runtime_error(
      std::to_string(ranks) + " ranks: a step has " + std::to_string(micro_batches) +
      " micro-batches (-B over -b), expected a power of two of ranks that divides them: " +
      std::to_string(below) + (above <= micro_batches ? " or " + std::to_string(above) : ""));
}

std::vector<double> Communicator::gather(double number) {
  std::vector<double> numbers(size_t(ranks_), number);
  gather_parts(numbers.data(), sizeof(double));
  return numbers;
}

double Communicator::mean(double number) { return tree_sum(gather(number)) / ranks_; }

std::string Communicator::broadcast(const std::string& text) {
  uint64_t size = text.size();
  broadcast(&size, sizeof size);
  std::string all = text;
  all.resize(size);
  broadcast(all.data(), size);
  return all;
}

void Communicator::compare(const std::vector<std::pair<std::string, std::string>>& values) {
  if (ranks_ == 1) return;
  std::string mine, wrong;
  for (const auto& [name, value] : values) mine += name + '\0' + value + '\0';
  const std::string expected = broadcast(mine);
  for (size_t at = 0, i = 0; mine != expected && wrong.empty() && at < expected.size(); i++) {
    const std::string name = expected.c_str() + at, value = expected.c_str() + at + name.size() + 1;
    at += name.size() + value.size() + 2;
    if (i >= values.size() || values[i].first != name)
      wrong = "has no " + name + ", rank 0 has " + value;
    else if (values[i].second != value)
      wrong = "has " + name + " " + values[i].second + ", rank 0 has " + value + "; expected the same";
  }
  if (mine != expected && wrong.empty()) wrong = "has other settings than rank 0";
  if (agree(!wrong.empty()) == 0) return;
  if (wrong.empty()) throw OtherRankFailed();
  throw std::runtime_error(wrong);
}

#ifndef GDN_MPI

struct Communicator::Watch {};

void Communicator::require_mpi_if_launched() {
  if (launched() > 1)
    throw std::runtime_error(
        std::to_string(launched()) +
        " ranks were started, but this train_gdn was built without MPI, expected one process; "
        "apt-get install openmpi-bin libopenmpi-dev, and make");
}
void Communicator::join(double) { require_mpi_if_launched(); }
void Communicator::leave() {}
void Communicator::barrier() {}
void Communicator::broadcast(void*, size_t) {}
std::vector<int64_t> Communicator::agree(std::vector<int64_t> numbers) { return numbers; }
void Communicator::add_up(std::vector<double>&) {}
void Communicator::gather_parts(void*, size_t) {}
void Communicator::swap(int, void*, const void*, int, size_t, size_t) {}
void Communicator::send(int, const void*, size_t) {}
void Communicator::receive(int, void*, size_t) {}
void Communicator::limit_step(double) {}
void Communicator::abort_silently() { std::exit(1); }
void Communicator::abort_after_another() { std::exit(1); }

#else

namespace {

using Clock = std::chrono::steady_clock;

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

// A thread of each rank that looks whether the others are there. Every second each rank sends rank 0 a word,
// and rank 0 sends each one; who is silent for `timeout` seconds (the process is gone, stopped, or its host
// is) is named by rank 0 or, where rank 0 is the silent one, by the others, and all end. It also ends a step
// of this rank that hangs.
struct Communicator::Watch {
  Watch(Communicator& c, double timeout) : c_(c), timeout_(timeout) {
    MPI_Comm_dup(MPI_COMM_WORLD, &comm_);
    thread_ = std::thread([this] { run(); });
  }
  ~Watch() {
    leaving_ = true;
    thread_.join();
    MPI_Comm_free(&comm_);
  }

  std::atomic<bool> waiting{false};  // the main thread waits in a call
  std::atomic<int64_t> since{0};  // nanoseconds of the clock at which it last came from one, or a step began
  std::atomic<double> limit{0};   // seconds of a step without waiting
  std::atomic<bool> leaving_{false};

 private:
  struct Peer {
    int rank;
    Clock::time_point heard;
    MPI_Request sending = MPI_REQUEST_NULL;
    bool left = false;
  };
  enum Word : int { here, leaving };

  void run() {
    const auto start = Clock::now();
    std::vector<Peer> peers;
    for (int r = c_.rank_ == 0 ? 1 : 0; r < (c_.rank_ == 0 ? c_.ranks_ : 1); r++) peers.push_back({r, start});
    int word = here;
    auto sent = start - std::chrono::hours(1), before = start;
    while (!leaving_) {
      auto now = Clock::now();
      if (seconds_between(before, now) > timeout_ / 2) {  // it is this process that was stopped
        for (Peer& p : peers) p.heard = now;
        since = now.time_since_epoch().count();
      }
      before = now;
      if (seconds_between(sent, now) >= std::min(1.0, timeout_ / 4)) {
        for (Peer& p : peers) send(p, word);
        sent = now;
      }
      for (Peer& p : peers) listen(p);
      now = Clock::now();
      for (Peer& p : peers) {
        // Where rank 0 is silent, the first of the others is to say it.
        const double patience = timeout_ + 0.5 * std::max(0, c_.rank_ - 1);
        if (p.left || seconds_between(p.heard, now) < patience) continue;
        end("rank " + std::to_string(p.rank) + " has not been heard of for " +
            std::to_string(int(timeout_ + 0.5)) + " s; all ranks end, the last checkpoint stays");
      }
      if (limit > 0 && !waiting) {
        const double busy = 1e-9 * double(now.time_since_epoch().count() - since.load());
        if (busy > limit)
          end("rank " + std::to_string(c_.rank_) + " hangs: its step has not ended in " +
              std::to_string(int(busy + 0.5)) + " s; all ranks end, the last checkpoint stays");
      }
      sleep_for(std::min(0.1, timeout_ / 20));
    }
    // Whoever leaves is not missed.
    word = leaving;
    for (Peer& p : peers) {
      if (p.sending != MPI_REQUEST_NULL) MPI_Wait(&p.sending, MPI_STATUS_IGNORE);
      MPI_Send(&word, 1, MPI_INT, p.rank, 0, comm_);
    }
    for (Peer& p : peers)
      while (!p.left) {
        listen(p);
        sleep_for(0.001);
      }
  }

  void send(Peer& p, int& word) {
    if (p.left) return;
    int done = 1;
    if (p.sending != MPI_REQUEST_NULL) MPI_Test(&p.sending, &done, MPI_STATUS_IGNORE);
    if (done) MPI_Isend(&word, 1, MPI_INT, p.rank, 0, comm_, &p.sending);
  }

  void listen(Peer& p) {
    for (int there = 1; there && !p.left;) {
      MPI_Iprobe(p.rank, 0, comm_, &there, MPI_STATUS_IGNORE);
      if (!there) break;
      int word = here;
      MPI_Recv(&word, 1, MPI_INT, p.rank, 0, comm_, MPI_STATUS_IGNORE);
      p.heard = Clock::now();
      p.left = word == leaving;
    }
  }

  [[noreturn]] void end(const std::string& line) {
    std::fflush(stdout);
    warn(line);
    c_.abort_silently();
  }

  Communicator& c_;
  const double timeout_;
  MPI_Comm comm_ = MPI_COMM_NULL;
  std::thread thread_;
};

template <class Call>
void Communicator::timed(const Call& call) {
  if (ranks_ == 1) return;
  const auto from = Clock::now();
  if (watch_) watch_->waiting = true;
  call();
  const auto to = Clock::now();
  if (watch_) {
    watch_->since = to.time_since_epoch().count();
    watch_->waiting = false;
  }
  seconds_ += seconds_between(from, to);
}

void Communicator::require_mpi_if_launched() {}

void Communicator::join(double timeout) {
  const int expected = launched();
  if (expected == 1) return;
  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks_);
  if (ranks_ != expected)
    throw std::runtime_error(
        std::to_string(expected) + " ranks were started, but MPI sees " + std::to_string(ranks_) +
        "; start them with the mpirun of the MPI that this program is linked with, or with "
        "srun --mpi=pmix");
  MPI_Comm host = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &host);
  MPI_Comm_rank(host, &local_rank_);
  MPI_Comm_size(host, &local_ranks_);
  MPI_Comm_free(&host);
  if (provided == MPI_THREAD_MULTIPLE)
    watch_ = std::make_unique<Watch>(*this, timeout);
  else if (first())
    warn("this MPI has no MPI_THREAD_MULTIPLE: a rank that hangs is not noticed");
}

void Communicator::leave() {
  if (ranks_ == 1) return;
  barrier();
  watch_.reset();
  MPI_Finalize();
  ranks_ = 1;
}

void Communicator::barrier() {
  timed([] { MPI_Barrier(MPI_COMM_WORLD); });
}

namespace {

// MPI counts in int: large arrays are counted in pieces of this many bytes.
constexpr size_t kUnit = 4096 * sizeof(double);

// Calls with a type and how many of it `bytes` are.
template <class Call>
void with_type(size_t bytes, const Call& call) {
  if (bytes % kUnit != 0) return call(MPI_BYTE, int(bytes));
  MPI_Datatype unit;
  MPI_Type_contiguous(int(kUnit), MPI_BYTE, &unit);
  MPI_Type_commit(&unit);
  call(unit, int(bytes / kUnit));
  MPI_Type_free(&unit);
}

}  // namespace

void Communicator::broadcast(void* data, size_t bytes) {
  timed([&] {
    for (size_t done = 0; done < bytes;) {  // of any size
      const size_t piece = std::min(bytes - done, size_t(1) << 30);
      MPI_Bcast(static_cast<char*>(data) + done, int(piece), MPI_BYTE, 0, MPI_COMM_WORLD);
      done += piece;
    }
  });
}

std::vector<int64_t> Communicator::agree(std::vector<int64_t> numbers) {
  timed([&] {
    MPI_Allreduce(MPI_IN_PLACE, numbers.data(), int(numbers.size()), MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
  });
  return numbers;
}

void Communicator::add_up(std::vector<double>& numbers) {
  timed([&] {
    MPI_Allreduce(MPI_IN_PLACE, numbers.data(), int(numbers.size()), MPI_DOUBLE, MPI_SUM, MPI_COMM_WORLD);
  });
}

void Communicator::gather_parts(void* data, size_t bytes) {
  timed([&] {
    with_type(bytes, [&](MPI_Datatype type, int count) {
      MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, data, count, type, MPI_COMM_WORLD);
    });
  });
}

void Communicator::swap(int partner, void* received, const void* data, int pieces, size_t bytes,
                        size_t stride) {
  timed([&] {
    with_type(bytes, [&](MPI_Datatype type, int count) {
      MPI_Datatype sent;
      MPI_Type_create_hvector(pieces, count, MPI_Aint(stride), type, &sent);
      MPI_Type_commit(&sent);
      MPI_Sendrecv(data, 1, sent, partner, 1, received, pieces * count, type, partner, 1, MPI_COMM_WORLD,
                   MPI_STATUS_IGNORE);
      MPI_Type_free(&sent);
    });
  });
}

void Communicator::send(int to, const void* data, size_t bytes) {
  timed([&] { MPI_Send(data, int(bytes), MPI_BYTE, to, 2, MPI_COMM_WORLD); });
}

void Communicator::receive(int from, void* data, size_t bytes) {
  timed([&] { MPI_Recv(data, int(bytes), MPI_BYTE, from, 2, MPI_COMM_WORLD, MPI_STATUS_IGNORE); });
}

void Communicator::limit_step(double seconds) {
  if (!watch_) return;
  watch_->since = Clock::now().time_since_epoch().count();
  watch_->limit = seconds;
}

void Communicator::abort_after_another() {
  for (const int ending : {SIGTERM, SIGINT, SIGHUP}) signal(ending, SIG_DFL);
  sleep_for(10);
  abort_silently();
}

void Communicator::abort_silently() {
  std::fflush(nullptr);
  signal(SIGALRM, SIG_DFL);
  alarm(3);  // where MPI waits for a host that is gone
  if (ranks_ > 1) MPI_Abort(MPI_COMM_WORLD, 1);
  _exit(1);
}

#endif

void Communicator::abort(const std::string& line) {
  std::fflush(stdout);
  const int rank = ranks_ == 1 ? launched_rank() : rank_;  // 1: it failed before it joined the others
  for (const int ending : {SIGTERM, SIGINT, SIGHUP}) signal(ending, SIG_DFL);
  if (rank > 0) sleep_for(1 + 0.1 * std::min(rank, 20));  // rank 0 ends all before, where it fails, too
  warn((rank > 0 ? "rank " + std::to_string(rank) + ": " : "") + line);
  abort_silently();
}

Communicator::Communicator() = default;
Communicator::~Communicator() = default;

}  // namespace gdn
