// Batches of token sequences from three sources: token shards, raw text files and a built-in corpus.
//
// - shards: files ending in .bin, the format of llm.c and modded-nanogpt: 256 little-endian int32 (magic
//   20240520, version 1, token count, zeros), then uint16 GPT-2 tokens; vocabulary 50257.
// - raw text: all other files, one token per byte; vocabulary 256.
// - built-in: stories generated from a seed, one token per byte, each byte's probability known exactly; see
//   namespace stories below.
//
// A source is cut into sequences of T inputs and T targets shifted by one: sequence i of a file covers its
// tokens [iT, iT + T], so a file of n tokens holds (n - 1) / T sequences and drops the tail. The loader
// numbers the sequences it hands out p = 0, 1, 2, ...; with N sequences in all, epoch e = p / N visits them
// in the order of a pseudo-random permutation of [0, N) keyed by (seed, e). The permutation is computed
// element by element, so p is the whole state. Row j of global batch s is p = s B + j, whatever the number of
// ranks; rank r of R reads rows [r B / R, (r + 1) B / R).
//
// Errors are std::runtime_error with one line: the file, the value seen, what was expected.
// Files are memory-mapped and read in the host's byte order, which is taken to be little-endian.
#pragma once

#include <fcntl.h>
#include <glob.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace gdn {

// Which of two disjoint streams of built-in stories to draw; files are the same under both.
enum class Split { train, validation };

namespace data {

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// The output function of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that scatters near
// inputs.
inline uint64_t mix64(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// splitmix64 as a stream of random integers.
struct Random {
  uint64_t state;

  uint32_t next() {
    uint32_t bits = static_cast<uint32_t>(mix64(state) >> 32);
    state += 0x9E3779B97F4A7C15ull;
    return bits;
  }

  // Uniform in [0, n), n >= 1, without bias: Lemire's multiply-and-reject (2019).
  uint32_t below(uint32_t n) {
    uint64_t product = uint64_t{next()} * n;
    if (static_cast<uint32_t>(product) < n) {
      uint32_t threshold = (0u - n) % n;
      while (static_cast<uint32_t>(product) < threshold) product = uint64_t{next()} * n;
    }
    return static_cast<uint32_t>(product >> 32);
  }
};

// Image of i under a pseudo-random permutation of [0, n), 0 <= i < n, chosen by key: a six-round balanced
// Feistel network on the smallest even number of bits that holds n values, applied again until the image
// falls below n (cycle walking; fewer than 4 applications on average).
inline uint64_t permuted(uint64_t i, uint64_t n, uint64_t key) {
  int half_bits = 0;
  while (half_bits < 32 && (uint64_t{1} << (2 * half_bits)) < n) ++half_bits;
  uint64_t half_mask = (uint64_t{1} << half_bits) - 1;
  do {
    uint64_t left = i >> half_bits, right = i & half_mask;
    for (uint64_t round = 0; round < 6; ++round) {
      uint64_t mixed = left ^ (mix64(mix64(key + round) + right) & half_mask);
      left = right;
      right = mixed;
    }
    i = left << half_bits | right;
  } while (i >= n);
  return i;
}

}  // namespace data

// The built-in corpus. A sequence is whole stories one after another, cut at the wanted length. A story names
// two to four friends, states facts about them (job, place, a thing and its colour, how many animals), then
// mixes events that overwrite facts with questions whose answers the facts determine.
//
// Every random choice is among byte strings none of which is a prefix of another, so the text reveals each
// choice, and the facts and the step of the story are functions of the text so far. With integer weights w,
// the byte that narrows the options consistent with the text from mass M = sum of w to mass m had probability
// m / M and costs log(M) - log(m) nats; every other byte is certain and costs 0. The sum over a sequence is
// thus exactly -log p of its bytes: the loss of a perfect model, whose expectation is the corpus's entropy.
namespace stories {

// One byte string of a choice; the tag says what choosing it means where the text alone does not.
struct Option {
  Option(const char* text, uint32_t weight = 1, int tag = 0) : text(text), weight(weight), tag(tag) {}
  std::string text;
  uint32_t weight;
  int tag;
};

// At most 64 options, none a prefix of another; subsets of them are bit masks.
struct ChoiceSet {
  ChoiceSet(std::initializer_list<Option> list) : options(list), agree(list.size()) {
    for (size_t k = 0; k < options.size(); ++k) {
      const std::string& text = options[k].text;
      for (size_t length = 1; length <= text.size(); ++length) {
        uint64_t mask = 0;
        for (size_t m = 0; m < options.size(); ++m) {
          if (options[m].text.compare(0, length, text, 0, length) == 0) mask |= uint64_t{1} << m;
        }
        agree[k].push_back(mask);
      }
    }
  }

