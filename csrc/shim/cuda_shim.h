// Runs CUDA kernels on the CPU, for tests: the same .cu sources, compiled by a C++ compiler with this in front.
//
// A block's threads are fibers that run until they wait; which one goes on is drawn from a seed
// (MEGATRON_RETRO_SHIM_SEED), and one warp is held back until the others can go no further, so a missing barrier shows
// as a wrong number under some seed. Shared memory holds NaN when a block starts. Threads that wait for different things
// for ever are reported, not hung. Blocks run one after another in an order that is drawn too.
#pragma once

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint4 {
  unsigned x, y, z, w;
};
using cudaStream_t = void*;

namespace shim {

// Threads that wait for each other: a block's, or a warp's.
struct Group {
  int alive = 0, arrived = 0;
  long generation = 0;
  void leave() {
    --alive;
    release();
  }
  void release() {
    if (alive > 0 && arrived == alive) arrived = 0, ++generation;
  }
};

// An asynchronous copy that was asked for; zeros where there is nothing to copy from.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

constexpr size_t stack_bytes = 64 * 1024;

// Switches by _setjmp and _longjmp, which make no system call; a context only starts it, once per launch.
struct Fiber {
  ucontext_t context{};
  jmp_buf jump;
  std::unique_ptr<char[]> stack;
  bool started = false;
  dim3 thread;
  int index = 0;
  bool done = false;
  Group* waits_for = nullptr;
  long waited_generation = 0;
  alignas(16) unsigned char mailbox[32] = {};
  std::vector<Copy> copies;
};

class Block {
 public:
  Block(dim3 grid, dim3 shape, size_t shared_bytes) : grid_size(grid), block_size(shape) {
    const int count = int(shape.x * shape.y * shape.z);
    fibers.resize(count);
    for (Fiber& fiber : fibers) fiber.stack.reset(new char[stack_bytes]);
    shared.resize(shared_bytes / sizeof(float) + 64);
    warps.resize((count + 31) / 32);
  }

  void run(dim3 index, const std::function<void()>& kernel, std::mt19937& order) {
    block_index = index;
    body = &kernel;
    std::fill(shared.begin(), shared.end(), std::nanf(""));
    everyone = Group{int(fibers.size())};
    std::fill(warps.begin(), warps.end(), Group{});
    for (size_t i = 0; i < fibers.size(); ++i) start(int(i));
    size_t left = fibers.size();
    std::vector<int> turn(fibers.size());
    for (size_t i = 0; i < turn.size(); ++i) turn[i] = int(i);
    int held = -1;
    while (left) {
      std::shuffle(turn.begin(), turn.end(), order);
      bool moved = false;
      for (int i : turn) {
        Fiber& fiber = fibers[i];
        if (i / 32 == held) continue;
        if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.waited_generation)) continue;
        fiber.waits_for = nullptr;
        moved = true;
        current = &fiber;
        resume(fiber);
        if (fiber.done) {
          --left;
          everyone.leave();
          warps[i / 32].leave();
        }
      }
      if (!moved && held < 0) throw std::runtime_error("the threads of a block wait for each other for ever");
      if (!moved)
        held = -1;
      else if (held < 0 && warps.size() > 1)
        held = int(order() % warps.size());
    }
  }

  void wait(Group& group) {
    Fiber& self = *current;
    self.waits_for = &group;
    self.waited_generation = group.generation;
    ++group.arrived;
    group.release();
    yield(self);
  }

  Group& warp() { return warps[current->index / 32]; }

  // What every lane of the caller's warp has put into its mailbox; lanes that do not exist give what the caller gave.
  template <typename Posted>
  void from_all_lanes(const Posted& mine, Posted (&lanes)[32]) {
    static_assert(sizeof(Posted) <= sizeof(Fiber::mailbox), "a mailbox holds 32 bytes");
    std::memcpy(current->mailbox, &mine, sizeof(mine));
    wait(warp());
    const size_t first = size_t(current->index / 32 * 32);
    for (size_t lane = 0; lane < 32; ++lane)
      std::memcpy(&lanes[lane], fibers[first + lane < fibers.size() ? first + lane : current->index].mailbox, sizeof(mine));
    wait(warp());
  }

  // Asynchronous copies are done when the thread that asked for them waits, so that a missing wait shows.
  void copy_later(void* to, const void* from, size_t bytes) { current->copies.push_back({to, from, bytes}); }
  void copy_now() {
    for (const Copy& copy : current->copies)
      copy.from ? std::memcpy(copy.to, copy.from, copy.bytes) : std::memset(copy.to, 0, copy.bytes);
    current->copies.clear();
  }

  dim3 grid_size, block_size, block_index;
  Fiber* current = nullptr;
  Group everyone;
  std::vector<float> shared;

 private:
  void start(int i) {
    Fiber& fiber = fibers[i];
    fiber.index = i;
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.copies.clear();
    fiber.thread = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    ++warps[i / 32].alive;
    if (fiber.started) return;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    makecontext(&fiber.context, &Block::enter, 0);
  }
  __attribute__((noinline)) void resume(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.jump, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  __attribute__((noinline)) void yield(Fiber& fiber) {
    if (_setjmp(fiber.jump) == 0) _longjmp(scheduler, 1);
  }
  static void enter();

  std::vector<Fiber> fibers;
  std::vector<Group> warps;
  jmp_buf scheduler;
  const std::function<void()>* body = nullptr;
};

