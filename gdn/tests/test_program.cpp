// The program itself: ./train_gdn as a user runs it, in a folder of its own. Bad input must give one clear
// line and exit code 1; a resumed run must end with the same bits as one that was never stopped; a signal
// must save and leave.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../checkpoint.h"
#include "../report.h"
#include "needs_gpu.h"
#include "program.h"

namespace {

using namespace gdn;
using namespace gdn_tests;
namespace fs = std::filesystem;

TEST_CASE("program: bad input gives one line that names it, and exit code 1") {
  Folder folder;
  write_file(folder.path / "text.txt",
             "some text, long enough for a few sequences of thirty-two tokens and their targets");
  write_file(folder.path / "empty.bin", "");
  write_file(folder.path / "magic.bin", shard(std::vector<uint16_t>(100), {7}));
  write_file(folder.path / "none.bin", shard({}));
  write_file(folder.path / "short.bin", shard(std::vector<uint16_t>(100), {20240520, 1, 200}));
  write_file(folder.path / "vocabulary.bin", shard(std::vector<uint16_t>(100, 60000)));
  write_file(folder.path / "good.bin", shard(std::vector<uint16_t>(100, 50256)));
  struct Case {
    std::string arguments, part;
  };
  for (const Case& c : {Case{"-frobnicate 3", "-frobnicate"},
                        Case{"-w", "-w"},
                        Case{"-w abc", "-w 'abc'"},
                        Case{"-w 12x", "-w '12x'"},
                        Case{"-w -5", "-w '-5'"},
                        Case{"-lr fast", "-lr 'fast'"},
                        Case{"-lr nan", "-lr 'nan'"},
                        Case{"-n 1e3", "-n '1e3'"},
                        Case{"-b1 1.5", "-b1 '1.5'"},
                        Case{"-b1 1", "-b1 '1'"},
                        Case{"-b2 1", "-b2 '1'"},
                        Case{"-b1 0.99999999999", "-b1 '0.99999999999'"},
                        Case{"-eps 0", "-eps '0'"},
                        Case{"-min_lr lr", "-min_lr 'lr'"},
                        Case{"-min_lr lr/0", "-min_lr 'lr/0'"},
                        Case{"-eval good.bin", "-load"},
                        Case{"-resume", "-resume"},
                        Case{"-resume -o nowhere", "nowhere"},
                        Case{"-resume=maybe", "-resume 'maybe'"},
                        Case{"stray", "stray"},
                        Case{"-opt adam", "-opt 'adam'"},
                        Case{"-sum last", "-sum 'last'"},
                        Case{"-param up", "-param 'up'"},
                        Case{"-gains both", "-gains 'both'"},
                        Case{"-gates both", "-gates 'both'"},
                        Case{"-readout none", "-readout 'none'"},
                        Case{"-wd_mode none", "-wd_mode 'none'"},
                        Case{"-lr_of convs=2", "-lr_of: factor 'convs=2'"},
                        Case{"-lr_of conv=2,conv=2", "-lr_of: factor 'conv=2'"},
                        Case{"-clip_norm mup", "-clip_norm 'mup'"},
                        Case{"-init_of taps=2", "-init_of: factor 'taps=2'"},
                        Case{"-init_of gain=2", "gain"},
                        Case{"-logit_factor 0", "-logit_factor '0'"},
                        Case{"-eps -1", "-eps '-1'"},
                        Case{"-coord_check -resume", "-coord_check"},
                        Case{"-coord_check -mask_docs", "-mask_docs"},
                        Case{"-coord_check -o nowhere/x.csv", "nowhere/x.csv"},
                        Case{"-coord_check -opt sgd -lr 1e6 -clip 0", "-coord_check"},
                        Case{"-d tpu", "-d 'tpu'"},
                        Case{"-w 100 -heads 6", "-w 100"},
                        Case{"-head_dim 7 -ev 0.5", "-ev"},
                        Case{"-ev 0.3", "-ev"},
                        Case{"-B 10 -b 4", "-B 10"},
                        Case{"-n 5 -warmup 6", "-warmup 6"},
                        Case{"-i nowhere.bin", "nowhere.bin"},
                        Case{"-i empty.bin", "empty.bin"},
                        Case{"-i magic.bin", "magic.bin"},
                        Case{"-i none.bin", "none.bin"},
                        Case{"-i short.bin", "short.bin"},
                        Case{"-i vocabulary.bin", "vocabulary.bin"},
                        Case{"-i good.bin,text.txt", "text.txt"},
                        Case{"-i text.txt -j good.bin", "good.bin"},
                        Case{"-i text.txt -T 4096", "text.txt"},
                        Case{"-i ''", "-i ''"},
                        Case{"-j text.txt", "-j 'text.txt'"},
                        Case{"-vocab_size 300", "-vocab_size 300"},
                        Case{"-i good.bin -vocab_size 100", "vocabulary of 100"},
                        Case{"-i good.bin -mask_docs -separator 7", "-mask_docs"},
                        Case{"-b 1048576 -B 1048576 -T 16777216", "-b 1048576"},
                        Case{"-gen 5", "-load"},
                        Case{"-gen 5 -load nowhere", "nowhere"},
                        Case{"-load nowhere", "nowhere"},
                        Case{"-resume -load nowhere", "-resume"},
                        Case{"-o good.bin", "good.bin"}}) {
    CAPTURE(c.arguments);
    const Outcome o = run(folder, kTiny + std::string("-n 2 ") + c.arguments);
    CAPTURE(o.err);
    CHECK(o.code == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    CHECK(o.err.rfind("train_gdn: ", 0) == 0);
    CHECK(o.err.find(c.part) != std::string::npos);
  }
}

TEST_CASE("program: -h lists every option with its default") {
  Folder folder;
  const Outcome o = run(folder, "-h");
  CHECK(o.code == 0);
  for (const char* option : {"-i ",           "-j ",         "-w ",
                             "-w0 ",          "-L ",         "-heads ",
                             "-head_dim ",    "-ev ",        "-T ",
                             "-b ",           "-B ",         "-n ",
                             "-opt ",         "-lr ",        "-wd ",
                             "-b1 ",          "-b2 ",        "-mom ",
                             "-clip ",        "-warmup ",    "-min_lr ",
                             "-param ",       "-d ",         "-seed ",
                             "-o ",           "-v ",         "-save ",
                             "-keep ",        "-resume ",    "-eval ",
                             "-skip_bad ",    "-version ",   "-s ",
                             "-load ",        "-gen ",       "-prompt ",
                             "-eps ",         "-wd_mode ",   "-gains ",
                             "-coord_check ", "-vocab ",     "-temperature ",
                             "-top_k ",       "-top_p ",     "-mask_docs ",
                             "-lr_of ",       "-gates ",     "-readout ",
                             "-clip_norm ",   "-init_of ",   "-logit_factor ",
                             "-vocab_size ",  "-separator ", "-sum ",
                             "-timeout ",     "-comm "}) {
    CAPTURE(option);
    CHECK(o.out.find("\n  " + std::string(option)) != std::string::npos);
  }
  CHECK(read_file("dev/doc/options.md").find("```text\n" + o.out + "```") !=
        std::string::npos);  // the document repeats it
  for (std::istringstream lines(o.out); lines;) {
    std::string line;
    std::getline(lines, line);
    CAPTURE(line);
    CHECK(line.size() <= 80);
  }
  CHECK(run(folder, "--help").out == o.out);
  const size_t first = o.out.find("\nneeded first\n"), next = o.out.find("\n\n", first + 1);
  REQUIRE(next != std::string::npos);
  int needed = 0;
  for (size_t at = first; (at = o.out.find("\n  -", at + 1)) < next;) needed++;
  CHECK(needed == 10);
}

TEST_CASE("program: log.csv has its header, a row a step, and validations; the start is timed") {
  Folder folder;
  const auto start = std::chrono::steady_clock::now();
  const Outcome o = run(folder, kTiny + std::string("-n 6 -v 3 -vn 2 -o out"));
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  REQUIRE(o.code == 0);
  const std::string log = read_file(folder.path / "out" / "log.csv");
  CHECK(log.rfind("# train_gdn ", 0) == 0);  // where it comes from
  const std::string header = "\nstep,split,loss,lr,grad_norm,ms,tokens_per_s,sol,floor,time,wait_ms\n";
  CHECK(log.find(header) == log.find('\n'));
  for (const char* start : {"\n1,train,", "\n6,train,", "\n3,val,", "\n6,val,"}) {
    CAPTURE(start);
    CHECK(log.find(start) != std::string::npos);
  }
  CHECK(std::count(log.begin(), log.end(), '\n') == 2 + 6 + 2);
  const size_t at = o.out.find("first step after ");
  REQUIRE(at != std::string::npos);
  const double seconds = std::atof(&o.out[at] + std::strlen("first step after "));
  CHECK(seconds > 0);
  CHECK(seconds <= wall + 0.02);  // the start is known to 0.01
}

// The arrays of a checkpoint, without the counters' file that holds the options.
inline std::vector<std::string> arrays(const fs::path& checkpoint) {
  return {read_file(checkpoint / "model.safetensors"), read_file(checkpoint / "training_state.safetensors")};
}

inline void check_resume(const std::string& device) {
  Folder folder;
  std::string text;  // whatever folder the tests run in
  for (int i = 0; i < 4000; i++) text += std::to_string(i * i % 1013) + (i % 9 ? " " : ".\n");
  write_file(folder.path / "text.txt", text);
  const std::string options =
      "-d " + device + " -w 64 -heads 2 -head_dim 32 -L 2 -T 70 -B 4 -b 2 -v 4 -vn 2 ";
  for (const std::string& data : {std::string(""), std::string("-i text.txt -j text.txt ")})
    for (const std::string& optimizer : {std::string("-opt adamw "), std::string("-opt sgd ")}) {
      CAPTURE(data + optimizer);
      const std::string all = options + data + optimizer;
      fs::remove_all(folder.path / "whole");
      fs::remove_all(folder.path / "parts");
      // what a validation, a sample or a checkpoint waits for comes at different steps in the two
      for (const char* rest : {"-n 8 -save 0 -s 0 -o whole", "-n 8 -save 3 -s 5 -keep 0 -o parts"}) {
        const Outcome o = run(folder, all + rest);
        CAPTURE(o.err);
        REQUIRE(o.code == 0);
      }
      // as after a kill between steps 5 and 6: only step 3 is saved, the log has later rows
      fs::remove_all(folder.path / "parts" / "step_00000006");
      fs::remove_all(folder.path / "parts" / "step_00000008");
      const Outcome resumed =
          run(folder, "-d " + device + " -resume -o parts");  // options come from the checkpoint
      CAPTURE(resumed.err);
      REQUIRE(resumed.code == 0);
      CHECK(arrays(folder.path / "whole" / "step_00000008") ==
            arrays(folder.path / "parts" / "step_00000008"));
      const auto losses = [&](const char* name) {
        std::ifstream log(folder.path / name / "log.csv");
        std::vector<std::string> rows;
        for (std::string row; std::getline(log, row);) {
          if (row[0] == '#') continue;
          size_t end = 0;  // step, split, loss, lr, grad_norm: what does not depend on the clock
          for (int comma = 0; comma < 5 && end != std::string::npos; comma++) end = row.find(',', end + 1);
          rows.push_back(row.substr(0, end));
        }
        return rows;
      };
      CHECK(losses("whole") == losses("parts"));
    }
}

// What a short training without validations and samples leaves in `file` of its folder.
std::string file_of_a_run(const Folder& folder, const std::string& options, const std::string& file) {
  const Outcome o = run(folder, kTiny + std::string("-v 0 -s 0 -save 0 ") + options + " -o out");
  CAPTURE(o.err);
  REQUIRE(o.code == 0);
  const std::string bytes = read_file(folder.path / "out" / file);
  fs::remove_all(folder.path / "out");
  return bytes;
}

TEST_CASE("program: -lr_of multiplies the learning rates of the classes it names") {
  Folder folder;
  const auto weights = [&](const std::string& options) {
    return file_of_a_run(folder, "-n 3 " + options, "step_00000003/model.safetensors");
  };
  const std::string all =
      "embedding=0.5,hidden=0.5,gate=0.5,gate_scalar=0.5,conv=0.5,gain=0.5,output_gain=0.5";
  for (const std::string& mode : {std::string("-wd_mode coupled "), std::string("-wd 0 ")}) {
    CAPTURE(mode);
    const std::string halved = weights(mode + "-lr 0.01 -min_lr 0.005");
    CHECK(weights(mode + "-lr 0.02 -min_lr 0.01 -lr_of " + all) == halved);  // powers of 2: the same bits
    CHECK(weights(mode + "-lr 0.02 -min_lr 0.01") != halved);
  }
  // independent decay knows -lr alone, whatever the class has: without a gradient's step (eps) all is decay
  CHECK(weights("-wd_mode independent -eps 1 -clip 1e-30 -lr 0.02 -min_lr 0.01 -lr_of " + all) ==
        weights("-wd_mode independent -eps 1 -clip 1e-30 -lr 0.02 -min_lr 0.01"));
}

TEST_CASE("program: a checkpoint keeps -logit_factor, and refuses another") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 2 -save 0 -logit_factor 4 -o saved")).code == 0);
  const auto without_rates = [](const std::string& log) {  // up to the learning rate: step, split, loss
    const size_t row = log.find("\n1,train,");
    return log.substr(row, log.find("e+00") - row);
  };
  const auto first_row = [&](const std::string& load) {  // of a training from there that stands still
    return without_rates(file_of_a_run(folder, "-n 1 -lr 0 -min_lr 0 -load " + load, "log.csv"));
  };
  const std::string kept = first_row("saved -logit_factor 4");
  // without any option of the model all follow the checkpoint
  REQUIRE(run(folder, "-d cpu -T 32 -B 2 -b 1 -s 0 -v 0 -save 0 -n 1 -lr 0 -min_lr 0 -load saved -o followed")
              .code == 0);
  CHECK(without_rates(read_file(folder.path / "followed" / "log.csv")) == kept);
  const fs::path saved = folder.path / "saved" / "step_00000002", copy = folder.path / "copy";
  fs::create_directory(copy);
  fs::copy_file(saved / "model.safetensors", copy / "model.safetensors");
  std::string config = read_file(saved / "config.json");
  write_file(copy / "config.json", config);
  CHECK(first_row("copy -logit_factor 4") == kept);
  const std::string key = "\"logit_factor\": 4";
  REQUIRE(config.find(key) != std::string::npos);
  write_file(copy / "config.json", config.replace(config.find(key), key.size(), "\"logit_factor\": 1"));
  CHECK(first_row("copy") != kept);
  const Outcome other = run(folder, kTiny + std::string("-n 1 -load saved -logit_factor 2"));
  CHECK(other.code == 1);
  CHECK(other.err.find("has -logit_factor 4, the options ask for 2") != std::string::npos);
}

TEST_CASE(
    "program: -clip_norm chooses the norm, by default after the optimizer; both are one at the base width") {
  Folder folder;
  const auto first_norm = [&](const std::string& options) {
    std::istringstream log(file_of_a_run(folder, "-n 1 " + options, "log.csv"));
    std::string row, field;
    for (int line = 0; line < 3; line++)
      std::getline(log, row);  // the third one: after "# ..." and the header
    std::istringstream fields(row);
    for (int column = 0; column < 5; column++)
      std::getline(fields, field, ',');  // step,split,loss,lr,grad_norm
    return field;
  };
  const std::string plain = first_norm("-opt sgd -clip_norm plain"), scaled = first_norm("-opt sgd");
  CHECK(std::stod(plain) > 0);
  CHECK(scaled == first_norm("-opt sgd -clip_norm scaled"));
  CHECK(scaled != plain);
  CHECK(plain == first_norm("-opt adamw"));
  CHECK(scaled == first_norm("-opt adamw -clip_norm scaled"));
  CHECK(first_norm("-w0 32 -opt sgd -clip_norm scaled") == first_norm("-w0 32 -opt sgd -clip_norm plain"));
}

TEST_CASE("program: a resumed run has the bits of one never stopped (CPU)") { check_resume("cpu"); }

TEST_CASE("program: a resumed run has the bits of one never stopped (CUDA)" * needs_gpu()) {
  check_resume("cuda");
}

TEST_CASE(
    "program: the newest whole checkpoint is found, damaged ones are named; other shapes and reuse refused") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 4 -save 2 -o out")).code == 0);
  const Outcome again = run(folder, kTiny + std::string("-n 4 -o out"));
  CHECK(again.code == 1);
  CHECK(again.err.find("-resume") != std::string::npos);
  const Outcome wider = run(folder, kTiny + std::string("-n 6 -w 64 -resume -o out"));
  CHECK(wider.code == 1);
  CHECK(wider.err.find("width") != std::string::npos);
  const fs::path newest = folder.path / "out" / "step_00000004" / "training_state.safetensors";
  std::string bytes = read_file(newest);
  bytes[bytes.size() / 2] ^= 1;
  write_file(newest, bytes);
  const Outcome resumed = run(folder, kTiny + std::string("-n 6 -resume -o out"));
  CHECK(resumed.code == 0);
  CHECK(resumed.err.find("step_00000004") != std::string::npos);
  CHECK(resumed.out.find("resuming out/step_00000002") != std::string::npos);
}

