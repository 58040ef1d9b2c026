// GRU:  r = sigmoid(p_r);  z = sigmoid(p_z);  n = tanh(wx_n + r y_n);  h = (1 - z) n + z h_before
// with y = weights h_before + b.
// Gates r, z, n with the reset applied after the product; state h. The backward reads p and y_n.
#include "rnn/device.h"

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
  static __device__ __forceinline__ void backward(const Number (&read)[5], Number e, Number (&dstate)[1],
                                                  Number (&dp)[3], Number (&dy)[3], bool) {
    const Number r = sigmoid(read[R]), z = sigmoid(read[Z]), n = hyperbolic_tangent(read[N]);
    const Number y_n = read[3], h_before = read[4];
    dp[N] = e * (1 - z) * (1 - n * n);
    dp[Z] = e * (h_before - n) * z * (1 - z);
    dp[R] = dp[N] * y_n * r * (1 - r);
    dy[R] = dp[R];
    dy[Z] = dp[Z];
    dy[N] = r * dp[N];
    dstate[0] = z * e;
  }
};

CELL_KERNEL(gru, Gru)
