#define NORMOPS_TYPE BFloat16
#define NORMOPS_IS_BFLOAT16
#include "instantiate.inc"
