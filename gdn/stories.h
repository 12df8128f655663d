// The built-in corpus: stories generated from a seed, one token per byte, the probability of every byte known
// exactly.
//
// A sequence is whole stories one after another, cut at the wanted length. A story names two to four friends,
// states facts about them (job, place, a thing and its colour, how many animals), then mixes events that
// overwrite facts with questions whose answers the facts determine.
//
// Every random choice is among byte strings none of which is a prefix of another, so the text reveals each
// choice, and the facts and the step of the story are functions of the text so far. With integer weights w,
// the byte that narrows the options consistent with the text from mass M = sum of w to mass m had probability
// m / M and costs log(M) - log(m) nats; every other byte is certain and costs 0. The sum over a sequence is
// thus exactly -log p of its bytes: the loss of a perfect model, whose expectation is the corpus's entropy.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "random.h"

namespace gdn {

// Which of two disjoint streams of stories to draw.
enum class Split { train, validation };

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

  RandomStream random;
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
  return Writer(mix64(mix64(seed) + counter));
}

}  // namespace stories

}  // namespace gdn
