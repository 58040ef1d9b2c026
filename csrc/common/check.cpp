#include "check.h"

#include <algorithm>
#include <cctype>

namespace seqops {

std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: {
      std::string name = torch::headeronly::toString(dtype);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return name;
    }
  }
}

std::string device_text(const Tensor& t) {
  using torch::headeronly::DeviceType;
  const auto device = t.device();
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::Meta: return "meta";
    case DeviceType::CUDA: return "cuda:" + std::to_string(device.index());
    default: return "device type " + std::to_string(static_cast<int>(device.type()));
  }
}

void check_shape(const char* op, const char* name, const Tensor& t, const char* letters,
                 std::initializer_list<int64_t> expected) {
  const auto sizes = t.sizes();
  check(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, ": ", name, ": expected ",
        letters, " = ", list_text(expected), ", got ", list_text(sizes));
}

void check_device(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  const std::string expected = device_text(like), got = device_text(t);
  check(expected == got, op, ": ", name, ": expected ", like_name, "'s device ", expected, ", got ", got);
}

}  // namespace seqops
