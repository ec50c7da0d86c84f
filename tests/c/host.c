/* A host in C: loads any plugin library, runs it on noise and random text, and writes the final latents as raw f32.
 *
 *     host LIBRARY CONFIG OUTPUT FAMILY UNET_IN_CHANNELS B C H W S D STEPS [UNET_CONFIG]
 *
 * CONFIG and UNET_CONFIG are JSON files, or - for none. Prints one line per event; exits 0 when all went as the header says.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sampler_hook.h"

#define TIMESTEPS 1000

static void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

static sh_string string(const char *text) {
  sh_string result = {text, strlen(text)};
  return result;
}

static char *read_file(const char *path) {
  if (strcmp(path, "-") == 0) return calloc(1, 1);
  FILE *file = fopen(path, "rb");
  expect(file != NULL, path);
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *text = calloc(1, (size_t)size + 1);
  expect(text != NULL && fread(text, 1, (size_t)size, file) == (size_t)size, path);
  fclose(file);
  return text;
}

/* The host's table. */
static void host_log(const sh_host *host, int32_t level, sh_string message) {
  (void)host;
  printf("log %d: %.*s\n", level, (int)message.size, message.data ? message.data : "");
}

static int32_t host_cancelled(const sh_host *host) { return *(const int32_t *)host->instance; }

static const void *host_extension(const sh_host *host, sh_string id) {
  (void)host;
  (void)id;
  return NULL;
}

/* Deterministic numbers, roughly normal: the sum of twelve uniform ones. */
static float normal(uint64_t *state) {
  double sum = -6;
  for (int i = 0; i < 12; i++) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    sum += (double)(*state >> 11) / 9007199254740992.0;
  }
  return (float)sum;
}

static float *noise(size_t count, uint64_t seed) {
  float *numbers = malloc((count ? count : 1) * sizeof(float));
  expect(numbers != NULL, "memory");
  for (size_t i = 0; i < count; i++) numbers[i] = normal(&seed);
  return numbers;
}

static sh_view view(float *data, int ndim, int64_t *shape) {
  sh_view result = {0};
  result.struct_size = sizeof(result);
  result.tensor.data = data;
  result.tensor.device.device_type = SH_DEVICE_CPU;
  result.tensor.ndim = ndim;
  result.tensor.dtype.code = 2;
  result.tensor.dtype.bits = 32;
  result.tensor.dtype.lanes = 1;
  result.tensor.shape = shape;
  return result;
}

static sh_error no_error(void) {
  sh_error error = {0};
  error.struct_size = sizeof(error);
  return error;
}

/* A call that has to succeed. */
static void succeed(sh_status status, const sh_error *error, const char *call) {
  if (status == SH_OK) return;
  fprintf(stderr, "%s: status %d, %s\n", call, status, error->message);
  exit(1);
}

/* A call that has to fail with that status. */
static void refuse(sh_status status, const sh_error *error, sh_status expected, const char *call) {
  printf("%s: status %d, %s\n", call, status, error->message);
  expect(status == expected && error->code == expected && error->message[0] != 0, call);
}

