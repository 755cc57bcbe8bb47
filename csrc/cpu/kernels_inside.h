// The whole of one instruction set; see vectors.h for what the including file sets.
#include "vectors.h"
#include "products.h"
#include "distances.h"
#include "transport.h"
#include "couplings.h"
