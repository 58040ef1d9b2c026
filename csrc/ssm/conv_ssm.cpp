// conv_ssm: schemas. Every backend is Python, made of torch's convolutions and linear_scan (seqops/ssm/composed_conv_ssm.py),
// so its checks are in Python alone (seqops/ssm/op_conv_ssm.py).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def(
      "conv_ssm(Tensor u, Tensor a, Tensor b, Tensor c, Tensor? d=None, Tensor? initial_state=None) "
      "-> (Tensor y, Tensor final_state)");
  m.def(
      "conv_ssm_forward(Tensor u, Tensor a, Tensor b, Tensor c, Tensor? d=None, Tensor? initial_state=None) "
      "-> (Tensor y, Tensor final_state, Tensor entering)");
  m.def(
      "conv_ssm_backward(Tensor? dy, Tensor? dfinal_state, Tensor u, Tensor a, Tensor b, Tensor c, Tensor? d, "
      "Tensor? initial_state, Tensor entering, *, bool wants_u=True) "
      "-> (Tensor du, Tensor da, Tensor db, Tensor dc, Tensor dd, Tensor dinitial_state)");
}
