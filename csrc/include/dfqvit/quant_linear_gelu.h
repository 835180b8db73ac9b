// GELU, and y * sigmoid(slope * y), on n vectors side by side. A part of quant_linear_body.h, which includes it once
// for each CPU path: no include guard.

// x (1/2 + x P(x^2) / Q(x^2)), x in the fraction cut to +-limit, and 0 below -limit. The fraction approximates
// erf(x / sqrt 2) / 2, or its tanh form, fitted so that the greatest error of the whole is least (by reweighted least
// squares): 1.2e-8, beside the rounding of float32, about 2e-7 |x|. A true
// division: the processors' own approximations of an inverse differ from path to path.
struct Gelu {
  float p[6], q[5], limit;
};
constexpr Gelu kGelu = {
    {0x1.988448p-2f, 0x1.15aea8p-5f, 0x1.3336eep-8f, 0x1.6548ecp-13f, 0x1.b211c0p-18f, 0x1.91c998p-26f},
    {0x1.01abacp-2f, 0x1.d61532p-6f, 0x1.f01a88p-10f, 0x1.394f8ep-14f, 0x1.48bc66p-20f},
    5.3f};
constexpr Gelu kGeluTanh = {
    {0x1.988460p-2f, 0x1.e31c54p-6f, 0x1.d8a60ep-9f, 0x1.0b31a0p-13f, 0x1.e3d978p-18f, 0x1.bef6b2p-26f},
    {0x1.ee664ep-3f, 0x1.8788bap-6f, 0x1.4c4c0ap-10f, 0x1.39a1f0p-14f, 0x1.73be46p-20f},
    5.2f};

template <int n>
DFQVIT_INLINE void gelu(vec* x, const Gelu& c) {
  const vec limit = simd::broadcast(c.limit), minus_limit = simd::broadcast(-c.limit);
  vec cut[n], z[n], p[n], q[n];
  DFQVIT_EACH {
    cut[i] = simd::min(simd::max(x[i], minus_limit), limit);
    z[i] = simd::mul(cut[i], cut[i]);
    p[i] = simd::broadcast(c.p[5]);
    q[i] = simd::broadcast(c.q[4]);
  }
  for (int k = 4; k >= 0; --k) {
    const vec a = simd::broadcast(c.p[k]), b = simd::broadcast(k == 0 ? 1.0f : c.q[k - 1]);
    DFQVIT_EACH {
      p[i] = simd::fma(p[i], z[i], a);
      q[i] = simd::fma(q[i], z[i], b);
    }
  }
  DFQVIT_EACH p[i] = simd::divide(simd::mul(cut[i], p[i]), q[i]);
  DFQVIT_EACH {
    const vec half = simd::mul(x[i], simd::broadcast(0.5f));
    x[i] = simd::zero_below(simd::fma(x[i], p[i], half), x[i], minus_limit);
  }
}

// The same where the result is rounded to bytes: a polynomial, without the division. x is cut to +-limit in the
// fraction 1/2 + x P(u), u = 2 (x / limit)^2 - 1. Error at most 5.6e-6 (1 + |result|).
struct CoarseGelu {
  float p[11], limit;
};
constexpr CoarseGelu kCoarseGelu = {
    {0x1.2d7de6p-3f, -0x1.2aece4p-4f, 0x1.b163c8p-5f, -0x1.4c4e08p-5f, 0x1.f753ccp-6f, -0x1.6ba4fap-6f, 0x1.c66d54p-7f,
     -0x1.e6daa0p-8f, 0x1.60b954p-8f, -0x1.137cccp-8f, 0x1.7c59d4p-10f},
    4.8f};
constexpr CoarseGelu kCoarseGeluTanh = {
    {0x1.2d88fcp-3f, -0x1.2b46a0p-4f, 0x1.b26ba4p-5f, -0x1.4c8912p-5f, 0x1.f57d0cp-6f, -0x1.6764b0p-6f, 0x1.aeb08cp-7f,
     -0x1.aff6a6p-8f, 0x1.70966ep-8f, -0x1.53a99ap-8f, 0x1.f0acd8p-10f},
    4.8f};

template <int n>
DFQVIT_INLINE void gelu(vec* x, const CoarseGelu& c) {
  const vec limit = simd::broadcast(c.limit), minus_limit = simd::broadcast(-c.limit);
  const vec slope = simd::broadcast(2 / (c.limit * c.limit)), minus_one = simd::broadcast(-1.0f);
  vec cut[n], u[n], p[n];
  DFQVIT_EACH {
    x[i] = simd::max(x[i], minus_limit);  // where the result is as good as 0
    cut[i] = simd::min(x[i], limit);
    u[i] = simd::fma(simd::mul(cut[i], cut[i]), slope, minus_one);
    p[i] = simd::broadcast(c.p[10]);
  }
  for (int k = 9; k >= 0; --k) {
    const vec a = simd::broadcast(c.p[k]);
    DFQVIT_EACH p[i] = simd::fma(p[i], u[i], a);
  }
  DFQVIT_EACH x[i] = simd::mul(x[i], simd::fma(cut[i], p[i], simd::broadcast(0.5f)));
}

// x / (1 + e^(-slope x)), with a slope of 1.702 QuickGELU and of 1 SiLU, by e = 2^(-slope log2(e) |x|), which is at
// most 1: x / (1 + e), times e below 0. The inverse of 1 + e is Newton's from the parabola nearest to it (off by 1/99,
// then 1e-4, then 1e-8), since the processors' own approximations differ: on every path that fuses, the same bits.
// Error at most 6e-7 |x|. NaN stays NaN.
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kSwishLimit = -128.0f;  // where the result is as good as 0; of minus infinity it would be NaN

template <int n>
DFQVIT_INLINE void swish(vec* x, float steepness) {
  const vec slope = simd::broadcast(steepness * kLog2e), limit = simd::broadcast(kSwishLimit),
            none = simd::broadcast(0.0f);
  const vec minus_one = simd::broadcast(-1.0f), two = simd::broadcast(2.0f);
  vec e[n], d[n], r[n];
  DFQVIT_EACH {
    x[i] = simd::max(limit, x[i]);
    const vec t = simd::mul(x[i], slope);
    e[i] = simd::exp2_nonpositive(simd::min(t, simd::sub(none, t)));
    d[i] = simd::sub(minus_one, e[i]);  // minus the divisor
    r[i] = simd::fma(simd::broadcast(32.0f / 99.0f), d[i], simd::broadcast(144.0f / 99.0f));
    r[i] = simd::fma(r[i], d[i], simd::broadcast(210.0f / 99.0f));
  }
  for (int step = 0; step < 2; ++step) {
    DFQVIT_EACH r[i] = simd::mul(r[i], simd::fma(d[i], r[i], two));
  }
  DFQVIT_EACH {
    const vec numerator = simd::fma(simd::min(none, x[i]), e[i], simd::max(none, x[i]));
    x[i] = simd::mul(numerator, r[i]);
  }
}
