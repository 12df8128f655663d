// Tests of stories.h: whether the built-in corpus states the probability of its text rightly. Two independent
// readers check that: one decodes the text alone and recomputes every sentence's probability and every
// answer, the other forks the corpus at one point many times and compares each byte's stated probability with
// its frequency.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "../stories.h"

namespace {

using namespace gdn;

inline const std::vector<const stories::ChoiceSet*> kChoiceSets{
    &stories::kOpenings, &stories::kCasts,          &stories::kSettings,      &stories::kNames,
    &stories::kJobs,     &stories::kPlaces,         &stories::kThings,        &stories::kColours,
    &stories::kNumbers,  &stories::kAnimals,        &stories::kJobWordings,   &stories::kPlaceWordings,
    &stories::kSteps,    &stories::kAnimalWordings, &stories::kThingWordings, &stories::kVerbs};

// Reads stories from their text alone: keeps the facts, requires that every answer follows from them, and
// sums -log p of the choices from the tables of weights.
struct StoryReader {
  struct Person {
    std::string job, place, animals, count;
  };
  struct Thing {
    std::string colour, owner;
  };
  using Allowed = std::function<bool(const std::string&)>;

  const std::string& text;
  size_t at = 0;          // bytes read
  double nats = 0.0;      // -log p of those bytes
  int answers = 0;        // questions read
  int fresh_answers = 0;  // of these, about a fact that an event had overwritten

  std::vector<std::string> cast;
  std::map<std::string, Person> people;
  std::map<std::string, Thing> things;
  std::set<std::string> overwritten;  // "place of Anna"
  size_t introduced = 0;
  int steps = 0;

  explicit StoryReader(const std::string& story_text) : text(story_text) {}

  bool sees(const std::string& words) const { return text.compare(at, words.size(), words) == 0; }

  void expect(const std::string& words) {
    REQUIRE_MESSAGE(sees(words), "expected '" << words << "' at '" << text.substr(at, 60) << "'");
    at += words.size();
  }

  // Reads the one option that stands here, which must be allowed.
  const stories::Option& choose(const stories::ChoiceSet& set, const Allowed& allowed) {
    const stories::Option* chosen = nullptr;
    double total = 0.0;
    for (const stories::Option& option : set.options) {
      if (!allowed(option.text)) continue;
      total += option.weight;
      if (sees(option.text)) {
        REQUIRE(chosen == nullptr);
        chosen = &option;
      }
    }
    REQUIRE_MESSAGE(chosen != nullptr, "no option allowed at '" << text.substr(at, 60) << "'");
    nats -= std::log(chosen->weight / total);
    at += chosen->text.size();
    return *chosen;
  }
  const stories::Option& choose(const stories::ChoiceSet& set) {
    return choose(set, [](const std::string&) { return true; });
  }
  std::string choose_new(const stories::ChoiceSet& set, std::string Person::*fact) {
    return choose(set, [&](const std::string& value) { return !holder(fact, value); }).text;
  }

  const std::string* holder(std::string Person::*fact, const std::string& value) const {
    for (const auto& [name, person] : people) {
      if (person.*fact == value) return &name;
    }
    return nullptr;
  }
  std::string choose_holder(const stories::ChoiceSet& set, std::string Person::*fact) {
    return *holder(fact, choose(set, [&](const std::string& value) { return holder(fact, value); }).text);
  }
  std::string choose_person(const std::string& except = "") {
    return choose(stories::kNames, [&](const std::string& n) { return n != except && people.count(n); }).text;
  }
  std::string choose_thing(const std::string& owner = "") {
    return choose(stories::kThings,
                  [&](const std::string& kind) {
                    return things.count(kind) && (owner.empty() || things.at(kind).owner == owner);
                  })
        .text;
  }
  static std::string pronoun(const std::string& name) {
    for (const stories::Option& option : stories::kNames.options) {
      if (option.text == name) return option.tag == stories::kShe ? "She" : "He";
    }
    return "";
  }

  void sentence() {
    if (cast.empty()) {
      open();
    } else if (introduced < cast.size()) {
      introduce(cast[introduced++]);
    } else {
      step();
    }
  }

  void open() {
    people.clear();
    things.clear();
    overwritten.clear();
    introduced = 0;
    steps = 0;
    choose(stories::kOpenings);
    const std::string number = choose(stories::kCasts).text;
    const size_t count = number == "two" ? 2 : number == "three" ? 3 : 4;
    expect(" friends lived ");
    choose(stories::kSettings);
    expect(": ");
    for (size_t p = 0; p < count; ++p) {
      if (p > 0) expect(p + 1 == count ? " and " : ", ");
      auto unused = [&](const std::string& name) { return people.count(name) == 0; };
      cast.push_back(choose(stories::kNames, unused).text);
      people[cast.back()];
    }
    expect(".");
  }

