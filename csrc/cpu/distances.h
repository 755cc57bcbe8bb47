// Distances from products, their sums, and the targets' Gram matrix from both. Included inside of an instruction set's namespace.

// The blocks of a symmetric matrix left of the diagonal are those above it, transposed: rows and slots below G.
static void mirror(const Layout& l, float* pairs) {
  for (int64_t row = kWidth; row < l.G; row += kWidth) {
    const int64_t last = smaller(kWidth, l.rows - row);
    for (int64_t column = 0; column < row; column += kWidth) {
      Vec block[kWidth];
      UNROLL for (int r = 0; r < kWidth; ++r) block[r] = load(pairs + (column + r) * l.slots + row);
      transpose(block);
      for (int64_t r = 0; r < last; ++r) store(pairs + (row + r) * l.slots + column, block[r]);
    }
  }
}

static void distances(const Layout& l, float* products, const float* norms) {
  mirror(l, products);
  const Vec floor = splat(kSmallestSquaredDistance);
  for (int64_t i = 0; i < l.G; ++i) {
    float* row = products + i * l.slots;
    const Vec norm = splat(norms[i]);
    for (int64_t j = 0; j < l.slots; j += kWidth) {
      const Vec square = at_least((norm + load(norms + j)) - 2.0f * load(row + j), floor);
      Vec root;
      for (int k = 0; k < kWidth; ++k) root[k] = __builtin_sqrtf(square[k]);
      store(row + j, root);
    }
  }
}

static void distance_sums(const Layout& l, const float* distances, const float* weight, double* sums) {
  sums[0] = sums[1] = 0;
  for (int64_t i = 0; i < l.G; ++i) {
    Vec sum = splat(0.0f), squares = splat(0.0f);
    for (int64_t j = 0; j < l.slots; j += kWidth) {
      const Vec d = load(distances + i * l.slots + j);
      const Vec weighted = load(weight + j) * d;
      sum += weighted;
      squares += weighted * d;
    }
    sums[0] += sum_lanes(sum);
    sums[1] += sum_lanes(squares);
  }
}

template <int... I>
INLINE IntVec lane_numbers(Lanes<I...>) {
  return IntVec{I...};
}
INLINE Vec without_lane(Vec x, int lane) { return lane_numbers(AllLanes{}) == lane ? splat(1e30f) : x; }

// K_jk = (y_j - m).(y_k - m) with m the mean of the generated samples, whose |y_j - m|^2 follow from the distances alone:
// mean_i d_ij^2 - mean_ii' d_ii'^2 / 2. Rows of generated targets follow too; those of the others come from `products`, which
// are centred elsewhere: shift is half of what |y_j - m|^2 has more than the norm under that centre. Each pair is counted once,
// at j <= k and twice its value, so that half of c^T c suffices.
static bool gram(const Layout& l, const float* member, const float* distances, const float* products, const float* norms,
                 float* gram, float* square, float* shift) {
  for (int64_t j = 0; j < l.slots; ++j) square[j] = 0;
  Vec closest = splat(__builtin_inff());
  for (int64_t i = 0; i < l.G; ++i) {
    const float* row = distances + i * l.slots;
    for (int64_t j = 0; j < l.slots; j += kWidth) {
      const Vec d = load(row + j);
      store(square + j, load(square + j) + d * d);
      // Pairs with padding are far away; that with itself, at the floor by definition, is not asked.
      const Vec pair = d + (1.0f - load(member + j)) * 1e30f;
      closest = smaller(closest, j == i / kWidth * kWidth ? without_lane(pair, static_cast<int>(i % kWidth)) : pair);
    }
    square[i] -= row[i] * row[i];  // the floor under a self pair is no distance
  }
  const float low = min_lanes(closest);
  if (low * low <= kSmallestSquaredDistance * 1.001f) return false;
  const float share = 1.0f / static_cast<float>(l.G);
  float spread = 0;
  for (int64_t i = 0; i < l.G; ++i) spread += square[i];
  spread *= share * share * 0.5f;
  for (int64_t j = 0; j < l.slots; ++j) {
    square[j] = member[j] * (square[j] * share - spread);
    shift[j] = j < l.first_gram ? 0.0f : (square[j] - norms[j]) * 0.5f;
  }
  for (int64_t j = 0; j < l.slots; ++j) {
    float* row = gram + j * l.slots;
    const int64_t first = j / kWidth * kWidth;
    const float twice = 2.0f * member[j];
    if (j < l.first_gram) {
      const Vec own = splat(square[j]);
      for (int64_t k = first; k < l.slots; k += kWidth) {
        const Vec d = load(distances + j * l.slots + k);
        store(row + k, (0.5f * twice) * load(member + k) * ((own + load(square + k)) - d * d));
      }
    } else {
      const float* product = products + (j - l.first_gram) * l.slots;
      for (int64_t k = first; k < l.slots; k += kWidth) {
        store(row + k, twice * load(member + k) * (load(product + k) + (shift[j] + load(shift + k))));
      }
    }
    for (int64_t k = first; k < j; ++k) row[k] = 0;
    row[j] = square[j];
  }
  return true;
}

template <int V>
static float gram_tile(const float* a, const float* b, const float* weights, int64_t stride, int64_t count) {
  Tile<V> tile;
  clear(tile);
  multiply(tile, a, 1, stride, b, stride, kWidth, count);
  return weighted_sum(tile, weights, stride, typename Tile<V>::All{});
}

// The sum cancels where the field is much shorter than its parts, and what is left then is rounding: NaN, ask the field itself.
static double gram_norm(const Layout& l, const float* coefficients, const float* gram, const float* square) {
  constexpr double kSmallestShare = 2e-3;  // of the parts' own squares; rounding is about 2e-7 of those
  double norm = 0;
  const int64_t panels = l.slots / kWidth;
  for (int64_t v0 = 0; v0 < panels; v0 += kPanel) {
    const int64_t v1 = smaller(v0 + kPanel, panels);
    for (int64_t j = 0; j < l.slots && j / kWidth < v1; j += kRows) {
      if (is_padding(l, j)) continue;
      const int64_t v = larger(v0, j / kWidth);
      const float* from = coefficients + v * kWidth;
      const float* weights = gram + j * l.slots + v * kWidth;
      switch (v1 - v) {
        case 1:
          norm += gram_tile<1>(coefficients + j, from, weights, l.slots, l.G);
          break;
        case 2:
          norm += gram_tile<2>(coefficients + j, from, weights, l.slots, l.G);
          break;
        default:
          norm += gram_tile<kPanel>(coefficients + j, from, weights, l.slots, l.G);
      }
    }
  }
  double parts = 0;
  for (int64_t j = 0; j < l.slots; j += kWidth) {
    Vec sum = splat(0.0f);
    for (int64_t i = 0; i < l.G; ++i) {
      const Vec c = load(coefficients + i * l.slots + j);
      sum += c * c;
    }
    parts += sum_lanes(sum * load(square + j));
  }
  return norm < kSmallestShare * parts ? __builtin_nan("") : norm;
}
