// sLSTM (xLSTM, Beck et al. 2024): exponential input gate, logistic forget gate in the log domain, stabiliser m.
//   l = log sigmoid(p_f) + m_before;  m = max(l, p_i);  i = exp(p_i - m);  f = exp(l - m);  z = tanh(p_z)
//   c = f c_before + i z;  n = f n_before + i;  h = sigmoid(p_o) c / n          (c / n = 0 where n = 0)
// Gates i, f, z, o; states h, c, n, m. h does not depend on m, so inside a step m is a constant; only gradients given
// to the final states see it: `delta` follows the winner of the max from dm_n - (dc_n c_n + dn_n n_n) back to dm0.
#include "rnn/kernels.h"

struct Slstm {
  static constexpr int GATES = 4, STATES = 4, CACHES = 7, READS = 9;
  static constexpr bool KEEPS = false, CARRIES = false;
  enum { I, F, Z, O };
  // the cache: i; f, negative where p_i won the max; sigmoid(-p_f); p_z; p_o; c; n. Then the c and n before.
  enum { READ_I, READ_F, READ_FORGET_SLOPE, READ_Z, READ_O, READ_C, READ_N, READ_C_BEFORE, READ_N_BEFORE };

  static __device__ __forceinline__ Number absent(int state) { return state == 3 ? -Number(INFINITY) : Number(0); }
  static __device__ __forceinline__ Number quotient(Number c, Number n) { return n == 0 ? Number(0) : c / n; }

  static __device__ __forceinline__ void forward(const Number (&wx)[4], const Number (&y)[4], Number (&state)[4],
                                                 Number (&cache)[7], bool) {
    const Number p_i = wx[I] + y[I], p_f = wx[F] + y[F], p_z = wx[Z] + y[Z], p_o = wx[O] + y[O];
    const Number l = log_sigmoid(p_f) + state[3];
    const bool input_won = p_i >= l || p_i != p_i;  // NaN on either side wins over numbers
    const Number m = input_won ? p_i : l;
    const bool nothing = m == -Number(INFINITY);  // both are -inf: their difference would be NaN
    const Number i = nothing ? Number(0) : exponential(p_i - m), f = nothing ? Number(0) : exponential(l - m);
    state[1] = f * state[1] + i * hyperbolic_tangent(p_z);
    state[2] = f * state[2] + i;
    state[3] = m;
    state[0] = sigmoid(p_o) * quotient(state[1], state[2]);
    cache[READ_I] = i;
    cache[READ_F] = input_won ? -f : f;
    cache[READ_FORGET_SLOPE] = sigmoid(-p_f);
    cache[READ_Z] = p_z;
    cache[READ_O] = p_o;
    cache[READ_C] = state[1];
    cache[READ_N] = state[2];
  }

  static __device__ __forceinline__ constexpr Source source(int read) {
    return read < CACHES ? Source{Source::CACHE, read, -1}
                         : Source{Source::CACHE, read - 2, read == READ_C_BEFORE ? 1 : 2};
  }
  static __device__ __forceinline__ void begin(Number (&dstate)[4], Number c_n, Number n_n) {
    dstate[3] -= dstate[1] * c_n + dstate[2] * n_n;
  }
  struct Ready {
    Number i, f, z, c_before, n_before;
    Number q, q_by_c;                     // c / n, and the gradient of h by c
    Number forget_slope, z_by_c, o_by_h;  // gradients of p_f by log sigmoid(p_f), p_z by c, p_o by h
    Number n;
    bool input_won;
  };
  static __device__ __forceinline__ Ready ready(const Number (&read)[9]) {
    const bool input_won = signbit(read[READ_F]);  // also of -0
    const Number i = read[READ_I], f = input_won ? -read[READ_F] : read[READ_F], n = read[READ_N];
    const Number q = quotient(read[READ_C], n), o = sigmoid(read[READ_O]), q_by_c = quotient(o, n);
    const Number z = hyperbolic_tangent(read[READ_Z]);
    return {i,
            f,
            z,
            read[READ_C_BEFORE],
            read[READ_N_BEFORE],
            q,
            q_by_c,
            read[READ_FORGET_SLOPE],
            i * (1 - z * z),
            q * o * (1 - o),
            n,
            input_won};
  }
  static __device__ __forceinline__ void backward(const Ready& ready, Number e, Number (&dstate)[4], Number (&dp)[4],
                                                  Number (&dy)[4], bool) {
    const Number delta = dstate[3], dq = ready.n == 0 ? Number(0) : e * ready.q_by_c;  // times dn/dq = -q
    const Number dc = dstate[1] + dq, dn = dstate[2] - dq * ready.q;
    dp[I] = (dc * ready.z + dn) * ready.i + (ready.input_won ? delta : Number(0));
    dp[F] = ((dc * ready.c_before + dn * ready.n_before) * ready.f + (ready.input_won ? Number(0) : delta)) *
            ready.forget_slope;
    dp[Z] = dc * ready.z_by_c;
    dp[O] = e * ready.o_by_h;
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) dy[gate] = dp[gate];
    dstate[1] = dc * ready.f;
    dstate[2] = dn * ready.f;
    dstate[3] = ready.input_won ? Number(0) : delta;
  }
  static __device__ __forceinline__ void finish(Number (&dstate)[4], Number c_0, Number n_0) {
    dstate[3] += dstate[1] * c_0 + dstate[2] * n_0;
  }
};

CELL_KERNEL(slstm, Slstm)
