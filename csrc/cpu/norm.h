// What the normalizations share, for inclusion inside a pass of foreach_isa.h: no include guard.

namespace fastlm::FASTLM_ISA::norm {

// Sum of term(j, n) over elements j to `end` of a row; four accumulators hide the latency of the additions.
template <class V, class F>
inline __attribute__((always_inline)) V part_sum(int64_t j, int64_t end, F&& term) {
  constexpr int64_t L = lanes<V>;
  using whole = std::integral_constant<int64_t, L>;
  V a0{}, a1{}, a2{}, a3{};
  for (; j + 4 * L <= end; j += 4 * L) {
    a0 += term(j, whole{});
    a1 += term(j + L, whole{});
    a2 += term(j + 2 * L, whole{});
    a3 += term(j + 3 * L, whole{});
  }
  for (; j + L <= end; j += L) a0 += term(j, whole{});
  if (j < end) a1 += term(j, end - j);
  return (a0 + a1) + (a2 + a3);
}

// The same over a row of N; parts keep the rounding small where rows are long.
template <class V, class F>
inline __attribute__((always_inline)) lane_t<V> row_sum(int64_t N, F&& term) {
  constexpr int64_t kPart = 8192;
  V sum = part_sum<V>(0, std::min(N, kPart), term);
  for (int64_t j = kPart; j < N; j += kPart) sum += part_sum<V>(j, std::min(N, j + kPart), term);
  return reduce_add(sum);
}

// Asks for the cache line that begins at element j of a row; between two lines, nothing. LOCALITY 3 is the first-level
// cache, 2 the second.
template <int LOCALITY = 3, class T>
inline void prefetch(const T* row, int64_t j) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (lanes<vec_of<T>> >= kLine || j % kLine == 0) __builtin_prefetch(row + j, 0, LOCALITY);
}

// out (N) = the sum of `chunks` rows of N, a stride apart, in order.
template <class S>
void add_partials(const S* partial, int64_t stride, int64_t chunks, int64_t N, S* out) {
  using V = vec_of<S>;
  constexpr int64_t kColumns = 256;
#pragma omp parallel for schedule(static) if (chunks * N > kParallelGrain)
  for (int64_t first = 0; first < N; first += kColumns)
    for_lanes<V>(std::min(kColumns, N - first), [&](int64_t k, auto n) {
      V v{};
      for (int64_t c = 0; c < chunks; ++c) v += load<V>(partial + c * stride + first + k, n);
      store(out + first + k, v, n);
    });
}

}  // namespace fastlm::FASTLM_ISA::norm
