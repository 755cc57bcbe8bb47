// Packing of features and the two matrix products: y y^T and c y. Included inside of an instruction set's namespace.

constexpr int64_t kGramBlock = 128;    // features whose products are summed before they are added to the rest
constexpr int64_t kFieldBlock = 144;   // features of the field at once; an odd number of cache lines, so rows do not collide
constexpr int64_t kRawStride = kFieldBlock;
constexpr int kRows = ROW_BLOCK;
constexpr int kPanel = PANEL_VECTORS;

INLINE float to_float(float x) { return x; }
INLINE float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
INLINE float to_float(BFloat16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
INLINE float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t value = float_to_bits(bits_to_float(magnitude) * 0x1p112f);
  return bits_to_float((magnitude >= 0x0f800000 ? value | 0x7f800000 : value) | sign);
}

INLINE void convert(float x, float& to) { to = x; }
INLINE void convert(float x, BFloat16& to) {  // to nearest even
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
INLINE void convert(float x, Float16& to) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to infinity
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 rounds at the last of its bits
    result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  } else {
    result = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  }
  to.bits = static_cast<uint16_t>(result | sign);
}

template <typename Element>
INLINE void gather_row(const Element* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) to[k] = to_float(from[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] = to_float(from[k * stride]);
  }
}

template <typename Element>
static void gather_members(const Members& members, int64_t b, int64_t first, int64_t last, int64_t begin, int64_t count,
                           int64_t num_features, float* raw) {
  const int64_t padded = round_up(count, kWidth);
  const Element* base = static_cast<const Element*>(members.data) + b * members.stride[0] + begin * members.stride[2];
  // What is read next, the row's following features or its first ones in the next problem, comes while this is multiplied.
  const int64_t ahead = begin + count < num_features ? count : members.stride[0] - begin;
  for (int64_t m = first; m < last; ++m, raw += kRawStride) {
    const Element* row = base + m * members.stride[1];
    gather_row(row, members.stride[2], count, raw);
    for (int64_t k = count; k < padded; ++k) raw[k] = 0;
    if (members.stride[2] != 1) continue;
    const auto next = reinterpret_cast<uintptr_t>(row) + static_cast<uintptr_t>(ahead) * sizeof(Element);
    for (uintptr_t byte = 0; byte < static_cast<uintptr_t>(count) * sizeof(Element); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(next + byte), 0, 2);
    }
  }
}

static void mean_of_rows(const float* raw, int64_t num_rows, int64_t padded, float* mean) {
  const float share = 1.0f / static_cast<float>(num_rows);
  for (int64_t k = 0; k < padded; k += kWidth) {
    Vec sum = splat(0.0f);
    for (int64_t m = 0; m < num_rows; ++m) sum += load(raw + m * kRawStride + k);
    store(mean + k, sum * share);
  }
}

// Targets in slots from first_slot, features begin to begin + count, as float32 into raw [slots - first_slot, kRawStride];
// padding slots are left alone. `mean` is subtracted later, because distances lose their digits to a common offset: the mean of
// the generated samples, since every distance is to one of them, or of the positives where those are left out.
template <typename Element>
static void gather_elements(const Features& f, const Layout& l, int64_t b, int64_t first_slot, int64_t begin, int64_t count,
                            float* raw, float* mean) {
  const int64_t padded = round_up(count, kWidth);
  float* positives = raw + (l.first_positive - first_slot) * kRawStride;
  gather_members<Element>(f.generated, b, smaller(first_slot, l.G), l.G, begin, count, f.sizes.S, raw);
  const int64_t first_negative = larger(first_slot, l.G);
  if (l.N > 0) {
    gather_members<Element>(f.negatives, b, first_negative - l.G, l.N, begin, count, f.sizes.S,
                            raw + (first_negative - first_slot) * kRawStride);
  }
  gather_members<Element>(f.positives, b, 0, l.P, begin, count, f.sizes.S, positives);
  first_slot == 0 ? mean_of_rows(raw, l.G, padded, mean) : mean_of_rows(positives, l.P, padded, mean);
}

