// A CPU allocator for torch that counts the live and the peak bytes of every tensor's storage.
//
// memory_counter_start() puts it before the allocator that is in place, which still does the work; storages made
// earlier keep their own deleter and are not counted. Scratch memory that a library takes for itself (oneDNN, MKL,
// gloo's transport) is not tensor memory and is not counted either. Sizes are those malloc has set aside, so
// padding is in them. compare.py builds this file; job.py calls it through ctypes.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <malloc.h>

#include <atomic>
#include <cstdint>

namespace {

std::atomic<int64_t> live_bytes{0};
std::atomic<int64_t> peak_bytes{0};
c10::Allocator* inner = nullptr;

void release(void* data) {
  if (data == nullptr) {
    return;
  }
  live_bytes -= static_cast<int64_t>(malloc_usable_size(data));
  inner->raw_deallocate(data);
}

struct CountingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* data = inner->raw_allocate(num_bytes);
    if (data != nullptr) {
      const auto size = static_cast<int64_t>(malloc_usable_size(data));
      const int64_t live = live_bytes += size;
      int64_t peak = peak_bytes.load();
      while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
      }
    }
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t num_bytes) const override {
    default_copy_data(to, from, num_bytes);
  }
};

CountingAllocator counting;

}  // namespace

extern "C" {

void memory_counter_start() {
  if (inner != nullptr) {
    return;
  }
  inner = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&counting, /*priority=*/100);
}

int64_t memory_counter_live() { return live_bytes; }

int64_t memory_counter_peak() { return peak_bytes; }

// The peak so far is forgotten: it begins again at what is live now.
void memory_counter_reset_peak() { peak_bytes = live_bytes.load(); }

}
