/* A host in C that lends its weights (weights/1), shows progress (progress/1), and calls the two halves of a step (split/1).
 *
 *     lending_host LIBRARY FOLDER
 *
 * FOLDER holds what the test wrote: weights.json and split.json (configurations), unet.json (the U-Net's config.json), tensors.txt
 * (a line "NAME NDIM EXTENT.." each) with their numbers one after the other in tensors.f32, and pooled, context, latents, features
 * and gradient as raw f32 with their shapes in shapes.txt. Writes stepped.f32, cotangent.f32 and applied.f32.
 */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sampler_hook.h"

#define MOST_DIMS 4
#define MOST_TENSORS 4096

static void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

static char folder[1024];

static FILE *open_file(const char *name, const char *mode) {
  char path[2048];
  snprintf(path, sizeof(path), "%s/%s", folder, name);
  FILE *file = fopen(path, mode);
  expect(file != NULL, path);
  return file;
}

/* All of a file, with a NUL behind it. */
static char *read_file(const char *name, size_t *size) {
  FILE *file = open_file(name, "rb");
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *content = calloc(1, *size + 1);
  expect(content != NULL && fread(content, 1, *size, file) == *size, name);
  fclose(file);
  return content;
}

static void write_floats(const char *name, const float *values, size_t count) {
  FILE *file = open_file(name, "wb");
  expect(fwrite(values, sizeof(float), count, file) == count, name);
  fclose(file);
}

struct tensor {
  char name[256];
  int64_t shape[MOST_DIMS];
  int ndim;
  float *values;
};

struct lender {
  struct tensor tensors[MOST_TENSORS];
  uint64_t count;
  uint64_t reads, progresses, last_done, last_total;
};

static sh_view view_of(const struct tensor *tensor, uint32_t flags) {
  sh_view view = {.struct_size = sizeof(view), .flags = flags};
  view.tensor.data = tensor->values;
  view.tensor.device.device_type = SH_DEVICE_CPU;
  view.tensor.ndim = tensor->ndim;
  view.tensor.dtype = (DLDataType){2, 32, 1};
  view.tensor.shape = (int64_t *)tensor->shape;
  return view;
}

/* ---- The host's table and its extensions -------------------------------------------------------------------------------- */

static struct lender *lender_of(const sh_host *host) { return host->instance; }

static void host_log(const sh_host *host, int32_t level, sh_string message) {
  (void)host;
  printf("log %d: %.*s\n", level, (int)message.size, message.data ? message.data : "");
}

static int32_t host_cancelled(const sh_host *host) {
  (void)host;
  return 0;
}

static uint64_t weights_revision(const sh_host *host) {
  (void)host;
  return 1;
}

static uint64_t weights_count(const sh_host *host) { return lender_of(host)->count; }

static sh_status no_tensor(uint64_t index, sh_error *error) {
  error->code = SH_INVALID_ARGUMENT;
  snprintf(error->message, sizeof(error->message), "no tensor %llu", (unsigned long long)index);
  return SH_INVALID_ARGUMENT;
}

static sh_status weights_name(const sh_host *host, uint64_t index, sh_string *name, sh_error *error) {
  struct lender *lender = lender_of(host);
  if (index >= lender->count) return no_tensor(index, error);
  *name = (sh_string){lender->tensors[index].name, strlen(lender->tensors[index].name)};
  return SH_OK;
}

static sh_status weights_tensor(const sh_host *host, uint64_t index, sh_view *tensor, uint64_t *revision, sh_error *error) {
  struct lender *lender = lender_of(host);
  if (index >= lender->count) return no_tensor(index, error);
  *revision = 1;
  if (tensor != NULL) {
    *tensor = view_of(&lender->tensors[index], SH_VIEW_READ_ONLY);
    lender->reads++;
  }
  return SH_OK;
}

static void show_progress(const sh_host *host, sh_string task, uint64_t done, uint64_t total) {
  struct lender *lender = lender_of(host);
  expect(task.size > 0 && done <= total, "progress within its total");
  lender->progresses++;
  lender->last_done = done;
  lender->last_total = total;
}

