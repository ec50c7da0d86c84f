/* Does on purpose what the sanitizers are there to find: a check of the checks. */
#include <limits.h>
#include <stdlib.h>
#include <string.h>

int main(int argc, char **argv) {
  char *volatile memory = malloc(8);
  volatile int number = INT_MAX;
  if (argc != 2 || memory == NULL) return 2;
  if (strcmp(argv[1], "overflow") == 0) memory[8] = 1;
  if (strcmp(argv[1], "undefined") == 0) number = number + 1;
  if (strcmp(argv[1], "leak") != 0) free(memory);
  memory = NULL;
  return 0;
}
