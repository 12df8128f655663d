// The program itself: ./train_gdn as a user runs it, in a folder of its own. Bad input must give one clear
// line and exit code 1; a resumed run must end with the same bits as one that was never stopped; a signal
// must save and leave.
#include <doctest/doctest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
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

#include "needs_gpu.h"
#include "program.h"

namespace {

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
                        Case{"stray", "stray"},
                        Case{"-opt adam", "adam"},
                        Case{"-param up", "up"},
                        Case{"-gains both", "both"},
                        Case{"-gates both", "both"},
                        Case{"-wd_mode none", "none"},
                        Case{"-lr_of convs=2", "convs=2"},
                        Case{"-clip_norm mup", "mup"},
                        Case{"-init_of taps=2", "taps=2"},
                        Case{"-init_of gain=2", "gain"},
                        Case{"-logit_factor 0", "-logit_factor '0'"},
                        Case{"-eps -1", "-eps '-1'"},
                        Case{"-coord_check -resume", "-coord_check"},
                        Case{"-coord_check -mask_docs", "-mask_docs"},
                        Case{"-coord_check -o nowhere/x.csv", "nowhere/x.csv"},
                        Case{"-coord_check -opt sgd -lr 1e6 -clip 0", "-coord_check"},
                        Case{"-d tpu", "tpu"},
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
  for (const char* option :
       {"-i ",      "-j ",           "-w ",     "-w0 ",          "-L ",      "-heads ",  "-head_dim ",
        "-ev ",     "-T ",           "-b ",     "-B ",           "-n ",      "-opt ",    "-lr ",
        "-wd ",     "-b1 ",          "-b2 ",    "-mom ",         "-clip ",   "-warmup ", "-min_lr ",
        "-param ",  "-d ",           "-seed ",  "-o ",           "-v ",      "-save ",   "-keep ",
        "-resume ", "-s ",           "-load ",  "-gen ",         "-prompt ", "-eps ",    "-wd_mode ",
        "-gains ",  "-coord_check ", "-vocab ", "-temperature ", "-top_k ",  "-top_p ",  "-mask_docs ",
        "-lr_of ",   "-gates ",      "-clip_norm ", "-init_of ",
        "-logit_factor ", "-vocab_size ", "-separator "}) {
    CAPTURE(option);
    CHECK(o.out.find("\n  " + std::string(option)) != std::string::npos);
  }
  CHECK(read_file("README.md").find("```text\n" + o.out + "```") !=
        std::string::npos);  // the README repeats it
}

TEST_CASE("program: log.csv has its header, a row a step, and validations; the start is timed") {
  Folder folder;
  const auto start = std::chrono::steady_clock::now();
  const Outcome o = run(folder, kTiny + std::string("-n 6 -v 3 -vn 2 -o out"));
  const double wall = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  REQUIRE(o.code == 0);
  const std::string log = read_file(folder.path / "out" / "log.csv");
  CHECK(log.rfind("step,split,loss,lr,grad_norm,ms,tokens_per_s,sol\n", 0) == 0);
  for (const char* start : {"\n1,train,", "\n6,train,", "\n3,val,", "\n6,val,"}) {
    CAPTURE(start);
    CHECK(log.find(start) != std::string::npos);
  }
  CHECK(std::count(log.begin(), log.end(), '\n') == 1 + 6 + 2);
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
  const std::string all = "embedding=0.5,hidden=0.5,gate=0.5,gate_scalar=0.5,conv=0.5,gain=0.5,output_gain=0.5";
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
    return log.substr(0, log.find("e+00"));
  };
  const auto first_row = [&](const std::string& load) {  // of a training from there that stands still
    return without_rates(file_of_a_run(folder, "-n 1 -lr 0 -min_lr 0 -load " + load, "log.csv"));
  };
  const std::string kept = first_row("saved -logit_factor 4");
  // without any option of the model all follow the checkpoint
  REQUIRE(run(folder, "-d cpu -T 32 -B 2 -b 1 -s 0 -v 0 -save 0 -n 1 -lr 0 -min_lr 0 -load saved -o followed").code == 0);
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

TEST_CASE("program: -clip_norm chooses the norm, by default after the optimizer; both are one at the base width") {
  Folder folder;
  const auto first_norm = [&](const std::string& options) {
    std::istringstream log(file_of_a_run(folder, "-n 1 " + options, "log.csv"));
    std::string row, field;
    std::getline(log, row);
    std::getline(log, row);
    std::istringstream fields(row);
    for (int column = 0; column < 5; column++) std::getline(fields, field, ',');  // step,split,loss,lr,grad_norm
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

TEST_CASE("program: SIGINT and SIGTERM save and leave") {
  for (const int signal : {SIGINT, SIGTERM}) {
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
    CHECK(WEXITSTATUS(status) == 0);
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
    const std::string later = "{ (while ! grep -q 'step 2/' .out 2>/dev/null; do sleep 0.02; done; " + std::string(change) + ") & }";
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

TEST_CASE("program: shards of another tokenizer train, resume and generate with their vocabulary") {
  Folder folder;
  std::vector<uint16_t> tokens(900);
  for (size_t i = 0; i < tokens.size(); i++) tokens[i] = uint16_t(i % 11 ? 2 + i * 37 % 318 : 1);
  write_file(folder.path / "s.bin", shard(tokens));
  REQUIRE(run(folder, kTiny + std::string("-i s.bin -vocab_size 320 -separator 1 -mask_docs -n 4 -save 2 -keep 0 -o out")).code == 0);
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

}  // namespace
