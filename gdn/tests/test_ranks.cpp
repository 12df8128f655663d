// Several ranks under mpirun, on the CPU: the bits of one rank, whoever resumes; and what ends them. What
// runs here is the training step and the optimizer that run on GPUs. Where there is no mpirun nothing is run.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../communicator.h"
#include "../cpu_layers.h"
#include "../random.h"
#include "needs_gpu.h"
#include "program.h"

namespace {

using namespace gdn;
using namespace gdn_tests;

TEST_CASE("ranks: sums over ranks follow a binary tree of neighbours") {
  const std::vector<double> x = {1e16, 1, -1e16, 1, 3, 4, 5, 6};
  CHECK(tree_sum({7}) == 7);
  CHECK(tree_sum(x) == ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])));
  Cpu<double> dev;
  double sum = 0;
  sum_tree(dev, &sum, x.data(), 8);
  CHECK(sum == tree_sum(x));
}

TEST_CASE("ranks: the numbers of ranks that do are named where one does not") {
  for (const auto& [ranks, micro_batches] : {std::pair(1, 7), {2, 6}, {4, 12}, {8, 8}, {64, 64}})
    CHECK_NOTHROW(require_ranks(ranks, micro_batches));
  CHECK_THROWS_WITH(require_ranks(3, 12), doctest::Contains("divides them: 2 or 4"));
  CHECK_THROWS_WITH(require_ranks(4, 6),
                    "4 ranks: a step has 6 micro-batches (-B over -b), expected a power of two of ranks that "
                    "divides them: 2");
  CHECK_THROWS_WITH(require_ranks(6, 64), doctest::Contains("divides them: 4 or 8"));
}

#ifdef GDN_MPI

// Runs a shell script in the folder. $mpirun, $train_gdn are set, one thread a rank; what it leaves on
// standard output and error is the outcome's.
Outcome shell(const Folder& folder, const std::string& script) {
  const std::string set =
      "export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=100 OMPI_ALLOW_RUN_AS_ROOT=1 "
      "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1\n"
      "mpirun='mpirun --oversubscribe --bind-to none --mca btl_base_warn_component_unused 0'\n"
      "train_gdn='" +
      program() + "'\n";
  write_file(folder.path / "script.sh", set + script);
  const std::string command =
      "cd '" + folder.path.string() + "' && timeout 100 bash script.sh >.out 2>.err </dev/null";
  const int status = std::system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_file(folder.path / ".out"),
          read_file(folder.path / ".err")};
}

bool has_mpirun() {
  if (std::system("command -v mpirun >/dev/null 2>&1") == 0) return true;
  MESSAGE("no mpirun: not run");
  return false;
}

// Lines of this program on standard error.
std::vector<std::string> lines_of_ours(const std::string& err) {
  std::vector<std::string> lines;
  std::istringstream all(err);
  for (std::string line; std::getline(all, line);)
    if (line.rfind("train_gdn: ", 0) == 0) lines.push_back(line);
  return lines;
}

// What a run leaves that must not depend on the number of ranks: the files of a checkpoint but the one with
// date and host, and of the log what does not depend on the clock.
std::vector<std::string> result(const fs::path& run, const std::string& step) {
  std::vector<std::string> all;
  for (const char* name : {"model.safetensors", "training_state.safetensors", "config.json"})
    all.push_back(read_file(run / step / name));
  REQUIRE(all[1].size() > 10000);
  std::ifstream log(run / "log.csv");
  for (std::string row; std::getline(log, row);) {
    if (row[0] == '#') continue;
    size_t end = 0;  // step, split, loss, lr, grad_norm
    for (int comma = 0; comma < 5 && end != std::string::npos; comma++) end = row.find(',', end + 1);
    all.push_back(row.substr(0, end));
  }
  return all;
}

// A model whose groups fill several blocks of the arena, so that every rank has a part with numbers.
const std::string kModel = "-d cpu -w 64 -heads 3 -L 2 -T 32 -s 0 -keep 0 ";