inline Block*& running() {
  static thread_local Block* block = nullptr;
  return block;
}

inline int lane_index() { return running()->current->index & 31; }

inline void Block::enter() {
  Block* block = running();
  Fiber& self = *block->current;
  for (;;) {  // one turn per block of the grid
    (*block->body)();
    self.done = true;
    block->yield(self);
  }
}

inline void launch(dim3 grid, dim3 shape, size_t shared_bytes, const std::function<void()>& kernel) {
  if (shape.x * shape.y * shape.z > 1024) throw std::runtime_error("a block has at most 1024 threads");
  if (shared_bytes > 227 * 1024) throw std::runtime_error("a block has at most 227 KB of shared memory");
  const char* seed = std::getenv("MEGATRON_RETRO_SHIM_SEED");
  std::mt19937 order(seed ? std::atoi(seed) : 0);
  std::vector<dim3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.emplace_back(x, y, z);
  std::shuffle(blocks.begin(), blocks.end(), order);
  Block block(grid, shape, shared_bytes);
  running() = &block;
  for (const dim3& index : blocks) block.run(index, kernel, order);
  running() = nullptr;
}

// Where the kernels that ran lie in the library, which its symbol table turns into names: tests must reach all of them.
inline std::set<uint64_t>& launched() {
  static std::set<uint64_t> places;
  return places;
}

inline void note_launch(const void* kernel) {
  Dl_info library;
  if (dladdr(kernel, &library))
    launched().insert(reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase));
}

}  // namespace shim

// Fills `places` as far as there is room and returns how many kernels have run since the library was loaded.
extern "C" inline __attribute__((used, visibility("default"))) uint64_t shim_launched(uint64_t* places, uint64_t room) {
  for (uint64_t place : shim::launched())
    if (room > 0) *places++ = place, --room;
  return shim::launched().size();
}

#define threadIdx (shim::running()->current->thread)
#define blockIdx (shim::running()->block_index)
#define blockDim (shim::running()->block_size)
#define gridDim (shim::running()->grid_size)

inline void __syncthreads() { shim::running()->wait(shim::running()->everyone); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::running()->wait(shim::running()->warp()); }

template <typename Value>
inline Value __shfl_sync(unsigned, Value value, int lane) {
  Value lanes[32];
  shim::running()->from_all_lanes(value, lanes);
  return lanes[lane & 31];
}

template <typename Value>
inline Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return __shfl_sync(mask, value, shim::lane_index() ^ lanes);
}
