/* A host in C that is also C++: corrects one batch of noise with a plugin, through the header alone.
 *
 *     cc -I host-api/include host-api/examples/host.c -o target/c-host -ldl -lm
 *     target/c-host target/release/libdpt.so \
 *       '{"adapter": "weights/shapes/dpt.safetensors", "base_model": "weights/shapes", "eta": 4}'
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <sampler_hook.h>

#define BATCH 1
#define CHANNELS 4
#define SIZE 16 /* latents of SIZE x SIZE: pictures of 128 x 128 */
#define COUNT (BATCH * CHANNELS * SIZE * SIZE)
#define STEPS 3
#define TIMESTEPS 1000

static sh_string string(const char *text) {
  sh_string result = {text, strlen(text)};
  return result;
}

/* A plugin library stays loaded until the program ends: its threads may outlive every instance. */
static sh_entry_fn load(const char *path) {
  sh_entry_fn entry = NULL;
#ifdef _WIN32
  HMODULE library = LoadLibraryA(path);
  FARPROC symbol = library != NULL ? GetProcAddress(library, SH_ENTRY_SYMBOL) : NULL;
  if (symbol == NULL) fprintf(stderr, "%s: error %lu\n", path, GetLastError());
#else
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void *symbol = library != NULL ? dlsym(library, SH_ENTRY_SYMBOL) : NULL;
  if (symbol == NULL) fprintf(stderr, "%s\n", dlerror());
#endif
  memcpy(&entry, &symbol, sizeof(entry)); /* ISO C has no cast from a data pointer to a function pointer */
  return entry;
}

/* ---- What every host gives its plugins --------------------------------------------------------------------------- */

static void host_log(const sh_host *host, int32_t level, sh_string message) {
  (void)host;
  if (level <= SH_LOG_INFO) fprintf(stderr, "plugin: %.*s\n", (int)message.size, message.data ? message.data : "");
}

/* Nonzero when the user does not want to wait; asked from any thread, so a flag behind it must be atomic. */
static int32_t host_cancelled(const sh_host *host) { return (void)host, 0; }

static const void *host_extension(const sh_host *host, sh_string id) {
  (void)host;
  (void)id;
  return NULL;
}

/* ---- What is sampled --------------------------------------------------------------------------------------------- */

/* Noise of roughly unit variance: the sum of twelve uniform numbers. */
static void fill_with_noise(float *latents) {
  uint64_t state = 1;
  for (int i = 0; i < COUNT; i++) {
    double sum = -6;
    for (int j = 0; j < 12; j++) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      sum += (double)(state >> 11) / 9007199254740992.0;
    }
    latents[i] = (float)sum;
  }
}

/* Stable Diffusion's schedule: the square roots of beta rise linearly. */
static void fill_with_alphas(double *alphas_cumprod) {
  double product = 1;
  for (int t = 0; t < TIMESTEPS; t++) {
    double root = sqrt(0.00085) + (sqrt(0.012) - sqrt(0.00085)) * t / (TIMESTEPS - 1);
    alphas_cumprod[t] = product *= 1 - root * root;
  }
}

static void print_step(uint32_t index, const sh_report *report) {
  printf("step %u: outcome %d\n", index, report->outcome);
  for (uint32_t b = 0; b < BATCH; b++) {
    const sh_item_report *item = &report->items[b];
    if (item->status != SH_OK) printf("  item %u was left as it was: status %d\n", b, item->status);
    else printf("  item %u: score %.6f, corrected by %.6f\n", b, item->score, item->correction_norm);
  }
}

/* All calls in their order. The first that fails ends the run, and `error` says why. */
static sh_status sample(const sh_plugin *plugin, float *latents, sh_error *error) {
  static double alphas_cumprod[TIMESTEPS];
  fill_with_alphas(alphas_cumprod);
  sh_model model = {sizeof(model), SH_PREDICTION_EPSILON, string("sd1"), 4, CHANNELS,
                    alphas_cumprod, TIMESTEPS, string("")};
  sh_device cpu = {SH_DEVICE_CPU, 0};
  sh_status status = plugin->prepare(plugin, &model, cpu, error);
  if (status != SH_OK) return status;

  /* A host with a text encoder passes `context` and `pooled`. This one has none: a plugin with a base model of its own
   * encodes the prompts itself. */
  sh_string prompt = string("a red circle to the left of a blue square");
  sh_text text = {sizeof(text), 0, NULL, NULL, NULL, &prompt};
  sh_run run = {sizeof(run), BATCH, STEPS, 0, 4.0, &text};
  status = plugin->begin(plugin, &run, error);
  if (status != SH_OK) return status;

  int64_t shape[4] = {BATCH, CHANNELS, SIZE, SIZE};
  sh_view view = {sizeof(view), 0, {latents, {SH_DEVICE_CPU, 0}, 4, {SH_DTYPE_FLOAT, 32, 1}, shape, NULL, 0}, NULL}; /* f32 */
  for (uint32_t i = 0; i < STEPS; i++) {
    const int timestep = 900; /* a sampler's timesteps fall; here they stay, so that the scores can be compared */
    sh_step step = {sizeof(step), i, STEPS, 0, timestep, alphas_cumprod[timestep], SH_SPACE_VP, 0, NULL};
    sh_item_report items[BATCH];
    sh_report report = {sizeof(report), sizeof(items[0]), items, BATCH, 0, 0, 0};
    status = plugin->step(plugin, &step, &view, &view, &report, error); /* in place */
    if (status != SH_OK) return status; /* the latents are as they were: a host may also go on without correction */
    print_step(i, &report);
    /* Here a host predicts the noise in `latents`, with guidance, and steps its sampler. */
  }
  return plugin->end(plugin, error);
}

int main(int argc, char **argv) {
  if (argc != 3) return fprintf(stderr, "usage: host LIBRARY CONFIGURATION\n"), 2;
  sh_entry_fn entry_of = load(argv[1]);
  if (entry_of == NULL) return 1;
  const sh_entry *entry = entry_of(SH_ABI_MAJOR);
  if (entry == NULL || entry->struct_size < sizeof(*entry) || !entry->plugin_count)
    return fprintf(stderr, "%s: no plugin for version %d\n", argv[1], SH_ABI_MAJOR), 1;

  static float latents[COUNT];
  fill_with_noise(latents);
  sh_host host = {sizeof(host), 0, NULL, string("c-host"), string("1.0"), host_log, host_cancelled, host_extension};
  sh_error error = {sizeof(error), SH_OK, {0}};
  const sh_plugin *plugin = NULL;
  sh_status status = entry->create(entry->descriptor(0)->id, &host, string(argv[2]), &plugin, &error);
  if (status == SH_OK) status = sample(plugin, latents, &error);
  if (status != SH_OK) fprintf(stderr, "status %d: %s\n", status, error.message);
  if (plugin != NULL) plugin->destroy(plugin); /* legal in every state, after a failure too */
  return status == SH_OK ? 0 : 1;
}