TEST_CASE("program: masked documents are resumed masked, and need shards") {
  Folder folder;
  std::vector<uint16_t> tokens(900);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(i % 11 ? i * 37 % 5000 : 50256);
  write_file(folder.path / "s.bin", shard(tokens));
  const std::string options = kTiny + std::string("-i s.bin -n 4 ");
  REQUIRE(run(folder, options + "-o unmasked").code == 0);
  REQUIRE(run(folder, options + "-mask_docs -o whole").code == 0);
  REQUIRE(run(folder, options + "-mask_docs -save 2 -keep 0 -o parts").code == 0);
  fs::remove_all(folder.path / "parts" / "step_00000004");
  REQUIRE(run(folder, "-d cpu -resume -o parts").code == 0);
  const auto last = [&](const char* name) { return arrays(folder.path / name / "step_00000004"); };
  CHECK(last("whole") == last("parts"));
  CHECK(last("whole") != last("unmasked"));
  // generation does as the training did: what stands before a document's start is forgotten, or it is not
  const auto continued = [&](const std::string& options, const std::string& prompt) {
    const Outcome o = run(folder, "-d cpu -gen 20 -temperature 3 " + options + " -prompt '" + prompt + "'");
    CAPTURE(o.err);
    REQUIRE(o.code == 0);
    REQUIRE(o.out.rfind(prompt, 0) == 0);
    return o.out.substr(prompt.size());
  };
  CHECK(continued("-load whole", "7 5 50256 4") == continued("-load whole", "9 9 50256 4"));
  CHECK(continued("-load unmasked", "7 5 50256 4") != continued("-load unmasked", "9 9 50256 4"));
  CHECK(continued("-load unmasked -mask_docs", "7 5 50256 4") ==
        continued("-load unmasked -mask_docs", "9 9 50256 4"));
  const Outcome bytes = run(folder, kTiny + std::string("-n 1 -mask_docs"));
  CHECK(bytes.code == 1);
  CHECK(bytes.err.rfind("train_gdn: -mask_docs: needs token shards", 0) == 0);
}

