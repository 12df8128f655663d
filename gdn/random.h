// Random numbers as a pure function of (key, index): the same on every device, in any order, with any number
// of threads. splitmix64's finalizer (Steele, Lea, Flood 2014), a bijection that scatters near inputs, mixes
// a counter; Box-Muller turns pairs into normals. Beside them a stream of integers and a permutation computed
// element by element, for the data.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#ifdef __CUDACC__
#define GDN_HOST_DEVICE __host__ __device__  // compiled for the CPU and for the GPU
#else
#define GDN_HOST_DEVICE
#endif

namespace gdn {

GDN_HOST_DEVICE inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// splitmix64 as a stream of random integers.
struct RandomStream {
  uint64_t state;

  uint32_t next() {
    uint32_t bits = uint32_t(mix64(state) >> 32);
    state += 0x9e3779b97f4a7c15ull;
    return bits;
  }

  // Uniform in [0, n), n >= 1, without bias: Lemire's multiply-and-reject (2019).
  uint32_t below(uint32_t n) {
    uint64_t product = uint64_t{next()} * n;
    if (uint32_t(product) < n) {
      const uint32_t threshold = (0u - n) % n;
      while (uint32_t(product) < threshold) product = uint64_t{next()} * n;
    }
    return uint32_t(product >> 32);
  }
};

// Image of i under a pseudo-random permutation of [0, n), 0 <= i < n, chosen by key: a six-round balanced
// Feistel network on the smallest even number of bits that holds n values, applied again until the image
// falls below n (cycle walking; fewer than 4 applications on average).
inline uint64_t permuted(uint64_t i, uint64_t n, uint64_t key) {
  int half_bits = 0;
  while (half_bits < 32 && (uint64_t{1} << (2 * half_bits)) < n) ++half_bits;
  const uint64_t half_mask = (uint64_t{1} << half_bits) - 1;
  do {
    uint64_t left = i >> half_bits, right = i & half_mask;
    for (uint64_t round = 0; round < 6; ++round) {
      const uint64_t mixed = left ^ (mix64(mix64(key + round) + right) & half_mask);
      left = right;
      right = mixed;
    }
    i = left << half_bits | right;
  } while (i >= n);
  return i;
}

// A stream of its own for each (seed, name): FNV-1a of the name, mixed with the seed.
inline uint64_t stream_key(uint64_t seed, const std::string& name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char c : name) hash = (hash ^ c) * 0x100000001b3ull;
  return mix64(mix64(seed) ^ hash);
}

GDN_HOST_DEVICE inline uint64_t random_bits(uint64_t key, uint64_t index) {
  return mix64(key + index * 0xd1342543de82ef95ull);
}

// in (0,1], never 0
GDN_HOST_DEVICE inline double random_uniform(uint64_t key, uint64_t index) {
  return (double(random_bits(key, index) >> 11) + 0.5) * 0x1p-53;
}

// Logarithm, sine and cosine in basic operations and explicit fma alone, each rounded as IEEE 754 says, so
// that every compiler, the CPU and the GPU get the same bits. Errors are below 3e-16 of the result (of 1, for
// sine and cosine).

// ln x of a normal x > 0: with x = 2^e m, m from sqrt(1/2) to sqrt(2), and s = (m - 1) / (m + 1),
// ln x = e ln 2 + 2 (s + s^3/3 + s^5/5 + ...)
GDN_HOST_DEVICE inline double natural_log(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  int e = int(bits >> 52) - 1023;
  bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
  double m;
  std::memcpy(&m, &bits, sizeof(m));
  if (m > 1.4142135623730951) {
    m *= 0.5;
    e++;
  }
  const double s = (m - 1) / (m + 1), t = s * s;
  double p = 1.0 / 21;
  p = std::fma(t, p, 1.0 / 19);
  p = std::fma(t, p, 1.0 / 17);
  p = std::fma(t, p, 1.0 / 15);
  p = std::fma(t, p, 1.0 / 13);
  p = std::fma(t, p, 1.0 / 11);
  p = std::fma(t, p, 1.0 / 9);
  p = std::fma(t, p, 1.0 / 7);
  p = std::fma(t, p, 1.0 / 5);
  p = std::fma(t, p, 1.0 / 3);
  return std::fma(double(e), 0.6931471805599453, std::fma(2 * s * t, p, 2 * s));
}

// Sine and cosine of 2 pi turns, turns in [0,1]: Taylor series around the nearest quarter turn.
GDN_HOST_DEVICE inline void sine_cosine(double turns, double& sine, double& cosine) {
  const int quarter = int(4 * turns + 0.5);
  const double x = (4 * turns - quarter) * 1.5707963267948966, t = x * x;
  double s = 1.0 / 355687428096000;  // 1/17!
  s = std::fma(t, s, -1.0 / 1307674368000);
  s = std::fma(t, s, 1.0 / 6227020800);
  s = std::fma(t, s, -1.0 / 39916800);
  s = std::fma(t, s, 1.0 / 362880);
  s = std::fma(t, s, -1.0 / 5040);
  s = std::fma(t, s, 1.0 / 120);
  s = std::fma(t, s, -1.0 / 6);
  s = std::fma(x * t, s, x);
  double c = 1.0 / 20922789888000;  // 1/16!
  c = std::fma(t, c, -1.0 / 87178291200);
  c = std::fma(t, c, 1.0 / 479001600);
  c = std::fma(t, c, -1.0 / 3628800);
  c = std::fma(t, c, 1.0 / 40320);
  c = std::fma(t, c, -1.0 / 720);
  c = std::fma(t, c, 1.0 / 24);
  c = std::fma(t, c, -0.5);
  c = std::fma(t, c, 1.0);
  const bool odd = quarter & 1;
  sine = (quarter & 2 ? -1 : 1) * (odd ? c : s);
  cosine = ((quarter + 1) & 2 ? -1 : 1) * (odd ? s : c);
}

// mean 0, variance 1: numbers 2 * pair and 2 * pair + 1, the two Box-Muller normals of one counter
GDN_HOST_DEVICE inline void random_normal_pair(uint64_t key, uint64_t pair, double (&normal)[2]) {
  const double radius = std::sqrt(-2 * natural_log(random_uniform(key, 2 * pair)));
  double sine, cosine;
  sine_cosine(random_uniform(key, 2 * pair + 1), sine, cosine);
  normal[0] = radius * cosine;
  normal[1] = radius * sine;
}

inline double random_normal(uint64_t key, uint64_t index) {
  double normal[2];
  random_normal_pair(key, index / 2, normal);
  return normal[index % 2];
}

}  // namespace gdn