int main(int argc, char **argv) {
  if (argc < 13) {
    fprintf(stderr, "host LIBRARY CONFIG OUTPUT FAMILY UNET_IN_CHANNELS B C H W S D STEPS [UNET_CONFIG]\n");
    return 2;
  }
  int64_t latent_shape[4], context_shape[3], pooled_shape[2];
  for (int i = 0; i < 4; i++) latent_shape[i] = atoll(argv[6 + i]);
  context_shape[0] = pooled_shape[0] = latent_shape[0];
  context_shape[1] = atoll(argv[10]);
  context_shape[2] = pooled_shape[1] = atoll(argv[11]);
  uint32_t steps = (uint32_t)atoi(argv[12]), batch = (uint32_t)latent_shape[0];
  size_t count = (size_t)(latent_shape[0] * latent_shape[1] * latent_shape[2] * latent_shape[3]);
  char *config = read_file(argv[2]), *unet_config = read_file(argc > 13 ? argv[13] : "-");

  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) fprintf(stderr, "%s\n", dlerror());
  expect(library != NULL, "dlopen");
  sh_entry_fn entry_of = NULL;
  *(void **)&entry_of = dlsym(library, SH_ENTRY_SYMBOL);
  expect(entry_of != NULL, "dlsym");
  expect(entry_of(SH_ABI_MAJOR + 1) == NULL, "an unknown major version gives NULL");
  const sh_entry *entry = entry_of(SH_ABI_MAJOR);
  expect(entry != NULL && entry->struct_size >= sizeof(sh_entry), "entry");
  expect(entry->abi_major == SH_ABI_MAJOR && entry->abi_minor == SH_ABI_MINOR, "version");
  expect(entry->plugin_count > 0 && entry->descriptor(entry->plugin_count) == NULL, "descriptors");
  const sh_descriptor *descriptor = entry->descriptor(0);
  printf("plugin: %.*s %.*s\n", (int)descriptor->id.size, descriptor->id.data, (int)descriptor->version.size,
         descriptor->version.data);

  int32_t cancel = 0;
  sh_host host = {sizeof(host), 0,           &cancel,        string("c-host"), string("1.0"),
                  host_log,     host_cancelled, host_extension};
  sh_error error = no_error();
  const sh_plugin *plugin = NULL;
  sh_status status = entry->create(descriptor->id, &host, string("{\"no such key\": 1}"), &plugin, &error);
  refuse(status, &error, SH_INVALID_CONFIG, "create with a broken configuration");
  expect(plugin == NULL, "a failed create leaves the pointer");
  succeed(entry->create(descriptor->id, &host, string(config), &plugin, &error), &error, "create");

  double alphas_cumprod[TIMESTEPS], product = 1;
  for (int t = 0; t < TIMESTEPS; t++) { /* scaled linear betas */
    double root = sqrt(0.00085) + (sqrt(0.012) - sqrt(0.00085)) * t / (TIMESTEPS - 1);
    product *= 1 - root * root;
    alphas_cumprod[t] = product;
  }
  sh_model model = {sizeof(model), SH_PREDICTION_EPSILON, string(argv[4]), (uint32_t)atoi(argv[5]),
                    (uint32_t)latent_shape[1], alphas_cumprod, TIMESTEPS, string(unet_config)};
  DLDevice cpu = {SH_DEVICE_CPU, 0};
  refuse(plugin->end(plugin, &error), &error, SH_INVALID_STATE, "end before prepare");
  succeed(plugin->prepare(plugin, &model, cpu, &error), &error, "prepare");
  sh_needs needs = {sizeof(needs), 0, {NULL, 0}};
  succeed(plugin->needs(plugin, &needs, &error), &error, "needs");
  printf("needs: flags %u, tap %.*s\n", needs.flags, (int)needs.tap.size, needs.tap.data ? needs.tap.data : "");
  expect(!(needs.flags & SH_NEEDS_GRADIENT), "this host lends no gradient");

  float *latents = noise(count, 1), *out = noise(count, 2);
  float *context = noise((size_t)(context_shape[0] * context_shape[1] * context_shape[2]), 3);
  float *pooled = noise((size_t)(pooled_shape[0] * pooled_shape[1]), 4);
  sh_view context_view = view(context, 3, context_shape), pooled_view = view(pooled, 2, pooled_shape);
  sh_view latents_view = view(latents, 4, latent_shape), out_view = view(out, 4, latent_shape);
  sh_text text = {sizeof(text), 0, &context_view, &pooled_view, NULL, NULL};
  sh_run run = {sizeof(run), batch, steps, 0, 7.5, &text};
  succeed(plugin->begin(plugin, &run, &error), &error, "begin");
  refuse(plugin->begin(plugin, &run, &error), &error, SH_INVALID_STATE, "begin in a run");

  sh_item_report *items = calloc(batch ? batch : 1, sizeof(*items));
  expect(items != NULL, "memory");
  for (uint32_t i = 0; i < steps; i++) {
    int timestep = (int)((TIMESTEPS - 1) - (int64_t)(TIMESTEPS - 1) * i / steps);
    sh_step step = {sizeof(step), i, steps, 0, timestep, alphas_cumprod[timestep], SH_SPACE_VP, 0, NULL};
    sh_report report = {sizeof(report), sizeof(*items), items, batch, 0, 0, 0};
    /* A cancelled step leaves everything as it was; then out of place and in place by turns. */
    float before = count ? out[0] : 0;
    cancel = 1;
    status = plugin->step(plugin, &step, &latents_view, &out_view, &report, &error);
    cancel = 0;
    expect(batch == 0 || status == SH_CANCELLED, "a cancelled step fails");
    expect(count == 0 || memcmp(&before, &out[0], sizeof(float)) == 0, "a cancelled step writes nothing");
    const sh_view *target = i % 2 ? &latents_view : &out_view;
    succeed(plugin->step(plugin, &step, &latents_view, target, &report, &error), &error, "step");
    if (target == &out_view) memcpy(latents, out, count * sizeof(float));
    printf("step %u: timestep %d, outcome %d, %.3f s\n", i, timestep, report.outcome, report.seconds);
    for (uint32_t b = 0; b < batch; b++)
      printf("  item %u: status %d, score %g, gradient %g, correction %g\n", b, items[b].status, items[b].score,
             items[b].gradient_norm, items[b].correction_norm);
  }
  succeed(plugin->end(plugin, &error), &error, "end");
  printf("memory: %llu bytes\n", (unsigned long long)plugin->memory(plugin));
  plugin->destroy(plugin);

  FILE *file = fopen(argv[3], "wb");
  expect(file != NULL && fwrite(latents, sizeof(float), count, file) == count && fclose(file) == 0, argv[3]);
  free(items);
  free(pooled);
  free(context);
  free(out);
  free(latents);
  free(unet_config);
  free(config);
  return 0;
}