  void introduce(const std::string& name) {
    Person& person = people[name];
    expect(" " + name);
    choose(stories::kJobWordings);
    person.job = choose_new(stories::kJobs, &Person::job);
    choose(stories::kPlaceWordings);
    person.place = choose_new(stories::kPlaces, &Person::place);
    expect(". " + pronoun(name));
    choose(stories::kThingWordings);
    const std::string colour = choose(stories::kColours).text;
    expect(" ");
    auto unused = [&](const std::string& kind) { return things.count(kind) == 0; };
    things[choose(stories::kThings, unused).text] = Thing{colour, name};
    choose(stories::kAnimalWordings);
    person.count = choose(stories::kNumbers).text;
    expect(" ");
    person.animals = choose_new(stories::kAnimals, &Person::animals);
    expect(".");
  }

  void step() {
    expect(" ");
    const std::string end = "The end.\n\n";
    const stories::Option& lead = choose(
        stories::kSteps, [&](const std::string& words) { return words == end ? steps >= 8 : steps < 18; });
    ++steps;
    if (lead.text == end) {
      cast.clear();
    } else if (lead.text.back() == '.') {
      CHECK(lead.tag == stories::kScenery);
    } else if (lead.tag == stories::kEvent) {
      event();
    } else {
      question(lead.text);
    }
  }

  void event() {
    const std::string name = choose_person();
    Person& person = people[name];
    const bool owns =
        std::any_of(things.begin(), things.end(), [&](auto& t) { return t.second.owner == name; });
    const std::string verb = choose(stories::kVerbs, [&](const std::string& v) {
                               return owns || (v != " gave the " && v != " painted the ");
                             }).text;
    if (verb == " gave the ") {
      const std::string kind = choose_thing(name);
      expect(" to ");
      things[kind].owner = choose_person(name);
      overwritten.insert("owner of " + kind);
    } else if (verb == " painted the ") {
      const std::string kind = choose_thing(name);
      expect(" ");
      auto changed = [&](const std::string& colour) { return colour != things[kind].colour; };
      things[kind].colour = choose(stories::kColours, changed).text;
      overwritten.insert("colour of " + kind);
    } else if (verb == " traded and now had ") {
      person.count = choose(stories::kNumbers, [&](const std::string& n) { return n != person.count; }).text;
      expect(" " + person.animals);
      overwritten.insert("count of " + name);
    } else if (verb == " became a " || verb == " found work as a ") {
      person.job = choose_new(stories::kJobs, &Person::job);
      overwritten.insert("job of " + name);
    } else {
      person.place = choose_new(stories::kPlaces, &Person::place);
      overwritten.insert("place of " + name);
    }
    expect(".");
  }

  void question(const std::string& lead) {
    std::string fact, second_fact;
    if (lead == "Where was " || lead == "At which place was ") {
      const std::string name = choose_person();
      expect("? " + pronoun(name) + " was at the " + people[name].place);
      fact = "place of " + name;
    } else if (lead == "Who was at the ") {
      const std::string name = choose_holder(stories::kPlaces, &Person::place);
      expect("? " + name + " was there");
      fact = "place of " + name;
    } else if (lead == "Who had the " || lead == "Who owned the ") {
      const std::string kind = choose_thing();
      expect("? It belonged to " + things[kind].owner);
      fact = "owner of " + kind;
    } else if (lead == "Where could one find the ") {
      const std::string kind = choose_thing();
      const std::string owner = things[kind].owner;
      expect("? With " + owner + " at the " + people[owner].place);
      fact = "owner of " + kind;
      second_fact = "place of " + owner;
    } else if (lead == "What colour was the ") {
      const std::string kind = choose_thing();
      expect("? It was " + things[kind].colour);
      fact = "colour of " + kind;
    } else if (lead == "How many ") {
      const std::string name = choose_holder(stories::kAnimals, &Person::animals);
      expect(" were there? " + name + " had " + people[name].count);
      fact = "count of " + name;
    } else if (lead == "What was the job of ") {
      const std::string name = choose_person();
      expect("? " + pronoun(name) + " was a " + people[name].job);
      fact = "job of " + name;
    } else {
      REQUIRE(lead == "Who was the ");
      const std::string name = choose_holder(stories::kJobs, &Person::job);
      expect("? That was " + name);
      fact = "job of " + name;
    }
    expect(".");
    ++answers;
    fresh_answers += overwritten.count(fact) + overwritten.count(second_fact) > 0;
  }
};

// Frequencies of the bytes that follow each prefix of many continuations.
struct ByteTree {
  struct Branch {
    int node = 0, count = 0;
    double nats = 0.0;
  };
  std::vector<std::map<char, Branch>> nodes = std::vector<std::map<char, Branch>>(1);