  uint64_t all() const { return ~uint64_t{0} >> (64 - options.size()); }

  // Sum of the weights of the options in the mask.
  uint32_t mass(uint64_t mask) const {
    uint32_t sum = 0;
    for (; mask != 0; mask &= mask - 1) sum += options[__builtin_ctzll(mask)].weight;
    return sum;
  }

  // The option of the mask that holds `point`, 0 <= point < mass(mask), with their weights laid end to end.
  int at(uint64_t mask, uint32_t point) const {
    for (; point >= options[__builtin_ctzll(mask)].weight; mask &= mask - 1) {
      point -= options[__builtin_ctzll(mask)].weight;
    }
    return __builtin_ctzll(mask);
  }

  std::vector<Option> options;
  // agree[k][b]: the options whose bytes 0..b equal those of option k.
  std::vector<std::vector<uint64_t>> agree;
};

// What a sentence after the introductions does (tags of kSteps).
enum Step {
  kEvent,
  kScenery,
  kWherePerson,
  kWhoAtPlace,
  kWhoHasThing,
  kWhereThing,
  kWhichColour,
  kHowMany,
  kWhichJob,
  kWhoHasJob,
  kEnd
};

// What an event changes (tags of kVerbs).
enum Event { kMove, kGive, kPaint, kTrade, kNewJob };

enum Pronoun { kShe, kHe };

inline const ChoiceSet kOpenings{
    {"Once upon a time ", 3}, {"Long ago ", 2}, {"Many years ago ", 2}, "In the old days "};
inline const ChoiceSet kCasts{{"two", 3, 2}, {"three", 2, 3}, {"four", 1, 4}};
inline const ChoiceSet kSettings{"by the sea",        "in a small town",        "on an island",
                                 "in a quiet valley", "near the mountains",     "in a large city",
                                 "on a wide plain",   "at the edge of a forest"};
inline const ChoiceSet kNames{
    {"Anna", 1, kShe},  {"Alice", 1, kShe}, {"Bella", 1, kShe}, {"Clara", 1, kShe},  {"Daisy", 1, kShe},
    {"Emma", 1, kShe},  {"Flora", 1, kShe}, {"Grace", 1, kShe}, {"Hanna", 1, kShe},  {"Ivy", 1, kShe},
    {"Julia", 1, kShe}, {"Kate", 1, kShe},  {"Lucy", 1, kShe},  {"Mary", 1, kShe},   {"Nora", 1, kShe},
    {"Olive", 1, kShe}, {"Polly", 1, kShe}, {"Rosa", 1, kShe},  {"Sara", 1, kShe},   {"Tilda", 1, kShe},
    {"Vera", 1, kShe},  {"Wanda", 1, kShe}, {"Adam", 1, kHe},   {"Ben", 1, kHe},     {"Carl", 1, kHe},
    {"David", 1, kHe},  {"Edgar", 1, kHe},  {"Frank", 1, kHe},  {"George", 1, kHe},  {"Henry", 1, kHe},
    {"Isaac", 1, kHe},  {"Jack", 1, kHe},   {"Karl", 1, kHe},   {"Leo", 1, kHe},     {"Max", 1, kHe},
    {"Noah", 1, kHe},   {"Oscar", 1, kHe},  {"Peter", 1, kHe},  {"Quentin", 1, kHe}, {"Robert", 1, kHe},
    {"Sam", 1, kHe},    {"Tom", 1, kHe},    {"Victor", 1, kHe}, {"William", 1, kHe},
};
inline const ChoiceSet kJobs{"baker",  "banker",  "barber", "brewer", "butcher",  "carpenter", "cook",
                             "dancer", "doctor",  "farmer", "fisher", "gardener", "hunter",    "judge",
                             "lawyer", "mason",   "miller", "miner",  "nurse",    "painter",   "pilot",
                             "poet",   "potter",  "sailor", "singer", "shepherd", "smith",     "soldier",
                             "tailor", "teacher", "weaver", "writer"};
inline const ChoiceSet kPlaces{"bakery",  "beach",   "bridge",   "castle", "cave",   "chapel",  "church",
                               "farm",    "ferry",   "forest",   "garden", "gate",   "harbour", "inn",
                               "lake",    "library", "market",   "meadow", "mill",   "museum",  "orchard",
                               "palace",  "park",    "pond",     "river",  "school", "station", "temple",
                               "theatre", "tower",   "vineyard", "well"};
inline const ChoiceSet kThings{"basket", "bell",   "blanket", "book",  "bottle", "bowl",  "bucket",  "candle",
                               "chair",  "clock",  "coat",    "cup",   "drum",   "flag",  "flute",   "hammer",
                               "hat",    "kettle", "key",     "kite",  "ladder", "lamp",  "lantern", "mirror",
                               "piano",  "ring",   "rope",    "scarf", "spoon",  "trunk", "violin",  "wagon"};
inline const ChoiceSet kColours{"red",   "blue",   "green",  "yellow", "white", "black",
                                "brown", "silver", "golden", "purple", "grey",  "pink"};
inline const ChoiceSet kNumbers{"two",   "three", "four", "five",   "six",   "seven",
                                "eight", "nine",  "ten",  "eleven", "twelve"};
inline const ChoiceSet kAnimals{"cats",  "cows", "dogs",  "donkeys", "doves",  "ducks",   "foxes", "geese",
                                "goats", "hens", "mules", "pigs",    "ponies", "rabbits", "sheep", "swans"};
inline const ChoiceSet kJobWordings{{" was a ", 3}, " worked as a ", " had become a "};
inline const ChoiceSet kPlaceWordings{{" at the ", 3}, " and lived at the ", " with a house at the "};
inline const ChoiceSet kThingWordings{{" had a ", 3}, " owned a ", " was fond of a "};
inline const ChoiceSet kAnimalWordings{{" and ", 3}, " as well as ", " besides "};
// The last option ends the story.
inline const ChoiceSet kSteps{
    {"Then ", 10, kEvent},
    {"Later ", 8, kEvent},
    {"One day ", 8, kEvent},
    {"In the evening ", 6, kEvent},
    {"After a while ", 6, kEvent},
    {"The next morning ", 6, kEvent},
    {"The wind blew all day.", 1, kScenery},
    {"It rained for an hour.", 1, kScenery},
    {"The sun was warm.", 1, kScenery},
    {"Nobody was in a hurry.", 1, kScenery},
    {"Where was ", 6, kWherePerson},
    {"At which place was ", 4, kWherePerson},
    {"Who was at the ", 8, kWhoAtPlace},
    {"Who had the ", 4, kWhoHasThing},
    {"Who owned the ", 4, kWhoHasThing},
    {"Where could one find the ", 8, kWhereThing},
    {"What colour was the ", 4, kWhichColour},
    {"How many ", 4, kHowMany},
    {"What was the job of ", 3, kWhichJob},
    {"Who was the ", 3, kWhoHasJob},
    {"The end.\n\n", 15, kEnd},
};
inline const ChoiceSet kVerbs{
    {" walked to the ", 5, kMove}, {" went to the ", 5, kMove},       {" moved to the ", 5, kMove},
    {" gave the ", 10, kGive},     {" painted the ", 5, kPaint},      {" traded and now had ", 4, kTrade},
    {" became a ", 2, kNewJob},    {" found work as a ", 2, kNewJob},
};

// Facts are indices into the choice sets, -1 while not stated. No two people of a story share a fact's value,
// counts excepted, and no two things are alike, so every question has one answer.
struct Person {
  int name = -1, job = -1, place = -1, animals = -1, count = -1;
};

struct Thing {
  int kind = -1, colour = -1, owner = -1;  // owner: index into the story's people
};

// Writes stories sentence by sentence. Copying a writer forks the corpus at that point of the text.
struct Writer {
  explicit Writer(uint64_t stream) : random{stream} {}

