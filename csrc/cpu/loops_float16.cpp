#define NORMOPS_TYPE Half
#include "instantiate.inc"