TEST_CASE("ranks: 1, 2 and 4 have the same bits: weights, moments, losses, norms, validations") {
  if (!has_mpirun()) return;
  Folder folder;
  for (const std::string& options : {std::string("-n 4 -B 8 -b 1 -v 1 -vn 5 -save 2 "),
                                     std::string("-n 3 -B 12 -b 1 -v 0 -save 0 -opt sgd -lr 0.3 ")}) {
    CAPTURE(options);
    const std::string last = options[3] == '4' ? "step_00000004" : "step_00000003";
    const Outcome alone = shell(folder, "exec $train_gdn " + kModel + options + "-o alone");
    CAPTURE(alone.err);
    REQUIRE(alone.code == 0);
    const auto expected = result(folder.path / "alone", last);
    for (const std::string& ranks : {std::string("2"), std::string("4")}) {
      CAPTURE(ranks);
      const Outcome o =
          shell(folder, "exec $mpirun -n " + ranks + " $train_gdn " + kModel + options + "-o several");
      CAPTURE(o.err);
      REQUIRE(o.code == 0);
      CHECK(lines_of_ours(o.err).empty());
      CHECK(result(folder.path / "several", last) == expected);
      CHECK(o.out.find("memory of a rank: ") != std::string::npos);
      std::set<std::string> said;  // by rank 0 alone: no line twice
      std::istringstream lines(o.out);
      for (std::string line; std::getline(lines, line);) {
        CAPTURE(line);
        CHECK((line.empty() || said.insert(line).second));
      }
      fs::remove_all(folder.path / "several");
    }
    fs::remove_all(folder.path / "alone");
  }
}

TEST_CASE("ranks: -h and -version are said by one rank") {
  if (!has_mpirun()) return;
  Folder folder;
  for (const char* option : {"-h", "-version"}) {
    CAPTURE(option);
    const Outcome alone = shell(folder, std::string("exec $train_gdn ") + option);
    const Outcome two = shell(folder, std::string("exec $mpirun -n 2 $train_gdn ") + option);
    CHECK(two.code == 0);
    CHECK(!alone.out.empty());
    CHECK(two.out == alone.out);
  }
}

TEST_CASE("ranks: a sample after a step, which leaves the weights in shards, is that of one rank") {
  if (!has_mpirun()) return;
  Folder folder;
  const std::string options = kModel + "-B 4 -b 1 -n 2 -warmup 1 -lr 0.1 -v 0 -save 0 -s 1 ";
  const auto sample = [&](const std::string& ranks) {
    const Outcome o = shell(folder, "exec $mpirun -n " + ranks + " $train_gdn " + options + "-o out");
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    fs::remove_all(folder.path / "out");
    const size_t begin = o.out.find("sample after step 1"), end = o.out.find("step 2/2", begin);
    REQUIRE(end != std::string::npos);
    return o.out.substr(begin, end - begin);
  };
  const std::string alone = sample("1");
  CHECK(alone.size() > 100);
  CHECK(sample("2") == alone);
}

// Six steps with `options`, on `device` (-d): by one rank, into "whole", and into "parts" by 4 ranks
// that begin, 1 that goes on from their second step, and 2 from its fourth. They end with the same bits.
void four_then_one_then_two(const Folder& folder, const std::string& device, const std::string& options) {
  const Outcome o = shell(folder,
                          "set -e\n"
                          "options='" +
                              options +
                              "-B 8 -b 1 -n 6 -warmup 1'\n"
                              "$train_gdn $options -save 0 -o whole\n"
                              "$mpirun -n 4 $train_gdn $options -save 2 -o parts\n"
                              "rm -r parts/step_00000004 parts/step_00000006\n"
                              "$train_gdn -d " +
                              device +
                              " -resume -o parts\n"
                              "rm -r parts/step_00000006\n"
                              "$mpirun -n 2 $train_gdn -d " +
                              device + " -resume -o parts\n");
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  CHECK(result(folder.path / "whole", "step_00000006") == result(folder.path / "parts", "step_00000006"));
}

TEST_CASE("ranks: 4 begin a run, 1 goes on, 2 end it: the bits of one that was never stopped") {
  if (!has_mpirun()) return;
  Folder folder;
  four_then_one_then_two(folder, "cpu", kModel + "-v 0 ");
  // what all ranks find is said once
  const Outcome changed = shell(folder, "exec $mpirun -n 2 $train_gdn -d cpu -resume -o parts -seed 43 -n 7");
  CAPTURE(changed.err);
  CHECK(changed.code == 0);
  const auto lines = lines_of_ours(changed.err);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].find("-seed was 42, is 43") != std::string::npos);
}

