// Sentencepiece's normalization rules (a Darts-clone double array in front of the replacement texts), to be asked
// whether a rule reads across a space.
#pragma once

#include <cstdint>
#include <string_view>

namespace host {

// Whether some rule's source text has a byte of `spaces` that is not the whole of it, or some rule writes U+2581.
bool rules_touch_spaces(std::string_view charsmap, std::string_view spaces);

}  // namespace host
