#define NORMOPS_TYPE float
#include "instantiate.inc"
