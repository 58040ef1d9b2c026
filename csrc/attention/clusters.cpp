// Clusters of tokens on the CPU: schemas, checks, allocation, and the lists of each cluster. See clusters.h.
#include "clusters.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "../common/rows.h"

namespace seqops {
namespace {

const ClusterKernels& kernels() {
#define SEQOPS_ROW(name) \
  case Isa::name: return name::cluster_kernels;
  switch (isa()) {
    SEQOPS_FOR_EACH_ISA(SEQOPS_ROW)
    default: throw std::runtime_error("cluster_assign: no kernels for this instruction set");
  }
#undef SEQOPS_ROW
}

int type_index(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return 0;
    case ScalarType::Double: return 1;
    case ScalarType::BFloat16: return 2;
    default: return 3;
  }
}

// ---- checks

void check_clusters(const char* op, const Tensor& x, const Tensor& centroids) {
  check(x.dim() == 4, op, ": x: expected 4 dimensions [B, T, H, D], got shape ", shape_text(x));
  check_type(op, "x", x, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half});
  check(x.size(2) >= 1 && x.size(3) >= 1, op, ": x: expected at least 1 head and 1 channel, got shape ", shape_text(x));
  check(x.size(1) <= 2147483647, op, ": x: expected at most 2147483647 steps, got shape ", shape_text(x));
  check_device(op, "centroids", centroids, "x", x);
  check(centroids.dim() == 3 && centroids.size(0) >= 1 && centroids.size(0) % x.size(2) == 0 &&
            centroids.size(1) >= 1 && centroids.size(2) == x.size(3),
        op, ": centroids: expected [H, K, D] = [a multiple of ", x.size(2), ", K >= 1, ", x.size(3), "], got ",
        shape_text(centroids));
  check_type(op, "centroids", centroids, {x.scalar_type(), real_of(x.scalar_type())});
}

// ---- the work of one call

struct Clusters {
  int64_t B, T, Hx, H, K, D, real;
  bool wide;
  Tensor x;
  Scratch packed;  // [H, packed_size]
  int64_t packed_size;
  int64_t workers;

  Clusters(const Tensor& given, const Tensor& centroids)
      : B(given.size(0)),
        T(given.size(1)),
        Hx(given.size(2)),
        H(centroids.size(0)),
        K(centroids.size(1)),
        D(given.size(3)),
        real(given.scalar_type() == ScalarType::Double ? 8 : 4),
        wide(given.scalar_type() == ScalarType::Double),
        x(given.size(3) == 1 || given.stride(3) == 1 ? given : torch::stable::contiguous(given)),
        packed_size((kernels().packed_size[wide](K, D) + 63) / 64 * 64) {
    packed = Scratch(H * packed_size);
    const Optional mu = dense(centroids, wide ? ScalarType::Double : ScalarType::Float);
    for (int64_t h = 0; h < H; ++h) {
      kernels().pack[wide](static_cast<const char*>(mu->const_data_ptr()) + h * K * D * real, K, D,
                           static_cast<char*>(packed.get()) + h * packed_size);
    }
    constexpr double WORTH = 1 << 17;  // operations that take as long as waking a thread
    const double operations = static_cast<double>(B) * H * T * K * D / 8;
    workers = std::max<int64_t>(
        1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(operations / WORTH)));
  }

  int64_t tile_bytes() const { return (CLUSTER_TOKENS * D * real + 63) / 64 * 64; }

  // `count` tokens from `first` on of (b, h), with their keys or without.
  void score(int64_t b, int64_t h, int64_t first, int64_t count, int32_t* nearest, void* keys, void* tile) const {
    const int64_t size = x.element_size();
    ClusterScores k = {};
    k.T = T, k.K = K, k.D = D;
    k.x = static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + h / (H / Hx) * x.stride(2)) * size;
    k.x_t = x.stride(1);
    k.centroids = static_cast<const char*>(packed.get()) + h * packed_size;
    k.nearest = nearest + b * T * H + h, k.nearest_t = H;
    k.first = first, k.count = count;
    k.keys = keys, k.tile = tile;
    kernels().scores[type_index(x.scalar_type())](k);
  }

  // Runs `work(worker, task)` for every task.
  template <class Work>
  void each(int64_t tasks, const Work& work) const {
    alignas(64) int64_t next = 0;
    const auto run = [&](int64_t worker) {
      for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) work(worker, task);
    };
    if (workers == 1) return run(0);
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) run(worker);
    });
  }
};

Tensor nearest_cluster(const Tensor& x, const Tensor& centroids) {
  check_clusters("nearest_cluster", x, centroids);
  const Clusters c(x, centroids);
  Tensor nearest = new_output(x, {c.B, c.T, c.H}, ScalarType::Int);
  if (nearest.numel() == 0) return nearest;
  constexpr int64_t STRETCH = 4 * CLUSTER_TOKENS;
  const int64_t stretches = (c.T + STRETCH - 1) / STRETCH;
  const Scratch tiles(c.workers * c.tile_bytes());
  int32_t* const to = static_cast<int32_t*>(nearest.mutable_data_ptr());
  c.each(c.B * stretches * c.H, [&](int64_t worker, int64_t task) {
    const int64_t h = task % c.H, stretch = task / c.H % stretches, b = task / c.H / stretches;
    const int64_t first = stretch * STRETCH;
    c.score(b, h, first, std::min(STRETCH, c.T - first), to, nullptr,
            static_cast<char*>(tiles.get()) + worker * c.tile_bytes());
  });
  return nearest;
}

