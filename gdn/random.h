// Random numbers as a pure function of (key, index): the same on every device, in any order, with any number
// of threads. splitmix64's finalizer (Steele, Lea, Flood 2014) mixes a counter; Box-Muller turns pairs into
// normals.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace gdn {

inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// A stream of its own for each (seed, name): FNV-1a of the name, mixed with the seed.
inline uint64_t stream_key(uint64_t seed, const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char c : name) hash = (hash ^ c) * 0x100000001b3ull;
  return mix64(mix64(seed) ^ hash);
}

inline uint64_t random_bits(uint64_t key, uint64_t index) {
  return mix64(key + index * 0xd1342543de82ef95ull);
}

// in (0,1), never 0 or 1
inline double random_uniform(uint64_t key, uint64_t index) {
  return (double(random_bits(key, index) >> 11) + 0.5) * 0x1p-53;
}

// mean 0, variance 1: numbers 2i and 2i+1 are the two Box-Muller normals of counter i
inline double random_normal(uint64_t key, uint64_t index) {
  const double radius = std::sqrt(-2 * std::log(random_uniform(key, index & ~1ull)));
  const double angle = 2 * 3.14159265358979323846 * random_uniform(key, index | 1);
  return radius * (index & 1 ? std::sin(angle) : std::cos(angle));
}

// random_normal of 2 * pair and of 2 * pair + 1, for half the work
inline void random_normal_pair(uint64_t key, uint64_t pair, double (&normal)[2]) {
  const double radius = std::sqrt(-2 * std::log(random_uniform(key, 2 * pair)));
  const double angle = 2 * 3.14159265358979323846 * random_uniform(key, 2 * pair + 1);
  normal[0] = radius * std::cos(angle);
  normal[1] = radius * std::sin(angle);
}

}  // namespace gdn