  data::Random random;
  std::string text;          // everything written so far
  std::vector<double> nats;  // nats[t] = -log p(text[t] | text[0..t))

  // Appends one sentence to text and nats (a question with its answer): the opening of a story, the
  // introduction of one person, or a step, the last of which is "The end." and a blank line.
  void sentence() {
    if (cast == 0) {
      open();
    } else if (introduced < cast) {
      introduce(introduced++);
    } else {
      step();
    }
  }

 private:
  static constexpr int kMinSteps = 8, kMaxSteps = 18;  // sentences between the introductions and "The end."

  std::array<Person, 4> people;
  std::array<Thing, 4> things;
  int cast = 0;        // people of this story; 0 before its opening
  int introduced = 0;  // people introduced so far
  int steps = 0;       // sentences since the introductions

  static uint64_t bit(int index) { return index < 0 ? 0 : uint64_t{1} << index; }

  // The values that a fact has now, over all people or things.
  uint64_t known(int Person::*fact) const {
    uint64_t mask = 0;
    for (const Person& person : people) mask |= bit(person.*fact);
    return mask;
  }
  uint64_t known_things() const {
    uint64_t mask = 0;
    for (const Thing& thing : things) mask |= bit(thing.kind);
    return mask;
  }
  uint64_t things_of(int owner) const {
    uint64_t mask = 0;
    for (const Thing& thing : things) {
      if (thing.owner == owner) mask |= bit(thing.kind);
    }
    return mask;
  }

