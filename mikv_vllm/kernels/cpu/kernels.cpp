// Table of the kernels of one instruction set.
#include "kernels.hpp"

#define MIKV_STRING_(x) #x
#define MIKV_STRING(x) MIKV_STRING_(x)

namespace mikv::MIKV_ISA {

extern const Kernels kernels;
const Kernels kernels{MIKV_STRING(MIKV_ISA), decode, score, compress, restore, extend};

}  // namespace mikv::MIKV_ISA