static const void *host_extension(const sh_host *host, sh_string id) {
  static const sh_host_weights weights = {sizeof(weights), 0, weights_revision, weights_count, weights_name, weights_tensor};
  static const sh_host_progress progress = {sizeof(progress), 0, show_progress};
  (void)host;
  if (id.size == strlen(SH_HOST_WEIGHTS) && memcmp(id.data, SH_HOST_WEIGHTS, id.size) == 0) return &weights;
  if (id.size == strlen(SH_HOST_PROGRESS) && memcmp(id.data, SH_HOST_PROGRESS, id.size) == 0) return &progress;
  return NULL;
}

/* ---- What the test wrote ------------------------------------------------------------------------------------------------- */

/* Takes lines "NAME NDIM EXTENT.."; numbers come from `values` one tensor after the other. */
static uint64_t read_tensors(const char *list, char *values, struct tensor *tensors) {
  size_t size;
  char *text = read_file(list, &size);
  uint64_t count = 0;
  for (char *line = strtok(text, "\n"); line != NULL; line = strtok(NULL, "\n")) {
    struct tensor *tensor = &tensors[count++];
    int used = 0, more = 0;
    expect(count <= MOST_TENSORS && sscanf(line, "%255s %d%n", tensor->name, &tensor->ndim, &used) == 2, "a tensor's line");
    expect(tensor->ndim >= 0 && tensor->ndim <= MOST_DIMS, "ndim");
    size_t elements = 1;
    for (int axis = 0; axis < tensor->ndim; axis++, used += more) {
      long long extent = 0;
      expect(sscanf(line + used, "%lld%n", &extent, &more) == 1, "an extent");
      tensor->shape[axis] = extent;
      elements *= (size_t)extent;
    }
    tensor->values = (float *)values;
    values += elements * sizeof(float);
  }
  free(text);
  return count;
}

static const struct tensor *find(const struct tensor *tensors, uint64_t count, const char *name) {
  for (uint64_t i = 0; i < count; i++)
    if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
  expect(0, name);
  return NULL;
}

static size_t elements(const struct tensor *tensor) {
  size_t count = 1;
  for (int axis = 0; axis < tensor->ndim; axis++) count *= (size_t)tensor->shape[axis];
  return count;
}

/* ---- The run ------------------------------------------------------------------------------------------------------------- */

static sh_error error = {.struct_size = sizeof(error)};

static void ok(sh_status status, const char *call) {
  if (status == SH_OK) return;
  fprintf(stderr, "%s: status %d, %s\n", call, status, error.message);
  exit(1);
}

static const sh_plugin *begin(const sh_entry *entry, const sh_host *host, const char *config, const struct tensor *tensors,
                              uint64_t count) {
  size_t size;
  char *text = read_file(config, &size), *unet = read_file("unet.json", &(size_t){0});
  const sh_plugin *plugin = NULL;
  ok(entry->create(entry->descriptor(0)->id, host, (sh_string){text, size}, &plugin, &error), "create");
  const double alphas[3] = {0.999, 0.5, 0.005};
  sh_model model = {.struct_size = sizeof(model), .prediction = SH_PREDICTION_EPSILON, .family = {"sd1", 3},
                    .unet_in_channels = 4, .latent_channels = 4, .alphas_cumprod = alphas, .alphas_cumprod_count = 3,
                    .unet_config = {unet, strlen(unet)}};
  ok(plugin->prepare(plugin, &model, (DLDevice){SH_DEVICE_CPU, 0}, &error), "prepare");
  sh_view context = view_of(find(tensors, count, "context"), SH_VIEW_READ_ONLY);
  sh_view pooled = view_of(find(tensors, count, "pooled"), SH_VIEW_READ_ONLY);
  sh_text given = {.struct_size = sizeof(given), .context = &context, .pooled = &pooled};
  sh_run run = {.struct_size = sizeof(run), .batch = 2, .steps = 4, .guidance_scale = 5, .text = &given};
  ok(plugin->begin(plugin, &run, &error), "begin");
  free(text);
  free(unet);
  return plugin;
}