// ---- lists

// The places, ascending, of the `size` largest of T keys, of equal ones the lower places; then -1.
template <class Key>
void select(const Key* keys, int64_t T, int64_t size, int32_t* list) {
  const int64_t wanted = std::min(size, T);
  std::fill(list + wanted, list + size, -1);
  // The digits of the smallest key that is taken, from the highest on.
  constexpr int BITS = sizeof(Key) * 8, DIGIT = 8;
  Key prefix = 0;
  int64_t left = wanted;  // to take among the keys that begin with these digits
  for (int shift = BITS - DIGIT; shift >= 0 && wanted > 0; shift -= DIGIT) {
    int32_t counts[1 << DIGIT] = {};
    const bool all = shift == BITS - DIGIT;
    for (int64_t t = 0; t < T; ++t) {
      if (all || keys[t] >> (shift + DIGIT) == prefix) ++counts[keys[t] >> shift & ((1 << DIGIT) - 1)];
    }
    int64_t digit = (1 << DIGIT) - 1;
    while (counts[digit] < left) left -= counts[digit--];
    prefix = static_cast<Key>(prefix << DIGIT | static_cast<Key>(digit));
  }
  int64_t taken = 0;
  for (int64_t t = 0; t < T && taken < wanted; ++t) {
    if (keys[t] > prefix || (keys[t] == prefix && left-- > 0)) list[taken++] = static_cast<int32_t>(t);
  }
}

// Of each cluster the first `size` tokens whose nearest it is; then -1. `counts` [K] is scratch.
void first_tokens(const int32_t* nearest, int64_t stride, int64_t T, int64_t K, int64_t size, int32_t* lists,
                  int64_t* counts) {
  std::fill(lists, lists + K * size, -1);
  std::fill(counts, counts + K, 0);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t c = nearest[t * stride];
    if (counts[c] < size) lists[c * size + counts[c]++] = static_cast<int32_t>(t);
  }
}

std::tuple<Tensor, Tensor> cluster_lists(const Tensor& x, const Tensor& centroids, int64_t size,
                                         const std::string& mode) {
  const char* op = "cluster_lists";
  check_clusters(op, x, centroids);
  check(size >= 1, op, ": size: expected an integer >= 1, got ", size);
  const bool balanced = mode == "balanced";
  check(balanced || mode == "causal", op, ": mode: expected one of balanced, causal, got '", mode, "'");
  const Clusters c(x, centroids);
  Tensor index = new_output(x, {c.B, c.H, c.K, size}, ScalarType::Int);
  Tensor nearest = new_output(x, {c.B, c.T, c.H}, ScalarType::Int);
  if (index.numel() == 0) return {index, nearest};
  const int64_t of_keys = balanced ? (c.K * c.T * c.real + 63) / 64 * 64 : (c.K * 8 + 63) / 64 * 64;
  const int64_t bytes = c.tile_bytes() + of_keys;
  const Scratch scratch(c.workers * bytes);
  int32_t *const to = static_cast<int32_t*>(nearest.mutable_data_ptr()), *const lists = static_cast<int32_t*>(
                                                                             index.mutable_data_ptr());
  c.each(c.B * c.H, [&](int64_t worker, int64_t task) {
    const int64_t h = task % c.H, b = task / c.H;
    char* tile = static_cast<char*>(scratch.get()) + worker * bytes;
    void* keys = tile + c.tile_bytes();
    c.score(b, h, 0, c.T, to, balanced ? keys : nullptr, tile);
    int32_t* mine = lists + task * c.K * size;
    if (!balanced) {
      first_tokens(to + b * c.T * c.H + h, c.H, c.T, c.K, size, mine, static_cast<int64_t*>(keys));
    }
    for (int64_t cluster = 0; balanced && cluster < c.K; ++cluster) {
      if (c.wide) {
        select(static_cast<const uint64_t*>(keys) + cluster * c.T, c.T, size, mine + cluster * size);
      } else {
        select(static_cast<const uint32_t*>(keys) + cluster * c.T, c.T, size, mine + cluster * size);
      }
    }
  });
  return {index, nearest};
}

}  // namespace
}  // namespace seqops

// A schema that does not parse aborts the process at import: an import test covers these lines.
STABLE_TORCH_LIBRARY_FRAGMENT(seqops, m) {
  m.def("nearest_cluster(Tensor x, Tensor centroids) -> Tensor");
  m.def("cluster_lists(Tensor x, Tensor centroids, SymInt size, str mode) -> (Tensor index, Tensor nearest)");
}

STABLE_TORCH_LIBRARY_IMPL(seqops, CPU, m) {
  m.impl("nearest_cluster", TORCH_BOX(&seqops::nearest_cluster));
  m.impl("cluster_lists", TORCH_BOX(&seqops::cluster_lists));
}