TEST_CASE("program: SIGINT, SIGTERM, SIGHUP and SIGUSR1 save and leave") {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGUSR1}) {
    Folder folder;
    const std::string binary = program();
    std::fflush(nullptr);  // what is buffered is the parent's to print
    const pid_t child = fork();
    if (child == 0) {
      if (chdir(folder.path.c_str()) != 0 || !freopen(".out", "w", stdout) || !freopen(".err", "w", stderr))
        _exit(99);
      execl(binary.c_str(), "train_gdn", "-d", "cpu", "-w", "32", "-heads", "3", "-L", "1", "-T", "32", "-n",
            "1000000", "-save", "0", "-s", "0", "-v", "0", "-o", "out", nullptr);
      _exit(99);
    }
    for (int tries = 0; tries < 600 && read_file(folder.path / ".out").find("step 2/") == std::string::npos;
         tries++)
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    kill(child, signal);
    int status = 0;
    waitpid(child, &status, 0);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 128 + signal);
    const std::string out = read_file(folder.path / ".out");
    CHECK(out.find("stopped after step") != std::string::npos);
    CHECK(out.find("saved out/step_") != std::string::npos);
    CHECK(run(folder, "-d cpu -gen 5 -load out").code == 0);
  }
}

TEST_CASE("program: a full disk while saving is said, the run goes on, the old checkpoint stays") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 2 -o out")).code == 0);
  const Outcome full =
      run(folder, kTiny + std::string("-n 6 -save 2 -resume -o out"), "trap '' XFSZ; ulimit -f 40");
  CHECK(full.code == 1);  // the last checkpoint is missing, and that is said
  CHECK(full.out.find("step 6/6") != std::string::npos);
  CHECK(full.err.find("not saved") != std::string::npos);
  CHECK(run(folder, "-d cpu -gen 5 -load out/step_00000002").code == 0);
  CHECK(run(folder, kTiny + std::string("-n 6 -resume -o out")).code == 0);
}