  // Writes bytes that are certain.
  void say(std::string_view words) {
    text += words;
    nats.resize(text.size(), 0.0);
  }
  void say(const ChoiceSet& set, int index) { say(set.options[index].text); }

  // Draws an allowed option of the set by weight, writes it, and returns its index.
  int pick(const ChoiceSet& set, uint64_t allowed = ~uint64_t{0}) {
    uint64_t consistent = allowed & set.all();
    uint32_t mass = set.mass(consistent);
    int choice = set.at(consistent, random.below(mass));
    text += set.options[choice].text;
    for (uint64_t agree : set.agree[choice]) {
      double cost = 0.0;
      if ((consistent & agree) != consistent) {
        consistent &= agree;
        uint32_t narrowed = set.mass(consistent);
        cost = std::log(static_cast<double>(mass)) - std::log(static_cast<double>(narrowed));
        mass = narrowed;
      }
      nats.push_back(cost);
    }
    return choice;
  }

  // Draws a known value of a fact that tells people apart, writes it, and returns the index of its person.
  int pick_person(const ChoiceSet& set, int Person::*fact, uint64_t allowed = ~uint64_t{0}) {
    int value = pick(set, known(fact) & allowed), p = 0;
    while (people[p].*fact != value) ++p;
    return p;
  }

  // Draws a known thing, writes its kind, and returns it.
  Thing& pick_thing(uint64_t allowed = ~uint64_t{0}) {
    int kind = pick(kThings, known_things() & allowed), i = 0;
    while (things[i].kind != kind) ++i;
    return things[i];
  }

  void say_pronoun(const Person& person) { say(kNames.options[person.name].tag == kShe ? "She" : "He"); }

  void open() {
    people.fill(Person{});
    things.fill(Thing{});
    introduced = steps = 0;
    pick(kOpenings);
    cast = kCasts.options[pick(kCasts)].tag;
    say(" friends lived ");
    pick(kSettings);
    say(": ");
    for (int p = 0; p < cast; ++p) {
      if (p > 0) say(p + 1 < cast ? ", " : " and ");
      people[p].name = pick(kNames, ~known(&Person::name));
    }
    say(".");
  }

  void introduce(int p) {
    Person& person = people[p];
    say(" ");
    say(kNames, person.name);
    pick(kJobWordings);
    person.job = pick(kJobs, ~known(&Person::job));
    pick(kPlaceWordings);
    person.place = pick(kPlaces, ~known(&Person::place));
    say(". ");
    say_pronoun(person);
    pick(kThingWordings);
    things[p].colour = pick(kColours);
    say(" ");
    things[p].kind = pick(kThings, ~known_things());
    things[p].owner = p;
    pick(kAnimalWordings);
    person.count = pick(kNumbers);
    say(" ");
    person.animals = pick(kAnimals, ~known(&Person::animals));
    say(".");
  }

