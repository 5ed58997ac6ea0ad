#include "cuda/attention_forward.cuh"
namespace fastgpt::FASTGPT_ISA {
Status attention_forward_f32(const AttentionForward& p, Launch& launch) { return {Status::unsupported_shape, 0, 0}; }
}  // namespace fastgpt::FASTGPT_ISA