TEST_CASE("program: a loss that is not finite stops the run and keeps the last good checkpoint") {
  Folder folder;
  const Outcome o =
      run(folder, kTiny + std::string("-n 400 -opt sgd -lr 1e6 -clip 0 -warmup 400 -save 1 -keep 0 -o out"));
  CHECK(o.code == 1);
  CHECK(o.err.find("not finite") != std::string::npos);
  CHECK(o.err.find("step ") != std::string::npos);
  CHECK(run(folder, "-d cpu -gen 5 -load out/step_00000001").code == 0);
}

TEST_CASE("program: a token outside the vocabulary, met far into a run, loses nothing") {
  Folder folder;
  std::vector<uint16_t> tokens(20 * 32 + 1, 11);
  tokens[tokens.size() / 2] = 60000;
  write_file(folder.path / "s.bin", shard(tokens));
  // 20 sequences, one of them bad, in a shuffled order: two a step
  const Outcome o = run(folder, kTiny + std::string("-n 10 -save 0 -i s.bin -o out"));
  CHECK(o.code == 1);
  CHECK(o.err.find("60000") != std::string::npos);
  REQUIRE(o.out.find("step 1/10") != std::string::npos);
  CHECK(o.out.find("saved out/step_") != std::string::npos);
  CHECK(run(folder, "-d cpu -gen 2 -load out").code == 0);
}

TEST_CASE("program: data that shrink while training: one line, a checkpoint, exit code 1") {
  Folder folder;
  for (const char* change : {": > d.txt", "rm d.txt", "echo x >> d.txt"}) {
    write_file(folder.path / "d.txt", std::string(100000, 'x'));
    const std::string later = "{ (while ! grep -q 'step 2/' .out 2>/dev/null; do sleep 0.02; done; " +
                              std::string(change) + ") & }";
    fs::remove(folder.path / ".out");
    fs::remove_all(folder.path / "out");
    const Outcome o = run(folder, kTiny + std::string("-n 1000000 -save 0 -i d.txt -o out"), later);
    CAPTURE(o.err);
    CHECK(o.code == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    CHECK(o.err.rfind("train_gdn: d.txt: ", 0) == 0);
    CHECK(o.out.find("saved out/step_") != std::string::npos);
    CHECK(run(folder, "-d cpu -gen 2 -load out").code == 0);
  }
}

TEST_CASE("program: data that are touched, or copied anew, while training end no run") {
  Folder folder;
  write_file(folder.path / "d.txt", std::string(100000, 'x'));
  const std::string later =
      "{ (while ! grep -q 'step 2/' .out 2>/dev/null; do sleep 0.02; done; touch d.txt; while ! grep -q "
      "'step "
      "20/' .out; do sleep 0.02; done; cp d.txt e.txt; mv e.txt d.txt) & }";
  const Outcome o = run(folder, kTiny + std::string("-n 200 -save 0 -i d.txt -o out"), later);
  CAPTURE(o.err);
  CHECK(o.code == 0);
  CHECK(o.err.find("d.txt: has a new time of change; its bytes are as before") != std::string::npos);
  CHECK(o.err.find("d.txt: was replaced; its bytes are as before") != std::string::npos);
}

TEST_CASE("program: shards of another tokenizer train, resume and generate with their vocabulary") {
  Folder folder;
  std::vector<uint16_t> tokens(900);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(i % 11 ? 2 + i * 37 % 318 : 1);
  write_file(folder.path / "s.bin", shard(tokens));
  REQUIRE(
      run(folder,
          kTiny + std::string("-i s.bin -vocab_size 320 -separator 1 -mask_docs -n 4 -save 2 -keep 0 -o out"))
          .code == 0);
  const std::string last = read_file(folder.path / "out" / "step_00000004" / "training_state.safetensors");
  fs::remove_all(folder.path / "out" / "step_00000004");
  REQUIRE(run(folder, "-d cpu -resume -o out").code == 0);
  CHECK(read_file(folder.path / "out" / "step_00000004" / "training_state.safetensors") == last);
  const Outcome o = run(folder, "-d cpu -load out -gen 5");
  CAPTURE(o.err);
  CHECK(o.code == 0);
}

TEST_CASE("program: samples depend on seed and prompt alone; token ids where the data are shards") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 2 -o bytes")).code == 0);
  const auto text = [&](const std::string& o) { return run(folder, "-d cpu -load bytes -gen 40 " + o).out; };
  CHECK(text("-prompt 'Once'") == text("-prompt 'Once'"));
  CHECK(text("-prompt 'Once'").rfind("Once", 0) == 0);
  CHECK(text("-prompt 'Once'") != text("-prompt 'Once' -seed 7"));
  std::vector<uint16_t> tokens(200);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(i * 250);
  write_file(folder.path / "s.bin", shard(tokens));
  REQUIRE(run(folder, kTiny + std::string("-n 1 -i s.bin -o ids")).code == 0);
  const std::string ids = run(folder, "-d cpu -load ids -gen 5 -prompt '50256 11'").out;
  CHECK(ids.rfind("50256 11 ", 0) == 0);
  CHECK(ids.find_first_not_of("0123456789 \n") == std::string::npos);
  CHECK(run(folder, "-d cpu -load ids -gen 5 -prompt 'Once'").code == 1);
}

// ---- losing work

// A run in the background, in `folder`, whose output goes to .out and .err.
struct Started {
  Started(const Folder& folder, const std::string& arguments, const std::string& before = "true") {
    const std::string command = "cd '" + folder.path.string() + "' && " + before + " && exec '" + program() +
                                "' " + arguments + " >.out 2>.err </dev/null";
    std::fflush(nullptr);  // what is buffered is the parent's to print
    child = fork();
    if (child == 0) {
      execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
      _exit(99);
    }
  }
  // Its exit code, or -signal.
  int wait() {
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }
  pid_t child;
};

inline void wait_for(const fs::path& file, const std::string& text) {
  for (int tries = 0; tries < 1200 && read_file(file).find(text) == std::string::npos; tries++)
    std::this_thread::sleep_for(std::chrono::milliseconds(25));
}

inline std::string random_shard(size_t count, int seed) {
  std::vector<uint16_t> tokens(count);
  for (size_t i = 0; i < count; i++) tokens[i] = uint16_t((i * i * 31 + size_t(seed) * i) % 5000);
  return shard(tokens);
}

TEST_CASE("program: a validation or a sample that fails costs nothing: the run is saved first, and goes on") {
  Folder folder;
  write_file(folder.path / "ok.bin", random_shard(2000, 3));
  std::vector<uint16_t> tokens(2000, 7);
  tokens[1800] = 50300;
  write_file(folder.path / "late.bin", shard(tokens));
  tokens[1800] = 7;
  tokens[20] = 50300;
  write_file(folder.path / "early.bin", shard(tokens));
  const Outcome late =
      run(folder, kTiny + std::string("-n 4 -v 2 -vn 4 -save 0 -i ok.bin -j late.bin -o late"));
  CHECK(late.code == 1);
  CHECK(late.err.find("validation after step 4: late.bin: token 1800 is 50300") != std::string::npos);
  CHECK(fs::exists(folder.path / "late" / "step_00000004" / "checkpoint.json"));
  CHECK(late.out.find("validation after step 2: loss") != std::string::npos);
  const Outcome early = run(folder, kTiny + std::string("-n 4 -v 2 -save 0 -i ok.bin -j early.bin -o early"));
  CHECK(early.out.find("step 4/4") != std::string::npos);
  CHECK(fs::exists(folder.path / "early" / "step_00000004" / "checkpoint.json"));
}