TEST_CASE("ranks: what they do not agree on is one line that names a rank, before the first step") {
  if (!has_mpirun()) return;
  Folder folder;
  for (const char* host : {"a", "b", "c"}) fs::create_directory(folder.path / host);
  const std::string text(4000, 'x');
  write_file(folder.path / "a" / "text.txt", text);
  write_file(folder.path / "b" / "text.txt", text.substr(1) + "y");
  // the same program of another build, by a letter of what it says of its build
  std::string binary = read_file(program());
  const size_t at = binary.find("; GPU code: ");
  REQUIRE(at != std::string::npos);
  binary[at + 2] = 'g';
  write_file(folder.path / "other", binary);
  fs::permissions(folder.path / "other", fs::perms::owner_all);
  const std::string tiny = kTiny + std::string("-n 2 ");
  struct Case {
    std::string first, second, line;
  };
  for (const Case& c : {
           Case{"$train_gdn " + tiny, "$train_gdn " + tiny + "-lr 0.1", "rank 1: has -lr '0.1', rank 0 has"},
           Case{"$train_gdn " + tiny, "./other " + tiny, "rank 1: has build g++"},
           Case{"-wdir a $train_gdn " + tiny + "-i text.txt", "-wdir b $train_gdn " + tiny + "-i text.txt",
                "rank 1: has file 1 of -i 4000 bytes, xxh64 of its ends"},
           Case{"-wdir a $train_gdn " + tiny + "-i text.txt", "-wdir c $train_gdn " + tiny + "-i text.txt",
                "rank 1: data: no file matches 'text.txt'"},
           Case{"$train_gdn " + tiny + "-B 6", "$train_gdn " + tiny + "-B 5", "rank 1: has -B '5'"},
           Case{"$train_gdn " + tiny + "-B 5", "$train_gdn " + tiny + "-B 5",
                "2 ranks: a step has 5 micro-batches"},
           Case{"$train_gdn " + tiny + "-w 31", "$train_gdn " + tiny + "-w 31", "-w 31"},
           Case{"$train_gdn -gen 3 -load x", "$train_gdn -gen 3 -load x", "-gen: 2 ranks were started"},
       }) {
    CAPTURE(c.line);
    const Outcome o = shell(folder, "exec $mpirun -n 1 " + c.first + " : -n 1 " + c.second);
    CAPTURE(o.err);
    CHECK(o.code == 1);
    const auto lines = lines_of_ours(o.err);
    REQUIRE(lines.size() == 1);
    CHECK(lines[0].rfind("train_gdn: " + c.line, 0) == 0);
    CHECK(o.out.find("step 1/") == std::string::npos);
  }
}

// Starts two ranks that train for long and save every 5 steps, does `then` when step 7 is done, and returns
// what they leave and the seconds that it took from there. $rank is the process of rank 1.
std::pair<Outcome, double> disturbed(const Folder& folder, const std::string& then,
                                     const std::string& options = "", const std::string& launch = "") {
  const Outcome o =
      shell(folder, "$mpirun " + launch +
                        " -n 2 sh -c 'echo $$ >pid.$OMPI_COMM_WORLD_RANK; exec \"$0\" \"$@\"' $train_gdn " +
                        kModel + "-B 2 -b 1 -v 0 -n 100000 -warmup 1 -save 5 -o out " + options +
                        " >steps &\n"
                        "while ! grep -q '^step 7/' steps; do kill -0 $! || exit 99; sleep 0.02; done\n"
                        "rank=$(cat pid.1)\n" +
                        then +
                        "\nbegin=$(date +%s%N)\nwait $!\ncode=$?\n"
                        "echo seconds $((($(date +%s%N) - begin) / 1000000))\ncat steps\nexit $code\n");
  const size_t at = o.out.find("seconds ");
  REQUIRE(at != std::string::npos);
  return {o, std::atof(&o.out[at + 8]) / 1000};
}

