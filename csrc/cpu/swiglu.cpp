// swiglu, forward and backward: y = g s u with s = sigmoid(g), g the gate and u the upward projection.
//
//   dup = dy g s,  dgate = dy u s (1 + g (1 - s))
//
// Rows may lie apart (slices of one fused projection), so nothing is copied first. Bytes: forward reads g and u and
// writes y; backward reads dy, g and u and writes dgate and dup; s is recomputed. About 25 operations an element.
#include "core/math.h"
#include "core/parallel.h"

namespace fastgpt::FASTGPT_ISA {
namespace {

template <class T>
Status forward(const SwigluForward& p) {
  parallel_for_runs(p.rows, p.cols, [&](int64_t row, int64_t col, int64_t count) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride + col;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride + col;
    T* y = static_cast<T*>(p.y) + row * p.cols + col;
    for_each_vector(count, [&](int64_t i, int64_t n) {
      Vec g = load(gate + i, n);
      const Vec s = sigmoid<kTarget<T>>(g).value;
      g = max(splat(-200.0f), g);  // s is 0 there: no inf * 0
      store(y + i, g * s * load(up + i, n), n);
    });
  });
  return {};
}

template <class T>
Status backward(const SwigluBackward& p) {
  parallel_for_runs(p.rows, p.cols, [&](int64_t row, int64_t col, int64_t count) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_stride + col;
    const T* up = static_cast<const T*>(p.up) + row * p.up_stride + col;
    const T* dy = static_cast<const T*>(p.dy) + row * p.cols + col;
    T* dgate = static_cast<T*>(p.dgate) + row * p.gradient_stride + col;
    T* dup = static_cast<T*>(p.dup) + row * p.gradient_stride + col;
    for_each_vector(count, [&](int64_t i, int64_t n) {
      Vec g = load(gate + i, n);
      const Vec u = load(up + i, n), d = load(dy + i, n);
      const Sigmoid s = sigmoid<kTarget<T>>(g);
      g = max(splat(-200.0f), g);
      const Vec silu = g * s.value;
      // silu (1 - s) = g s (1 - s) vanishes for large g, where silu may be infinite.
      const Vec bend = g > 200.0f ? Vec{} : silu * s.complement;
      store(dup + i, d * silu, n);
      store(dgate + i, d * u * (s.value + bend), n);
    });
  });
  return {};
}

}  // namespace

Status swiglu_forward(const SwigluForward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return forward<typename decltype(t)::type>(p); });
}

Status swiglu_backward(const SwigluBackward& p) {
  return dispatch_dtype(p.dtype, [&](auto t) { return backward<typename decltype(t)::type>(p); });
}

}  // namespace fastgpt::FASTGPT_ISA
