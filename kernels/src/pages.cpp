#include "pages.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace medreasoner {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

}  // namespace

void FreePages::operator()(uint8_t* data) const { std::free(data); }

Pages allocate_pages(int64_t n_bytes) {
    const int64_t whole = (n_bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = nullptr;
    if (posix_memalign(&data, kHugePage, static_cast<size_t>(whole)) != 0) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data, static_cast<size_t>(whole), MADV_HUGEPAGE);  // a wish: it may be refused
#endif
    return Pages(static_cast<uint8_t*>(data));
}

}  // namespace medreasoner
