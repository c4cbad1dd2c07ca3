// Tasks of about equal cost, the longest first, for threads that each take the next one.

#include "cpu/attention_plan.h"

#include "cpu/ops.h"

namespace fastlm {

namespace {

struct Sequence {
  int64_t b, T, S, rows;  // rows: of one key-value head
  double cost;            // pairs of one key-value head
};

// Pairs of query and key, estimated from a few queries.
double pairs(const AttentionArgs& a, int64_t T) {
  constexpr int64_t kSamples = 8;
  double sum = 0;
  for (int64_t i = 0; i < kSamples; ++i) {
    const KeyRange keys = attention_keys(a, T * (2 * i + 1) / (2 * kSamples));
    sum += (double)(keys.end - keys.begin);
  }
  return sum / kSamples * (double)T;
}

// All sequences that have rows or keys, the most expensive first.
std::vector<Sequence> sequences(const AttentionArgs& args) {
  std::vector<Sequence> all;
  all.reserve((size_t)args.B);
  AttentionArgs a = args;
  for (int64_t b = 0; b < args.B; ++b) {
    if (args.cu_q) {
      a.T = args.cu_q[b + 1] - args.cu_q[b];
      a.S = args.cu_k[b + 1] - args.cu_k[b];
    }
    if (b == 0 || args.cu_q)
      all.push_back({b, a.T, a.S, a.H / a.Hkv * a.T, (double)(a.H / a.Hkv) * pairs(a, a.T)});
    else
      all.push_back({b, a.T, a.S, all[0].rows, all[0].cost});
  }
  if (args.cu_q)
    std::stable_sort(all.begin(), all.end(), [](const Sequence& x, const Sequence& y) { return x.cost > y.cost; });
  return all;
}

double total(const std::vector<Sequence>& all, int64_t heads) {
  double sum = 0;
  for (const Sequence& s : all) sum += s.cost * (double)heads;
  return std::max(sum, 1.0);
}

// Whether heads taken whole, in this order, leave the threads at most 40 % behind a perfect division: what the two
// further products of divided heads cost.
bool balanced(const std::vector<Sequence>& all, int64_t heads, double sum) {
  const int64_t threads = omp_threads();
  std::vector<double> busy((size_t)threads, 0.0);
  for (const Sequence& s : all)
    for (int64_t h = 0; h < heads; ++h) *std::min_element(busy.begin(), busy.end()) += s.cost;
  return 5 * *std::max_element(busy.begin(), busy.end()) * (double)threads <= 7 * sum;
}

// Tasks of one head, cut into `count` ranges of rows or of keys.
void cut(std::vector<AttentionTask>& tasks, const Sequence& s, int64_t head, int64_t count, int64_t length, int64_t unit,
         bool rows) {
  const int64_t units = ceil_div(length, unit);
  count = std::min(count, units);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = i * units / count * unit, to = std::min(length, (i + 1) * units / count * unit);
    if (rows)
      tasks.push_back({s.b, head, from, to - from, 0, s.S, true, false});
    else
      tasks.push_back({s.b, head, 0, s.rows, from, to, false, true});
  }
}

Heads at_sequence(Heads x, int64_t b, int64_t first, int64_t size) {
  if (x.data) x.data = (char*)x.data + (b * x.b + first * x.t) * size;
  return x;
}

}  // namespace

AttentionArgs attention_sequence(const AttentionArgs& all, int64_t b) {
  constexpr int64_t kSize[] = {4, 8, 2, 2, 1};
  AttentionArgs a = all;
  const int64_t size = kSize[all.type], i = all.cu_q ? all.cu_q[b] : 0, j = all.cu_k ? all.cu_k[b] : 0;
  for (Heads* x : {&a.q, &a.out, &a.dout, &a.dq}) *x = at_sequence(*x, b, i, size);
  for (Heads* x : {&a.k, &a.v, &a.dk, &a.dv}) *x = at_sequence(*x, b, j, size);
  if (a.mask.data) a.mask.data = (char*)a.mask.data + b * a.mask.b * kSize[a.mask.type];
  a.B = 1;
  a.row = all.cu_q ? i : b * all.H * all.T;
  if (all.cu_q) a.T = all.cu_q[b + 1] - i, a.S = all.cu_k[b + 1] - j;
  return a;
}

bool worth_threads(const AttentionArgs& a) {
  // 5 us of waking are worth 16 times the elements of an elementwise kernel: products are not bound by memory.
  return (double)a.H * (double)a.T * (double)a.S * (double)(a.D + a.Dv) > 16.0 * (double)kParallelGrain;
}

std::vector<AttentionTask> plan_forward(const AttentionArgs& a, const ForwardGrain& grain) {
  const std::vector<Sequence> all = sequences(a);
  const double share = total(all, a.Hkv) / (4 * (double)omp_threads());
  std::vector<AttentionTask> tasks;
  for (const Sequence& s : all) {
    if (s.rows == 0) continue;
    const int64_t wanted = std::min(ceil_div(s.rows, grain.least), (int64_t)std::ceil(s.cost / share));
    const int64_t pieces = std::max(ceil_div(s.rows, grain.most), std::max<int64_t>(1, wanted));
    const int64_t chunk = ceil_div(ceil_div(s.rows, pieces), grain.unit) * grain.unit;
    for (int64_t head = 0; head < a.Hkv; ++head)
      for (int64_t first = (s.rows - 1) / chunk * chunk; first >= 0; first -= chunk)  // causal: longest first
        tasks.push_back({s.b, head, first, std::min(chunk, s.rows - first), 0, s.S, false, false});
  }
  return tasks;
}

std::vector<AttentionTask> plan_backward(const AttentionArgs& a, const BackwardGrain& grain) {
  const std::vector<Sequence> all = sequences(a);
  const double sum = total(all, a.Hkv);
  const bool whole = !worth_threads(a) || balanced(all, a.Hkv, sum);
  std::vector<AttentionTask> tasks;
  for (const Sequence& s : all) {
    const int64_t pieces = whole ? 1 : (int64_t)std::ceil(s.cost / sum * 4 * (double)omp_threads());
    for (int64_t head = 0; head < a.Hkv; ++head) {
      if (pieces <= 1) {
        tasks.push_back({s.b, head, 0, s.rows, 0, s.S, true, true});
        continue;
      }
      cut(tasks, s, head, pieces, s.S, grain.keys, false);
      cut(tasks, s, head, pieces, s.rows, grain.rows, true);
    }
  }
  return tasks;
}

}  // namespace fastlm