TEST_CASE("program: -skip_bad steps over a batch with a token outside the vocabulary") {
  Folder folder;
  std::vector<uint16_t> tokens(20 * 32 + 1, 11);
  tokens[tokens.size() / 2] = 60000;
  write_file(folder.path / "s.bin", shard(tokens));
  const Outcome o = run(folder, kTiny + std::string("-n 10 -save 0 -skip_bad -i s.bin -o out"));
  CHECK(o.code == 0);
  CHECK(o.err.find("60000") != std::string::npos);
  CHECK(o.err.find("stepped over") != std::string::npos);
  write_file(folder.path / "all.bin", shard(std::vector<uint16_t>(20 * 32 + 1, 60000)));
  CHECK(run(folder, kTiny + std::string("-n 2 -skip_bad -i all.bin -o all")).code == 1);  // nothing is left
}

TEST_CASE("program: a second Ctrl-C within a validation loses nothing, and is answered at once") {
  Folder folder;
  Started started(folder, kTiny + std::string("-n 3 -save 0 -v 2 -vn 1000000 -o out"));
  wait_for(folder.path / ".out", "step 2/3");
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  kill(started.child, SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  kill(started.child, SIGINT);
  CHECK(started.wait() == 128 + SIGINT);
  CHECK(read_file(folder.path / ".err").find("finishing this step and saving") != std::string::npos);
  CHECK(fs::exists(folder.path / "out" / "step_00000002" / "checkpoint.json"));
  CHECK(read_file(folder.path / ".out").find("./train_gdn -resume -o out") != std::string::npos);
}

TEST_CASE("program: nohup stays in force; nobody reading the output ends no training") {
  Folder folder;
  Started started(folder, kTiny + std::string("-n 1000000 -save 0 -o out"), "trap '' HUP");
  wait_for(folder.path / ".out", "step 2/");
  kill(started.child, SIGHUP);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  CHECK(kill(started.child, 0) == 0);
  CHECK(waitpid(started.child, nullptr, WNOHANG) == 0);
  kill(started.child, SIGTERM);
  CHECK(started.wait() == 128 + SIGTERM);
  const std::string piped = "cd '" + folder.path.string() + "' && { '" + program() + "' " + kTiny +
                            "-n 200 -save 0 -o piped 2>.err; echo $? >.code; } | head -n 3 >/dev/null";
  CHECK(std::system(piped.c_str()) == 0);
  CHECK(read_file(folder.path / ".code") == "0\n");
  CHECK(fs::exists(folder.path / "piped" / "step_00000200" / "checkpoint.json"));
}

TEST_CASE("program: a full disk under standard output is exit code 1, and ends no training") {
  if (!fs::exists("/dev/full")) return;
  Folder folder;
  const auto full = [&](const std::string& arguments) {
    const int status = std::system(
        ("cd '" + folder.path.string() + "' && '" + program() + "' " + arguments + " >/dev/full 2>.err")
            .c_str());
    return WEXITSTATUS(status);
  };
  CHECK(full(kTiny + std::string("-n 3 -o out")) == 1);
  CHECK(read_file(folder.path / ".err").find("standard output") != std::string::npos);
  REQUIRE(fs::exists(folder.path / "out" / "step_00000003" / "checkpoint.json"));
  for (const char* call :
       {"-h", "-version", "-d cpu -load out -gen 5", "-d cpu -coord_check -w 32 -heads 2 -L 1 -T 8"}) {
    CAPTURE(call);
    CHECK(full(call) == 1);
  }
}

TEST_CASE("program: nothing that is not finite is published, and the last good checkpoint is good") {
  Folder folder;
  // weights that overflow within a few steps
  const Outcome o =
      run(folder, kTiny + std::string("-n 400 -opt sgd -lr 1e6 -clip 0 -warmup 400 -save 1 -keep 1 -o out"));
  CHECK(o.code == 1);
  const std::string mark = "the last good checkpoint is ";
  const size_t at = o.err.find(mark);
  REQUIRE(at != std::string::npos);
  std::string good = o.err.substr(at + mark.size());
  good.resize(good.find('\n'));
  REQUIRE(fs::exists(folder.path / good));
  CHECK(run(folder, "-d cpu -gen 5 -load " + good).code == 0);
  int left = 0;  // it is the newest one
  for (const auto& entry : fs::directory_iterator(folder.path / "out"))
    left += entry.path().filename().string() > fs::path(good).filename().string() &&
            entry.path().filename().string().rfind("step_", 0) == 0;
  CHECK(left == 0);
  const Outcome resumed = run(folder, "-d cpu -resume -o out -lr 0 -min_lr 0");
  CHECK(resumed.out.find("resuming " + good) != std::string::npos);
}

TEST_CASE("program: -resume never starts anew; -resume auto does where there is nothing") {
  Folder folder;
  const std::string tiny = kTiny;
  REQUIRE(run(folder, tiny + "-n 2 -o out").code == 0);
  const std::string file = (folder.path / "out" / "step_00000002" / "model.safetensors").string();
  std::string bytes = read_file(file);
  bytes[bytes.size() / 2] ^= 1;
  write_file(file, bytes);
  fs::remove_all(folder.path / "out" / "step_00000001");
  const Outcome damaged = run(folder, "-d cpu -resume -o out");
  CHECK(damaged.code == 1);
  CHECK(std::count(damaged.err.begin(), damaged.err.end(), '\n') == 1);
  CHECK(damaged.err.find("no whole checkpoint") != std::string::npos);
  fs::create_directory(folder.path / "empty");
  CHECK(run(folder, "-d cpu -resume -o empty").code == 1);
  CHECK(!fs::exists(folder.path / "run_001"));
  const Outcome fresh = run(folder, tiny + "-n 2 -save 1 -resume auto -o requeued");
  CHECK(fresh.code == 0);
  const Outcome again = run(folder, tiny + "-n 4 -resume auto -o requeued");
  CHECK(again.code == 0);
  CHECK(again.out.find("resuming requeued/step_00000002") != std::string::npos);
  CHECK(again.out.find("step 1/") == std::string::npos);
  for (const char* name : {"step_00000002.damaged", "step_00000002.damaged2"}) {  // twice in one folder
    CAPTURE(name);
    const Outcome anew = run(folder, tiny + "-n 3 -save 1 -keep 1 -resume auto -o out");
    CHECK(anew.code == 0);
    CHECK(anew.out.find("step 1/") != std::string::npos);
    CHECK(anew.err.find(std::string("is kept as out/") + name) != std::string::npos);
    CHECK(read_file(folder.path / "out" / name / "model.safetensors") == bytes);
    CHECK(run(folder, "-d cpu -gen 2 -load out").code == 0);
    fs::rename(folder.path / "out" / "step_00000003", folder.path / "out" / "step_00000002");
    write_file(file, bytes);
  }
}

TEST_CASE("program: -resume derives defaults anew, keeps those of the device, and knows its data") {
  Folder folder;
  write_file(folder.path / "d.bin", random_shard(4000, 5));
  const std::string model = "-d cpu -w 32 -heads 3 -L 1 -T 32 -s 0 -v 0 -i d.bin ";
  REQUIRE(run(folder, model + "-B 16 -n 2 -save 1 -keep 0 -o out").code == 0);
  fs::remove_all(folder.path / "out" / "step_00000002");
  const Outcome smaller = run(folder, "-d cpu -resume -B 8 -o out");  // over a -b that nobody gave
  CHECK(smaller.code == 0);
  CHECK(smaller.err.find("-B was 16, is 8") != std::string::npos);
  const Outcome longer = run(folder, "-d cpu -resume -n 40 -o out");
  CHECK(longer.code == 0);
  CHECK(longer.err.find("-B was 8, is 16") == std::string::npos);
  const std::string manifest = read_file(folder.path / "out" / "step_00000040" / "checkpoint.json");
  CHECK(manifest.find("\"warmup\": \"4\"") != std::string::npos);
  for (const char* part : {"\"commit\"", "\"date\"", "\"host\"", "\"d.bin\"", "\"bytes\":9024"}) {
    CAPTURE(part);
    CHECK(manifest.find(part) != std::string::npos);
  }
  write_file(folder.path / "d.bin", random_shard(5000, 5));
  const Outcome grown = run(folder, "-d cpu -resume -n 41 -seed 7 -o out");
  CHECK(grown.code == 0);
  CHECK(grown.err.find("d.bin (9024 bytes)") != std::string::npos);
  CHECK(grown.err.find("d.bin (11024 bytes)") != std::string::npos);
  CHECK(grown.err.find("-seed was 42, is 7") != std::string::npos);
}

TEST_CASE("program: -load with some of the model's options takes the others from the checkpoint") {
  Folder folder;
  REQUIRE(run(folder, "-d cpu -w 64 -heads 2 -head_dim 32 -L 1 -T 32 -B 2 -n 1 -s 0 -v 0 -o out").code == 0);
  const std::string more = "-d cpu -T 32 -B 2 -n 1 -s 0 -v 0 -load out ";
  CHECK(run(folder, more + "-w 64 -o same").code == 0);
  CHECK(run(folder, more + "-L 1 -param mup -o same2").code == 0);
  const Outcome other = run(folder, more + "-L 2 -o other");
  CHECK(other.code == 1);
  CHECK(other.err.find("layers 1, the options ask for 2") != std::string::npos);
}

TEST_CASE("program: a step folder whose name is not its step is named and passed over") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 4 -save 2 -o out")).code == 0);
  fs::rename(folder.path / "out" / "step_00000004", folder.path / "out" / "step_00000009");
  const Outcome o = run(folder, "-d cpu -resume -o out");
  CHECK(o.code == 0);
  CHECK(o.err.find("step_00000009: holds step 4") != std::string::npos);
  CHECK(o.out.find("resuming out/step_00000002") != std::string::npos);
  CHECK(fs::exists(folder.path / "out" / "step_00000009" / "checkpoint.json"));
}

