/* A host that does everything wrong, and lives on: bad input to a real plugin through the C door.
 *
 *     refusals LIBRARY CONFIGURATION BROKEN_CONFIGURATION
 *
 * Both configurations are JSON with an adapter; the second one names a base model that is not there. What no plugin can
 * notice is not tried: calls after destroy, pointers to freed memory, a struct_size larger than the memory behind it.
 * The sanitizers watch this program and every allocation; the plugin library itself is not instrumented.
 */
#include <math.h>
#include <pthread.h>

#include "common.h"

#define STEPS 3
#define COUNT (4 * 16 * 16)

static const sh_entry *entry;
static sh_error error = {sizeof(error), SH_OK, {0}};
static float *latents; /* on the heap, exactly as large as the view says */
static int64_t shape[4] = {1, 4, 16, 16};

/* ---- The host ---------------------------------------------------------------------------------------------------- */

/* What happens while the plugin asks `cancelled`. */
struct during {
  const sh_plugin *plugin; /* NULL: nothing */
  int32_t cancel, asked;
};

/* Another thread, in the middle of a step: calls are refused, but what is tagged [any] answers. */
static void *other_thread(void *argument) {
  const sh_plugin *plugin = argument;
  sh_error busy = {sizeof(busy), SH_OK, {0}};
  expect(plugin->end(plugin, &busy) == SH_BUSY && busy.code == SH_BUSY, "end during a step");
  printf("end during a step: status %d, %s\n", busy.code, busy.message);
  expect(plugin->begin(plugin, NULL, &busy) == SH_BUSY, "begin during a step");
  expect(plugin->step(plugin, NULL, NULL, NULL, NULL, NULL) == SH_BUSY, "step during a step, with no error to fill");
  const sh_plugin_params *params = plugin->extension(plugin, string(SH_PLUGIN_PARAMS));
  double value = -1;
  expect(params != NULL && params->count(plugin) > 0, "params/1 during a step");
  expect(params->get(plugin, 0, &value, &busy) == SH_OK, "a parameter is read during a step");
  return NULL;
}

static int32_t host_cancelled(const sh_host *host) {
  struct during *during = host->instance;
  if (during->plugin != NULL && during->asked++ == 0) {
    pthread_t thread;
    expect(pthread_create(&thread, NULL, other_thread, (void *)during->plugin) == 0, "a thread");
    expect(pthread_join(thread, NULL) == 0, "its end");
    expect(during->plugin->end(during->plugin, NULL) == SH_BUSY, "end within a step, on its own thread");
  }
  return during->cancel;
}

static const void *no_extension(const sh_host *host, sh_string id) {
  (void)host;
  (void)id;
  return NULL;
}

static struct during during;
static const sh_host host = {sizeof(host), 0,        &during,        {"hostile", 7},
                             {"1", 1},     host_log, host_cancelled, no_extension};

/* ---- Refusals ---------------------------------------------------------------------------------------------------- */

/* A call that must fail so, and say why. */
static void refused(sh_status status, sh_status expected, const char *part, const char *call) {
  printf("%s: status %d, %s\n", call, status, error.message);
  expect(status == expected && error.code == expected, call);
  expect(strstr(error.message, part) != NULL, part);
  memset(error.message, 0, sizeof(error.message));
  error.code = SH_OK;
}

static void ok(sh_status status, const char *call) {
  if (status != SH_OK) fprintf(stderr, "%s: status %d, %s\n", call, status, error.message);
  expect(status == SH_OK, call);
}

