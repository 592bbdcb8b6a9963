#define NORMOPS_TYPE BFloat16
#include "instantiate.inc"
