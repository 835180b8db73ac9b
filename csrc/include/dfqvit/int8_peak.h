// The measured peak of the byte products that quant_linear is made of, for rooflines. No torch headers.
#pragma once

#include "dfqvit/isa.h"

namespace dfqvit {

// Multiply-adds of bytes a second that one core does on this path, measured in some milliseconds; 0 for paths that have
// no instruction for them.
double int8_peak(Isa isa);

}  // namespace dfqvit
