// Compiles the header PASSES for every instruction set, each within a namespace of its own: anywhere, avx2, avx512, amx.

namespace anywhere {
#define PRODUCT 0
#include PASSES
#undef PRODUCT
}  // namespace anywhere

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define PRODUCT 0
#include PASSES
#undef PRODUCT
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512 {
#define PRODUCT 1
#include PASSES
#undef PRODUCT
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
namespace amx {
#define PRODUCT 2
#include PASSES
#undef PRODUCT
}  // namespace amx
#pragma GCC pop_options
#endif