TEST_CASE("program: one run a folder, and nothing that is not this program's is written over") {
  Folder folder;
  const std::string tiny = kTiny;
  Started started(folder, tiny + "-n 1000000 -save 1 -o out");
  wait_for(folder.path / ".out", "step 3/");
  const auto second = [&](const std::string& arguments) {
    const std::string command =
        "cd '" + folder.path.string() + "' && '" + program() + "' " + arguments + " 2>.err2 >/dev/null";
    return WEXITSTATUS(std::system(command.c_str()));
  };
  CHECK(second("-d cpu -resume -o out") == 1);
  CHECK(read_file(folder.path / ".err2").find("another run") != std::string::npos);
  kill(started.child, SIGKILL);
  CHECK(started.wait() == -SIGKILL);
  CHECK(run(folder, tiny + "-resume -n 2 -o out").code <= 1);  // the lock went with its owner

  fs::create_directory(folder.path / "mine");
  write_file(folder.path / "mine" / "log.csv", "my,own,table\n1,2,3\n");
  for (const char* call : {"-n 2 -o mine", "-n 2 -resume auto -o mine"}) {
    CAPTURE(call);
    const Outcome o = run(folder, tiny + call);
    CHECK(o.code == 1);
    CHECK(o.err.find("log.csv") != std::string::npos);
    CHECK(read_file(folder.path / "mine" / "log.csv") == "my,own,table\n1,2,3\n");
  }
  fs::create_directory(folder.path /
                       "killed");  // as a run leaves it that is killed before its first checkpoint
  REQUIRE(run(folder, tiny + "-n 1 -o other").code == 0);
  fs::copy_file(folder.path / "other" / "log.csv", folder.path / "killed" / "log.csv");
  CHECK(run(folder, tiny + "-n 2 -o killed").code == 1);
  CHECK(run(folder, tiny + "-n 2 -resume auto -o killed").code == 0);
  fs::create_directories(folder.path / "notes" / "step_00000002");
  write_file(folder.path / "notes" / "step_00000002" / "notes.txt", "kept");
  fs::create_directories(folder.path / "notes" / "step_00000001.tmp");
  write_file(folder.path / "notes" / "step_00000001.tmp" / "mine.txt", "kept");
  run(folder, tiny + "-n 3 -save 1 -keep 1 -resume auto -o notes");
  CHECK(read_file(folder.path / "notes" / "step_00000002" / "notes.txt") == "kept");
  CHECK(read_file(folder.path / "notes" / "step_00000001.tmp" / "mine.txt") == "kept");
  CHECK(run(folder, "-d cpu -gen 2 -load notes").code == 0);
}

TEST_CASE("program: a kill at any of 200 moments loses nothing that was saved, and leaves whole rows") {
  Folder folder;
  uint64_t random = 88172645463325252ull;
  int64_t saved = -1;
  for (int kills = 0; kills < 200; kills++) {
    fs::remove(folder.path / ".out");
    Started started(folder, kTiny + std::string("-n 1000000 -save 1 -keep 2 -resume auto -o out"),
                    "export OMP_NUM_THREADS=1");
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    // half of them while it starts, half while it saves after each step, however slow the machine is
    if (kills % 2) wait_for(folder.path / ".out", "saved ");
    std::this_thread::sleep_for(std::chrono::milliseconds(random % 160));
    kill(started.child, SIGKILL);
    const int code = started.wait();
    CAPTURE(read_file(folder.path / ".err"));
    REQUIRE(code == -SIGKILL);  // it never ended by itself: it found what to go on from
    const std::string out = read_file(folder.path / ".out");
    const std::string mark = "resuming out/step_";
    if (out.find(mark) != std::string::npos) {
      const int64_t resumed = std::atoll(&out[out.find(mark) + mark.size()]);
      CHECK(resumed >= saved);
      saved = resumed;
    }
  }
  CHECK(saved > 0);
  const Outcome end = run(folder, kTiny + std::string("-n 1 -resume -o out"));
  CAPTURE(end.err);
  CHECK(end.code == 0);
  std::istringstream log(read_file(folder.path / "out" / "log.csv"));
  int64_t last = 0;
  for (std::string row; std::getline(log, row);) {
    if (row[0] == '#' || row[0] == 's') continue;
    CAPTURE(row);
    CHECK(std::count(row.begin(), row.end(), ',') == 10);
    if (row.find(",train,") == std::string::npos) continue;
    CHECK(std::atoll(row.c_str()) == last + 1);
    last++;
  }
}

