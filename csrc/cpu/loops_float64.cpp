#define NORMOPS_TYPE double
#include "instantiate.inc"
