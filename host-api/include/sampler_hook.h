/* sampler_hook.h - a stable C interface between hosts that sample diffusion models and plugins that hook into the steps.
 *
 * DRAFT 0.3: the layout may still change until 1.0, and a library only speaks to a host of the same major AND minor.
 *
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * This header is the specification. A host loads a plugin library, asks its one exported symbol for the entry, and then:
 *
 *     entry  = sampler_hook_entry(SH_ABI_MAJOR)             NULL: the library does not speak this major
 *     entry->create(id, host, config, &plugin, &error)      state CREATED
 *     plugin->prepare(plugin, &model, device, &error)       state PREPARED    (again outside a run: new weights)
 *     plugin->begin(plugin, &run, &error)                   state RUNNING     (host merges LoRA entries before or here)
 *       plugin->step(plugin, &step, in, out, &report, &error)   before every noise prediction
 *     plugin->end(plugin, &error)                           state PREPARED
 *     plugin->destroy(plugin)                               in any state, from any thread, not during another call
 *
 * The host must never unload a plugin library: it may own worker threads.
 *
 * Tags at the end of each function's comment
 *   thread  [main]     any thread, no other call on the same instance at the same time
 *           [sampler]  likewise; usually the thread that samples. Calls may move between threads.
 *           [any]      any thread at any time, also during another call
 *   state   the states in which the call is legal; elsewhere it returns SH_INVALID_STATE and changes nothing
 *
 * Rules
 *   - A function that returns sh_status returns SH_OK or fills *error (when error is not NULL) and changes nothing that
 *     the caller can see: a failed step leaves the latents as they were, and the host may sample on without correction.
 *   - Pointers passed to a function are borrowed until it returns, except `host`, which lives until destroy.
 *     What a function returns stays the property of who returned it; each comment says how long it is valid.
 *   - Every struct that starts with struct_size may grow at its end. The one who allocates it stores the size it knows;
 *     the other side reads and writes no further. A struct_size smaller than that of the first version is an error.
 *   - Strings are UTF-8 with a length, not NUL-terminated. {NULL, 0} is the empty string.
 *   - Reserved members are 0. Unknown flags are an error.
 *   - Extensions are optional on both sides: who asks for one that the other does not have gets NULL and goes without.
 *   - A plugin that catches a fault inside a call returns SH_PANIC; from then on every function of the instance that
 *     returns sh_status answers SH_POISONED, and nothing but destroy is of use.
 */
#ifndef SAMPLER_HOOK_H
#define SAMPLER_HOOK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SH_ABI_MAJOR 0
#define SH_ABI_MINOR 3
#define SH_ENTRY_SYMBOL "sampler_hook_entry"

/* ---- Status ------------------------------------------------------------------------------------------------------- */

/* Append-only: a code never changes its meaning. A reader treats codes it does not know as SH_INTERNAL. */
typedef int32_t sh_status;
#define SH_OK 0
#define SH_INVALID_ARGUMENT 1 /* null pointer, struct too small, unknown flag or constant, index out of range */
#define SH_INVALID_STATE 2    /* the call is not legal in the instance's state */
#define SH_BUSY 3             /* another call on this instance is in progress on another thread */
#define SH_INVALID_CONFIG 4   /* the configuration is not JSON, or has unknown keys or values out of range */
#define SH_UNSUPPORTED 5      /* understood, but not supported: flow prediction, extra U-Net inputs, a foreign device */
#define SH_NOT_FOUND 6        /* no such file, tap, parameter, plugin id */
#define SH_INVALID_DATA 7     /* a file does not hold what it should */
#define SH_SHAPE_MISMATCH 8   /* a view's shape does not fit the model, the run or another view */
#define SH_DTYPE_MISMATCH 9   /* a view's dtype is not f32, f16 or bf16, or differs from its partner's */
#define SH_NON_FINITE 10      /* NaN or infinity where numbers are needed */
#define SH_CANCELLED 11       /* the host's cancelled() said so */
#define SH_HOST_FAILED 12     /* a function of the host failed; the message carries the host's */
#define SH_OUT_OF_MEMORY 13
#define SH_INTERNAL 14        /* a fault that is not the caller's */
#define SH_PANIC 15           /* a fault was caught in this call; the instance is poisoned */
#define SH_POISONED 16        /* an earlier call ended in SH_PANIC; only destroy is left */

