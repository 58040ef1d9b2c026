// The input projection of a layer, y = x weight^T + bias, with the recurrent product's own tiles.
//
// A block of rows of x and one panel of weights stay in L2 while every tile of the block passes over the panel.
#include "../common/team.h"
#include "product.h"

namespace seqops::SEQOPS_ISA {
namespace {

constexpr int64_t BLOCK_ROWS = 96;  // 16 tiles of 6 rows: the panel is brought near once for all of them

template <class S>
void run_projection(const Projection& a, int64_t begin, int64_t end) {
  constexpr int L = LANES<S>;
  const Panels panels = projection_panels(a.units, L, a.depth);
  const Packed<S> weights = {a.packed, /*narrow=*/false};
  const S* x = static_cast<const S*>(a.x);
  Team team(a.arrived, a.workers, end - begin);

  for (int64_t panel = panels.count() * begin / a.workers; panel < panels.count() * end / a.workers; ++panel) {
    const S* weight = static_cast<const S*>(a.weight);
    S* out = static_cast<S*>(a.packed) + panels.offset(panel);
    if (a.stride_k == 1) {
      pack_rows<S>(weight, 0, a.stride_unit, a.units, a.depth, panels, panel, out);
    } else {
      pack_columns<S>(weight, 0, a.stride_k, 1, a.depth, a.units, panels, panel, out);
    }
  }
  team.wait();

  const int64_t last_row = a.rows * end / a.workers;
  for (int64_t row0 = a.rows * begin / a.workers; row0 < last_row; row0 += BLOCK_ROWS) {
    const int64_t block_end = row0 + BLOCK_ROWS < last_row ? row0 + BLOCK_ROWS : last_row;
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      const int64_t width = panels.width_of(panel), unit0 = panel * panels.width * L;
      for_each_tile(row0, block_end, ROWS_OF[width], [&](int64_t from, int64_t to) {
        alignas(SEQOPS_VECTOR_BYTES) S sums[MOST_SUMS * L];
        const int64_t offset = panels.offset(panel);
        const S* input = x + from * a.stride_x;
        if (width == 1) {
          weights.template multiply<1>(offset, to - from, input, a.stride_x, a.depth, sums);
        } else if (width == 2) {
          weights.template multiply<2>(offset, to - from, input, a.stride_x, a.depth, sums);
        } else {
          weights.template multiply<4>(offset, to - from, input, a.stride_x, a.depth, sums);
        }
        for (int64_t row = from; row < to; ++row) {
          for (int64_t w = 0; w < width && unit0 + w * L < a.units; ++w) {
            const int64_t unit = unit0 + w * L, n = a.units - unit < L ? a.units - unit : L;
            Vector<S> y = load(sums + ((row - from) * width + w) * L);
            if (a.bias != nullptr) y += load(static_cast<const S*>(a.bias) + unit, n);
            store(static_cast<S*>(a.y) + row * a.units + unit, y, n);
          }
        }
      });
    }
  }
}

}  // namespace

extern const ProjectionKernels projection_kernels = {run_projection<float>, run_projection<double>};

}  // namespace seqops::SEQOPS_ISA