void check_goes_on(const Folder& folder) {
  const Outcome o = shell(folder,
                          "set -e\n"
                          "last=$(ls -d out/step_* | grep -v tmp | tail -n 1)\n"
                          "$train_gdn -d cpu -gen 5 -load $last >/dev/null\n"
                          "done=$((10#${last#out/step_}))\n"
                          "exec $mpirun -n 2 $train_gdn -d cpu -resume -o out -n $((done + 2))\n");
  CAPTURE(o.err);
  CHECK(o.code == 0);
}

TEST_CASE("ranks: one that dies ends all, is named, and the last checkpoint is whole") {
  if (!has_mpirun()) return;
  Folder folder;
  const auto [o, seconds] = disturbed(folder, "kill -KILL $rank");
  CAPTURE(o.err);
  CHECK(o.code != 0);
  CHECK(seconds < 30);
  CHECK(o.err.find("rank 1") != std::string::npos);
  check_goes_on(folder);
}

TEST_CASE("ranks: one that hangs ends all, and is named") {
  if (!has_mpirun()) return;
  for (const int rank : {1, 0}) {
    CAPTURE(rank);
    Folder folder;
    const auto [o, seconds] =
        disturbed(folder, "kill -STOP $(cat pid." + std::to_string(rank) + ")", "-timeout 3");
    CAPTURE(o.err);
    CHECK(o.code != 0);
    CHECK(seconds < 15);
    const auto lines = lines_of_ours(o.err);
    REQUIRE(lines.size() == 1);
    CHECK(lines[0].rfind("train_gdn: rank " + std::to_string(rank) + " has not been heard of for 3 s", 0) ==
          0);
    if (rank == 1) check_goes_on(folder);
  }
}

TEST_CASE("ranks: one whose step hangs while its process lives says so, and ends all") {
  if (!has_mpirun()) return;
  Folder folder;
  // reads of the data that never return, from when the file "hang" is there
  write_file(folder.path / "hang.c", R"(#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
ssize_t pread(int d, void* p, size_t n, off_t at) {
  static ssize_t (*real)(int, void*, size_t, off_t);
  if (!real) real = dlsym(RTLD_NEXT, "pread");
  const char* rank = getenv("OMPI_COMM_WORLD_RANK");
  while (rank && !strcmp(rank, "1") && !access("hang", F_OK)) sleep(1);
  return real(d, p, n, at);
}
ssize_t pread64(int d, void* p, size_t n, off_t at) { return pread(d, p, n, at); }
)");
  if (std::system(("cc -shared -fPIC -o '" + (folder.path / "hang.so").string() + "' '" +
                   (folder.path / "hang.c").string() + "' -ldl 2>/dev/null")
                      .c_str()) != 0) {
    MESSAGE("no C compiler: not run");
    return;
  }
  std::string text;
  for (int i = 0; i < 4000; i++) text += std::to_string(i * i % 1013) + ' ';
  write_file(folder.path / "text.txt", text);
  const auto [o, seconds] =
      disturbed(folder, "touch hang", "-i text.txt -timeout 3", "-x LD_PRELOAD=./hang.so");
  CAPTURE(o.err);
  CHECK(o.code != 0);
  CHECK(seconds < 30);
  const auto lines = lines_of_ours(o.err);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].rfind("train_gdn: rank 1 hangs: its step has not ended in", 0) == 0);
}

TEST_CASE("ranks: a signal at any one of them lets all finish the step, save and leave") {
  if (!has_mpirun()) return;
  for (const char* signal : {"TERM", "USR1"}) {
    CAPTURE(signal);
    Folder folder;
    const auto [o, seconds] = disturbed(folder, std::string("kill -") + signal + " $rank", "-save 0");
    CAPTURE(o.err);
    CAPTURE(o.out);
    CHECK(seconds < 30);
    CHECK(o.code > 128);
    CHECK(lines_of_ours(o.err).empty());
    CHECK(o.out.find("stopped after step") != std::string::npos);
    CHECK(o.out.find("saved out/step_") != std::string::npos);
    if (signal == std::string("TERM")) check_goes_on(folder);
  }
}