int main(int argc, char **argv) {
  expect(argc == 3, "usage: lending_host LIBRARY FOLDER");
  snprintf(folder, sizeof(folder), "%s", argv[2]);
  void *library = dlopen(argv[1], RTLD_NOW);
  expect(library != NULL, "dlopen");
  sh_entry_fn entry_of;
  *(void **)&entry_of = dlsym(library, SH_ENTRY_SYMBOL);
  expect(entry_of != NULL, "dlsym");
  const sh_entry *entry = entry_of(SH_ABI_MAJOR);
  expect(entry != NULL, "entry");

  static struct lender lender;
  static struct tensor inputs[16];
  size_t size;
  lender.count = read_tensors("tensors.txt", read_file("tensors.f32", &size), lender.tensors);
  uint64_t count = read_tensors("shapes.txt", read_file("shapes.f32", &size), inputs);
  sh_host host = {sizeof(host), 0, &lender, {"lending host", 12}, {"1", 1}, host_log, host_cancelled, host_extension};
  sh_step step = {.struct_size = sizeof(step), .index = 0, .count = 4, .timestep = 800, .alpha_bar = 0.04, .space = SH_SPACE_VP};
  sh_item_report items[2];
  sh_report report = {.struct_size = sizeof(report), .item_size = sizeof(items[0]), .items = items, .item_count = 2};

  /* A whole step on the lent weights. */
  const sh_plugin *plugin = begin(entry, &host, "weights.json", inputs, count);
  sh_needs needs = {.struct_size = sizeof(needs)};
  ok(plugin->needs(plugin, &needs, &error), "needs");
  expect(needs.flags & SH_NEEDS_WEIGHTS, "the plugin needs weights");
  const struct tensor *latents = find(inputs, count, "latents");
  struct tensor out = *latents;
  out.values = calloc(elements(latents), sizeof(float));
  sh_view from = view_of(latents, SH_VIEW_READ_ONLY), to = view_of(&out, 0);
  ok(plugin->step(plugin, &step, &from, &to, &report, &error), "step");
  expect(report.outcome == SH_CORRECTED && items[0].status == SH_OK && items[1].status == SH_OK, "both items are corrected");
  write_floats("stepped.f32", out.values, elements(&out));
  printf("reads %llu of %llu, progress %llu of %llu\n", (unsigned long long)lender.reads, (unsigned long long)lender.count,
         (unsigned long long)lender.last_done, (unsigned long long)lender.last_total);
  expect(lender.progresses >= lender.reads, "progress was shown");
  plugin->destroy(plugin);

  /* The two halves, on features and a gradient that another program computed. */
  plugin = begin(entry, &host, "split.json", inputs, count);
  const sh_plugin_split *split = plugin->extension(plugin, (sh_string){SH_PLUGIN_SPLIT, strlen(SH_PLUGIN_SPLIT)});
  expect(split != NULL && split->struct_size >= sizeof(*split), "split/1");
  ok(split->score(plugin, &step, NULL, NULL, &report, &error), "score without features");
  expect(report.outcome == SH_CORRECTED, "the step will be corrected");
  const struct tensor *features = find(inputs, count, "features");
  struct tensor cotangent = *features;
  cotangent.values = calloc(elements(features), sizeof(float));
  sh_view activation = view_of(features, SH_VIEW_READ_ONLY), slope = view_of(&cotangent, 0);
  ok(split->score(plugin, &step, &activation, &slope, &report, &error), "score");
  write_floats("cotangent.f32", cotangent.values, elements(&cotangent));
  printf("scores %.6f %.6f\n", items[0].score, items[1].score);
  sh_view gradient = view_of(find(inputs, count, "gradient"), SH_VIEW_READ_ONLY);
  ok(split->apply(plugin, &step, &from, &gradient, &to, &report, &error), "apply");
  write_floats("applied.f32", out.values, elements(&out));
  /* A step is not what this configuration is for; nothing is written. */
  memset(out.values, 0, elements(&out) * sizeof(float));
  expect(plugin->step(plugin, &step, &from, &to, &report, &error) == SH_UNSUPPORTED, "step is refused");
  expect(strstr(error.message, "split/1") != NULL && out.values[0] == 0, "and says why");
  plugin->destroy(plugin);
  printf("done\n");
  return 0;
}
