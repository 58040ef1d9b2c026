// LSTM:  c = sigmoid(p_f) c_before + sigmoid(p_i) tanh(p_g);  h = sigmoid(p_o) tanh(c);  p = wx + r h_before + b.
// Gates i, f, g, o; states h, c. The backward reads p and c: a saturated gate in bfloat16 would have no bits in 1-σ.
#include "rnn/kernels.h"

struct Lstm {
  static constexpr int GATES = 4, STATES = 2, CACHES = 4, READS = 6;
  static constexpr bool KEEPS = true, CARRIES = false;
  enum { I, F, G, O };

  static __device__ __forceinline__ Number absent(int) { return 0; }

  static __device__ __forceinline__ void forward(const Number (&wx)[4], const Number (&y)[4], Number (&state)[2],
                                                 Number (&cache)[5], bool) {
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) cache[gate] = wx[gate] + y[gate];
    state[1] = sigmoid(cache[F]) * state[1] + gated_tangent(cache[I], cache[G]);
    state[0] = gated_tangent(cache[O], state[1]);
    cache[4] = state[1];
  }

  // p, c and the c before
  static __device__ __forceinline__ constexpr Source source(int read) {
    return read < 4 ? Source{Source::CACHE, read, -1} : Source{Source::KEPT, 0, read == 5 ? 1 : -1};
  }
  // Gradients of c by h and of p by c (of p_o by h), and of the c before by c.
  struct Ready {
    Number c_by_h, p[4], c_by_c;
  };
  static __device__ __forceinline__ Ready ready(const Number (&read)[6]) {
    const Number i = sigmoid(read[I]), f = sigmoid(read[F]), g = hyperbolic_tangent(read[G]), o = sigmoid(read[O]);
    const Number s = hyperbolic_tangent(read[4]), c_before = read[5];
    return {o * (1 - s * s), {g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), s * o * (1 - o)}, f};
  }
  static __device__ __forceinline__ void backward(const Ready& ready, Number e, Number (&dstate)[2], Number (&dp)[4],
                                                  Number (&dy)[4], bool) {
    const Number dc = dstate[1] + e * ready.c_by_h;
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) dy[gate] = dp[gate] = ready.p[gate] * (gate == O ? e : dc);
    dstate[1] = dc * ready.c_by_c;
  }
};

CELL_KERNEL(lstm, Lstm)