  // Counts one continuation; a byte must state the same -log p every time it follows the same prefix.
  void add(const std::string& text, const std::vector<double>& nats, size_t start) {
    int node = 0;
    for (size_t t = start; t < text.size(); ++t) {
      auto [branch, is_new] = nodes[node].try_emplace(text[t]);
      int next = branch->second.node;
      if (is_new) {
        next = static_cast<int>(nodes.size());
        branch->second = Branch{next, 0, nats[t]};
        nodes.emplace_back();  // ends the life of `branch`
      }
      Branch& taken = nodes[node].at(text[t]);
      ++taken.count;
      REQUIRE(taken.nats == nats[t]);
      node = next;
    }
  }

  // Requires, wherever enough continuations pass, that the stated probabilities sum to 1 and fit the counts.
  void require_calibrated(int min_visits) const {
    for (const auto& node : nodes) {
      double visits = 0.0, stated = 0.0;
      for (const auto& [byte, branch] : node) {
        visits += branch.count;
        stated += std::exp(-branch.nats);
      }
      if (visits < min_visits) continue;
      REQUIRE(stated <= 1.0 + 1e-12);
      REQUIRE((1.0 - stated) * visits < 25.0);  // unseen bytes: e^-25 that they all stay unseen
      for (const auto& [byte, branch] : node) {
        double p = std::exp(-branch.nats);
        double deviation = std::abs(branch.count - visits * p);
        REQUIRE(deviation <= 5.5 * std::sqrt(visits * p * (1.0 - p)) + 1.0);
      }
    }
  }
};

inline double entropy(const std::vector<double>& weights) {
  double total = std::accumulate(weights.begin(), weights.end(), 0.0), nats = 0.0;
  for (double w : weights) nats -= w / total * std::log(w / total);
  return nats;
}

TEST_CASE("built-in corpus: no option is a prefix of another in its set") {
  for (const stories::ChoiceSet* set : kChoiceSets) {
    REQUIRE(set->options.size() <= 64);
    for (const stories::Option& a : set->options) {
      CHECK(a.weight > 0);
      CHECK_FALSE(a.text.empty());
      for (const stories::Option& b : set->options) {
        if (&a != &b) CHECK_MESSAGE(b.text.compare(0, a.text.size(), a.text) != 0, a.text << " | " << b.text);
      }
    }
  }
}

TEST_CASE("built-in corpus: a reader of the text alone finds the same probabilities and answers") {
  int answers = 0, fresh_answers = 0;
  for (int64_t index = 0; index < 40; ++index) {
    stories::Writer writer = stories::sequence(9, index % 2 ? Split::validation : Split::train, index);
    StoryReader reader(writer.text);
    double nats = 0.0;
    while (writer.text.size() < 4000) {
      const size_t start = writer.text.size();
      writer.sentence();
      REQUIRE(writer.nats.size() == writer.text.size());
      nats = std::accumulate(writer.nats.begin() + start, writer.nats.end(), nats);
      reader.sentence();
      REQUIRE(reader.at == writer.text.size());
      REQUIRE(reader.nats == doctest::Approx(nats).epsilon(1e-11));
    }
    answers += reader.answers;
    fresh_answers += reader.fresh_answers;
  }
  CHECK(answers > 1000);
  CHECK(4 * fresh_answers > answers);
}

TEST_CASE(
    "built-in corpus: stated probabilities of bytes sum to 1 and fit the frequencies at forks of the text") {
  stories::Writer writer = stories::sequence(4, Split::train, 0);
  for (int fork = 0; fork < 16; ++fork) {
    ByteTree tree;
    const size_t start = writer.text.size();
    for (uint64_t stream = 0; stream < 3000; ++stream) {
      stories::Writer branch = writer;
      branch.random.state = mix64(stream * 1000 + fork);
      branch.sentence();
      tree.add(branch.text, branch.nats, start);
    }
    tree.require_calibrated(200);
    writer.sentence();
  }
}

TEST_CASE("built-in corpus: the mean of the nats of an opening is the entropy of its choices") {
  double expected = entropy({3, 2, 2, 1}) + entropy({3, 2, 1}) + std::log(8.0) + std::log(44.0) +
                    std::log(43.0) + 0.5 * std::log(42.0) + std::log(41.0) / 6.0;
  const int openings = 20000;
  double sum = 0.0, squares = 0.0;
  for (int i = 0; i < openings; ++i) {
    stories::Writer writer = stories::sequence(6, Split::train, i);
    writer.sentence();
    double nats = std::accumulate(writer.nats.begin(), writer.nats.end(), 0.0);
    sum += nats;
    squares += nats * nats;
  }
  double mean = sum / openings, deviation = std::sqrt((squares / openings - mean * mean) / openings);
  CHECK(std::abs(mean - expected) < 5.0 * deviation);
}

}  // namespace
