/* A complete plugin in C, written from the header alone: multiplies the latents by the live parameter `strength`. */
#include <math.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sampler_hook.h"

#define STRING(literal) {(literal), sizeof(literal) - 1}

enum state { CREATED, PREPARED, RUNNING };

struct tiny {
  sh_plugin table;
  const sh_host *host;
  atomic_flag busy;
  enum state state;
  uint32_t batch, steps, channels;
  _Atomic double strength;
};

/* ---- Errors and strings ------------------------------------------------------------------------------------------- */

static sh_status fail(sh_error *error, sh_status code, const char *format, ...) {
  if (error != NULL && error->struct_size >= sizeof(sh_error)) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof(error->message), format, arguments);
    va_end(arguments);
    error->code = code;
  }
  return code;
}

static int equals(sh_string string, const char *text) {
  return string.size == strlen(text) && (string.size == 0 || memcmp(string.data, text, string.size) == 0);
}

/* ---- Views: any strides, f32, f16 and bf16 ------------------------------------------------------------------------- */

static float half_to_float(uint16_t h) {
  int exponent = (h >> 10) & 31, mantissa = h & 1023;
  double value = exponent == 31  ? (mantissa ? (double)NAN : (double)INFINITY)
                 : exponent == 0 ? ldexp(mantissa, -24)
                                 : ldexp(1024 + mantissa, exponent - 25);
  return (float)(h >> 15 ? -value : value);
}

static uint16_t float_to_half(float value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  double size = fabs((double)value);
  int exponent;
  if (isnan(value)) return 0x7e00;
  if (size >= 65520) return (uint16_t)(sign | 0x7c00);
  frexp(size, &exponent);
  if (size == 0 || exponent < -13) exponent = -13; /* zero and subnormals: the smallest normal's spacing */
  /* nearbyint rounds to even; a carry out of the mantissa lands in the exponent, where it belongs. */
  uint32_t steps = (uint32_t)nearbyint(ldexp(size, 11 - exponent));
  return (uint16_t)(sign | (steps + ((uint32_t)(exponent + 13) << 10)));
}

static float load(const sh_tensor *tensor, const char *element) {
  uint32_t bits = 0;
  float value;
  if (tensor->dtype.bits == 32) {
    memcpy(&value, element, 4);
    return value;
  }
  uint16_t narrow;
  memcpy(&narrow, element, 2);
  if (tensor->dtype.code == 2) return half_to_float(narrow);
  bits = (uint32_t)narrow << 16;
  memcpy(&value, &bits, 4);
  return value;
}

static void store(const sh_tensor *tensor, char *element, float value) {
  uint32_t bits;
  if (tensor->dtype.bits == 32) {
    memcpy(element, &value, 4);
    return;
  }
  memcpy(&bits, &value, 4);
  uint16_t narrow =
      tensor->dtype.code == 2 ? float_to_half(value) : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  memcpy(element, &narrow, 2);
}

/* The address of element (b, i), i counting row-major within item b. */
static char *at(const sh_tensor *tensor, int64_t b, int64_t i) {
  int64_t index[4] = {b, i / (tensor->shape[2] * tensor->shape[3]), i / tensor->shape[3] % tensor->shape[2],
                      i % tensor->shape[3]};
  int64_t offset = 0, stride = 1;
  for (int axis = 3; axis >= 0; axis--) {
    offset += index[axis] * (tensor->strides ? tensor->strides[axis] : stride);
    stride *= tensor->shape[axis];
  }
  return (char *)tensor->data + tensor->byte_offset + offset * (tensor->dtype.bits / 8);
}