// Builds gdn/tests/faults.c as faults.so in the folder; says so where there is no C compiler.
inline bool build_faults(const Folder& folder) {
  const bool built = std::system(("cc -shared -fPIC -o '" + (folder.path / "faults.so").string() +
                                  "' gdn/tests/faults.c -ldl 2>/dev/null")
                                     .c_str()) == 0;
  if (!built) MESSAGE("no C compiler: not run");
  return built;
}

TEST_CASE("program: any call on a file that fails once ends in one line and exit code 1, or is repaired") {
  Folder folder;
  if (!build_faults(folder)) return;
  std::string text;
  for (int i = 0; i < 900; i++) text += std::to_string(i * i % 1013) + (i % 9 ? " " : ".\n");
  write_file(folder.path / "zzdata.txt", text);
  const std::string tiny = kTiny + std::string("-i zzdata.txt -j zzdata.txt -vn 1 -save 1 -keep 1 ");
  const fs::path out = folder.path / "zzout";
  REQUIRE(run(folder, tiny + "-n 1 -o zzout").code == 0);
  fs::rename(out, folder.path / "base");
  const struct {
    const char* call;
    std::vector<int> errors;
  } calls[] = {{"open", {EMFILE, EACCES, EIO, ENOSPC}},
               {"opendir", {EMFILE, EACCES, EIO}},
               {"stat", {EACCES, EIO}},
               {"access", {EACCES}},
               {"read", {EIO}},
               {"pread", {EIO}},
               {"write", {EIO, ENOSPC}},
               {"fsync", {EIO, ENOSPC}},
               {"ftruncate", {EIO}},
               {"close", {EIO, ENOSPC}},
               {"flock", {EIO}},
               {"rename", {EACCES, EIO, ENOSPC}},
               {"mkdir", {EACCES, ENOSPC, EIO}},
               {"rmdir", {EACCES, EIO}},
               {"unlink", {EACCES, EIO}}};
  for (const bool resumed : {false, true})
    for (const auto& c : calls)
      for (int at = 1;; at++) {
        fs::remove_all(out);
        fs::remove(folder.path / "mark");
        if (resumed) fs::copy(folder.path / "base", out, fs::copy_options::recursive);
        const int error = c.errors[size_t(at) % c.errors.size()];
        const Outcome o = run(folder, resumed ? "-d cpu -resume -n 2 -o zzout" : tiny + "-n 2 -o zzout",
                              "export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive LD_PRELOAD=./faults.so "
                              "FAULT_IN=zz FAULT_CALLS=," +
                                  std::string(c.call) + ", FAULT_FROM=" + std::to_string(at) +
                                  " FAULT_TO=" + std::to_string(at + 1) +
                                  " FAULT_ERRNO=" + std::to_string(error) + " FAULT_MARK=mark");
        if (!fs::exists(folder.path / "mark")) break;
        const std::string fault = std::string(resumed ? "resumed, " : "new, ") + c.call + " " +
                                  std::to_string(at) + ": " + std::strerror(error) + "; " + o.err;
        CAPTURE(fault);
        CHECK((o.code == 0 || o.code == 1));
        std::istringstream lines(o.err);
        std::string line, last;
        int count = 0;
        for (; std::getline(lines, line); count++) {
          CHECK(line.rfind("train_gdn: ", 0) == 0);
          CHECK(line.find("filesystem error") == std::string::npos);
          last = line;
        }
        if (o.code == 1) {
          CHECK(count >= 1);
          CHECK(count <= 2);
          CHECK(last.find("zz") != std::string::npos);
        }
        // what was saved opens, the last step's too where the run says that it ended well; no row is lost
        const auto newest = [&] { return find_newest_checkpoint(out.string(), [](const std::string&) {}); };
        if (resumed || o.out.find("saved ") != std::string::npos) CHECK(newest() != "");
        if (o.code == 0) CHECK(newest() == (out / "step_00000002").string());
        const std::string log = read_file(out / "log.csv");
        if (resumed || o.code == 0) CHECK(log.find("\n1,train,") != std::string::npos);
        if (o.code == 0) CHECK(log.find("\n2,train,") != std::string::npos);
      }
}

TEST_CASE("program: a stream that is closed gets no file's number; a limit of file size is as a full disk") {
  Folder folder;
  const std::string tiny = kTiny + std::string("-n 2 -save 1 ");
  for (const char* closed : {"<&-", ">&-", "2>&-", "<&- >&- 2>&-"}) {
    CAPTURE(closed);
    fs::remove_all(folder.path / "out");
    const std::string command = "cd '" + folder.path.string() + "' && '" + program() + "' " + tiny +
                                "-o out >.out 2>.err </dev/null " + closed;
    CHECK(std::system(command.c_str()) == 0);
    const std::string log = read_file(folder.path / "out" / "log.csv");
    CHECK(log.rfind("# train_gdn ", 0) == 0);
    CHECK(log.find("device") == std::string::npos);
    CHECK(std::count(log.begin(), log.end(), '\n') == 2 + 2 + 1);
    CHECK(find_newest_checkpoint((folder.path / "out").string(), [](const std::string&) {}) ==
          (folder.path / "out" / "step_00000002").string());
  }
  const Outcome limited = run(folder, tiny + "-o limited", "ulimit -f 40");  // SIGXFSZ as it is by default
  CHECK(limited.code == 1);
  CHECK(limited.out.find("step 2/2") != std::string::npos);
  CHECK(limited.err.find("File too large") != std::string::npos);
}

TEST_CASE("program: an error is one line whatever a name holds") {
  Folder folder;
  for (const char* call : {"-i \"$(printf 'no\\nsuch\\rfile')\"", "-resume -o \"$(printf 'no\\nfolder')\"",
                           "-lr_of \"$(printf 'x\\ny')\"", "\"$(printf -- '-no\\nsuch')\""}) {
    CAPTURE(call);
    const Outcome o = run(folder, kTiny + std::string("-n 2 ") + call);
    CHECK(o.code == 1);
    CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
    CHECK(o.err.find('\r') == std::string::npos);
  }
}

TEST_CASE("program: threads that wait sleep, unless the caller chose; the process keeps its name") {
  Folder folder;
  for (const std::string& chosen : {std::string("true"), std::string("export OMP_WAIT_POLICY=active"),
                                    std::string("export GOMP_SPINCOUNT=5")}) {
    CAPTURE(chosen);
    fs::remove(folder.path / ".out");
    Started started(folder, kTiny + std::string("-n 1000000 -save 0 -resume auto -o out"),
                    "unset OMP_WAIT_POLICY GOMP_SPINCOUNT && " + chosen);
    wait_for(folder.path / ".out", "step 1/");
    const std::string process = "/proc/" + std::to_string(started.child) + "/";
    CHECK(read_file(process + "comm") == "train_gdn\n");
    const std::string settings = read_file(process + "environ");
    CHECK((settings.find("OMP_WAIT_POLICY=passive") != std::string::npos) == (chosen == "true"));
    kill(started.child, SIGKILL);
    started.wait();
  }
}