#define SH_ERROR_MESSAGE_SIZE 512

/* Owned by the caller, filled by the callee when a call fails. */
typedef struct sh_error {
  uint32_t struct_size;
  sh_status code;
  char message[SH_ERROR_MESSAGE_SIZE]; /* UTF-8, NUL-terminated, cut at a character when too long */
} sh_error;

/* ---- Strings and tensors ------------------------------------------------------------------------------------------ */

typedef struct sh_string {
  const char *data;
  uint64_t size; /* bytes */
} sh_string;

/* DLPack's structs, under their own names and layout. A host that uses dlpack.h includes it before this header. */
#ifndef DLPACK_DLPACK_H_
typedef struct DLDevice {
  int32_t device_type; /* kDLCPU = 1, kDLCUDA = 2 */
  int32_t device_id;
} DLDevice;

typedef struct DLDataType {
  uint8_t code; /* kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4 */
  uint8_t bits;
  uint16_t lanes; /* 1 */
} DLDataType;

typedef struct DLTensor {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL: row-major and contiguous */
  uint64_t byte_offset;
} DLTensor;
#endif

#define SH_DEVICE_CPU 1
#define SH_DEVICE_CUDA 2

#define SH_VIEW_READ_ONLY 1u

/* A borrowed tensor: f32, f16 or bf16, any strides and byte_offset. Element addresses must be aligned to the dtype. */
typedef struct sh_view {
  uint32_t struct_size;
  uint32_t flags; /* SH_VIEW_* */
  DLTensor tensor;
  void *stream; /* CUDA: the cudaStream_t on which the data is ready and results are expected; CPU: NULL */
} sh_view;

/* ---- The host ----------------------------------------------------------------------------------------------------- */

#define SH_LOG_ERROR 1
#define SH_LOG_WARN 2
#define SH_LOG_INFO 3
#define SH_LOG_DEBUG 4
#define SH_LOG_TRACE 5

typedef struct sh_host sh_host;
/* Given to create; it and everything it points to live until destroy. Every function is required. */
struct sh_host {
  uint32_t struct_size;
  uint32_t reserved;
  void *instance; /* the host's own */
  sh_string name;
  sh_string version;
  /* A message for the user; `level` is SH_LOG_*. [any] */
  void (*log)(const sh_host *host, int32_t level, sh_string message);
  /* Nonzero when the user wants the step in progress to stop; a step then returns SH_CANCELLED. [any] */
  int32_t (*cancelled)(const sh_host *host);
  /* The host extension of that id, valid until destroy, or NULL. [any] */
  const void *(*extension)(const sh_host *host, sh_string id);
};

/* ---- What is sampled ---------------------------------------------------------------------------------------------- */

#define SH_PREDICTION_EPSILON 1
#define SH_PREDICTION_V 2
#define SH_PREDICTION_FLOW 3 /* rectified flow; no alpha_bar: plugins that need one refuse it */

/* The diffusion model in use. */
typedef struct sh_model {
  uint32_t struct_size;
  int32_t prediction;        /* SH_PREDICTION_* */
  sh_string family;          /* "sd1", "sd2", or another name */
  uint32_t unet_in_channels; /* 4; 9 for inpainting models */
  uint32_t latent_channels;  /* 4 */
  const double *alphas_cumprod; /* by training timestep */
  uint64_t alphas_cumprod_count;
  sh_string unet_config;     /* the U-Net's config.json in diffusers' terms; empty when the host does not know it */
} sh_model;

/* The conditional text of each item of a batch of B. A member that the host does not have is NULL; plugins say in `needs`
 * what they cannot do without. Hooks never see the unconditional half of the guidance. */
