#pragma once

#include "arrays.h"

py::array_t<float> embed_hashed(const Array<int32_t>& tokens, const Array<uint8_t>& present,
                                const std::vector<int32_t>& weights, int64_t dimension, int64_t threads);
