// The tail of the normal distribution, for the CPU's vectors of floats and for the one float of a GPU's thread.
//
// With t >= 0, Phi(-t) = e^(-t^2/2) R(t), where R falls from 1/2 to about 1 / (t sqrt(2 pi)). R(t) (t + a) is a
// polynomial in u = (t - a) / (t + a), the mapping of Shepherd and Laframboise (Math. Comp. 36, 1981), with our own fit
// on [0, 15]: of degree 9 with a = 3.4 (relative error 4e-9), for half of degree 5 with a = 3.2 (6e-6).
#pragma once

#include "core/isa.h"

namespace fastgpt::FASTGPT_ISA {

// What a result will be stored in: functions with this parameter spend fewer terms on the 16-bit types. They are then
// within 1.2e-5, a twentieth of float16's rounding and a hundred and fiftieth of bfloat16's.
enum class Target { single, half };
template <class T>
constexpr Target kTarget = sizeof(T) == 2 ? Target::half : Target::single;

template <Target kFor>
constexpr float kNormalCentre = kFor == Target::single ? 3.4f : 3.2f;  // a

// R(t) (t + a) for u = (t - a) / (t + a) = 1 - 2 a / (t + a); V is float or a vector of floats.
template <Target kFor, class V>
FASTGPT_HOST_DEVICE inline V normal_tail(V u) {
  if constexpr (kFor == Target::half) {
    V p = 0.00720118545f * u - 0.00215018983f;
    p = p * u - 0.0736861452f;
    p = p * u + 0.265934944f;
    p = p * u - 0.533835113f;
    return p * u + 0.735885799f;
  } else {
    V p = 0.000129213833f * u + 0.000331833289f;
    p = p * u - 0.00078861753f;
    p = p * u - 0.00244819f;
    p = p * u + 0.00762810139f;
    p = p * u + 0.010374181f;
    p = p * u - 0.101905957f;
    p = p * u + 0.299455613f;
    p = p * u - 0.55557847f;
    return p * u + 0.741770804f;
  }
}

}  // namespace fastgpt::FASTGPT_ISA