typedef struct sh_text {
  uint32_t struct_size;
  uint32_t reserved;
  const sh_view *context;      /* [B, S, D] text encoder's last hidden state, after the final layer norm */
  const sh_view *pooled;       /* [B, D] that state at the end-of-text token, no projection */
  const int64_t *end_of_text;  /* B positions in the first chunk of S; instead of pooled */
  const sh_string *prompts;    /* B prompts */
} sh_text;

/* One sampling run. */
typedef struct sh_run {
  uint32_t struct_size;
  uint32_t batch; /* B; 0 is legal and makes every step a no-op */
  uint32_t steps; /* of the whole schedule, at least 1 */
  uint32_t reserved;
  double guidance_scale;
  const sh_text *text; /* NULL: the host has no text to show */
} sh_run;

#define SH_SPACE_VP 1 /* latents are z, variance-preserving: z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise */
#define SH_SPACE_VE 2 /* latents are x = z / sqrt(alpha_bar): k-diffusion's sigma space */

/* The host adds inputs to the U-Net that a plugin's own U-Net cannot see (ControlNet, IP-Adapter, ...). */
#define SH_STEP_EXTRA_INPUTS 1u

/* One step of a run. */
typedef struct sh_step {
  uint32_t struct_size;
  uint32_t index;          /* 0 .. count - 1; a run that starts within the schedule (from a noised image) begins above 0 */
  uint32_t count;          /* steps of the whole schedule, as in sh_run.steps */
  uint32_t sub_evaluation; /* 0 for the first noise prediction of the step, 1, 2, ... for those that samplers add */
  double timestep;         /* training timestep, may be fractional */
  double alpha_bar;        /* cumulative alpha at that timestep, in [0, 1]; in SH_SPACE_VE above 0 */
  int32_t space;           /* SH_SPACE_* */
  uint32_t flags;          /* SH_STEP_* */
  const sh_text *text;     /* replaces the run's text for this step (prompt schedules); NULL: the run's */
} sh_step;

/* What happened to one item of the batch. */
typedef struct sh_item_report {
  sh_status status;      /* SH_OK, or why this item was left as it was */
  float score;           /* before the correction; NaN when it was not computed */
  float gradient_norm;   /* L2 norm of the score's gradient over the item's latents (VP); NaN when not computed */
  float correction_norm; /* L2 norm of what was added to the item's latents (VP); 0 when nothing was */
} sh_item_report;

#define SH_CORRECTED 1              /* at least one item was corrected */
#define SH_SKIPPED_STRENGTH 2       /* the strength is zero */
#define SH_SKIPPED_RANGE 3          /* outside the share of steps that is corrected */
#define SH_SKIPPED_INTERVAL 4       /* between two corrected steps */
#define SH_SKIPPED_SUB_EVALUATION 5 /* only the first evaluation of a step is corrected */
#define SH_SKIPPED_EMPTY 6          /* batch 0 */

/* Owned by the caller. The caller sets struct_size, item_size, item_count and items. */
typedef struct sh_report {
  uint32_t struct_size;
  uint32_t item_size;   /* sizeof(sh_item_report) as the caller knows it: the distance between items */
  sh_item_report *items; /* NULL or room for item_count; the first min(B, item_count) are filled */
  uint64_t item_count;
  double seconds;       /* spent in the plugin, host functions included */
  int32_t outcome;      /* SH_CORRECTED or SH_SKIPPED_* */
  uint32_t reserved;
} sh_report;

/* ---- The plugin --------------------------------------------------------------------------------------------------- */

#define SH_NEEDS_GRADIENT 1u    /* the host extension SH_HOST_GRADIENT */
#define SH_NEEDS_CONTEXT 2u     /* sh_text.context */
#define SH_NEEDS_POOLED 4u      /* sh_text.pooled, or context and end_of_text */
#define SH_NEEDS_WEIGHTS 8u     /* the host extension SH_HOST_WEIGHTS */

/* Owned by the caller, who sets struct_size; filled by the plugin. */
typedef struct sh_needs {
  uint32_t struct_size;
  uint32_t flags; /* SH_NEEDS_* */
  sh_string tap;  /* the U-Net block whose output is used, "mid", "up1", ...; valid until the next prepare or destroy */
} sh_needs;