static void gather(const Features& f, const Layout& l, int64_t b, int64_t first_slot, int64_t begin, int64_t count, float* raw,
                   float* mean) {
  switch (f.type) {
    case ElementType::kFloat32:
      return gather_elements<float>(f, l, b, first_slot, begin, count, raw, mean);
    case ElementType::kBFloat16:
      return gather_elements<BFloat16>(f, l, b, first_slot, begin, count, raw, mean);
    case ElementType::kFloat16:
      return gather_elements<Float16>(f, l, b, first_slot, begin, count, raw, mean);
  }
}

// raw - mean -> packed [panel of kWidth slots][feature][slot], and norms += |y|^2. The norms are summed in the order in which
// the products are, so that the distance of coinciding points comes out as exactly 0.
static void pack(const Layout& l, int64_t first_slot, const float* raw, const float* mean, int64_t count, float* packed,
                 float* norms) {
  const int64_t padded = round_up(count, kWidth);
  for (int64_t slot = first_slot; slot < l.slots; slot += kWidth) {
    Vec norm = splat(0.0f);
    for (int64_t k = 0; k < padded; k += kWidth) {
      Vec rows[kWidth];
      const Vec centre = load(mean + k);
      UNROLL for (int r = 0; r < kWidth; ++r) rows[r] = load(raw + r * kRawStride + k) - centre;
      const int64_t last = slot < l.first_positive ? l.repelling : l.first_positive + l.P;
      if (slot + kWidth > last) {
        for (int64_t r = larger(last - slot, 0); r < kWidth; ++r) rows[r] = splat(0.0f);
      }
      transpose(rows);
      UNROLL for (int r = 0; r < kWidth; ++r) {
        store(packed + (k + r) * kWidth, rows[r]);
        norm = rows[r] * rows[r] + norm;
      }
    }
    store(norms + slot, load(norms + slot) + norm);
    raw += kWidth * kRawStride;
    packed += padded * kWidth;
  }
}

// kRows rows by V vectors of a product, in registers: lane (r, v) at [r * V + v]. Packs of indices instead of loops, because the
// compiler keeps an array in registers only where every index is a constant from the start.
template <int V>
struct Tile {
  using All = typename MakeLanes<kRows * V>::type;
  using Row = typename MakeLanes<V>::type;
  Vec lanes[kRows * V];
};

template <int V, int... I>
INLINE void clear_lanes(Tile<V>& tile, Lanes<I...>) {
  ((tile.lanes[I] = splat(0.0f)), ...);
}
template <int V, int... I, int... J>
INLINE void multiply_lanes(Tile<V>& tile, const float* a, int64_t a_row, const float* b, int64_t b_vector, Lanes<I...>,
                           Lanes<J...>) {
  const Vec row[V] = {load(b + J * b_vector)...};
  ((tile.lanes[I] = splat(a[I / V * a_row]) * row[I % V] + tile.lanes[I]), ...);
}
template <int V, int... I>
INLINE void add_lanes(const Tile<V>& tile, float* to, int64_t stride, Lanes<I...>) {
  ((store(to + I / V * stride + I % V * kWidth, load(to + I / V * stride + I % V * kWidth) + tile.lanes[I])), ...);
}
template <int V, int... I>
INLINE float sum_of_squares(const Tile<V>& tile, Lanes<I...>) {
  Vec sum[V] = {};
  ((sum[I % V] += tile.lanes[I] * tile.lanes[I]), ...);
  for (int v = 1; v < V; ++v) sum[0] += sum[v];
  return sum_lanes(sum[0]);
}
template <int V, int... I>
INLINE float weighted_sum(const Tile<V>& tile, const float* weights, int64_t stride, Lanes<I...>) {
  Vec sum[V] = {};
  ((sum[I % V] += tile.lanes[I] * load(weights + I / V * stride + I % V * kWidth)), ...);
  for (int v = 1; v < V; ++v) sum[0] += sum[v];
  return sum_lanes(sum[0]);
}