  void step() {
    const uint64_t end = bit(static_cast<int>(kSteps.options.size()) - 1);
    say(" ");
    int choice = pick(kSteps, steps < kMinSteps ? ~end : steps < kMaxSteps ? ~uint64_t{0} : end);
    Step kind = static_cast<Step>(kSteps.options[choice].tag);
    ++steps;
    if (kind == kEvent) {
      event();
    } else if (kind == kEnd) {
      cast = 0;
    } else if (kind != kScenery) {
      question(kind);
    }
  }

  // Changes one fact of one person; only those who have a thing can give or paint.
  void event() {
    int subject = pick_person(kNames, &Person::name);
    Person& person = people[subject];
    uint64_t verbs = 0;
    for (size_t v = 0; v < kVerbs.options.size(); ++v) {
      int tag = kVerbs.options[v].tag;
      if ((tag != kGive && tag != kPaint) || things_of(subject) != 0) verbs |= uint64_t{1} << v;
    }
    switch (kVerbs.options[pick(kVerbs, verbs)].tag) {
      case kMove:
        person.place = pick(kPlaces, ~known(&Person::place));
        break;
      case kGive: {
        Thing& thing = pick_thing(things_of(subject));
        say(" to ");
        thing.owner = pick_person(kNames, &Person::name, ~bit(person.name));
        break;
      }
      case kPaint: {
        Thing& thing = pick_thing(things_of(subject));
        say(" ");
        thing.colour = pick(kColours, ~bit(thing.colour));
        break;
      }
      case kTrade:
        person.count = pick(kNumbers, ~bit(person.count));
        say(" ");
        say(kAnimals, person.animals);
        break;
      case kNewJob:
        person.job = pick(kJobs, ~known(&Person::job));
        break;
    }
    say(".");
  }