typedef struct sh_plugin sh_plugin;
/* One instance. Every function is required. */
struct sh_plugin {
  uint32_t struct_size;
  uint32_t reserved;
  void *instance; /* the plugin's own */
  /* Ends the instance and frees what it owns; `plugin` is invalid afterwards. [main] any state, POISONED too */
  void (*destroy)(const sh_plugin *plugin);
  /* Fits the plugin to a model; loads what it needs; `device` is where the latents will be. May be called again.
   * [main] CREATED, PREPARED */
  sh_status (*prepare)(const sh_plugin *plugin, const sh_model *model, DLDevice device, sh_error *error);
  /* What begin and step will ask of the host. [main] PREPARED, RUNNING */
  sh_status (*needs)(const sh_plugin *plugin, sh_needs *needs, sh_error *error);
  /* Starts a run. [main] PREPARED */
  sh_status (*begin)(const sh_plugin *plugin, const sh_run *run, sh_error *error);
  /* Reads the latents [B, C, h, w] before a noise prediction and writes them, corrected, to `out`, which has the same
   * shape, dtype and device and is either the very same memory or does not overlap. When the outcome is SH_SKIPPED_*,
   * `out` holds the input bit for bit. An item that is not finite is left as it was, with its own status, while the
   * others are corrected; when no item could be, the call fails. `report` may be NULL; a call that fails leaves it alone.
   * [sampler] RUNNING */
  sh_status (*step)(const sh_plugin *plugin, const sh_step *step, const sh_view *latents, const sh_view *out,
                    sh_report *report, sh_error *error);
  /* Ends the run, finished or not. [main] RUNNING */
  sh_status (*end)(const sh_plugin *plugin, sh_error *error);
  /* Bytes of weights that the instance holds now. [main] any state but POISONED, which gives 0 */
  uint64_t (*memory)(const sh_plugin *plugin);
  /* The plugin extension of that id, valid until destroy, or NULL. [any] */
  const void *(*extension)(const sh_plugin *plugin, sh_string id);
};

/* Describes one plugin of a library; lives as long as the library. */
typedef struct sh_descriptor {
  uint32_t struct_size;
  uint32_t reserved;
  sh_string id;      /* stable: "dpt" */
  sh_string name;    /* for people */
  sh_string version;
  sh_string vendor;
  sh_string description;
} sh_descriptor;

/* The library. Lives as long as it; never freed. */
typedef struct sh_entry {
  uint32_t struct_size;
  uint32_t abi_major;
  uint32_t abi_minor;
  uint32_t plugin_count;
  /* NULL when index >= plugin_count. [any] */
  const sh_descriptor *(*descriptor)(uint32_t index);
  /* Creates an instance of the plugin `id`; `config` is a JSON object or empty. *plugin is set only on SH_OK. [any] */
  sh_status (*create)(sh_string id, const sh_host *host, sh_string config, const sh_plugin **plugin, sh_error *error);
} sh_entry;

/* The one symbol that a plugin library exports. NULL when it does not speak abi_major. [any] */
typedef const sh_entry *(*sh_entry_fn)(uint32_t abi_major);

/* ==== Plugin extensions ============================================================================================ */

/* Low-rank weights that belong to the plugin. The host merges them into its own model when a run begins and takes them out
 * from a kept copy when it ends: W + strength * scale * up @ down. */
#define SH_PLUGIN_LORA "sampler-hook.lora/1"

#define SH_LORA_PEFT 1  /* unet.<module>.lora_A.weight, lora_B.weight; alpha in the header's lora_adapter_metadata */
#define SH_LORA_KOHYA 2 /* lora_unet_<module with _ for .>.lora_down.weight, lora_up.weight, alpha */

/* Owned by the caller, who sets struct_size. */
typedef struct sh_lora_entry {
  uint32_t struct_size;
  uint32_t rank;
  sh_string module;    /* diffusers path: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"; valid until destroy */
  const sh_view *down; /* [rank, in], f32, on the CPU, contiguous; valid until destroy */
  const sh_view *up;   /* [out, rank], likewise */
  double scale;        /* alpha / rank, or 1 */
} sh_lora_entry;

