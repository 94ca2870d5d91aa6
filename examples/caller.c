/* The kernels from C: perturb bfloat16 weights, restore them, update the exact ones. From a checkout, after make build:
 *
 *   gcc -I csrc examples/caller.c es_kernels/libes_cpu.so -Wl,-rpath,es_kernels -o caller && ./caller
 *
 * Of an installed package, python -c "import es_kernels; print(es_kernels.__path__[0])" is the folder of the library,
 * with the header in its include/. */
#include <stdio.h>
#include <stdlib.h>

#include "es_kernels.h"

enum { N = 1003 };

static float exact[N];   /* the weights */
static uint16_t live[N]; /* what a model computes with: bfloat16 */

/* out <- round(base + noise) over a whole tensor of N elements, whose name gives the stream (NOISE.md) */
static EsSegment whole(void* out, int out_dtype) {
  EsSegment s = {.out = (uint64_t)out, .base = (uint64_t)exact, .rows = 1, .cols = N, .out_dtype = out_dtype};
  s.base_dtype = ES_F32;
  s.stream = 0x84e02e3edc717246; /* of the name "weight" */
  s.units_per_row = s.unit_end = (N + 7) / 8;
  return s;
}

static void check(int status) {
  if (status) fprintf(stderr, "%s\n", es_cpu_error()), exit(1);
}

static void add_noise(EsSegment s, int n_seeds, const uint64_t* seeds, const float* coefs, const char* what) {
  uint64_t fingerprint;
  check(es_cpu_add_noise(&s, 1, seeds, coefs, n_seeds, 0, NULL, 0, 1, NULL));
  check(es_cpu_fingerprint(&s, 1, &fingerprint, 1, NULL));
  printf("%s %016llx\n", what, (unsigned long long)fingerprint);
}

int main(void) {
  if (es_cpu_abi() != ES_ABI) return fprintf(stderr, "the library has another ABI than the header\n"), 1;
  for (int i = 0; i < N; i++) exact[i] = (i - 500) / 1024.0f;
  uint64_t seeds[] = {7, 8, 9};
  float sigma = 0.01f, coefs[] = {0.25f, -0.5f, 0.125f};
  add_noise(whole(live, ES_BF16), 1, seeds, &sigma, "perturbed");
  add_noise(whole(live, ES_BF16), 0, NULL, NULL, "restored");
  add_noise(whole(exact, ES_F32), 3, seeds, coefs, "updated");
  printf("weight[0] = %a\n", exact[0]);
  return 0;
}
