// A large piece of memory that is read from end to end: in huge pages where the system has them, since the processor's
// own read-ahead stops at the end of a page.
#pragma once

#include <cstdint>
#include <memory>

namespace medreasoner {

struct FreePages {
    void operator()(uint8_t* data) const;
};
using Pages = std::unique_ptr<uint8_t[], FreePages>;

// Throws std::bad_alloc. Nothing is written to it.
Pages allocate_pages(int64_t n_bytes);

}  // namespace medreasoner
