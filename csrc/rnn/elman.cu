// Elman's network:  h = tanh(p) or max(p, 0);  p = wx + r h_before + b.  One gate, state h. The backward reads only h.
#include "rnn/kernels.h"

struct Elman {
  static constexpr int GATES = 1, STATES = 1, CACHES = 0, READS = 1;
  static constexpr bool KEEPS = false, CARRIES = false;

  static __device__ __forceinline__ Number absent(int) { return 0; }

  static __device__ __forceinline__ void forward(const Number (&wx)[1], const Number (&y)[1], Number (&state)[1],
                                                 Number (&)[1], bool relu) {
    const Number p = wx[0] + y[0];
    state[0] = relu ? (p < 0 ? Number(0) : p) : hyperbolic_tangent(p);
  }

  static __device__ __forceinline__ constexpr Source source(int) { return {Source::OUTPUT, 0, -1}; }
  struct Ready {
    Number h;
  };
  static __device__ __forceinline__ Ready ready(const Number (&read)[1]) { return {read[0]}; }
  static __device__ __forceinline__ void backward(const Ready& ready, Number e, Number (&)[1], Number (&dp)[1],
                                                  Number (&dy)[1], bool relu) {
    dp[0] = relu ? (ready.h <= 0 ? Number(0) : e) : e * (1 - ready.h * ready.h);
    dy[0] = dp[0];
  }
};

CELL_KERNEL(elman, Elman)