static sh_status check_view(const struct tiny *tiny, const sh_view *view, const char *name, sh_error *error) {
  if (view == NULL || view->struct_size < sizeof(sh_view)) return fail(error, SH_INVALID_ARGUMENT, "%s: no view", name);
  const sh_tensor *tensor = &view->tensor;
  if (view->flags & ~SH_VIEW_READ_ONLY) return fail(error, SH_INVALID_ARGUMENT, "%s: unknown flags", name);
  if (tensor->device.device_type != SH_DEVICE_CPU) return fail(error, SH_UNSUPPORTED, "%s: not on the CPU", name);
  int wide = tensor->dtype.code == 2 && tensor->dtype.bits == 32;
  int narrow = (tensor->dtype.code == 2 || tensor->dtype.code == 4) && tensor->dtype.bits == 16;
  if (!(wide || narrow) || tensor->dtype.lanes != 1) return fail(error, SH_DTYPE_MISMATCH, "%s: dtype", name);
  if (tensor->ndim != 4 || tensor->shape == NULL || tensor->shape[0] != tiny->batch ||
      tensor->shape[1] != tiny->channels || tensor->shape[2] < 0 || tensor->shape[3] < 0)
    return fail(error, SH_SHAPE_MISMATCH, "%s: expected [%u, %u, h, w]", name, tiny->batch, tiny->channels);
  int64_t count = tensor->shape[0] * tensor->shape[1] * tensor->shape[2] * tensor->shape[3];
  if (count > 0 && tensor->data == NULL) return fail(error, SH_INVALID_ARGUMENT, "%s: data is NULL", name);
  return SH_OK;
}

/* ---- The instance -------------------------------------------------------------------------------------------------- */

static struct tiny *lock(const sh_plugin *plugin, const char *call, int legal, sh_error *error, sh_status *status) {
  static const char *const names[] = {"CREATED", "PREPARED", "RUNNING"};
  struct tiny *tiny = plugin->instance;
  if (atomic_flag_test_and_set(&tiny->busy)) {
    *status = fail(error, SH_BUSY, "%s: another call is in progress", call);
    return NULL;
  }
  if (!(legal & 1 << tiny->state)) {
    *status = fail(error, SH_INVALID_STATE, "%s in state %s", call, names[tiny->state]);
    atomic_flag_clear(&tiny->busy);
    return NULL;
  }
  *status = SH_OK;
  return tiny;
}

static void destroy(const sh_plugin *plugin) { free(plugin->instance); }

static sh_status prepare(const sh_plugin *plugin, const sh_model *model, sh_device device, sh_error *error) {
  sh_status status;
  struct tiny *tiny = lock(plugin, "prepare", 1 << CREATED | 1 << PREPARED, error, &status);
  if (tiny == NULL) return status;
  if (model == NULL || model->struct_size < sizeof(sh_model)) {
    status = fail(error, SH_INVALID_ARGUMENT, "no model");
  } else if (device.device_type != SH_DEVICE_CPU) {
    status = fail(error, SH_UNSUPPORTED, "tiny works on the CPU");
  } else {
    tiny->channels = model->latent_channels;
    tiny->state = PREPARED;
  }
  atomic_flag_clear(&tiny->busy);
  return status;
}

static sh_status needs(const sh_plugin *plugin, sh_needs *needs, sh_error *error) {
  sh_status status;
  struct tiny *tiny = lock(plugin, "needs", 1 << PREPARED | 1 << RUNNING, error, &status);
  if (tiny == NULL) return status;
  if (needs == NULL || needs->struct_size < sizeof(sh_needs)) {
    status = fail(error, SH_INVALID_ARGUMENT, "no needs");
  } else {
    needs->flags = 0;
    needs->tap = (sh_string){NULL, 0};
  }
  atomic_flag_clear(&tiny->busy);
  return status;
}

static sh_status begin(const sh_plugin *plugin, const sh_run *run, sh_error *error) {
  sh_status status;
  struct tiny *tiny = lock(plugin, "begin", 1 << PREPARED, error, &status);
  if (tiny == NULL) return status;
  if (run == NULL || run->struct_size < sizeof(sh_run) || run->steps == 0) {
    status = fail(error, SH_INVALID_ARGUMENT, "no run, or one without steps");
  } else {
    tiny->batch = run->batch;
    tiny->steps = run->steps;
    tiny->state = RUNNING;
  }
  atomic_flag_clear(&tiny->busy);
  return status;
}