typedef struct sh_plugin_lora {
  uint32_t struct_size;
  uint32_t reserved;
  /* Number of entries; 0 when the plugin brings no LoRA. [any] */
  uint64_t (*count)(const sh_plugin *plugin);
  /* [any] any state but POISONED */
  sh_status (*entry)(const sh_plugin *plugin, uint64_t index, sh_lora_entry *entry, sh_error *error);
  /* Adds strength * scale * up @ down to `weight` [out, in] in place, for hosts without a matrix product at hand. The sum
   * is formed in f32 and rounded once. Keep a copy: subtracting does not restore the bits. [any] any state but POISONED */
  sh_status (*merge)(const sh_plugin *plugin, uint64_t index, double strength, const sh_view *weight, sh_error *error);
  /* Writes all entries as a safetensors file in `layout` (SH_LORA_*), for hosts that load LoRA by path. The file appears
   * whole or not at all. [any] any state but POISONED */
  sh_status (*write)(const sh_plugin *plugin, sh_string path, int32_t layout, sh_error *error);
} sh_plugin_lora;

/* Parameters that a user may turn. A UI builds its controls from them. */
#define SH_PLUGIN_PARAMS "sampler-hook.params/1"

#define SH_PARAM_FLOAT 1
#define SH_PARAM_INTEGER 2
#define SH_PARAM_BOOLEAN 3 /* 0 or 1 */
#define SH_PARAM_CHOICE 4  /* 0 .. choice_count - 1 */

#define SH_PARAM_LIVE 1u /* may change during a run; others only before prepare */

/* Owned by the caller, who sets struct_size. Strings are valid until destroy. */
typedef struct sh_param {
  uint32_t struct_size;
  int32_t kind; /* SH_PARAM_FLOAT ... SH_PARAM_CHOICE */
  sh_string name; /* the key in the configuration */
  sh_string description;
  sh_string unit; /* "" when it has none */
  double minimum;
  double maximum;
  double default_value;
  uint32_t flags; /* SH_PARAM_LIVE */
  uint32_t choice_count;
  const sh_string *choices;
} sh_param;

typedef struct sh_plugin_params {
  uint32_t struct_size;
  uint32_t reserved;
  /* [any] */
  uint32_t (*count)(const sh_plugin *plugin);
  /* [any] any state but POISONED */
  sh_status (*info)(const sh_plugin *plugin, uint32_t index, sh_param *param, sh_error *error);
  /* [any] any state but POISONED */
  sh_status (*get)(const sh_plugin *plugin, uint32_t index, double *value, sh_error *error);
  /* Takes effect at the next step; out of range, not a whole number, or not finite: SH_INVALID_ARGUMENT. Without
   * SH_PARAM_LIVE only in state CREATED. [any] any state but POISONED */
  sh_status (*set)(const sh_plugin *plugin, uint32_t index, double value, sh_error *error);
  /* JSON schema of the configuration that create takes; valid until destroy. [any] */
  sh_string (*schema)(const sh_plugin *plugin);
} sh_plugin_params;

/* The two halves of a step, for hosts that compute features and gradient themselves, with an autograd of their own:
 *
 *     score(step, NULL, NULL, &report)            report.outcome: is this step corrected at all?
 *     score(step, activation, cotangent, &report) features in; scores and their gradient for the features out
 *     ... the host's own backward pass turns the cotangent into the gradient for the latents ...
 *     apply(step, latents, gradient, out, &report)
 *
 * They give what `step` gives with SH_HOST_GRADIENT. Neither remembers anything of the other; `step` itself needs a gradient
 * source and may answer SH_UNSUPPORTED when the plugin is configured for this extension. */
#define SH_PLUGIN_SPLIT "sampler-hook.split/1"