TEST_CASE("ranks: a full disk at rank 0 is said, the run goes on, the old checkpoint stays") {
  if (!has_mpirun()) return;
  Folder folder;
  const std::string options = kModel + "-B 2 -b 1 -v 0 -n 4 -save 2 ";
  REQUIRE(shell(folder, "exec $train_gdn " + options + "-n 2 -o out").code == 0);
  const Outcome o =
      shell(folder,
            "exec $mpirun -n 1 sh -c \"trap '' XFSZ; ulimit -f 40; exec $train_gdn -d cpu -resume "
            "-o out -n 6\" : -n 1 $train_gdn -d cpu -resume -o out -n 6");
  CAPTURE(o.err);
  CHECK(o.code == 1);
  CHECK(o.out.find("step 6/6") != std::string::npos);
  const auto lines = lines_of_ours(o.err);
  REQUIRE(!lines.empty());
  CHECK(lines[0].rfind("train_gdn: checkpoint not saved: ", 0) == 0);
  CHECK(lines.back().rfind("train_gdn: the last checkpoint could not be saved", 0) == 0);
  CHECK(shell(folder, "exec $train_gdn -d cpu -gen 5 -load out/step_00000002").code == 0);
}

TEST_CASE("ranks: a bad token at one of them is said by it, all save and end, or step over its batch") {
  if (!has_mpirun()) return;
  Folder folder;
  std::vector<uint16_t> tokens(20 * 32 + 1, 11);
  tokens[tokens.size() / 2] = 60000;
  write_file(folder.path / "s.bin", shard(tokens));
  const std::string options = kTiny + std::string("-n 10 -save 0 -i s.bin ");
  const Outcome o = shell(folder, "exec $mpirun -n 2 $train_gdn " + options + "-o bad");
  CAPTURE(o.err);
  CHECK(o.code == 1);
  const auto lines = lines_of_ours(o.err);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].find("60000") != std::string::npos);
  CHECK(o.out.find("saved bad/step_") != std::string::npos);
  const Outcome skips =
      shell(folder, "set -e\n$train_gdn " + options + "-skip_bad -o one\n$mpirun -n 2 $train_gdn " + options +
                        "-skip_bad -o two");
  CAPTURE(skips.err);
  CHECK(skips.code == 0);
  CHECK(result(folder.path / "one", "step_00000010") == result(folder.path / "two", "step_00000010"));
}

TEST_CASE(
    "ranks: on one GPU, staged through the host, 2 and 4 have the bits of 1, and so has NCCL with one rank" *
    needs_gpu()) {
  if (!has_mpirun()) return;
  Folder folder;
  const std::string model = "-d cuda -w 128 -heads 2 -L 3 -T 128 -s 0 -v 4 -vn 5 ";
  for (const std::string& options :
       {std::string("-n 6 -B 8 -b 1 "), std::string("-n 6 -B 12 -b 1 -opt sgd -lr 0.3 ")}) {
    CAPTURE(options);
    const Outcome alone = shell(folder, "exec $train_gdn " + model + options + "-o alone");
    CAPTURE(alone.err);
    REQUIRE(alone.code == 0);
    const auto expected = result(folder.path / "alone", "step_00000006");
    for (const std::string& how :
         {std::string("-n 1 $train_gdn -comm nccl "), std::string("-n 2 $train_gdn -comm host "),
          std::string("-n 4 $train_gdn -comm host ")}) {
      CAPTURE(how);
      const Outcome o = shell(folder, "exec $mpirun " + how + model + options + "-o several");
      CAPTURE(o.err);
      if (o.err.find("built without NCCL") != std::string::npos) continue;
      REQUIRE(o.code == 0);
      CHECK(result(folder.path / "several", "step_00000006") == expected);
      fs::remove_all(folder.path / "several");
    }
    fs::remove_all(folder.path / "alone");
  }
  four_then_one_then_two(folder, "cuda", model + "-keep 0 ");
}

#else

TEST_CASE("ranks: started as one of several without MPI the program says what it needs") {
  Folder folder;
  const Outcome o = run(folder, kTiny + std::string("-n 2"), "export OMPI_COMM_WORLD_SIZE=2");
  CHECK(o.code == 1);
  CHECK(o.err.rfind("train_gdn: 2 ranks were started, but this train_gdn was built without MPI", 0) == 0);
  CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
}

#endif

}  // namespace
