// The parts that a CPU build of PyTorch lacks to run autograd on fake CUDA tensors: hooks that report
// CUDA as available, and a no-op device guard. A CUDA build has both, even without a GPU, and does
// not need this file.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

constexpr auto kCUDA = c10::DeviceType::CUDA;

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

struct Guard : c10::impl::NoOpDeviceGuardImpl<kCUDA> {
  c10::Device getDevice() const override { return c10::Device(kCUDA, 0); }
  c10::Device exchangeDevice(c10::Device device) const override { return device; }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// PyTorch creates its hooks once, while it is imported, and keeps a reference to them. So the new hooks
// are constructed in place of the old object.
const bool replaced = [] {
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface),
                "the hooks must hold no data of their own");
  new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();
  return true;
}();

}  // namespace