TEST_CASE("program: an export of a muP model names the checkpoint to load in its place") {
  Folder folder;
  REQUIRE(run(folder, kTiny + std::string("-n 1 -o out")).code == 0);
  const fs::path step = folder.path / "out" / "step_00000001", exported = folder.path / "exported";
  fs::create_directory(exported);
  fs::copy_file(step / "model.safetensors", exported / "model.safetensors");
  std::string config = read_file(step / "config.json");
  const std::string key = "\"norm_eps\": 1e-06";
  REQUIRE(config.find(key) != std::string::npos);
  config.replace(config.find(key), key.size(),
                 "\"train_gdn_export\": \"out/step_00000001\",\n\"norm_eps\": 2.5e-07");
  write_file(exported / "config.json", config);
  const Outcome o = run(folder, "-d cpu -gen 1 -load exported");
  CAPTURE(o.err);
  CHECK(o.code == 1);
  CHECK(o.err.find("'norm_eps' is 2.5e-07 in this export of a muP model") != std::string::npos);
  CHECK(o.err.find("load the checkpoint that it was made from, out/step_00000001") != std::string::npos);
}

TEST_CASE("program: faults of the disk while a run writes are said, and repaired when they are over") {
  Folder folder;
  if (!build_faults(folder)) return;
  int number = 0;
  for (const int error : {EIO, ENOSPC, EACCES})
    for (const char* part : {"log.csv", "model.safetensors", "training_state", "checkpoint.json"}) {
      CAPTURE(error);
      CAPTURE(part);
      const std::string out = "out" + std::to_string(number++);
      // the log's first write is its head, a checkpoint's come later; both are well again before the end
      const std::string from = std::string(part) == "log.csv" ? "4" : "1",
                        to = std::string(part) == "log.csv" ? "9" : "2";
      const Outcome o = run(folder, kTiny + std::string("-n 30 -save 5 -keep 0 -o ") + out,
                            "export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1 LD_PRELOAD=./faults.so "
                            "FAULT_CALLS=,write,fsync, FAULT_IN=/" +
                                out + "/ FAULT_FROM=1000000");
      CHECK(o.code == 0);
      fs::remove_all(folder.path / out);
      const std::string faulty =
          "export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1 LD_PRELOAD=./faults.so FAULT_CALLS=,write,fsync, "
          "FAULT_IN=" +
          std::string(part) + " FAULT_FROM=" + from + " FAULT_TO=" + to +
          " FAULT_ERRNO=" + std::to_string(error);
      const Outcome f = run(folder, kTiny + std::string("-n 30 -save 5 -keep 0 -o ") + out, faulty);
      CAPTURE(f.err);
      CHECK(f.code == 0);
      CHECK(f.err.find(std::string(part) == "log.csv" ? "log.csv: cannot be written"
                                                      : "checkpoint not saved") != std::string::npos);
      const std::string log = read_file(folder.path / out / "log.csv");
      CHECK(std::count(log.begin(), log.end(), '\n') == 2 + 30 + 1);  // and the last validation
      CHECK(run(folder, "-d cpu -gen 2 -load " + out + "/step_00000030").code == 0);
    }
}

TEST_CASE("program: -eval prints a checkpoint's loss on files, the one that the training's validation had") {
  Folder folder;
  std::string text;
  for (int i = 0; i < 900; i++) text += std::to_string(i * i % 1013) + (i % 9 ? " " : ".\n");
  write_file(folder.path / "t.txt", text);
  const Outcome trained = run(folder, kTiny + std::string("-n 3 -i t.txt -j t.txt -o out"));
  REQUIRE(trained.code == 0);
  const std::string mark = "validation after step 3: loss ";
  const size_t at = trained.out.find(mark);
  REQUIRE(at != std::string::npos);
  const Outcome o = run(folder, "-d cpu -load out -eval t.txt");
  CAPTURE(o.err);
  CHECK(o.code == 0);
  CHECK(o.out.rfind("loss ", 0) == 0);
  CHECK(std::fabs(std::atof(&o.out[5]) - std::atof(&trained.out[at + mark.size()])) < 6e-5);
  CHECK(o.out.find("sequences of 32 tokens") != std::string::npos);
}

TEST_CASE("program: the version names commit and compiler; -min_lr takes a share of -lr") {
  Folder folder;
  const Outcome o = run(folder, "--version");
  CHECK(o.code == 0);
  CHECK(o.out.rfind("train_gdn ", 0) == 0);
  CHECK(o.out.find("GPU code") != std::string::npos);
  const auto weights = [&](const std::string& options) {
    return file_of_a_run(folder, "-n 3 -lr 0.02 " + options, "step_00000003/model.safetensors");
  };
  CHECK(weights("-min_lr lr/20") == weights("-min_lr 0.001"));
  CHECK(weights("") == weights("-min_lr lr/20"));
  CHECK(weights("-opt sgd") == weights("-opt sgd -min_lr lr/20"));
}

TEST_CASE("program: the tests that dev/doc/faults.md names are there") {
  std::string sources;
  for (const auto& entry : fs::directory_iterator("gdn/tests"))
    if (entry.path().extension() == ".cpp") sources += read_file(entry.path());
  const std::string text = read_file("dev/doc/faults.md");
  int names = 0;
  for (size_t begin = 0; (begin = text.find('`', begin)) != std::string::npos;) {
    const size_t end = text.find('`', begin + 1);
    REQUIRE(end != std::string::npos);
    const std::string name = text.substr(begin + 1, end - begin - 1);
    begin = end + 1;
    if (name.find(": ") == std::string::npos) continue;  // no test's name
    CAPTURE(name);
    CHECK(sources.find("\"" + name + "\"") != std::string::npos);
    names++;
  }
  CHECK(names > 40);
}

TEST_CASE("program: what a terminal gets is printable, and a step's line fits it by whole fields") {
  TerminalText terminal;
  CHECK(terminal("a\tb\n\x1b[31m") == "a\tb\n\\x1b[31m");
  CHECK(terminal("\xc3") == "");
  CHECK(terminal("\xa9\xe2\x80\xae") ==
        "\xc3\xa9\\xe2\\x80\\xae");  // e with an accent, an override of direction
  CHECK(terminal("\xff\xc0\x80\xed\xa0\x80") == "\\xff\\xc0\\x80\\xed\\xa0\\x80");
  CHECK(terminal("\xf0\x9f\x98") == "");
  CHECK(terminal.rest() == "\\xf0\\x9f\\x98");
  StepReport r;
  r.step = 1234567;
  r.steps = 10000000;
  r.loss = 0.3175;
  r.floor = 0.295;
  r.tokens_per_second = 1850000;
  for (const int width : {0, 40, 60, 79, 100}) {
    CAPTURE(width);
    const std::string line = Reporter::step_line(r, 100, width);
    if (width) CHECK(int(line.size()) <= width);
    CHECK(line.find("loss 0.3175 (floor 0.2950)") == (width == 40 ? std::string::npos : size_t(23)));
  }
  r.step = 12;
  r.steps = 2000;
  CHECK(Reporter::step_line(r, 15, 79).find("1850000 tokens/s") != std::string::npos);
}

}  // namespace
