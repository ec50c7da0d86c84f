// Copies elements between any two layouts of one shape, bit for bit.

struct Axes {
  unsigned long long count;      // elements
  unsigned long long extent[8];  // row-major; axes that a shape does not have are 1
  long long from[8];             // strides in elements
  long long to[8];
};

#define COPY(NAME, BITS)                                                                        \
  extern "C" __global__ void NAME(const Axes axes, const BITS *from, BITS *to) {                 \
    const unsigned long long threads = (unsigned long long)gridDim.x * blockDim.x;               \
    unsigned long long i = (unsigned long long)blockIdx.x * blockDim.x + threadIdx.x;            \
    for (; i < axes.count; i += threads) {                                                       \
      unsigned long long rest = i;                                                               \
      long long source = 0, target = 0;                                                          \
      _Pragma("unroll") for (int axis = 7; axis >= 0; --axis) {                                  \
        if (axes.extent[axis] == 1) continue;                                                    \
        const long long at = (long long)(rest % axes.extent[axis]);                              \
        rest /= axes.extent[axis];                                                               \
        source += at * axes.from[axis];                                                          \
        target += at * axes.to[axis];                                                            \
      }                                                                                          \
      to[target] = from[source];                                                                 \
    }                                                                                            \
  }

COPY(copy_16, unsigned short)
COPY(copy_32, unsigned int)