template <int V>
INLINE void clear(Tile<V>& tile) {
  clear_lanes(tile, typename Tile<V>::All{});
}
// tile += sum_k a[r * a_row + k * a_step] * b[k * b_step + v * b_vector ...]
template <int V>
INLINE void multiply(Tile<V>& tile, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                     int64_t b_vector, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += a_step, b += b_step) {
    multiply_lanes(tile, a, a_row, b, b_vector, typename Tile<V>::All{}, typename Tile<V>::Row{});
  }
}

template <int V>
static void add_products(const float* a, const float* b, int64_t panel, int64_t count, float* products, int64_t stride) {
  Tile<V> tile;
  clear(tile);
  multiply(tile, a, 1, kWidth, b, kWidth, panel, count);
  add_lanes(tile, products, stride, typename Tile<V>::All{});
}

// A block of rows at this slot holds no member.
INLINE bool is_padding(const Layout& l, int64_t slot) {
  return slot >= l.repelling && (slot < l.first_positive || slot >= l.first_positive + l.P);
}

static int64_t packing_scratch(const Layout& l) { return l.slots * (kRawStride + kGramBlock) + kRawStride; }

static void products(const Features& f, const Layout& l, int64_t b, int64_t begin, int64_t end, int64_t first_row,
                     int64_t last_row, int64_t first_slot, float* products, float* norms, float* scratch) {
  float* raw = scratch;
  float* mean = raw + l.slots * kRawStride;
  float* packed = mean + kRawStride;
  const int64_t panels = l.slots / kWidth;
  for (int64_t k = begin; k < end; k += kGramBlock) {
    const int64_t count = smaller(kGramBlock, end - k);
    const int64_t panel = round_up(count, kWidth) * kWidth;  // floats of a panel
    gather(f, l, b, first_slot, k, count, raw, mean);
    pack(l, first_slot, raw, mean, count, packed, norms);
    const float* origin = packed - first_slot / kWidth * panel;
    for (int64_t v0 = first_slot / kWidth; v0 < panels; v0 += kPanel) {
      const int64_t v1 = smaller(v0 + kPanel, panels);
      for (int64_t j = first_row; j < last_row && j / kWidth < v1; j += kRows) {
        if (is_padding(l, j)) continue;
        const int64_t v = larger(v0, j / kWidth);
        const float* a = origin + j / kWidth * panel + j % kWidth;
        const float* from = origin + v * panel;
        float* to = products + (j - first_row) * l.slots + v * kWidth;
        switch (v1 - v) {
          case 1:
            add_products<1>(a, from, panel, count, to, l.slots);
            break;
          case 2:
            add_products<2>(a, from, panel, count, to, l.slots);
            break;
          default:
            add_products<kPanel>(a, from, panel, count, to, l.slots);
        }
      }
    }
  }
}

template <typename Element>
INLINE void store_row(Element* to, const float* values, int64_t count) {
  for (int64_t k = 0; k < count; ++k) convert(values[k], to[k]);
}

template <typename Element, int V, int... I>
INLINE void write_lanes(const Tile<V>& tile, float factor, int64_t num_rows, int64_t count, Element* to, int64_t stride,
                        Lanes<I...>) {
  float values[kRows * V * kWidth];
  ((store(values + I * kWidth, tile.lanes[I] * factor)), ...);
  for (int64_t r = 0; r < num_rows; ++r) store_row(to + r * stride, values + r * V * kWidth, count);
}
// Whole rows of float32 go out as they are.
template <int V, int... I>
INLINE void write_lanes(const Tile<V>& tile, float factor, float* to, int64_t stride, Lanes<I...>) {
  ((store(to + I / V * stride + I % V * kWidth, tile.lanes[I] * factor)), ...);
}
INLINE float* as_floats(float* p) { return p; }
INLINE float* as_floats(void*) { return nullptr; }

