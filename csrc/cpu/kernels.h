// The arithmetic of one drift problem on one core, compiled once for every instruction set and chosen at run time.
//
// Targets sit in slots: [generated | negatives | padding | positives | padding], both sides starting at a multiple of the
// vector width, so that no vector holds targets of two sides. A pair matrix is [rows, slots], row-major, rows >= G. Padding
// slots have weight 0, and features 0 where they are packed.
#pragma once

#include <cstdint>

#include "../problem.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DRIFT_X86 1
#endif

namespace drift_accel::cpu {

// One key's features, as Problem of checks.h without its torch types.
struct Features {
  Sizes sizes;
  ElementType type;
  Members generated, negatives, positives;
  Weights weights;
};

struct Layout {
  int64_t G, N, P;
  int64_t repelling;       // G + N: slots of targets that repel
  int64_t first_positive;  // slot of the first positive
  int64_t slots;           // all, a multiple of the vector width
  int64_t rows;            // G, rounded up to a whole block of rows
  int64_t first_gram;      // the largest multiple of the width that is at most G

  int64_t num_targets() const { return repelling + P; }
  bool holds_member(int64_t slot) const {
    return slot < repelling || (slot >= first_positive && slot < first_positive + P);
  }
};

// Global statistics as the arithmetic uses them.
struct Scales {
  float logit_factor;    // z = d / max(s, 1e-3), or d^2 / mean of d^2
  double feature_factor; // 1 / u
};

// Per slot of one problem, [slots] each.
struct Targets {
  float* member;       // 1; 0 in padding
  float* weight;       // w; 0 in padding
  float* factor;       // what multiplies A: w, or with log_bias 1 for targets that are there and 0 for absent ones
  float* padding;      // added to z: 0, or so much that the pair has no share
  float* root_weight;  // sqrt(w) with log_bias, else 1
  float* log_weight;   // log w with log_bias and for unweighted transport, else 0
  float lightest, heaviest;  // of the weights above 0
};

// The pairs of one problem as all temperatures read them.
struct Pairs {
  float* z;             // [rows, slots] normalised distances, self pairs + 100
  float* row_min[2];    // [rows] smallest z of a row; of either side where they are coupled apart
  float* column_min;    // [slots]
};

// Sums over one problem, for the diagnostics.
struct DiagnosticSums {
  double value[kNumDiagnostics];
};

struct Kernels {
  const char* name;
  int64_t vector_width;
  int64_t row_block;
  int64_t column_block;  // features that are packed at once

  // Floats of scratch that `products` and `field` need.
  int64_t (*packing_scratch)(const Layout&);
  int64_t (*coupling_scratch)(const Layout&);

  // products [last_row - first_row rounded up, slots] += y_j . y_k for rows j and all slots k >= j's vector; norms [slots] +=
  // |y_k|^2 for slots from first_slot. y is centred over the slots from first_slot, features begin to end.
  void (*products)(const Features&, const Layout&, int64_t b, int64_t begin, int64_t end, int64_t first_row, int64_t last_row,
                   int64_t first_slot, float* products, float* norms, float* scratch);
  // products of the rows < G and norms -> distances, in place (step 1).
  void (*distances)(const Layout&, float* products, const float* norms);
  // sum_ij w_j d_ij, sum_ij w_j d_ij^2 (step 2).
  void (*distance_sums)(const Layout&, const float* distances, const float* weight, double* sums);
  // Distances -> z, in place, and their minima (step 3).
  void (*normalise)(const Layout&, const Options&, const Scales&, const Targets&, Pairs&);
  // One temperature: output = or += scale * c (steps 4 and 5).
  void (*couple)(const Layout&, const Options&, const Targets&, const Pairs&, float temperature, float scale, bool accumulate,
                 float* affinities, float* output, float* scratch, DiagnosticSums*);
  // [slots, slots] weights of sum_ijk c_ij c_ik K_jk, K centred, and its diagonal [slots]: from the distances and the products of
  // slots >= first_gram. False where distances on their floor do not determine K. `member`: 1, 0 in padding. Scratch: [slots].
  bool (*gram)(const Layout&, const float* member, const float* distances, const float* products, const float* norms, float* gram,
               float* square, float* scratch);
  // sum_ijk c_ij c_ik K_jk; NaN where too little of it is left after cancellation.
  double (*gram_norm)(const Layout&, const float* coefficients, const float* gram, const float* square);
  // squares[t] = sum over rows and features begin to end of (c_t y)^2; gradient [G,S] = factor * c_0 y where it is given.
  void (*field)(const Features&, const Layout&, int64_t b, int64_t begin, int64_t end, const float* const* coefficients,
                int64_t count, float factor, void* gradient, double* squares, float* scratch);
};

extern const Kernels kBaselineKernels;
#ifdef DRIFT_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace drift_accel::cpu