#define REFUSED(call, status, part) refused(call, status, part, #call)
/* The same with one thing about a good struct changed. */
#define REFUSED_WITH(type, good, change, call, status, part) \
  do {                                                       \
    type bad = good;                                         \
    bad.change;                                              \
    refused(call, status, part, #type " with " #change);     \
  } while (0)

static const sh_plugin *create(const char *config) {
  const sh_plugin *plugin = NULL;
  ok(entry->create(string("dpt"), &host, string(config), &plugin, &error), "create");
  return plugin;
}

static void creating(const char *good, const char *broken) {
  static const sh_plugin untouched, *plugin = &untouched;
  sh_string dpt = string("dpt"), config = string(good);
  REFUSED(entry->create(string("other"), &host, config, &plugin, &error), SH_NOT_FOUND, "other");
  REFUSED(entry->create((sh_string){NULL, 3}, &host, config, &plugin, &error), SH_INVALID_ARGUMENT, "id is NULL");
  REFUSED(entry->create(dpt, NULL, config, &plugin, &error), SH_INVALID_ARGUMENT, "host is NULL");
  REFUSED(entry->create(dpt, &host, config, NULL, &error), SH_INVALID_ARGUMENT, "plugin is NULL");
  REFUSED(entry->create(dpt, &host, (sh_string){NULL, 0}, &plugin, &error), SH_INVALID_CONFIG, "empty");
  REFUSED(entry->create(dpt, &host, string("{\"adapter\""), &plugin, &error), SH_INVALID_CONFIG, "EOF");
  REFUSED(entry->create(dpt, &host, string("{\"adapter\": \"a\", \"etta\": 1}"), &plugin, &error), SH_INVALID_CONFIG,
          "etta");
  REFUSED(entry->create(dpt, &host, string("{\"adapter\": \"/nowhere/of.safetensors\"}"), &plugin, &error),
          SH_NOT_FOUND, "/nowhere/of.safetensors");
  REFUSED_WITH(sh_host, host, struct_size -= 8, entry->create(dpt, &bad, config, &plugin, &error), SH_INVALID_ARGUMENT,
               "struct_size");
  REFUSED_WITH(sh_host, host, cancelled = NULL, entry->create(dpt, &bad, config, &plugin, &error), SH_INVALID_ARGUMENT,
               "cancelled is NULL");
  expect(plugin == &untouched, "a failed create leaves the pointer");

  sh_device cpu = {SH_DEVICE_CPU, 0};
  sh_model model = {sizeof(model), SH_PREDICTION_EPSILON, string("sd1"), 4, 4, NULL, 0, string("")};
  plugin = create(broken);
  REFUSED(plugin->prepare(plugin, &model, cpu, &error), SH_NOT_FOUND, "/nowhere/model");
  REFUSED(plugin->begin(plugin, NULL, &error), SH_INVALID_STATE, "CREATED");
  plugin->destroy(plugin);
}

/* Leaves the plugin prepared. */
static void preparing(const sh_plugin *plugin) {
  sh_device cpu = {SH_DEVICE_CPU, 0}, cuda = {SH_DEVICE_CUDA, 0}, unknown = {77, 0};
  sh_model model = {sizeof(model), SH_PREDICTION_EPSILON, string("sd1"), 4, 4, NULL, 0, string("")};
  sh_needs needs = {sizeof(needs), 0, {NULL, 0}};
  REFUSED(plugin->needs(plugin, &needs, &error), SH_INVALID_STATE, "CREATED");
  REFUSED(plugin->end(plugin, &error), SH_INVALID_STATE, "CREATED");
  REFUSED(plugin->prepare(plugin, NULL, cpu, &error), SH_INVALID_ARGUMENT, "model is NULL");
  REFUSED(plugin->prepare(plugin, &model, cuda, &error), SH_UNSUPPORTED, "cuda:0");
  REFUSED(plugin->prepare(plugin, &model, unknown, &error), SH_UNSUPPORTED, "type 77");
  REFUSED_WITH(sh_model, model, struct_size = 8, plugin->prepare(plugin, &bad, cpu, &error), SH_INVALID_ARGUMENT,
               "struct_size 8");
  REFUSED_WITH(sh_model, model, prediction = SH_PREDICTION_FLOW, plugin->prepare(plugin, &bad, cpu, &error),
               SH_UNSUPPORTED, "flow");
  REFUSED_WITH(sh_model, model, unet_in_channels = 9, plugin->prepare(plugin, &bad, cpu, &error), SH_UNSUPPORTED,
               "9 channels");
  REFUSED_WITH(sh_model, model, alphas_cumprod_count = 5, plugin->prepare(plugin, &bad, cpu, &error),
               SH_INVALID_ARGUMENT, "NULL");
  ok(plugin->prepare(plugin, &model, cpu, &error), "prepare");
  REFUSED(plugin->needs(plugin, NULL, &error), SH_INVALID_ARGUMENT, "needs is NULL");
  REFUSED_WITH(sh_needs, needs, struct_size = 4, plugin->needs(plugin, &bad, &error), SH_INVALID_ARGUMENT,
               "struct_size 4");
  ok(plugin->needs(plugin, &needs, &error), "needs");
  expect(equals(needs.tap, "mid") && !(needs.flags & SH_NEEDS_GRADIENT), "what the plugin needs");
  expect(plugin->extension(plugin, string("sampler-hook.params/99")) == NULL, "an unknown extension");
  expect(plugin->extension(plugin, string("")) == NULL, "an extension without a name");
}

/* Leaves the plugin in a run. */
static void beginning(const sh_plugin *plugin) {
  sh_string prompt = string("a red circle"), not_there = {NULL, 4}, not_utf8 = {"\xff", 1};
  sh_text text = {sizeof(text), 0, NULL, NULL, NULL, &prompt};
  sh_run run = {sizeof(run), 1, STEPS, 0, 4, &text};
  REFUSED(plugin->step(plugin, NULL, NULL, NULL, NULL, &error), SH_INVALID_STATE, "PREPARED");
  REFUSED(plugin->begin(plugin, NULL, &error), SH_INVALID_ARGUMENT, "run is NULL");
  REFUSED_WITH(sh_run, run, struct_size = 8, plugin->begin(plugin, &bad, &error), SH_INVALID_ARGUMENT, "struct_size 8");
  REFUSED_WITH(sh_run, run, steps = 0, plugin->begin(plugin, &bad, &error), SH_INVALID_ARGUMENT, "at least one step");
  REFUSED_WITH(sh_run, run, text = NULL, plugin->begin(plugin, &bad, &error), SH_INVALID_ARGUMENT, "context");

  float numbers[2 * 3] = {0};
  int64_t two_dims[2] = {1, 3}, two_items[3] = {2, 1, 3};
  sh_view flat = view_of(numbers, 2, two_dims, 0), wide = view_of(numbers, 3, two_items, 0);
#define REFUSED_TEXT(change, status, part) \
  REFUSED_WITH(sh_text, text, change, (run.text = &bad, plugin->begin(plugin, &run, &error)), status, part)
  REFUSED_TEXT(struct_size = 8, SH_INVALID_ARGUMENT, "struct_size 8");
  REFUSED_TEXT(prompts = &not_there, SH_INVALID_ARGUMENT, "NULL");
  REFUSED_TEXT(prompts = &not_utf8, SH_INVALID_ARGUMENT, "UTF-8");
  REFUSED_TEXT(context = &flat, SH_SHAPE_MISMATCH, "[1, 3]");
  REFUSED_TEXT(context = &wide, SH_SHAPE_MISMATCH, "[2, 1, 3]");
  run.text = &text;
  ok(plugin->begin(plugin, &run, &error), "begin");
  REFUSED(plugin->begin(plugin, &run, &error), SH_INVALID_STATE, "RUNNING");
  sh_device cpu = {SH_DEVICE_CPU, 0};
  REFUSED(plugin->prepare(plugin, NULL, cpu, &error), SH_INVALID_STATE, "RUNNING");
}

/* No refused step has changed a bit of the latents. */
static void stepping(const sh_plugin *plugin) {
  float before[COUNT], *away = calloc(COUNT, sizeof(float));
  expect(away != NULL, "memory");
  memcpy(before, latents, sizeof(before));
  sh_view good = view_of(latents, 4, shape, 0);
  sh_item_report items[1];
  sh_report report = {sizeof(report), sizeof(items[0]), items, 1, -1, 77, 0};
  sh_step step = {sizeof(step), 0, STEPS, 0, 900, 0.014, SH_SPACE_VP, 0, NULL};
#define REFUSED_STEP(change, part) \
  REFUSED_WITH(sh_step, step, change, plugin->step(plugin, &bad, &good, &good, &report, &error), SH_INVALID_ARGUMENT, \
               part)
  REFUSED_STEP(struct_size = 8, "struct_size 8");
  REFUSED_STEP(index = STEPS, "step 3 of 3");
  REFUSED_STEP(count = 7, "count 7");
  REFUSED_STEP(alpha_bar = 1.5, "alpha_bar 1.5");
  REFUSED_STEP(timestep = NAN, "timestep is NaN");
  REFUSED_STEP(space = 0, "unknown space 0");
  REFUSED_STEP(flags = 0x80, "unknown flags 0x80");
  REFUSED(plugin->step(plugin, NULL, &good, &good, &report, &error), SH_INVALID_ARGUMENT, "step is NULL");
  REFUSED(plugin->step(plugin, &step, NULL, &good, &report, &error), SH_INVALID_ARGUMENT, "latents is NULL");
  REFUSED(plugin->step(plugin, &step, &good, NULL, &report, &error), SH_INVALID_ARGUMENT, "out is NULL");
  REFUSED_WITH(sh_report, report, struct_size = 8, plugin->step(plugin, &step, &good, &good, &bad, &error),
               SH_INVALID_ARGUMENT, "struct_size 8");
  REFUSED_WITH(sh_report, report, item_size = 2, plugin->step(plugin, &step, &good, &good, &bad, &error),
               SH_INVALID_ARGUMENT, "item_size 2");

  int64_t two_items[4] = {2, 4, 8, 16}, channels[4] = {1, 2, 16, 32}, negative[4] = {1, 4, -16, 16};
  int64_t huge[4] = {1, 4, INT64_MAX, INT64_MAX}, odd[4] = {1, 4, 16, 8};
#define REFUSED_VIEW(change, status, part) \
  REFUSED_WITH(sh_view, good, change, plugin->step(plugin, &step, &bad, &bad, &report, &error), status, part)
  REFUSED_VIEW(struct_size = 8, SH_INVALID_ARGUMENT, "struct_size 8");
  REFUSED_VIEW(flags = 0x80, SH_INVALID_ARGUMENT, "unknown flags 0x80");
  REFUSED_VIEW(flags = SH_VIEW_READ_ONLY, SH_INVALID_ARGUMENT, "read-only");
  REFUSED_VIEW(tensor.data = NULL, SH_INVALID_ARGUMENT, "data is NULL");
  REFUSED_VIEW(tensor.shape = NULL, SH_INVALID_ARGUMENT, "shape is NULL");
  REFUSED_VIEW(tensor.device.device_type = SH_DEVICE_CUDA, SH_UNSUPPORTED, "cuda:0");
  REFUSED_VIEW(tensor.device.device_type = 77, SH_UNSUPPORTED, "type 77");
  REFUSED_VIEW(tensor.dtype.bits = 64, SH_DTYPE_MISMATCH, "64 bits");
  REFUSED_VIEW(tensor.dtype.code = 0, SH_DTYPE_MISMATCH, "code 0");
  REFUSED_VIEW(tensor.dtype.lanes = 2, SH_DTYPE_MISMATCH, "2 lanes");
  REFUSED_VIEW(tensor.ndim = 3, SH_SHAPE_MISMATCH, "[1, 4, 16]");
  REFUSED_VIEW(tensor.ndim = -1, SH_INVALID_ARGUMENT, "ndim -1");
  REFUSED_VIEW(tensor.shape = two_items, SH_SHAPE_MISMATCH, "[2, 4, 8, 16]");
  REFUSED_VIEW(tensor.shape = channels, SH_SHAPE_MISMATCH, "[1, 2, 16, 32]");
  REFUSED_VIEW(tensor.shape = negative, SH_INVALID_ARGUMENT, "negative");
  REFUSED_VIEW(tensor.shape = huge, SH_INVALID_ARGUMENT, "too large");
  REFUSED_VIEW(tensor.byte_offset = 2, SH_INVALID_ARGUMENT, "aligned");
  sh_view out = view_of(away, 4, odd, 0);
  REFUSED(plugin->step(plugin, &step, &good, &out, &report, &error), SH_SHAPE_MISMATCH, "[1, 4, 16, 8]");
  out.tensor.shape = shape;
  out.tensor.dtype.bits = 16;
  REFUSED(plugin->step(plugin, &step, &good, &out, &report, &error), SH_DTYPE_MISMATCH, "F16");

  latents[7] = NAN;
  REFUSED(plugin->step(plugin, &step, &good, &good, &report, &error), SH_NON_FINITE, "NaN");
  latents[7] = before[7];
  during = (struct during){plugin, 1, 0};
  REFUSED(plugin->step(plugin, &step, &good, &good, &report, &error), SH_CANCELLED, "cancelled");
  expect(during.asked > 0, "the plugin asked whether to go on");
  during = (struct during){NULL, 0, 0};
  expect(memcmp(before, latents, sizeof(before)) == 0, "refused steps leave the latents");
  expect(report.outcome == 77 && report.seconds == -1, "refused steps leave the report");
  for (int i = 0; i < COUNT; i++) expect(away[i] == 0, "refused steps leave the target");
  free(away);

  const sh_plugin_params *params = plugin->extension(plugin, string(SH_PLUGIN_PARAMS));
  double value;
  REFUSED(params->get(plugin, 1000, &value, &error), SH_INVALID_ARGUMENT, "1000");
  REFUSED(params->get(plugin, 0, NULL, &error), SH_INVALID_ARGUMENT, "NULL");
  REFUSED(params->set(plugin, 0, NAN, &error), SH_INVALID_ARGUMENT, "NaN");
}

/* A whole step that nothing is wrong with, on the latents as they are. */
static void correct(const sh_plugin *plugin, float *score) {
  sh_view view = view_of(latents, 4, shape, 0);
  sh_step step = {sizeof(step), 0, STEPS, 0, 900, 0.014, SH_SPACE_VP, 0, NULL};
  sh_item_report items[1];
  sh_report report = {sizeof(report), sizeof(items[0]), items, 1, 0, 0, 0};
  ok(plugin->step(plugin, &step, &view, &view, &report, &error), "step");
  expect(report.outcome == SH_CORRECTED && items[0].status == SH_OK && items[0].correction_norm > 0, "a correction");
  *score = items[0].score;
}

int main(int argc, char **argv) {
  expect(argc == 4, "refusals LIBRARY CONFIGURATION BROKEN_CONFIGURATION");
  sh_entry_fn entry_of = open_library(argv[1]);
  expect(entry_of(SH_ABI_MAJOR + 1) == NULL, "an unknown major version gives NULL");
  entry = entry_of(SH_ABI_MAJOR);
  expect(entry != NULL && entry->struct_size >= sizeof(*entry), "entry");
  expect(entry->plugin_count > 0 && entry->descriptor(entry->plugin_count) == NULL, "no descriptor beyond the last");

  latents = malloc(COUNT * sizeof(float));
  expect(latents != NULL, "memory");
  for (int i = 0; i < COUNT; i++) latents[i] = sinf((float)i * 12.9898f);
  float start[COUNT], scores[2];
  memcpy(start, latents, sizeof(start));

  creating(argv[2], argv[3]);
  const sh_plugin *plugin = create(argv[2]);
  preparing(plugin);
  beginning(plugin);
  stepping(plugin);
  correct(plugin, &scores[0]);
  /* A second instance, by a host that has seen all that: the same numbers. */
  const sh_plugin *second = create(argv[2]);
  preparing(second);
  beginning(second);
  memcpy(latents, start, sizeof(start));
  correct(second, &scores[1]);
  expect(memcmp(&scores[0], &scores[1], sizeof(scores[0])) == 0, "the same score");
  ok(second->end(second, &error), "end");
  REFUSED(second->end(second, &error), SH_INVALID_STATE, "PREPARED");
  second->destroy(second);
  plugin->destroy(plugin); /* in its run */
  free(latents);
  printf("done\n");
  return 0;
}
