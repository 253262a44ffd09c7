// Instructions of sm_80 and newer that C++ has no word for: matrix products on tensor cores, copies beside the
// computation, and functions without branches.
#pragma once

#include <cstdint>

#include "cuda.hpp"

namespace meliad::cuda {

// Starts a copy of 4 or 16 aligned bytes from global to shared memory, or writes zeros there and reads nothing; it
// belongs to the group that commit_copies closes.
template <int kBytes>
__device__ __forceinline__ void copy_or_zero(void* shared, const void* global, bool copies) {
  static_assert(kBytes == 4 || kBytes == 16);
#ifndef MELIAD_CUDA_ON_CPU
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int read = copies ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(read) : "memory");
  }
#else
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) {
    on_cpu::fail("an asynchronous copy from or to an address that is not a multiple of its size");
  }
  on_cpu::self->uncommitted.push_back({shared, copies ? global : nullptr, kBytes});
#endif
}

__device__ __forceinline__ void commit_copies() {
#ifndef MELIAD_CUDA_ON_CPU
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  on_cpu::self->committed.emplace_back();
  on_cpu::self->committed.back().swap(on_cpu::self->uncommitted);
#endif
}

// Waits for the copies of this thread, the newest kPending groups excepted.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
#ifndef MELIAD_CUDA_ON_CPU
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  auto& groups = on_cpu::self->committed;
  while (groups.size() > kPending) {
    for (const on_cpu::Copy& copy : groups.front()) {
      if (copy.source != nullptr) {
        std::memcpy(copy.target, copy.source, copy.bytes);
      } else {
        std::memset(copy.target, 0, copy.bytes);
      }
    }
    groups.erase(groups.begin());
  }
#endif
}

// Within one unit in the last place; of NaN it is NaN.
__device__ __forceinline__ float fast_square_root(float value) {
#ifndef MELIAD_CUDA_ON_CPU
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(value));
  return root;
#else
  return std::sqrt(value);
#endif
}

// 2^value within two units in the last place; what is too small for a normal number becomes 0.
__device__ __forceinline__ float fast_exp2(float value) {
#ifndef MELIAD_CUDA_ON_CPU
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
#else
  return std::exp2(value);
#endif
}

// Four 8 x 8 matrices of halves from shared memory into fragments. Lane l gives the 16 bytes of row l % 8 of matrix
// l / 8 and receives, of every matrix, elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of column l / 4 when
// transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&fragments)[4], const Half* row) {
#ifndef MELIAD_CUDA_ON_CPU
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragments[0]), "=r"(fragments[1]), "=r"(fragments[2]), "=r"(fragments[3])
                 : "r"(address)
                 : "memory");
  }
#else
  if (reinterpret_cast<uintptr_t>(row) % 16) on_cpu::fail("a matrix row at an address that is not a multiple of 16");
  on_cpu::Message message{};
  std::memcpy(message.data(), row, 16);
  const on_cpu::Message* rows = on_cpu::exchange(message);
  const unsigned outer = on_cpu::self->lane() / 4, inner = 2 * (on_cpu::self->lane() % 4);
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = kTransposed ? inner + i : outer, at = kTransposed ? outer : inner + i;
      std::memcpy(&pair[i], reinterpret_cast<const char*>(rows[8 * matrix + from].data()) + 2 * at, 2);
    }
    std::memcpy(&fragments[matrix], pair, 4);
  }
#endif
}

// sums [16, 8] += left [16, 16] right [16, 8], halves in, sums in single precision. Fragments as load_matrices gives
// them: left = quadrants top left, bottom left, top right, bottom right; right = upper and lower half, transposed. A
// lane l holds sums of rows l / 4 (0, 1) and l / 4 + 8 (2, 3), columns 2 (l % 4) and 2 (l % 4) + 1.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t right_upper,
                                             uint32_t right_lower) {
#ifndef MELIAD_CUDA_ON_CPU
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_upper), "r"(right_lower));
#else
  const on_cpu::Message* lanes = on_cpu::exchange({left[0], left[1], left[2], left[3], right_upper, right_lower, 0, 0});
  const auto half_at = [](uint32_t pair, unsigned i) {
    const auto bits = uint16_t(pair >> (16 * i));
    Half value;
    std::memcpy(&value, &bits, 2);
    return float(value);
  };
  const unsigned lane = on_cpu::self->lane();
  for (unsigned s = 0; s < 4; ++s) {
    const unsigned row = lane / 4, column = 2 * (lane % 4) + s % 2, lower = s / 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned holder = k % 8 / 2, second_half = k / 8;
      const float a = half_at(lanes[4 * row + holder][2 * second_half + lower], k % 2);
      const float b = half_at(lanes[4 * column + holder][4 + second_half], k % 2);
      sums[s] += a * b;
    }
  }
#endif
}

}  // namespace meliad::cuda