  // Draws whom or what the question is about; the answer is certain.
  void question(Step kind) {
    switch (kind) {
      case kWherePerson: {
        const Person& person = people[pick_person(kNames, &Person::name)];
        say("? ");
        say_pronoun(person);
        say(" was at the ");
        say(kPlaces, person.place);
        break;
      }
      case kWhoAtPlace: {
        const Person& person = people[pick_person(kPlaces, &Person::place)];
        say("? ");
        say(kNames, person.name);
        say(" was there");
        break;
      }
      case kWhoHasThing: {
        const Thing& thing = pick_thing();
        say("? It belonged to ");
        say(kNames, people[thing.owner].name);
        break;
      }
      case kWhereThing: {
        const Person& owner = people[pick_thing().owner];
        say("? With ");
        say(kNames, owner.name);
        say(" at the ");
        say(kPlaces, owner.place);
        break;
      }
      case kWhichColour: {
        const Thing& thing = pick_thing();
        say("? It was ");
        say(kColours, thing.colour);
        break;
      }
      case kHowMany: {
        const Person& person = people[pick_person(kAnimals, &Person::animals)];
        say(" were there? ");
        say(kNames, person.name);
        say(" had ");
        say(kNumbers, person.count);
        break;
      }
      case kWhichJob: {
        const Person& person = people[pick_person(kNames, &Person::name)];
        say("? ");
        say_pronoun(person);
        say(" was a ");
        say(kJobs, person.job);
        break;
      }
      default: {
        const Person& person = people[pick_person(kJobs, &Person::job)];
        say("? That was ");
        say(kNames, person.name);
        break;
      }
    }
    say(".");
  }
};

constexpr int64_t kSequences = int64_t{1} << 20;  // sequences in an epoch of the built-in corpus

// A writer at the start of sequence `index`: a pure function of its arguments. For one seed, all sequences of
// both splits start from different states of the random numbers.
inline Writer sequence(uint64_t seed, Split split, int64_t index) {
  uint64_t counter = 2 * static_cast<uint64_t>(index) + (split == Split::validation ? 1 : 0);
  return Writer(data::mix64(data::mix64(seed) + counter));
}

}  // namespace stories

namespace data {

constexpr int32_t kShardMagic = 20240520, kShardVersion = 1;
constexpr int64_t kShardHeaderBytes = 256 * sizeof(int32_t);
constexpr int kShardVocabulary = 50257, kByteVocabulary = 256;

// A memory-mapped file of tokens; the mapping lives as long as the last copy.
struct TokenFile {
  std::string path;
  std::shared_ptr<const uint8_t> bytes;
  int64_t size = 0;    // bytes
  int64_t tokens = 0;  // tokens
};

inline bool is_shard(const std::string& path) {
  return path.size() >= 4 && path.compare(path.size() - 4, 4, ".bin") == 0;
}

// Maps a file for reading (tokens is left 0). Fails if it cannot be opened, is empty, or is not a regular
// file.
inline TokenFile map_file(const std::string& path) {
  struct Descriptor {
    int number;
    ~Descriptor() { close(number); }
  } descriptor{open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (descriptor.number < 0) fail(path + ": cannot open: " + std::strerror(errno));
  struct stat status;
  if (fstat(descriptor.number, &status) != 0) fail(path + ": cannot stat: " + std::strerror(errno));
  if (!S_ISREG(status.st_mode)) fail(path + ": not a regular file, expected a token shard or a text file");
  if (status.st_size == 0) fail(path + ": empty file, expected at least one token");
  size_t size = static_cast<size_t>(status.st_size);
  void* address = mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor.number, 0);
  if (address == MAP_FAILED) fail(path + ": cannot map: " + std::strerror(errno));
  TokenFile file;
  file.path = path;
  file.size = status.st_size;
  file.bytes.reset(static_cast<const uint8_t*>(address),
                   [address, size](const uint8_t*) { munmap(address, size); });
  return file;
}

// Checks a shard's header against the format and the file's size; returns the number of tokens.
inline int64_t shard_tokens(const TokenFile& file) {
  if (file.size < kShardHeaderBytes) {
    fail(file.path + ": " + std::to_string(file.size) + " bytes, shorter than the shard header of " +
         std::to_string(kShardHeaderBytes));
  }
  int32_t header[3];
  std::memcpy(header, file.bytes.get(), sizeof(header));
  const auto [magic, version, tokens] = header;
  if (magic != kShardMagic) {
    fail(file.path + ": magic number " + std::to_string(magic) + ", expected " + std::to_string(kShardMagic));
  }
  if (version != kShardVersion) {
    fail(file.path + ": shard version " + std::to_string(version) + ", expected " +
         std::to_string(kShardVersion));
  }
  int64_t expected_size = kShardHeaderBytes + int64_t{tokens} * static_cast<int64_t>(sizeof(uint16_t));
  if (file.size != expected_size) {
    fail(file.path + ": " + std::to_string(file.size) + " bytes, expected " + std::to_string(expected_size) +
         " for the " + std::to_string(tokens) + " tokens of its header");
  }
  if (tokens == 0) fail(file.path + ": empty shard (0 tokens), expected at least one token");
  return tokens;
}

inline TokenFile open_tokens(const std::string& path) {
  TokenFile file = map_file(path);
  file.tokens = is_shard(path) ? shard_tokens(file) : file.size;
  return file;
}

// Files that match one glob pattern, sorted by name. Fails if there are none.
inline std::vector<std::string> glob_paths(const std::string& pattern) {
  glob_t matches;
  int status = glob(pattern.c_str(), 0, nullptr, &matches);
  std::vector<std::string> paths;
  if (status == 0) paths.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
  globfree(&matches);
  if (paths.empty()) fail("data: no file matches '" + pattern + "'");
  return paths;
}

// The parts of a list separated by commas.
inline std::vector<std::string> split_commas(const std::string& list) {
  std::vector<std::string> parts(1);
  for (char c : list) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Writes inputs[t] = tokens[t], targets[t] = tokens[t + 1] for t < length; returns the largest token seen.
template <typename Token>
int32_t copy_shifted(const Token* tokens, int length, int32_t* inputs, int32_t* targets) {
  Token largest = tokens[0];
  for (int t = 0; t < length; ++t) {
    inputs[t] = tokens[t];
    targets[t] = tokens[t + 1];
    largest = std::max(largest, tokens[t + 1]);
  }
  return largest;
}

}  // namespace data

// Where tokens come from: the built-in corpus, or a set of files of one kind.
class TokenSource {
 public:
  // spec: "" for the built-in corpus, otherwise glob patterns separated by commas (so no commas in file
  // names); files ending in .bin are shards, all others raw text. seed and split choose the built-in stories
  // and do not touch files. Fails if a pattern matches nothing, the files are of both kinds, or a file is
  // unreadable, empty or malformed.
  explicit TokenSource(const std::string& spec, uint64_t seed = 0, Split split = Split::train)
      : spec_(spec), seed_(seed), split_(split) {
    if (is_builtin()) return;
    for (const std::string& pattern : data::split_commas(spec)) {
      for (const std::string& path : data::glob_paths(pattern)) {
        if (!files_.empty() && data::is_shard(path) != data::is_shard(files_[0].path)) {
          data::fail("data: '" + files_[0].path + "' and '" + path +
                     "' mix token shards (.bin) and raw text, expected one kind");
        }
        files_.push_back(data::open_tokens(path));
      }
    }
  }

