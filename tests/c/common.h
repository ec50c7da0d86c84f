/* What the hosts of these tests share. */
#ifndef COMMON_H
#define COMMON_H

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sampler_hook.h"

static inline void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

static inline sh_string string(const char *text) { return (sh_string){text, strlen(text)}; }

static inline int equals(sh_string string, const char *text) {
  return string.size == strlen(text) && memcmp(string.data, text, string.size) == 0;
}

static inline sh_entry_fn open_library(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void *symbol = library != NULL ? dlsym(library, SH_ENTRY_SYMBOL) : NULL;
  sh_entry_fn entry;
  expect(symbol != NULL, symbol != NULL ? path : dlerror());
  memcpy(&entry, &symbol, sizeof(entry));
  return entry;
}

/* A contiguous f32 view in main memory. */
static inline sh_view view_of(float *values, int32_t ndim, int64_t *shape, uint32_t flags) {
  return (sh_view){sizeof(sh_view), flags, {values, {SH_DEVICE_CPU, 0}, ndim, {SH_DTYPE_FLOAT, 32, 1}, shape, NULL, 0}, NULL};
}

static inline void host_log(const sh_host *host, int32_t level, sh_string message) {
  (void)host;
  printf("log %d: %.*s\n", level, (int)message.size, message.data ? message.data : "");
}

#endif