typedef struct sh_plugin_split {
  uint32_t struct_size;
  uint32_t reserved;
  /* The activation [B, C, h, w] of the block that `needs` names, for the latents of this step in VP space with the conditional
   * text, or NULL to be told the outcome alone. Writes the gradient of each item's score for its features to `cotangent`, of
   * the same shape, when the outcome is SH_CORRECTED; otherwise, and when cotangent is NULL, only scores are computed where
   * the plugin was asked to monitor them. An item that is not finite has its own status and the cotangent 0. A call that fails
   * leaves cotangent and report alone. [sampler] RUNNING */
  sh_status (*score)(const sh_plugin *plugin, const sh_step *step, const sh_view *activation, const sh_view *cotangent,
                     sh_report *report, sh_error *error);
  /* As `step`, with the gradient [B, C, h, w] of the scores for the latents in VP space, whatever the step's space is. The
   * report has no scores. [sampler] RUNNING */
  sh_status (*apply)(const sh_plugin *plugin, const sh_step *step, const sh_view *latents, const sh_view *gradient,
                     const sh_view *out, sh_report *report, sh_error *error);
} sh_plugin_split;

/* ==== Host extensions ============================================================================================== */

/* The host's own U-Net, up to a block's output and back: no second U-Net in memory, and the host's patches count. */
#define SH_HOST_GRADIENT "sampler-hook.gradient/1"

typedef struct sh_host_gradient {
  uint32_t struct_size;
  uint32_t reserved;
  /* The output [B, C, h, w] of block `tap` for the latents [B, c, H, W] of this step, in VP space whatever the step's space
   * is, with the conditional text only. *activation (caller sets struct_size) is valid until vjp or release. May fail.
   * Called inside step, on its thread. [sampler] */
  sh_status (*features)(const sh_host *host, const sh_step *step, const sh_view *latents, sh_string tap,
                        sh_view *activation, sh_error *error);
  /* The vector-Jacobian product of the last features call: writes the gradient of sum(cotangent * activation) with respect
   * to the latents to `gradient` [B, c, H, W]. Ends the activation's life, also when it fails. [sampler] */
  sh_status (*vjp)(const sh_host *host, const sh_view *cotangent, const sh_view *gradient, sh_error *error);
  /* Drops the last activation without a vjp; nothing when there is none. [sampler] */
  void (*release)(const sh_host *host);
} sh_host_gradient;

/* The host's U-Net weights as they are when it samples, its own LoRAs and patches and the plugin's merged LoRA included: a
 * plugin's own U-Net then sees them and needs no file. Functions are called inside prepare, begin and step, on that thread. */
#define SH_HOST_WEIGHTS "sampler-hook.weights/1"

typedef struct sh_host_weights {
  uint32_t struct_size;
  uint32_t reserved;
  /* Another number whenever a tensor has changed; asked at begin and before every step. [main, sampler] */
  uint64_t (*revision)(const sh_host *host);
  /* Number of tensors. [main, sampler] */
  uint64_t (*count)(const sh_host *host);
  /* The diffusers name of a tensor, such as "conv_in.weight", to *name; valid until destroy. May fail. [main, sampler] */
  sh_status (*name)(const sh_host *host, uint64_t index, sh_string *name, sh_error *error);
  /* A tensor, f32, f16 or bf16. *tensor (caller sets struct_size) is valid until the next call of this function or until the
   * plugin's function returns, whichever is first; NULL: only *revision is asked for. *revision is another number whenever
   * this tensor has changed. May fail. [main, sampler] */
  sh_status (*tensor)(const sh_host *host, uint64_t index, sh_view *tensor, uint64_t *revision, sh_error *error);
} sh_host_weights;

/* Shows a user what takes its time. */
#define SH_HOST_PROGRESS "sampler-hook.progress/1"

typedef struct sh_host_progress {
  uint32_t struct_size;
  uint32_t reserved;
  /* `done` parts of `total` of a task are finished; `task` is for people. A task ends with done == total, or with its call.
   * [any] */
  void (*progress)(const sh_host *host, sh_string task, uint64_t done, uint64_t total);
} sh_host_progress;

#ifdef __cplusplus
}
#endif

#endif /* SAMPLER_HOOK_H */