/* Scales one item, or leaves it when a number would not be finite. */
static sh_item_report scale(float strength, const sh_tensor *from, const sh_tensor *to, int64_t b) {
  sh_item_report item = {SH_OK, NAN, NAN, 0};
  int64_t count = from->shape[1] * from->shape[2] * from->shape[3];
  double norm = 0;
  for (int64_t i = 0; i < count; i++) {
    char rounded[4];
    float before = load(from, at(from, b, i));
    store(to, rounded, before * strength);
    if (!isfinite(load(to, rounded))) item.status = SH_NON_FINITE;
    norm += pow((double)before * strength - before, 2);
  }
  if (item.status == SH_OK) item.correction_norm = (float)sqrt(norm);
  for (int64_t i = 0; i < count; i++) {
    char *source = at(from, b, i), *target = at(to, b, i);
    if (item.status == SH_OK) store(to, target, load(from, source) * strength);
    else memmove(target, source, from->dtype.bits / 8);
  }
  return item;
}

static sh_status step(const sh_plugin *plugin, const sh_step *step, const sh_view *latents, const sh_view *out,
                      sh_report *report, sh_error *error) {
  sh_status status;
  struct tiny *tiny = lock(plugin, "step", 1 << RUNNING, error, &status);
  if (tiny == NULL) return status;
  if (step == NULL || step->struct_size < sizeof(sh_step) || step->index >= step->count || step->count != tiny->steps)
    status = fail(error, SH_INVALID_ARGUMENT, "no step of this run");
  if (status == SH_OK && report != NULL && report->struct_size < sizeof(sh_report))
    status = fail(error, SH_INVALID_ARGUMENT, "report is too small");
  if (status == SH_OK) status = check_view(tiny, latents, "latents", error);
  if (status == SH_OK) status = check_view(tiny, out, "out", error);
  if (status == SH_OK && (latents->tensor.dtype.code != out->tensor.dtype.code ||
                          latents->tensor.dtype.bits != out->tensor.dtype.bits ||
                          memcmp(latents->tensor.shape, out->tensor.shape, 4 * sizeof(int64_t)) != 0))
    status = fail(error, SH_SHAPE_MISMATCH, "out differs from the latents");
  if (status == SH_OK && (out->flags & SH_VIEW_READ_ONLY)) status = fail(error, SH_INVALID_ARGUMENT, "out is read-only");
  if (status == SH_OK && tiny->host->cancelled(tiny->host)) status = fail(error, SH_CANCELLED, "the host cancelled");
  if (status == SH_OK) {
    for (uint32_t b = 0; b < tiny->batch; b++) {
      sh_item_report item = scale((float)tiny->strength, &latents->tensor, &out->tensor, b);
      if (report != NULL && report->items != NULL && b < report->item_count)
        memcpy((char *)report->items + (size_t)b * report->item_size, &item, sizeof(item));
    }
    if (report != NULL) {
      report->outcome = tiny->batch ? SH_CORRECTED : SH_SKIPPED_EMPTY;
      report->seconds = 0;
    }
  }
  atomic_flag_clear(&tiny->busy);
  return status;
}

static sh_status end(const sh_plugin *plugin, sh_error *error) {
  sh_status status;
  struct tiny *tiny = lock(plugin, "end", 1 << RUNNING, error, &status);
  if (tiny == NULL) return status;
  tiny->state = PREPARED;
  atomic_flag_clear(&tiny->busy);
  return status;
}

static uint64_t memory(const sh_plugin *plugin) { return plugin->instance ? sizeof(struct tiny) : 0; }

/* ---- Parameters ---------------------------------------------------------------------------------------------------- */

static uint32_t param_count(const sh_plugin *plugin) { return plugin->instance ? 1 : 0; }

static sh_status param_info(const sh_plugin *plugin, uint32_t index, sh_param *param, sh_error *error) {
  if (index >= param_count(plugin) || param == NULL || param->struct_size < sizeof(sh_param))
    return fail(error, SH_INVALID_ARGUMENT, "no parameter %u", index);
  *param = (sh_param){.struct_size = param->struct_size,
                      .kind = SH_PARAM_FLOAT,
                      .name = STRING("strength"),
                      .description = STRING("What the latents are multiplied by"),
                      .maximum = 4,
                      .default_value = 1,
                      .flags = SH_PARAM_LIVE};
  return SH_OK;
}

