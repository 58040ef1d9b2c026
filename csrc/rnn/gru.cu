// GRU:  r = sigmoid(p_r);  z = sigmoid(p_z);  n = tanh(wx_n + r y_n);  h = (1 - z) n + z h_before
// with y = weights h_before + b.
// Gates r, z, n with the reset applied after the product; state h. The backward reads p and y_n.
#include "rnn/kernels.h"

struct Gru {
  static constexpr int GATES = 3, STATES = 1, CACHES = 3, READS = 5;
  static constexpr bool KEEPS = true, CARRIES = true;  // z e reaches the step before without the product
  enum { R, Z, N };

  static __device__ __forceinline__ Number absent(int) { return 0; }

  static __device__ __forceinline__ void forward(const Number (&wx)[3], const Number (&y)[3], Number (&state)[1],
                                                 Number (&cache)[4], bool) {
    cache[R] = wx[R] + y[R];
    cache[Z] = wx[Z] + y[Z];
    cache[N] = wx[N] + sigmoid(cache[R]) * y[N];
    cache[3] = y[N];
    const Number z = sigmoid(cache[Z]);
    state[0] = (1 - z) * hyperbolic_tangent(cache[N]) + z * state[0];
  }

  // p, y_n and the h before
  static __device__ __forceinline__ constexpr Source source(int read) {
    return read < 3    ? Source{Source::CACHE, read, -1}
           : read == 3 ? Source{Source::KEPT, 0, -1}
                       : Source{Source::OUTPUT, 0, 0};
  }
  // Gradients of p_n and p_z by h, of p_r by p_n, and two gates.
  struct Ready {
    Number p_n, p_z, p_r, r, z;
  };
  static __device__ __forceinline__ Ready ready(const Number (&read)[5]) {
    const Number r = sigmoid(read[R]), z = sigmoid(read[Z]), n = hyperbolic_tangent(read[N]);
    const Number y_n = read[3], h_before = read[4];
    return {(1 - z) * (1 - n * n), (h_before - n) * z * (1 - z), y_n * r * (1 - r), r, z};
  }
  static __device__ __forceinline__ void backward(const Ready& ready, Number e, Number (&dstate)[1], Number (&dp)[3],
                                                  Number (&dy)[3], bool) {
    dp[N] = e * ready.p_n;
    dy[Z] = dp[Z] = e * ready.p_z;
    dy[R] = dp[R] = dp[N] * ready.p_r;
    dy[N] = ready.r * dp[N];
    dstate[0] = ready.z * e;
  }
};

CELL_KERNEL(gru, Gru)
