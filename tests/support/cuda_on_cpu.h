// What k2's CUDA kernels need of CUDA, for g++: the threads of a block are coroutines of one thread.
//
// Blocks run one after the other. A thread runs until it exchanges something with others (a
// shuffle, a tensor-core operation, a barrier), then the next one runs. A thread that waits for one
// that has returned waits for ever: that ends the process with a message.
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __expf std::exp  // not a function: glibc has one of that name

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float value) {
    uint32_t all;
    std::memcpy(&all, &value, 4);
    const bool is_number = value == value;
    bits = is_number ? (all + 0x7fff + ((all >> 16) & 1)) >> 16 : 0x7fff;
  }
};
struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float of) : value(static_cast<_Float16>(of)) {}
};
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x, y, z; };
using Shape = std::array<int32_t, 8>;
using Strides = std::array<int64_t, 8>;
namespace cuda::std {
template <typename T>
using remove_reference_t = typename ::std::remove_reference<T>::type;
}
using std::min;

static Index threadIdx, blockIdx, blockDim;

[[noreturn]] static void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  bool done = false;
  static constexpr size_t STACK = 64 * 1024;
};
struct Barrier {
  int arrived = 0;
  int passed = 0;
};

static ucontext_t scheduler;
static std::vector<Thread> threads;
static std::vector<Barrier> of_warps;
static Barrier of_block;
static int running, changes;

static void leave() { swapcontext(&threads[running].context, &scheduler); }

static void wait(Barrier& barrier, int members) {
  const int own = barrier.passed;
  ++changes;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.passed;
    return;
  }
  while (barrier.passed == own) leave();
}
static void wait_for_warp() { wait(of_warps[running / 32], 32); }
static void __syncthreads() { wait(of_block, static_cast<int>(threads.size())); }

static uint32_t exchanged[32][32][8];  // of each warp and lane

template <typename T>
static T __shfl_xor_sync(uint32_t lanes, T value, int other) {
  if (lanes != 0xffffffffu) fail("a shuffle of some lanes of a warp");
  auto& warp = exchanged[running / 32];
  std::memcpy(warp[running % 32], &value, sizeof(T));
  wait_for_warp();
  T result;
  std::memcpy(&result, warp[running % 32 ^ other], sizeof(T));
  wait_for_warp();
  return result;
}

static float __half2float(__half value) { return static_cast<float>(value.value); }
static float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t all = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &all, 4);
  return result;
}
static float __uint_as_float(uint32_t value) {
  float result;
  std::memcpy(&result, &value, 4);
  return result;
}
static uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t both = uint64_t(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  }
  return result;
}
template <typename T>
static T __ldcs(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) fail("a load that is not aligned");
  return *from;
}
static uint4 load_16_bytes(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) fail("16 bytes that are not aligned");
  return *static_cast<const uint4*>(from);
}

// mma.sync.aligned.m16n8k16, as PTX describes where its fragments are.
template <typename T>
static void multiply_16_8_16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& warp = exchanged[running / 32];
  const int lane = running % 32;
  std::memcpy(warp[lane], a, 16);
  warp[lane][4] = b0;
  warp[lane][5] = b1;
  wait_for_warp();
  const auto value = [](uint32_t pair, int half) {
    const uint16_t bits = pair >> (16 * half);
    T unpacked;
    std::memcpy(&unpacked, &bits, 2);
    if constexpr (std::is_same_v<T, __half>) return __half2float(unpacked);
    else return __bfloat162float(unpacked);
  };
  float results[4];
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4, column = lane % 4 * 2 + i % 2;
    results[i] = sum[i];
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      results[i] += value(warp[row * 4 + from][i / 2 + k / 8 * 2], k % 2) *
                    value(warp[column * 4 + from][4 + k / 8], k % 2);
    }
  }
  wait_for_warp();
  std::memcpy(sum, results, sizeof(results));
}

static void (*kernel_call)(const void* const*);
static const void* const* kernel_arguments;

static void run_thread() {
  kernel_call(kernel_arguments);
  threads[running].done = true;
  ++changes;
  leave();
}

static void run_block(int size) {
  threads = std::vector<Thread>(size);
  of_warps.assign((size + 31) / 32, {});
  of_block = {};
  for (auto& thread : threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = Thread::STACK;
    makecontext(&thread.context, run_thread, 0);
  }
  for (int left = size; left > 0;) {
    changes = 0;
    for (running = 0; running < size; ++running) {
      if (threads[running].done) continue;
      threadIdx = {running, 0, 0};
      swapcontext(&scheduler, &threads[running].context);
      if (threads[running].done) --left;
    }
    if (left && !changes) fail("threads wait for one that has returned");
  }
}

static void run_grid(
    void (*call)(const void* const*), int across, int down, int size, const void* const* arguments) {
  kernel_call = call;
  kernel_arguments = arguments;
  blockDim = {size, 1, 1};
  for (int y = 0; y < down; ++y) {
    for (int x = 0; x < across; ++x) {
      blockIdx = {x, y, 0};
      run_block(size);
    }
  }
}
