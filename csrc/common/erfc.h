// 1 - erf(x) and e^{-x^2} in vectors, with a small relative error also where they are tiny.
#pragma once

#include "vector.h"

namespace seqops::SEQOPS_ISA {
namespace {

// (1 + 2 x) e^{x^2} erfc(x) as a polynomial in (x - 3.75) / (x + 3.75) on 0 <= x <= MOST; above erfc is 0.
template <class T>
struct Erfc;
template <>
struct Erfc<float> {                        // error 7e-9
  static constexpr int32_t SHORT = ~0xfff;  // of a number cut to these bits the square is exact
  static constexpr float MOST = 10.2f;
  static constexpr float TERMS[] = {1.237512637f,     -0.1402405346f, 0.00358465953f, 0.08227339829f,
                                    -0.1087906022f,   0.09235754867f, -0.0587464748f, 0.02803847516f,
                                    -0.009886506938f, 0.00235921414f, 0.001114384663f};
};
template <>
struct Erfc<double> {  // error 2e-18
  static constexpr int64_t SHORT = ~0x7ffffff;
  static constexpr double MOST = 27.3;
  static constexpr double TERMS[] = {
      1.237512630837827584,      -0.140240598585547026,     0.003585415485462977916,    0.08227673849015162153,
      -0.1088039301416620978,    0.09230432116019562092,    -0.05869339859167792179,    0.02836227742111227145,
      -0.009746579533168665117,  0.001755625841853901054,   0.0002937134874921231744,   -0.000290154075879451241,
      0.00005164989833800855511, 0.00002238447080742570361, -0.00001144644784680993085, -9.748303206442844946e-7,
      1.755832647041915045e-6,   -5.386613083436982768e-8,  -2.631900847644228065e-7,   1.831277305119642822e-8,
      4.096643915199850583e-8,   1.85784890222781595e-10,   -5.078022763403985436e-9,   -9.990569607064295655e-10};
};

template <class T>
SEQOPS_INLINE Vector<T> exp_of_minus_square(Vector<T> x) {
  const Vector<T> cut = clamp<T>(x, 1e4);
  const Vector<T> high = (Vector<T>)((Bits<T>)cut & Erfc<T>::SHORT);
  return exp<T>(-(high * high)) * exp<T>((high - cut) * (high + cut));
}

// NaN passes.
template <class T>
SEQOPS_INLINE Vector<T> erfc(Vector<T> x) {
  const Vector<T> positive = at_most<T>(x < static_cast<T>(0) ? -x : x, Erfc<T>::MOST);
  const Vector<T> y = (positive - static_cast<T>(3.75)) / (positive + static_cast<T>(3.75));
  const Vector<T> rest = polynomial<T>(Erfc<T>::TERMS, y) / (positive + positive + static_cast<T>(1));
  const Vector<T> value = rest * exp_of_minus_square<T>(positive);
  return x < static_cast<T>(0) ? static_cast<T>(2) - value : value;
}

}  // namespace
}  // namespace seqops::SEQOPS_ISA