  bool is_builtin() const { return spec_.empty(); }
  bool is_bytes() const { return is_builtin() || !data::is_shard(files_[0].path); }
  int vocab_size() const { return is_bytes() ? data::kByteVocabulary : data::kShardVocabulary; }

  // Number of sequences of seq_len inputs: (tokens - 1) / seq_len summed over the files; 2^20 when built-in.
  int64_t sequences(int seq_len) const { return sequence_ends(seq_len).back(); }

  // ends[f] = sequences in files 0..f (the built-in corpus counts as one file).
  std::vector<int64_t> sequence_ends(int seq_len) const {
    if (is_builtin()) return {stories::kSequences};
    std::vector<int64_t> ends;
    for (const data::TokenFile& file : files_) {
      ends.push_back((ends.empty() ? 0 : ends.back()) + (file.tokens - 1) / seq_len);
    }
    return ends;
  }

  // Tokens over all files; 0 when built-in.
  int64_t tokens() const {
    int64_t sum = 0;
    for (const data::TokenFile& file : files_) sum += file.tokens;
    return sum;
  }

  // Sequence `index` of file `file`, both in range: writes inputs and targets, [seq_len] int32 each. Returns
  // the entropy floor of the targets, the mean of -log p in nats per token, or NaN for files, whose p is not
  // known. Fails if a token is not in the vocabulary.
  double read(size_t file, int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    if (is_builtin()) return read_stories(index, seq_len, inputs, targets);
    int64_t start = index * seq_len;
    const uint8_t* bytes = files_[file].bytes.get();
    if (is_bytes()) {
      data::copy_shifted(bytes + start, seq_len, inputs, targets);
    } else {
      auto* tokens = reinterpret_cast<const uint16_t*>(bytes + data::kShardHeaderBytes) + start;
      int32_t largest = data::copy_shifted(tokens, seq_len, inputs, targets);
      if (largest >= vocab_size()) fail_vocabulary(files_[file].path, start, tokens, seq_len);
    }
    return std::numeric_limits<double>::quiet_NaN();
  }

 private:
  double read_stories(int64_t index, int seq_len, int32_t* inputs, int32_t* targets) const {
    stories::Writer writer = stories::sequence(seed_, split_, index);
    const size_t length = static_cast<size_t>(seq_len) + 1;
    writer.text.reserve(length + 256);
    writer.nats.reserve(length + 256);
    while (writer.text.size() < length) writer.sentence();
    data::copy_shifted(reinterpret_cast<const uint8_t*>(writer.text.data()), seq_len, inputs, targets);
    double sum = 0.0;
    for (size_t t = 1; t < length; ++t) sum += writer.nats[t];
    return sum / seq_len;
  }

  [[noreturn]] void fail_vocabulary(const std::string& path, int64_t start, const uint16_t* tokens,
                                    int seq_len) const {
    auto outside = [this](uint16_t token) { return token >= vocab_size(); };
    const uint16_t* token = std::find_if(tokens, tokens + seq_len + 1, outside);
    data::fail(path + ": token " + std::to_string(start + (token - tokens)) + " is " +
               std::to_string(*token) + ", expected less than the vocabulary of " +
               std::to_string(vocab_size()));
  }

