// What one call of the drift op works on: sizes, element type, options. Plain C++, for host and device code alike.
//
// Letters, as in drift_accel/drift/reference.py: B problems, G generated rows i, N unconditional negatives, P positives,
// M = G + N + P targets j ordered [generated | negatives | positives], S features, w target weights, d distances,
// l logits, A affinities, c coefficients, V field, tau temperature, s and u scales.
#pragma once

#include <cstdint>

namespace drift_accel {

constexpr int kMaxTemperatures = 16;

constexpr float kSmallestSquaredDistance = 1e-8f;   // step 1
constexpr float kSmallestScale = 1e-3f;             // step 3
constexpr float kSmallestSqnorm = 1e-8f;            // step 6
constexpr float kSelfPairPenalty = 100.0f;          // step 3
constexpr float kSmallestRowSum = 1e-12f;           // the split form
constexpr float kSmallestMarginalWeight = 1e-6f;    // sinkhorn, weighted columns

enum class ElementType : int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Coupling : int32_t { kTwoSided, kRow, kSinkhorn };

// The options of DriftConfig (drift_accel/drift/configuration.py) that the arithmetic reads.
struct Options {
  float temperatures[kMaxTemperatures];
  int32_t num_temperatures;
  Coupling coupling;
  bool log_bias;             // weight_placement: log w in the softmax instead of w times the affinity
  bool split;                // drift_form: positives and negatives coupled apart
  bool squared;              // metric l2_sq
  bool mask_self;
  bool weighted_columns;     // sinkhorn_marginal
  bool separate_losses;      // field per_temperature
  float affinity_floor;      // 0: none
  int32_t sinkhorn_iterations;
  float attraction;
  float repulsion;
};

struct Sizes {
  int64_t B, G, N, P, S;

  constexpr int64_t M() const { return G + N + P; }
  constexpr int64_t repelling() const { return G + N; }  // targets j below this repel, the others attract
};

// Features of one kind of member, any strides (in elements): element (b, m, k) at data[b*stride[0] + m*stride[1] + k*stride[2]].
struct Members {
  const void* data;
  int64_t stride[3];
};

// Weights of the unconditional negatives [B, N]; data == nullptr: all 1.
struct Weights {
  const float* data;
  int64_t stride[2];
};

// What a diagnostic counts, in the order of DIAGNOSTICS (drift_accel/drift/couplings.py).
enum Diagnostic : int32_t { kFloorShare, kPositiveSampleSize, kNegativeSampleSize, kMeanCoefficient, kNumDiagnostics };

}  // namespace drift_accel
