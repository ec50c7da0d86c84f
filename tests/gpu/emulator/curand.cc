// cuRAND's place is taken; numbers other than those of cuRAND would be no test of anything, so there are none but normal ones
// of some generator, for callers that ask for noise.
#include <curand.h>

#include <random>

#define API extern "C" __attribute__((visibility("default"))) curandStatus_t

namespace {
std::mt19937_64 &random_of(curandGenerator_t generator) { return *reinterpret_cast<std::mt19937_64 *>(generator); }
template <class T> curandStatus_t normal(curandGenerator_t generator, T *to, size_t count, T mean, T deviation) {
    std::normal_distribution<T> normal(mean, deviation);
    for (size_t i = 0; i < count; i++) to[i] = normal(random_of(generator));
    return CURAND_STATUS_SUCCESS;
}
} // namespace

API curandCreateGenerator(curandGenerator_t *generator, curandRngType_t) {
    *generator = reinterpret_cast<curandGenerator_t>(new std::mt19937_64);
    return CURAND_STATUS_SUCCESS;
}
API curandDestroyGenerator(curandGenerator_t generator) {
    delete &random_of(generator);
    return CURAND_STATUS_SUCCESS;
}
API curandSetPseudoRandomGeneratorSeed(curandGenerator_t generator, unsigned long long seed) {
    random_of(generator).seed(seed);
    return CURAND_STATUS_SUCCESS;
}
API curandSetStream(curandGenerator_t, cudaStream_t) { return CURAND_STATUS_SUCCESS; }
API curandGenerateNormal(curandGenerator_t generator, float *to, size_t count, float mean, float deviation) {
    return normal(generator, to, count, mean, deviation);
}
API curandGenerateNormalDouble(curandGenerator_t generator, double *to, size_t count, double mean, double deviation) {
    return normal(generator, to, count, mean, deviation);
}
