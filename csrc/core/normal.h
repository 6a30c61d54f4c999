// Standard normals from Philox words by Box-Muller, and exp, with polynomials: libm differs between
// platforms, whereas these give the same bits on every processor. Torch-free, host and device.
//
// The coefficients are minimax fits (Lawson's iteration) rounded to float32; the errors given
// are the relative errors of the fits.
#pragma once

#include "philox.h"

namespace dxmi {

// A word as a uniform in (0, 1]: (x + 1/2) / 2^32 to the nearest float32.
template <class L>
DXMI_CORE typename L::F uniform(typename L::U x) {
  const typename L::F scale = L::of(0x1p-32f);
  const typename L::F half_step = L::of(0x1p-33f);
  return L::fma(L::to_float(x), scale, half_step);
}

// -2 ln(u) for u in (0, 1]; exactly 0 at u = 1, never negative.
template <class L>
DXMI_CORE typename L::F minus_two_log(typename L::F u) {
  using F = typename L::F;
  using U = typename L::U;
  using I = typename L::I;
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)): close to 1 on both sides, so no cancellation near u = 1.
  const I e = (I)(L::bits(u) - 0x3F3504F3u) >> 23;
  const F m = L::from_bits(L::bits(u) - ((U)e << 23));
  const F f = m - 1.0f;
  // ln(1 + f) = f - f^2/2 + f^3 P(f), error 3.2e-8; here times -2.
  F p = L::of(-1.7400719225406646e-1f);
  p = L::fma(p, f, L::of(2.853495180606842e-1f));
  p = L::fma(p, f, L::of(-2.9829573631286621e-1f));
  p = L::fma(p, f, L::of(3.31551730632782e-1f));
  p = L::fma(p, f, L::of(-3.992612361907959e-1f));
  p = L::fma(p, f, L::of(5.000267624855042e-1f));
  p = L::fma(p, f, L::of(-6.666781902313232e-1f));
  const F square = f * f;
  const F log_m = L::fma(L::of(-2.0f), f, L::fma(f * square, p, square));
  return L::fma(L::to_float(e), L::of(-1.3862943611198906f), log_m);  // -2 ln 2
}

// cos(2 pi u) and sin(2 pi u) for u in [0, 1]; the reduction to an eighth of a turn is exact.
template <class L>
DXMI_CORE void cos_sin_turns(typename L::F u, typename L::F& cosine, typename L::F& sine) {
  using F = typename L::F;
  using U = typename L::U;
  const F quarters = u * 4.0f;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const F shifted = quarters + 12582912.0f;
  const F f = quarters - (shifted - 12582912.0f);  // in [-1/2, 1/2] quarter turns
  const U quadrant = L::bits(shifted);
  const F square = f * f;
  F s = L::of(-4.602188244462013e-3f);  // sin(pi/2 f) / f, error 3.1e-9
  s = L::fma(s, square, L::of(7.968023419380188e-2f));
  s = L::fma(s, square, L::of(-6.459634900093079e-1f));
  s = L::fma(s, square, L::of(1.5707963705062866f));
  s = s * f;
  F c = L::of(9.040217264555395e-4f);  // (cos(pi/2 f) - 1) / f^2, error 5.4e-11
  c = L::fma(c, square, L::of(-2.086028829216957e-2f));
  c = L::fma(c, square, L::of(2.5366923213005066e-1f));
  c = L::fma(c, square, L::of(-1.2337005138397217f));
  c = L::fma(c, square, L::of(1.0f));
  // Odd quadrants swap the two; the second and third negate the cosine, the last two the sine.
  const U exchange = U{} - (quadrant & 1u);
  const U c_bits = L::bits(c), s_bits = L::bits(s);
  const U cos_sign = ((quadrant + 1u) & 2u) << 30;
  const U sin_sign = (quadrant & 2u) << 30;
  cosine = L::from_bits(((s_bits & exchange) | (c_bits & ~exchange)) ^ cos_sign);
  sine = L::from_bits(((c_bits & exchange) | (s_bits & ~exchange)) ^ sin_sign);
}

// The normals of elements 4 * group .. 4 * group + 3 from their four words.
template <class L>
DXMI_CORE void box_muller(const typename L::U words[4], typename L::F z[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    typename L::F cosine, sine;
    const typename L::F radius = L::sqrt(minus_two_log<L>(uniform<L>(words[pair])));
    cos_sin_turns<L>(uniform<L>(words[pair + 1]), cosine, sine);
    z[pair] = radius * cosine;
    z[pair + 1] = radius * sine;
  }
}

// exp(x), within 1.5 ulp; 0 below -104, infinity above 88.73, NaN for NaN. One value at a time, since
// it is needed once per row.
DXMI_CORE float exp(float x) {
  using L = ScalarLane;
  if (!(x > -104.0f)) return x != x ? x : 0.0f;
  if (x > 88.73f) return L::from_bits(0x7F800000u);
  const float k = L::fma(x, 1.44269504f, 12582912.0f) - 12582912.0f;
  // x - k ln 2, with ln 2 in two parts whose first is exact in products with k.
  float r = L::fma(k, -6.93359375e-1f, x);
  r = L::fma(k, 2.12194440e-4f, r);
  float q = 1.3814599951729178e-3f;  // exp(r) = 1 + r + r^2 Q(r), error 3.1e-9
  q = L::fma(q, r, 8.368715643882751e-3f);
  q = L::fma(q, r, 4.166838899254799e-2f);
  q = L::fma(q, r, 1.666652113199234e-1f);
  q = L::fma(q, r, 4.999999403953552e-1f);
  const float y = L::fma(r * r, q, r) + 1.0f;
  // Two factors, since 2^k alone may be subnormal or overflow.
  const int32_t half = static_cast<int32_t>(k) / 2, rest = static_cast<int32_t>(k) - half;
  return y * L::from_bits(static_cast<uint32_t>(half + 127) << 23) *
         L::from_bits(static_cast<uint32_t>(rest + 127) << 23);
}

DXMI_CORE double exp(double x) { return ::exp(x); }

}  // namespace dxmi
