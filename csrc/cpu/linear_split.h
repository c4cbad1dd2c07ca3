// fp32 as two bf16, for rows of x beside a bf16 weight; for inclusion inside a pass of level 3 or 4.

namespace fastlm::FASTLM_ISA {

// The leading bits of x (K), and what they leave out: together off by 2^-17 of x at most.
inline void split(const float* x, int64_t K, bf16_t* leading, bf16_t* rest) {
  for_lanes<VF>(K, [&](int64_t k, auto n) {
    const VF v = load<VF>(x + k, n);
    const VI finite = abs(v) <= 3.4028235e38f;
    const VF cut = finite ? (VF)((VU)v & 0xffff0000u) : v;
    store(leading + k, cut, n);
    store(rest + k, finite ? v - cut : VF{}, n);
  });
}

}  // namespace fastlm::FASTLM_ISA