// One block of rows by V vectors of features: returns the sum of squares of the rows below G, and writes them.
template <int V, typename Element>
static float field_tile(const Layout& l, const float* c, const float* y, int64_t row, int64_t count, float factor,
                        Element* gradient, int64_t stride) {
  constexpr typename Tile<V>::All kAll{};
  Tile<V> tile;
  clear(tile);
  multiply(tile, c, l.slots, 1, y, kRawStride, kWidth, l.repelling);
  multiply(tile, c + l.first_positive, l.slots, 1, y + l.repelling * kRawStride, kRawStride, kWidth, l.P);
  if (gradient != nullptr) {
    const int64_t num_rows = smaller(kRows, l.G - row);
    float* const floats = as_floats(gradient);
    if (floats != nullptr && num_rows == kRows && count == V * kWidth) {
      write_lanes(tile, factor, floats, stride, kAll);
    } else {
      write_lanes(tile, factor, num_rows, count, gradient, stride, kAll);
    }
  }
  return sum_of_squares(tile, kAll);
}

template <typename Element>
static void field_elements(const Features& f, const Layout& l, int64_t b, int64_t begin, int64_t end,
                           const float* const* coefficients, int64_t num_fields, float factor, Element* gradient,
                           double* squares, float* scratch) {
  float* raw = scratch;
  float* mean = raw + l.slots * kRawStride;
  const int64_t S = f.sizes.S;
  // The rows of raw follow each other without padding here: the field sums over members alone.
  Layout compact = l;
  compact.first_positive = l.repelling;
  for (int64_t t = 0; t < num_fields; ++t) squares[t] = 0;
  for (int64_t k = begin; k < end; k += kFieldBlock) {
    const int64_t count = smaller(kFieldBlock, end - k), padded = round_up(count, kWidth);
    gather(f, compact, b, 0, k, count, raw, mean);
    for (int64_t m = 0; m < l.num_targets(); ++m) {
      float* row = raw + m * kRawStride;
      for (int64_t v = 0; v < padded; v += kWidth) store(row + v, load(row + v) - load(mean + v));
    }
    for (int64_t t = 0; t < num_fields; ++t) {
      for (int64_t v = 0; v < padded; v += kPanel * kWidth) {
        const int64_t vectors = smaller(kPanel, (padded - v) / kWidth);
        for (int64_t row = 0; row < l.G; row += kRows) {
          const float* c = coefficients[t] + row * l.slots;
          Element* to = gradient == nullptr ? nullptr : gradient + row * S + k + v;
          const int64_t left = smaller(count - v, vectors * kWidth);
          switch (vectors) {
            case 1:
              squares[t] += field_tile<1>(l, c, raw + v, row, left, factor, to, S);
              break;
            case 2:
              squares[t] += field_tile<2>(l, c, raw + v, row, left, factor, to, S);
              break;
            default:
              squares[t] += field_tile<kPanel>(l, c, raw + v, row, left, factor, to, S);
          }
        }
      }
    }
  }
}

static void field(const Features& f, const Layout& l, int64_t b, int64_t begin, int64_t end, const float* const* coefficients,
                  int64_t num_fields, float factor, void* gradient, double* squares, float* scratch) {
  switch (f.type) {
    case ElementType::kFloat32:
      return field_elements(f, l, b, begin, end, coefficients, num_fields, factor, static_cast<float*>(gradient), squares,
                            scratch);
    case ElementType::kBFloat16:
      return field_elements(f, l, b, begin, end, coefficients, num_fields, factor, static_cast<BFloat16*>(gradient), squares,
                            scratch);
    case ElementType::kFloat16:
      return field_elements(f, l, b, begin, end, coefficients, num_fields, factor, static_cast<Float16*>(gradient), squares,
                            scratch);
  }
}