  std::string spec_;
  uint64_t seed_;
  Split split_;
  std::vector<data::TokenFile> files_;
};

// Draws batches from a source in shuffled order, for one rank of several.
class DataLoader {
 public:
  // spec, split: see TokenSource; seed keys the order and the built-in stories. seq_len: tokens in a
  // sequence, T; global_batch: sequences in a batch over all ranks, B. Fails as TokenSource does, if T, B or
  // the ranks are out of range, if ranks does not divide B, or if no file holds one sequence.
  DataLoader(const std::string& spec, int seq_len, int64_t global_batch, uint64_t seed, int rank = 0,
             int ranks = 1, Split split = Split::train)
      : source_(spec, seed, split),
        seq_len_(seq_len),
        global_batch_(global_batch),
        seed_(seed),
        rank_(rank),
        ranks_(ranks) {
    if (seq_len < 1) data::fail("data: sequence length " + std::to_string(seq_len) + ", expected at least 1");
    if (global_batch < 1) {
      data::fail("data: global batch " + std::to_string(global_batch) + ", expected at least 1");
    }
    if (ranks < 1 || rank < 0 || rank >= ranks) {
      data::fail("data: rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                 ", expected 0 <= rank < ranks");
    }
    if (global_batch % ranks != 0) {
      data::fail("data: global batch " + std::to_string(global_batch) + " does not split over " +
                 std::to_string(ranks) + " ranks, expected a multiple");
    }
    sequence_ends_ = source_.sequence_ends(seq_len);
    if (sequences() == 0) {
      data::fail("data: '" + spec + "' has " + std::to_string(source_.tokens()) + " tokens in " +
                 std::to_string(sequence_ends_.size()) + " file(s), expected one of at least " +
                 std::to_string(int64_t{seq_len} + 1) + " tokens, one sequence");
    }
  }

  const TokenSource& source() const { return source_; }
  int64_t sequences() const { return sequence_ends_.back(); }
  int64_t local_batch() const { return global_batch_ / ranks_; }

  // Sequences handed out so far over all ranks: the whole state of the loader. seek() accepts any position.
  uint64_t position() const { return position_; }
  void seek(uint64_t position) { position_ = position; }
  int64_t epoch() const { return static_cast<int64_t>(position_ / static_cast<uint64_t>(sequences())); }

  // This rank's rows of the next global batch: writes inputs and targets, [local_batch, seq_len] int32 each,
  // and advances the position by the global batch. Returns the entropy floor, the mean of -log p over those
  // targets in nats per token (a global batch's is the mean over its ranks), NaN when the source is not
  // built-in. Fails if a token is not in the vocabulary; the position then stays.
  double next(int32_t* inputs, int32_t* targets) {
    double floor_sum = 0.0;
    for (int64_t row = 0; row < local_batch(); ++row) {
      uint64_t p = position_ + static_cast<uint64_t>(rank_ * local_batch() + row);
      floor_sum += read(shuffled(p), inputs + row * seq_len_, targets + row * seq_len_);
    }
    position_ += static_cast<uint64_t>(global_batch_);
    return floor_sum / static_cast<double>(local_batch());
  }

  // Sequence `index`, 0 <= index < sequences(), in file order: writes inputs and targets, [seq_len] int32
  // each, and returns their entropy floor as next() does. Fails if the index or a token is out of range.
  double read(int64_t index, int32_t* inputs, int32_t* targets) const {
    if (index < 0 || index >= sequences()) {
      data::fail("data: sequence " + std::to_string(index) + ", expected 0 <= sequence < " +
                 std::to_string(sequences()));
    }
    auto end = std::upper_bound(sequence_ends_.begin(), sequence_ends_.end(), index);
    int64_t first = end == sequence_ends_.begin() ? 0 : end[-1];
    size_t file = static_cast<size_t>(end - sequence_ends_.begin());
    return source_.read(file, index - first, seq_len_, inputs, targets);
  }

 private:
  // The sequence that position p visits.
  int64_t shuffled(uint64_t p) const {
    uint64_t n = static_cast<uint64_t>(sequences());
    uint64_t key = data::mix64(data::mix64(seed_) ^ (p / n));
    return static_cast<int64_t>(data::permuted(p % n, n, key));
  }

  TokenSource source_;
  int seq_len_;
  int64_t global_batch_;
  uint64_t seed_;
  int rank_;
  int ranks_;
  uint64_t position_ = 0;
  std::vector<int64_t> sequence_ends_;  // sequences in files 0..f
};

}  // namespace gdn