static sh_status param_get(const sh_plugin *plugin, uint32_t index, double *value, sh_error *error) {
  if (index >= param_count(plugin) || value == NULL) return fail(error, SH_INVALID_ARGUMENT, "no parameter %u", index);
  *value = ((struct tiny *)plugin->instance)->strength;
  return SH_OK;
}

static sh_status param_set(const sh_plugin *plugin, uint32_t index, double value, sh_error *error) {
  if (index >= param_count(plugin)) return fail(error, SH_INVALID_ARGUMENT, "no parameter %u", index);
  if (!(value >= 0 && value <= 4)) return fail(error, SH_INVALID_ARGUMENT, "strength is not between 0 and 4");
  ((struct tiny *)plugin->instance)->strength = value;
  return SH_OK;
}

static sh_string param_schema(const sh_plugin *plugin) {
  (void)plugin;
  return (sh_string)STRING("{\"type\":\"object\",\"properties\":{\"strength\":{\"type\":\"number\"}}}");
}

static const void *extension(const sh_plugin *plugin, sh_string id) {
  static const sh_plugin_params params = {sizeof(params), 0,         param_count, param_info,
                                          param_get,      param_set, param_schema};
  (void)plugin;
  return equals(id, SH_PLUGIN_PARAMS) ? &params : NULL;
}

/* ---- The library --------------------------------------------------------------------------------------------------- */

static const sh_descriptor *descriptor(uint32_t index) {
  static const sh_descriptor tiny = {.struct_size = sizeof(tiny),
                                     .id = STRING("tiny"),
                                     .name = STRING("Tiny"),
                                     .version = STRING("1.0.0"),
                                     .vendor = STRING("sampler-hook"),
                                     .description = STRING("Multiplies the latents by a number")};
  return index == 0 ? &tiny : NULL;
}

/* Takes an empty string or {"strength": number}. */
static int configure(sh_string config, double *strength) {
  char text[128], rest;
  if (config.size == 0) return 1;
  if (config.size >= sizeof(text)) return 0;
  memcpy(text, config.data, config.size);
  text[config.size] = 0;
  int used = 0;
  if (sscanf(text, " { \"strength\" : %lf }%n %c", strength, &used, &rest) != 1 || used == 0) return 0;
  return *strength >= 0 && *strength <= 4;
}

static sh_status create(sh_string id, const sh_host *host, sh_string config, const sh_plugin **plugin, sh_error *error) {
  double strength = 1;
  if (!equals(id, "tiny")) return fail(error, SH_NOT_FOUND, "no plugin %.*s", (int)id.size, id.data ? id.data : "");
  if (host == NULL || host->struct_size < sizeof(sh_host) || plugin == NULL)
    return fail(error, SH_INVALID_ARGUMENT, "no host, or nowhere to put the plugin");
  if (!configure(config, &strength)) return fail(error, SH_INVALID_CONFIG, "expected {\"strength\": 0 to 4}");
  struct tiny *tiny = calloc(1, sizeof(*tiny));
  if (tiny == NULL) return fail(error, SH_OUT_OF_MEMORY, "no memory for an instance");
  tiny->table = (sh_plugin){sizeof(sh_plugin), 0, tiny, destroy, prepare, needs, begin, step, end, memory, extension};
  tiny->host = host;
  atomic_flag_clear(&tiny->busy);
  tiny->strength = strength;
  host->log(host, SH_LOG_INFO, (sh_string)STRING("tiny: created"));
  *plugin = &tiny->table;
  return SH_OK;
}

const sh_entry *sampler_hook_entry(uint32_t abi_major);
const sh_entry *sampler_hook_entry(uint32_t abi_major) {
  static const sh_entry entry = {sizeof(entry), SH_ABI_MAJOR, SH_ABI_MINOR, 1, descriptor, create};
  return abi_major == SH_ABI_MAJOR ? &entry : NULL;
}
